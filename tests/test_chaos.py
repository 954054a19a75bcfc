"""Runs that are killed, whose disk is full, whose store is gone for a while, whose clock jumps: all end alike."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client
from servers import Server
from test_pipeline import tiny_pipeline
from test_s3 import moto, s3  # noqa: F401 - fixtures

from imgcurate import SemanticDedupStage
from imgcurate.errors import ImgcurateError
from imgcurate.storage import list_files, read_bytes
from imgcurate.verification import verify_run

CHAOS = Path(__file__).resolve().parents[1] / "scripts" / "chaos.py"


def pipeline(shards: Path, *middle: object):
    return tiny_pipeline(str(shards / "*.tar"), *middle, SemanticDedupStage(eps=0.05, n_clusters=4), images_per_tar=6)


def digests(out: Path) -> dict[str, str]:
    """Return what all files of a run are, but for the manifest, which tells times."""
    files = [p for p in sorted(out.rglob("*")) if p.is_file() and p.name not in ("manifest.json", "ballast")]
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def undisturbed(shards: Path, client: Client, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed") / "OUT"
    assert pipeline(shards).run(str(out), client=client).counts == {"duplicate": 12, "ok": 60}
    return digests(out)


@pytest.mark.timeout(900)
def test_killed_processes(tmp_path: Path) -> None:
    command = [sys.executable, str(CHAOS), "-o", str(tmp_path / "chaos"), "--runs", "1", "--seed",
               "5", "--shards", "4", "--workers", "2", "--separate"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=850)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^(\d) of \1 runs are as the undisturbed one$", done.stdout, re.MULTILINE), done.stdout


# A disk that is full.


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a disk of 80 MiB."""
    if os.geteuid():
        pytest.skip("only root may mount a disk")
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip(f"cannot mount a tmpfs: {made.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> None:
    with contextlib.suppress(OSError), (folder / "ballast").open("ab", buffering=0) as ballast:
        while ballast.write(bytes(4096)):
            pass


@pytest.mark.parametrize("phase", ["read", "SemanticDedupStage", "count", "write", "finish"])
def test_a_disk_that_becomes_full(
    phase: str, disk: Path, shards: Path, undisturbed: dict[str, str], client: Client
) -> None:
    out = disk / "OUT"
    # Of one partition that fails it is a StorageError, of two at once a PartitionsError.

    def progress(now: str, done: int, total: int, result: dict[str, Any]) -> None:
        if now == phase and done == 1:
            fill(disk)

    with pytest.raises(ImgcurateError, match="No space left on device") as caught:
        pipeline(shards).run(str(out), client=client, progress=progress)
    assert "\n" not in str(caught.value)
    assert not verify_run(str(out)).ok
    with pytest.raises(ImgcurateError, match="No space left on device"):
        pipeline(shards).run(str(out), client=client)
    (disk / "ballast").unlink()
    pipeline(shards).run(str(out), client=client)
    assert digests(out) == undisturbed
    assert verify_run(str(out)).ok


def test_a_disk_that_is_full(disk: Path, shards: Path, client: Client) -> None:
    fill(disk)
    with pytest.raises(ImgcurateError, match=r"only 0 bytes are free on the disk of|No space left on device"):
        pipeline(shards).run(str(disk / "OUT"), client=client)
    (disk / "ballast").unlink()
    assert pipeline(shards).run(str(disk / "OUT"), client=client).kept == 60


# A store that is gone for a while.


@pytest.fixture
def store(s3: Server, shards: Path) -> Iterator[tuple[Server, str]]:  # noqa: F811 - a fixture of that module
    """Yield a server, and the URL of a bucket of it with the four shards."""
    import boto3

    client = boto3.client("s3", endpoint_url=s3.url)
    client.create_bucket(Bucket="chaos")
    for path in shards.glob("*.tar"):
        client.put_object(Bucket="chaos", Key=f"in/{path.name}", Body=path.read_bytes())
    yield s3, "s3://chaos"
    everything = [{"Key": o["Key"]} for o in client.list_objects_v2(Bucket="chaos").get("Contents", [])]
    client.delete_objects(Bucket="chaos", Delete={"Objects": everything})
    client.delete_bucket(Bucket="chaos")


@pytest.mark.parametrize("phase", ["read", "write"])
@pytest.mark.parametrize("gone_s", [20])
def test_a_store_that_is_gone_for_a_while(
    gone_s: float, phase: str, store: tuple[Server, str], client: Client, tmp_path: Path
) -> None:
    server, bucket = store
    run = tiny_pipeline(f"{bucket}/in/*.tar", SemanticDedupStage(eps=0.05, n_clusters=4), images_per_tar=6)
    expected = run.run(str(tmp_path / "UNDISTURBED"), client=client)
    timers: list[threading.Timer] = []

    def progress(now: str, done: int, total: int, result: dict[str, Any]) -> None:
        if now == phase and done == 1 and not timers:
            server.gone_after = 0
            timers.append(threading.Timer(gone_s, lambda: setattr(server, "gone_after", None)))
            timers[0].start()

    result = run.run(f"{bucket}/OUT", client=client, progress=progress)
    assert timers
    assert result.counts == expected.counts
    for folder in ("catalog", "shards"):
        here = tmp_path / "UNDISTURBED" / folder
        assert list_files(f"{bucket}/OUT/{folder}", "") == sorted(p.name for p in here.iterdir())
        for path in here.iterdir():
            assert read_bytes(f"{bucket}/OUT/{folder}/{path.name}") == path.read_bytes(), path
    assert verify_run(f"{bucket}/OUT").ok


# A clock that jumps.


@pytest.mark.parametrize("stamp_s", [0, 4_000_000_000])
def test_files_from_another_time(
    stamp_s: int, shards: Path, undisturbed: dict[str, str], client: Client, tmp_path: Path
) -> None:
    out = tmp_path / "OUT"

    class StoppedError(Exception):
        pass

    def stop(phase: str, done: int, total: int, result: dict[str, Any]) -> None:
        if phase == "read" and done == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        pipeline(shards).run(str(out), client=client, progress=stop)
    parts = list((out / "catalog").glob("part-*"))
    assert len(parts) >= 2
    for path in [out / "manifest.json", *parts, *out.rglob("*")]:
        with contextlib.suppress(FileNotFoundError):
            os.utime(path, (stamp_s, stamp_s))
    phases: dict[str, int] = {}
    pipeline(shards).run(str(out), client=client, progress=lambda phase, _, total, __: phases.update({phase: total}))
    assert phases.get("read", 0) <= 4 - len(parts)
    assert digests(out) == undisturbed
    assert verify_run(str(out)).ok


@pytest.mark.skipif(shutil.which("faketime") is None, reason="faketime is not installed")
@pytest.mark.parametrize("shift", ["-400d"])
def test_a_clock_that_jumped(shift: str, shards: Path, client: Client, tmp_path: Path) -> None:
    out = tmp_path / "OUT"
    command = [sys.executable, "-m", "imgcurate", "curate", str(shards / "*.tar"), "-o", str(out), "--workers", "1",
               "--encoder", "tiny-image", "-q"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "DONT_FAKE_MONOTONIC": "1"}
    first = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((out / "catalog").glob("part-*")) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    first.kill()
    first.wait()
    done = subprocess.run(
        ["faketime", "-f", shift, *command], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    other = subprocess.run(
        [*command[:6], str(tmp_path / "OTHER"), *command[7:]], env=environment, capture_output=True, timeout=200
    )
    assert other.returncode == 0, other.stderr
    assert digests(out) == digests(tmp_path / "OTHER")
    assert verify_run(str(out)).ok
