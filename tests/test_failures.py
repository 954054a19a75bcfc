"""Partitions that fail, workers that die, schedulers that vanish: what is finished stays; nothing waits for ever."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
import torch
from distributed import Client, Future, LocalCluster, Status

from imgcurate import liveness
from imgcurate.errors import ClusterError, ConfigError, ImgcurateError, PartitionsError
from imgcurate.execution import call_frame, may_pass, run_waves
from imgcurate.filesystems import StorageError

N = 21


@pytest.fixture(scope="module")
def nannies() -> Iterator[Client]:
    """Yield a client of two worker processes with nannies, where two deaths make a partition suspect."""
    with dask.config.set({"distributed.scheduler.allowed-failures": 1}):
        cluster = LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, resources={"GPU": 1},
            silence_logs=logging.CRITICAL,
        )  # fmt: skip
    with Client(cluster) as client:
        yield client
    # A nanny whose worker is just starting again may not end it in time.
    with contextlib.suppress(TimeoutError):
        cluster.close()


def note(folder: str, number: int) -> int:
    """Take note that a partition is run, and return how often it was before."""
    with (Path(folder) / f"{number:03d}").open("a") as file:
        before = file.tell()
        file.write(".")
    return before


def runs(folder: Path) -> Counter[int]:
    return Counter({int(p.name): p.stat().st_size for p in folder.iterdir()})


def kill(number: int, folder: str, bad: dict[int, int]) -> dict[str, Any]:
    """Kill the worker as many times as `bad` says."""
    before = note(folder, number)
    time.sleep(0.05)
    if before < bad.get(number, 0):
        # A nanny does not restart a worker that dies before the nanny has heard that it started.
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGKILL)
    return {"square": number**2}


def fail(number: int, folder: str, bad: dict[int, list[BaseException]]) -> dict[str, Any]:
    """Raise an error of `bad` at each run, as long as there are any."""
    before = note(folder, number)
    errors = bad.get(number, [])
    if before < len(errors):
        raise errors[before] from CAUSES.get(type(errors[before]))
    return {"square": number**2}


CAUSES: dict[type, BaseException] = {ImgcurateError: torch.OutOfMemoryError("CUDA out of memory")}
"""What :func:`fail` raises some errors from: arguments of tasks lose their causes."""


def sleep(number: int, seconds: float) -> dict[str, Any]:
    time.sleep(seconds)
    return {"square": number**2}


def build(function: Callable[..., dict[str, Any]], **kwargs: Any) -> Any:
    """Return what builds frames: parts of a larger one, as for stages on data sets."""
    whole = call_frame(function, range(200), range(200), **kwargs)
    return lambda numbers: whole.partitions[numbers]


def squares(numbers: Any) -> dict[int, dict[str, int]]:
    return {n: {"square": n**2} for n in numbers}


INNOCENT = [n for n in range(N) if n != 7]


@pytest.mark.parametrize("resources", [None, {"GPU": 1}])
def test_a_partition_that_kills_its_workers_fails_alone(
    nannies: Client, tmp_path: Path, resources: dict[str, float] | None
) -> None:
    failed: dict[int, str] = {}
    seen: list[tuple[str, int, int]] = []
    results = run_waves(
        nannies, build(kill, folder=str(tmp_path), bad={7: 99}), range(N), phase="work", resources=resources,
        max_failed=1, failed=failed, progress=lambda *args: seen.append(args[:3]),
    )  # fmt: skip
    assert results == squares(INNOCENT)
    assert failed == {7: "the workers that ran it died again and again (out of memory, or a crash in a model or stage)"}
    # Dask also counts the death of a worker that has been sent the task and not begun it.
    assert runs(tmp_path)[7] in (3, 4)
    assert seen == [("work", k + 1, N) for k in range(N - 1)]


def test_more_failed_than_may_is_an_error_and_all_others_are_done(nannies: Client, tmp_path: Path) -> None:
    failed: dict[int, str] = {}
    with pytest.raises(PartitionsError) as caught:
        run_waves(
            nannies, build(kill, folder=str(tmp_path), bad={7: 99}), range(N), phase="work", failed=failed
        )  # fmt: skip
    assert str(caught.value) == (
        "work: 1 of 21 partitions failed, the first is partition 7: the workers that ran it died again and again "
        "(out of memory, or a crash in a model or stage); what was finished is kept: run again to try just these "
        "again, or with --max-failed 1 to go on without them"
    )
    assert list(failed) == [7]
    assert set(runs(tmp_path)) == set(range(N))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_without_a_list_of_failures_the_error_is_raised_when_all_others_are_done(
    nannies: Client, tmp_path: Path
) -> None:
    with pytest.raises(ClusterError, match="^work: a partition killed its worker again and again") as caught:
        run_waves(nannies, build(kill, folder=str(tmp_path), bad={0: 99}), range(N), phase="work")
    assert not isinstance(caught.value, PartitionsError)
    assert set(runs(tmp_path)) == set(range(N))


def test_a_partition_that_kills_some_workers_and_then_none_is_done(nannies: Client, tmp_path: Path) -> None:
    failed: dict[int, str] = {}
    results = run_waves(
        nannies, build(kill, folder=str(tmp_path), bad={7: 3}), range(N), phase="work", failed=failed
    )  # fmt: skip
    assert results == squares(range(N))
    assert failed == {}
    assert runs(tmp_path)[7] == 4


def lose_device(number: int, folder: str, bad: dict[int, list[BaseException]]) -> dict[str, int]:
    if number in bad:
        raise ImgcurateError("stage x: one image") from RuntimeError("CUDA error: an illegal memory access")
    return fail(number, folder, {})


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


PASSES = [
    OSError("the network is down"), TimeoutError("no answer"), StorageError("cannot read s3://a/b"), MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    caused(ImgcurateError("stage x: one image"), torch.OutOfMemoryError("CUDA out of memory")),
]  # fmt: skip
STAYS = [
    ValueError("a bug"), ConfigError("no such column"), ImgcurateError("stage x: ValueError"), RuntimeError("no"),
    caused(ConfigError("no such file"), FileNotFoundError("a")), KeyError("key"),
]  # fmt: skip


@pytest.mark.parametrize("error", PASSES, ids=repr)
def test_errors_that_may_pass(error: BaseException) -> None:
    assert may_pass(error)


@pytest.mark.parametrize("error", STAYS, ids=repr)
def test_errors_that_stay(error: BaseException) -> None:
    assert not may_pass(error)


def test_errors_that_pass_are_tried_again_alone(client: Client, tmp_path: Path) -> None:
    bad = {3 * k: [error] for k, error in enumerate(PASSES)} | {20: [OSError("a"), OSError("b")]}
    failed: dict[int, str] = {}
    results = run_waves(client, build(fail, folder=str(tmp_path), bad=bad), range(N), phase="work", failed=failed)
    assert results == squares(range(N))
    assert failed == {}
    assert runs(tmp_path) == Counter({n: 1 + len(bad.get(n, [])) for n in range(N)})


def test_an_error_of_the_device_ends_the_run_though_partitions_may_fail(client: Client, tmp_path: Path) -> None:
    failed: dict[int, str] = {}
    run = build(lose_device, folder=str(tmp_path), bad={5: [], 7: []})
    with pytest.raises(ImgcurateError, match="stage x: one image"):
        run_waves(client, run, range(N), phase="work", failed=failed, max_failed=9)
    assert failed == {}


def test_errors_that_do_not_pass_after_all_are_counted(client: Client, tmp_path: Path) -> None:
    bad = {5: [OSError("disk\nfull")] * 9, 9: [StorageError("cannot read a.tar")] * 9}
    failed: dict[int, str] = {}
    run = build(fail, folder=str(tmp_path), bad=bad)
    results = run_waves(client, run, range(N), phase="work", failed=failed, max_failed=2)
    assert failed == {5: "OSError: disk full", 9: "cannot read a.tar"}
    assert results == squares(n for n in range(N) if n not in bad)
    assert runs(tmp_path) == Counter({n: 3 if n in bad else 1 for n in range(N)})
    with pytest.raises(OSError, match="disk\nfull"):
        run_waves(client, build(fail, folder=str(tmp_path), bad={5: [OSError("disk\nfull")] * 99}), range(N), phase="w")


def test_a_bug_ends_the_run_at_once(client: Client, tmp_path: Path) -> None:
    bad: dict[int, list[BaseException]] = {n: [ValueError(f"bug {n}")] * 9 for n in range(200)}
    for failed in (None, dict[int, str]()):
        with pytest.raises(ValueError, match="^bug "):
            run_waves(client, build(fail, folder=str(tmp_path), bad=bad), range(200), phase="work", failed=failed)
        assert not failed
    time.sleep(0.5)
    assert len(runs(tmp_path)) < 200


def test_bugs_that_are_allowed_are_counted(client: Client, tmp_path: Path) -> None:
    bad: dict[int, list[BaseException]] = {n: [ConfigError(f"bug {n}")] for n in (4, 11)}
    failed: dict[int, str] = {}
    run = build(fail, folder=str(tmp_path), bad=bad)
    results = run_waves(client, run, range(N), phase="work", failed=failed, max_failed=2)
    assert failed == {4: "bug 4", 11: "bug 11"}
    assert results == squares(n for n in range(N) if n not in bad)
    assert set(runs(tmp_path).values()) == {1}
    bad = {n: [ConfigError(f"bug {n}")] * 9 for n in range(200)}
    with pytest.raises(
        PartitionsError, match="work: 3 of 200 partitions failed, .* run again to go on, or with a higher"
    ):
        run_waves(
            client, build(fail, folder=str(tmp_path), bad=bad), range(200), phase="work", failed={}, max_failed=2
        )  # fmt: skip


def test_a_storage_that_is_gone_ends_the_run_before_all_was_tried(client: Client, tmp_path: Path) -> None:
    bad: dict[int, list[BaseException]] = {n: [OSError("gone")] * 99 for n in range(30, 200)}
    failed: dict[int, str] = {}
    with pytest.raises(PartitionsError, match="first is partition 30: OSError: gone; .* run again to go on"):
        run_waves(client, build(fail, folder=str(tmp_path), bad=bad), range(200), phase="work", failed=failed)
    assert len(runs(tmp_path)) < 200
    assert set(failed) == set(runs(tmp_path)) - set(range(30))
    assert Counter(failed.values()) == {"OSError: gone": 3, "OSError: gone (not tried alone)": len(failed) - 3}
    assert sum(n > 1 for n in runs(tmp_path).values()) == 3
    assert max(runs(tmp_path).values()) == 3


def test_a_storage_that_comes_back_is_gone_on_with(client: Client, tmp_path: Path) -> None:
    bad: dict[int, list[BaseException]] = {n: [OSError("gone")] for n in range(120)}
    results = run_waves(client, build(fail, folder=str(tmp_path), bad=bad), range(200), phase="work")
    assert results == squares(range(200))
    assert runs(tmp_path) == Counter({n: 1 + len(bad.get(n, [])) for n in range(200)})


class Remote:
    """A scheduler and workers without nannies, each a process of its own."""

    def __init__(self, folder: Path) -> None:
        self._file, self._processes = folder / "scheduler.json", list[subprocess.Popen[bytes]]()
        self._log = (folder / "log").open("wb")
        self.scheduler = self._start("dask_scheduler", "--host", "127.0.0.1", "--port", "0")

    def _start(self, module: str, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.{module}", "--scheduler-file", str(self._file), *options]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen([*command, "--no-dashboard"], stdout=self._log, stderr=self._log, env=env)
        self._processes.append(process)
        return process

    def start_worker(self) -> subprocess.Popen[bytes]:
        return self._start("dask_worker", "--no-nanny", "--nthreads", "1", "--host", "127.0.0.1")

    def client(self) -> Client:
        while not self._file.exists():
            time.sleep(0.1)
        return Client(scheduler_file=str(self._file), timeout="15s")

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._log.close()


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Remote]:
    remote = Remote(tmp_path)
    yield remote
    remote.close()


def after_the_first(call: Callable[[], object]) -> Any:
    """Return a progress that calls something once, a little after the first partition."""
    return lambda _, done, *rest: threading.Timer(0.5, call).start() if done == 1 else None


def test_a_scheduler_that_is_killed_is_an_error(remote: Remote) -> None:
    remote.start_worker()
    run = build(sleep, seconds=1)
    with remote.client() as client:
        where = f"the connection to the scheduler at {client.scheduler.address}"
        with pytest.raises(ClusterError) as caught:
            run_waves(client, run, range(N), phase="work", progress=after_the_first(remote.scheduler.kill))
        assert str(caught.value) == f"work: {where} was lost; what was finished is kept: run again to go on"
        with pytest.raises(ClusterError, match="the connection to the scheduler at .* was lost"):
            run_waves(client, run, range(N), phase="work")
    with pytest.raises(ClusterError, match="the connection to the scheduler at .* was lost"):
        run_waves(client, run, range(N), phase="work")


def test_a_scheduler_that_does_not_answer_is_an_error(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "SILENCE_S", 4.0)
    remote.start_worker()
    with remote.client() as client:
        stop = after_the_first(lambda: remote.scheduler.send_signal(signal.SIGSTOP))
        with pytest.raises(ClusterError, match="the scheduler at tcp://.* has not answered for 4 s; .*: run again"):
            run_waves(client, build(sleep, seconds=1), range(N), phase="work", progress=stop)
        remote.scheduler.kill()


def test_the_last_worker_gone_is_an_error(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "NO_WORKER_S", 3.0)
    worker = remote.start_worker()
    with remote.client() as client:
        client.wait_for_workers(1, timeout=60)
        with pytest.raises(
            ClusterError, match="the scheduler at tcp://.* has had no worker for 3 s; .*: start workers"
        ):
            run_waves(client, build(sleep, seconds=1), range(N), phase="work", progress=after_the_first(worker.kill))
        # Another worker in its place, and the same client goes on.
        monkeypatch.setattr(liveness, "NO_WORKER_S", 60.0)
        threading.Timer(2, remote.start_worker).start()
        assert run_waves(client, build(sleep, seconds=0), range(N), phase="work") == squares(range(N))


def test_resources_that_no_worker_declares_are_an_error(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "NO_WORKER_S", 1.0)
    message = r"none of the 2 workers at .* the resources that a partition takes \(GPU=0.5\) .* --resources 'GPU=1'"
    with pytest.raises(ClusterError, match=message):
        run_waves(client, build(sleep, seconds=0), range(N), phase="work", resources={"GPU": 0.5})


def test_partitions_longer_than_the_time_without_a_worker_are_waited_for(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "NO_WORKER_S", 0.5)
    monkeypatch.setattr(liveness, "SILENCE_S", 0.5)
    assert run_waves(client, build(sleep, seconds=2), range(3), phase="work") == squares(range(3))


def test_the_time_without_a_worker_counts_from_when_one_was_last_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "NO_WORKER_S", 4.0)
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        watch = liveness.Liveness(client, "work")
        until = time.monotonic() + 6
        while time.monotonic() < until:
            watch.check()
            time.sleep(0.1)
        cluster.scale(0)
        gone = time.monotonic()
        with pytest.raises(ClusterError, match="has had no worker for 4 s"):
            while True:
                watch.check()
                time.sleep(0.1)
        assert time.monotonic() - gone > 2


def test_workers_that_are_paused_and_idle_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "NO_WORKER_S", 2.0)

    def pause(dask_worker: Any) -> None:
        dask_worker.status = Status.paused

    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, memory_limit=0, dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
    ):
        client.run(pause)
        with pytest.raises(ClusterError, match=r"no worker at .* has taken up work for 2 s.* \(status paused\)"):
            run_waves(client, build(sleep, seconds=0), range(3), phase="work")


def test_work_that_someone_else_cancels_is_an_error(client: Client) -> None:
    def cancel() -> None:
        client.cancel([Future(key, client) for key in list(client.futures)], force=True)

    with pytest.raises(ClusterError, match=r"^work: the scheduler at .* cancelled the work \(unknown\); .*: run again"):
        run_waves(client, build(sleep, seconds=1), range(N), phase="work", progress=after_the_first(cancel))


def test_a_cluster_that_is_restarted_is_an_error() -> None:
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
        Client(cluster, set_as_default=False) as other,
        pytest.raises(ClusterError, match=r"cancelled the work \(scheduler-restart\)"),
    ):
        restart = after_the_first(lambda: other.restart(wait_for_workers=False))
        run_waves(client, build(sleep, seconds=1), range(N), phase="work", progress=restart)


def test_a_scheduler_that_fails_tasks_without_workers_is_an_error() -> None:
    with dask.config.set({"distributed.scheduler.no-workers-timeout": "1s"}):
        cluster = LocalCluster(n_workers=0, processes=False, dashboard_address=None)
    with (
        cluster,
        Client(cluster) as client,
        pytest.raises(ClusterError, match="^work: Attempted to run task .*: start"),
    ):
        run_waves(client, build(sleep, seconds=0), range(3), phase="work")
