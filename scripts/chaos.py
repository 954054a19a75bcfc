"""Kill processes of runs at random moments, go on with the runs, and compare with one that nobody disturbed.

Each run is killed once or several times (SIGKILL): its client, which holds the scheduler; one of its workers; with
--separate also the scheduler, and the nannies of workers, which are processes of their own then. The same command
is given again until it ends. Then

- every file of the result has the bytes of the undisturbed run, and no other file is there,
- no partition, later phase of one, or output shard that was finished at the kill was done again,
- counts are the same, and `imgcurate verify` finds nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from imgcurate.demo import make_demo_shards
from imgcurate.verification import verify_run

_ATTEMPTS = 12
_LIMIT_S = 600.0
_POLL_S = 0.02
_PHASE = re.compile(r"^(.+): ([\d,]+) of ([\d,]+)$", re.MULTILINE)
_IMAGES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"})


@dataclass
class Attempt:
    """One execution of the command.

    Attributes
    ----------
    killed : str
        Whom, and when; "" if nobody.
    code : int
        Exit code of the client; negative: by a signal.
    phases : dict of str to int
        How many tasks each phase had.
    errors : list of str
        What went wrong but for being killed.
    """

    killed: str = ""
    code: int = 0
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0
    first_file_s: float = 0.0
    pieces: int = 0
    phases: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Moment:
    """When something is killed.

    Attributes
    ----------
    pieces : int
        Not before so many pieces of work are finished: parts, what later phases set in them, output shards.
    pause_s : float
        Then so much later.
    """

    pieces: int
    pause_s: float


@dataclass
class Lab:
    """Where runs are made, and how."""

    folder: Path
    inputs: Path
    options: list[str]
    workers: int
    separate: bool
    random: random.Random
    shards: int = 0
    started: list[psutil.Process] = field(default_factory=list)

    def command(self, out: Path, scheduler: Path | None) -> list[str]:
        where = ["--scheduler", str(scheduler)] if scheduler else ["--workers", str(self.workers)]
        return [sys.executable, "-m", "imgcurate", "curate", str(self.inputs / "*.tar"), "-o", str(out),
                *self.options, *where]  # fmt: skip

    def start(self, command: Sequence[str], **streams: object) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, **streams)  # type: ignore[call-overload]
        self.started.append(psutil.Process(process.pid))
        return process

    def family(self) -> list[psutil.Process]:
        """Return what was started and is alive, and all that came of it."""
        alive: dict[int, psutil.Process] = {}
        for process in self.started:
            with contextlib.suppress(psutil.Error):
                for each in (process, *process.children(recursive=True)):
                    if each.is_running() and each.status() != psutil.STATUS_ZOMBIE:
                        alive[each.pid] = each
        self.started = list(alive.values())
        return self.started

    def end_all(self) -> None:
        """Kill what is left of what was started."""
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(self.started, timeout=10)
        self.started = []

    @contextlib.contextmanager
    def cluster(self) -> Iterator[Path | None]:
        """Yield the file of a scheduler with workers, each with a nanny, if they are to be processes of their own."""
        if not self.separate:
            yield None
            return
        file = self.folder / "scheduler.json"
        file.unlink(missing_ok=True)
        dask = [sys.executable, "-m", "dask"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        where = ["--host", "127.0.0.1", "--scheduler-file", str(file), "--no-dashboard"]
        self.start([*dask, "scheduler", "--port", "0", *where], **quiet)
        _wait_until(file.is_file, "the scheduler")
        for _ in range(self.workers):
            local = ["--local-directory", str(self.folder / "dask"), "--host", "127.0.0.1", "--no-dashboard"]
            self.start([*dask, "worker", "--scheduler-file", str(file), "--nthreads", "1", *local], **quiet)
        _wait_until(lambda: len(self._roles(None).get("worker", [])) == self.workers, "the workers")
        time.sleep(3)
        yield file

    def _roles(self, client: subprocess.Popen[bytes] | None) -> dict[str, list[psutil.Process]]:
        """Return the processes by what they are."""
        roles: dict[str, list[psutil.Process]] = {}
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if client is not None and process.pid == client.pid:
                    role = "client"
                elif " dask scheduler" in line:
                    role = "scheduler"
                elif " dask worker" in line:
                    role = "nanny"
                elif "multiprocessing.spawn" in line or "multiprocessing-fork" in line:
                    role = "worker"
                else:
                    continue
                roles.setdefault(role, []).append(process)
        return roles

    def attempt(self, out: Path, kills: Sequence[Moment]) -> Attempt:
        """Run the command once, and kill something at each of the moments."""
        done = Attempt()
        with self.cluster() as scheduler, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            before = _state(out)
            start = time.monotonic()
            client = self.start(self.command(out, scheduler), stdout=stdout, stderr=stderr)
            watch = _Watch(out, before, self.shards)
            killed = []
            for moment in kills:
                watch.until(client, start, moment, done)
                if client.poll() is not None:
                    break
                role, victim = self._victim(client)
                with contextlib.suppress(psutil.Error):
                    victim.kill()
                    killed.append(f"{role} {time.monotonic() - start:.1f}s")
                if role == "client":
                    break
            watch.until(client, start, Moment(0, _LIMIT_S), done)
            done.pieces = watch.most
            if client.poll() is None:
                done.errors.append(f"does not end in {_LIMIT_S:.0f} s")
                client.kill()
            done.code = client.wait()
            done.killed, done.seconds = ", ".join(killed), time.monotonic() - start
            for name, file in (("stdout", stdout), ("stderr", stderr)):
                file.seek(0)
                setattr(done, name, file.read().decode("utf-8", "replace"))
            done.phases = {phase: int(total.replace(",", "")) for phase, _, total in _PHASE.findall(done.stderr)}
            done.errors += watch.again
            if done.code == 0 or self.separate:
                self.end_all()
        return done

    def _victim(self, client: subprocess.Popen[bytes]) -> tuple[str, psutil.Process]:
        roles = self._roles(client)
        role = self.random.choice(sorted(roles))
        return role, self.random.choice(roles[role])


class _Watch:
    """Looks at the files of a run as it goes on: what was finished before must not be written again.

    Parts of the catalog are written once more when all output shards are there, as the last step.
    """

    def __init__(self, out: Path, before: dict[str, tuple[int, int]], shards: int) -> None:
        self._out, self._before, self._shards = out, before, shards
        self.again: list[str] = []
        self.most = 0

    def until(self, client: subprocess.Popen[bytes], start: float, moment: Moment, done: Attempt) -> None:
        """Look until the client ends, or a moment has come."""
        begun = None
        while client.poll() is None and time.monotonic() - start < _LIMIT_S:
            now = time.monotonic()
            pieces = self._look()
            self.most = max(self.most, pieces)
            if not done.first_file_s and (self._out / "manifest.json").exists():
                done.first_file_s = now - start
            if begun is None and done.first_file_s and pieces >= moment.pieces:
                begun = now
            if begun is not None and now - begun >= moment.pause_s:
                return
            time.sleep(_POLL_S)

    def _look(self) -> int:
        there = _state(self._out)
        for name, state in there.items():
            if name not in self._before or self._before[name] == state:
                continue
            del self._before[name]
            finishing = name.startswith("catalog/") and self._exported()
            if not finishing:
                self.again.append(f"{name} was there and was written again")
        return len(there)

    def _exported(self) -> bool:
        return len(list((self._out / "shards").glob("*.parquet"))) == self._shards


def _state(out: Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of all finished pieces of work; an output shard is finished when its sidecar is there."""
    found = {}
    for pattern in ("catalog/part-*.parquet", "checkpoint/[0-9]*/part-*.parquet", "shards/*.parquet", "shards/*.tar"):
        # Folders come and go meanwhile.
        with contextlib.suppress(OSError):
            for path in out.glob(pattern):
                if path.suffix == ".tar" and not path.with_suffix(".parquet").exists():
                    continue
                status = path.stat()
                found[str(path.relative_to(out))] = (status.st_ino, status.st_mtime_ns)
    return found


def _wait_until(there: object, what: str, limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not there():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise SystemExit(f"chaos: {what} did not come up in {limit_s:.0f} s")
        time.sleep(0.1)


def contents(out: Path) -> dict[str, bytes | dict[str, object]]:
    """Return all files of a run; the manifest without what differs from run to run."""
    files: dict[str, bytes | dict[str, object]] = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        files[str(path.relative_to(out))] = path.read_bytes()
    manifest = json.loads(files.get("manifest.json", b"{}"))
    for measured in ("timings_s", "timeline"):
        manifest.pop(measured, None)
    files["manifest.json"] = manifest
    return files


def compare(out: Path, expected: dict[str, bytes | dict[str, object]]) -> list[str]:
    """Return how a run differs from the undisturbed one."""
    found = contents(out)
    errors = [f"{name} is missing" for name in sorted({*expected} - {*found})]
    errors += [f"{name} is left over" for name in sorted({*found} - {*expected})]
    errors += [f"{name} differs" for name in sorted({*expected} & {*found}) if expected[name] != found[name]]
    errors += [f"{p.name}/ is left over" for p in out.iterdir() if p.is_dir() and not any(p.iterdir())]
    return errors


def disturb(lab: Lab, out: Path, expected: Attempt, n_parts: int) -> tuple[list[Attempt], list[str]]:
    """Make a run that is disturbed, until it is done; return what happened, and what is wrong."""
    attempts: list[Attempt] = []
    errors: list[str] = []
    disturbed = lab.random.choice((1, 1, 2, 3))
    for number in range(_ATTEMPTS):
        n_kills = lab.random.choice((1, 1, 2)) if number < disturbed else 0
        there = len(list((out / "catalog").glob("part-*.parquet")))
        orphans = bool(lab.family())
        done = lab.attempt(out, _moments(lab, n_kills, len(_state(out)), expected))
        attempts.append(done)
        errors += done.errors
        if "read" in done.phases and not orphans and done.phases["read"] > n_parts - there:
            errors.append(f"read {done.phases['read']} partitions of {n_parts}, of which {there} were there")
        if done.code == 0:
            break
        if not done.killed:
            errors.append(f"ended with exit code {done.code}: {done.stderr.strip().splitlines()[-1:]}")
            break
        if "Traceback" in done.stderr:
            # Ugly, and no fault of the result.
            print(f"     NOISE: a traceback of {len(done.stderr.splitlines())} lines after {done.killed}", flush=True)
    else:
        errors.append(f"was not done after {_ATTEMPTS} attempts")
    lab.end_all()
    if attempts[-1].stdout != expected.stdout:
        errors.append(f"says {attempts[-1].stdout.strip()!r}")
    return attempts, errors


def _moments(lab: Lab, n: int, there: int, expected: Attempt) -> list[Moment]:
    """Draw moments: half of them by the work that is finished, so that all phases are met however fast they are."""
    work_s = expected.seconds - expected.first_file_s
    moments = []
    for _ in range(n):
        if lab.random.random() < 0.5:
            moments.append(Moment(0, lab.random.uniform(0, work_s / n)))
        else:
            moments.append(
                Moment(lab.random.randint(min(there, expected.pieces), expected.pieces), lab.random.uniform(0, 0.5))
            )
    return moments


def verify(out: Path) -> list[str]:
    """Return what `imgcurate verify` finds."""
    return [p.line() for p in verify_run(str(out)).problems]


def make_inputs(folder: Path, n_shards: int, photos: Path | None) -> None:
    """Write the demo's samples, or photos of a folder, as so many tars."""
    samples: dict[str, list[tuple[str, bytes]]] = {}
    if photos is not None:
        for path in sorted(p for p in photos.rglob("*") if p.suffix.lower() in _IMAGES):
            key = f"{len(samples):06d}"
            samples[key] = [(f"{key}{path.suffix.lower()}", path.read_bytes()), (f"{key}.txt", path.name.encode())]
    else:
        with tempfile.TemporaryDirectory() as temporary:
            make_demo_shards(Path(temporary))
            for path in sorted(Path(temporary).glob("*.tar"))[:-1]:
                with tarfile.open(path) as tar:
                    for member in tar:
                        key = member.name.split(".", 1)[0]
                        samples.setdefault(key, []).append((member.name, tar.extractfile(member).read()))  # type: ignore[union-attr]
    if not samples:
        raise SystemExit(f"chaos: no image in {photos}")
    folder.mkdir(parents=True)
    keys = list(samples)
    for shard in range(n_shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for name, data in (member for key in keys[shard::n_shards] for member in samples[key]):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def main() -> int:
    """Run it; 1 if a run is not as the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for inputs and runs; must be new")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--shards", type=int, default=12, help="input shards, a partition each")
    parser.add_argument("--photos", type=Path, help="folder of images to take instead of the demo's photos")
    parser.add_argument("--separate", action="store_true", help="scheduler and workers as processes of their own")
    parser.add_argument("--images-per-tar", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help="keep the folders of runs that were fine")
    given = parser.parse_args()
    if given.output.exists() and any(given.output.iterdir()):
        parser.error(f"{given.output} is not empty: name a new folder")
    given.output.mkdir(parents=True, exist_ok=True)
    folder = given.output.resolve()
    make_inputs(folder / "in", given.shards, given.photos)
    options = ["--encoder", "tiny-image", "--eps", "0.02", "--exact-dedup", "--quality", "width=1:",
               "--images-per-tar", str(given.images_per_tar)]  # fmt: skip
    lab = Lab(folder, folder / "in", options, given.workers, given.separate, random.Random(given.seed))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        return _experiment(lab, given.runs, given.shards, keep=given.keep)
    finally:
        lab.end_all()


def _experiment(lab: Lab, n_runs: int, n_parts: int, *, keep: bool) -> int:
    undisturbed = lab.attempt(lab.folder / "undisturbed", [])
    if undisturbed.code:
        print(f"chaos: the undisturbed run failed:\n{undisturbed.stderr}", file=sys.stderr)
        return 1
    expected = contents(lab.folder / "undisturbed")
    lab.shards = sum(name.startswith("shards/") and name.endswith(".parquet") for name in expected)
    print(
        f"undisturbed: {undisturbed.stdout.strip()} in {undisturbed.seconds:.1f} s, {len(expected)} files", flush=True
    )
    print("run  attempts  seconds  killed", flush=True)
    failed = 0
    for number in range(n_runs):
        out = lab.folder / f"run-{number:03d}"
        attempts, errors = disturb(lab, out, undisturbed, n_parts)
        if not errors:
            errors = compare(out, expected) + verify(out)
        killed = " | ".join(a.killed or "nobody" for a in attempts)
        print(f"{number:3d}  {len(attempts):8d}  {sum(a.seconds for a in attempts):7.1f}  {killed}", flush=True)
        for error in errors:
            print(f"     WRONG: {error}", flush=True)
        failed += bool(errors)
        if not errors and not keep:
            shutil.rmtree(out)
    print(f"{n_runs - failed} of {n_runs} runs are as the undisturbed one", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
