"""What is checked before a run on workers that somebody else started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import Daemons
from distributed import Client, LocalCluster

from imgcurate import preflight
from imgcurate.cluster import open_client
from imgcurate.errors import ClusterError, ConfigError
from imgcurate.pipeline import Pipeline
from imgcurate.preflight import check_stages, check_storage, check_versions
from imgcurate.shards import Shard
from imgcurate.stages import FilePartitioningStage, ImageReaderStage, ImageWriterStage, ProcessingStage
from imgcurate.storage import StorageError, exclusive


def can_mount() -> bool:
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


needs_mount = pytest.mark.skipif(not can_mount(), reason="mount namespaces are not permitted here")


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[Daemons]:
    (tmp_path / "daemons").mkdir()
    with Daemons(tmp_path / "daemons") as daemons:
        yield daemons


@pytest.fixture
def scheduler(daemons: Daemons) -> str:
    return daemons.start("scheduler", "--host", "127.0.0.1", "--port", "0")


WORKER = ("--nthreads", "1", "--no-nanny")


def in_mounts(*commands: str) -> list[str]:
    """Return what runs a command in mounts of its own that shell commands make."""
    return ["unshare", "--mount", "sh", "-c", "set -e; " + "; ".join(commands) + '; exec "$@"', "sh"]


def test_a_cluster_that_is_right_leaves_no_trace(client: Client, shards: Path, tmp_path: Path) -> None:
    check_versions(client)
    check_storage(client, str(tmp_path / "OUT"), str(shards / "00000.tar"))
    assert list((tmp_path / "OUT").iterdir()) == []
    check_storage(client, "memory://preflight/OUT", Shard(str(shards), ("00000.tar",)))
    check_storage(client, "memory://preflight/OUT", None)


def test_no_workers(tmp_path: Path) -> None:
    with (
        LocalCluster(n_workers=0, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as empty,
        pytest.raises(ClusterError, match="has no workers"),
    ):
        check_versions(empty)


def test_what_the_client_cannot_read_is_not_the_workers_fault(client: Client, tmp_path: Path) -> None:
    check_storage(client, str(tmp_path / "OUT"), str(tmp_path / "missing.tar"))


def test_a_folder_that_another_run_holds(client: Client, tmp_path: Path) -> None:
    with exclusive(str(tmp_path)), pytest.raises(StorageError, match="another run is writing"):
        check_storage(client, str(tmp_path), None)


def test_an_output_that_cannot_be_written_to(client: Client) -> None:
    with pytest.raises(ConfigError, match="not written to"):
        check_storage(client, "http://127.0.0.1:1/OUT", None)


def test_versions_that_differ(
    daemons: Daemons, scheduler: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, version in (("pillow", "1.2.3"), ("pandas", "3.0.99"), ("torch", "2.0.0")):
        info = tmp_path / "site" / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    path = os.pathsep.join(filter(None, [str(tmp_path / "site"), os.environ.get("PYTHONPATH")]))
    for _ in range(2):
        daemons.start("worker", scheduler, *WORKER, env={"PYTHONPATH": path})
    daemons.start("worker", scheduler, *WORKER)
    with open_client(scheduler=scheduler) as client:
        addresses = set(client.run(os.getpid))
        with pytest.raises(ClusterError) as error:
            check_versions(client)
    message = str(error.value)
    assert "pillow 1.2.3 instead of" in message
    assert "torch 2.0.0 instead of" in message
    assert "pandas" not in message
    assert message.count(": 2 workers: ") == 2
    assert sum(a in message for a in addresses) == 2
    assert f"(host {os.uname().nodename})" in message
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "imgcurate.preflight"]
    assert "pandas 3.0.99 instead of" in warning


def test_a_scheduler_without_imgcurate(daemons: Daemons, tmp_path: Path) -> None:
    import distributed

    # Without site-packages' .pth files and the metadata of imgcurate, as if it were not installed.
    site = tmp_path / "site"
    site.mkdir()
    for entry in Path(distributed.__file__).parents[1].iterdir():
        if "imgcurate" not in entry.name and entry.suffix != ".pth":
            (site / entry.name).symlink_to(entry)
    address = daemons.start(
        "scheduler", "--host", "127.0.0.1", "--port", "0", env={"PYTHONPATH": str(site)}, python=("-S",)
    )
    daemons.start("worker", address, *WORKER)
    with (
        open_client(scheduler=address) as client,
        pytest.raises(ClusterError, match="imgcurate .* is not installed: the scheduler"),
    ):
        check_versions(client)


def test_stages_that_cannot_be_imported_where_they_run(
    daemons: Daemons, scheduler: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "stages_here_alone.py").write_text(
        "from imgcurate import ProcessingStage\n\n\nclass Mine(ProcessingStage):\n    pass\n"
    )
    daemons.start("worker", scheduler, *WORKER, env={"PYTHONPATH": str(site)})
    daemons.start("worker", scheduler, *WORKER)
    monkeypatch.syspath_prepend(str(site))
    from stages_here_alone import Mine

    # As one of a notebook: it travels whole.
    written_here = type("WrittenHere", (ProcessingStage,), {"__module__": "__main__"})
    with open_client(scheduler=scheduler) as client:
        has_it = {where: str(site) in path for where, path in client.run(lambda: sys.path).items()}
        check_stages(client, [ImageWriterStage(), written_here()])
        with pytest.raises(ClusterError, match="importable where scheduler and workers run") as error:
            check_stages(client, [ImageWriterStage(), Mine()])
        with pytest.raises(ClusterError, match=r"stage stages_here_alone\.Mine is not loaded"):
            Pipeline([FilePartitioningStage([str(shards / "*.tar")]), ImageReaderStage(), Mine()]).run(
                str(tmp_path / "OUT"), client=client
            )
    message = str(error.value)
    assert "Mine is not loaded (ModuleNotFoundError: No module named 'stages_here_alone'): 2 processes: " in message
    assert ", the scheduler" in message
    assert sorted(has_it.values()) == [False, True]
    assert [where in message for where in has_it] == [not there for there in has_it.values()]
    assert not (tmp_path / "OUT").exists()


def test_a_worker_that_is_silent_is_named(
    daemons: Daemons, scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "_SILENT_S", 3.0)
    for _ in range(2):
        daemons.start("worker", scheduler, *WORKER)
    with open_client(scheduler=scheduler) as client:
        check_versions(client)
        pids = client.run(os.getpid)
        silent, pid = next(iter(pids.items()))
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(ClusterError, match=f"no answer within 3 s: {silent}"):
                check_versions(client)
            with pytest.raises(ClusterError, match=f"no answer within 3 s: {silent}"):
                check_storage(client, str(tmp_path / "OUT"), None)
        finally:
            os.kill(pid, signal.SIGCONT)
    assert not (tmp_path / "OUT").exists()


def test_memory_is_not_shared_by_processes(daemons: Daemons, scheduler: str) -> None:
    daemons.start("worker", scheduler, *WORKER)
    with (
        open_client(scheduler=scheduler) as client,
        pytest.raises(ClusterError, match="memory://OUT is not usable .* a folder that all workers share, or a URL"),
    ):
        check_storage(client, "memory://OUT", None)


@needs_mount
def test_a_folder_of_the_same_name_that_is_another(daemons: Daemons, scheduler: str, tmp_path: Path) -> None:
    out, data = tmp_path / "data" / "OUT", tmp_path / "data" / "in.tar"
    data.parent.mkdir()
    data.write_bytes(b"bytes of the client")
    other = in_mounts(f"mount -t tmpfs none {data.parent}", f"mkdir {out}", f"echo others > {data}")
    for prefix in (other, other, in_mounts(f"mount -t tmpfs none {data.parent}"), ()):
        daemons.start("worker", scheduler, *WORKER, prefix=prefix)
    with open_client(scheduler=scheduler) as client, pytest.raises(ClusterError) as error:
        check_storage(client, str(out), str(data))
    message = str(error.value)
    assert "the client writes to it is not there): it must be a folder that all workers share, or a URL: 3 w" in message
    assert f"{data} is another file than the client's" in message
    assert f"cannot read {data}: No such file or directory: the inputs must be where all" in message
    assert not out.exists()


@needs_mount
def test_a_folder_that_workers_cannot_write_to(daemons: Daemons, scheduler: str, tmp_path: Path) -> None:
    out = tmp_path / "OUT"
    out.mkdir()
    (out / "mine").touch()
    read_only = in_mounts(f"mount --bind {out} {out}", f"mount -o remount,bind,ro {out}")
    for prefix in (read_only, read_only, ()):
        daemons.start("worker", scheduler, *WORKER, prefix=prefix)
    with open_client(scheduler=scheduler) as client, pytest.raises(ClusterError) as error:
        check_storage(client, str(out), None)
    assert f"(cannot write {out}: Read-only file system)" in str(error.value)
    assert str(error.value).count("2 workers: ") == 1
    assert [p.name for p in out.iterdir()] == ["mine"]


def test_many_workers_with_one_fault_are_one_line() -> None:
    faults = preflight._Faults()
    for n in range(10):
        faults.add("no answer", f"tcp://10.0.0.{n}:1")
    told = faults.told({"tcp://10.0.0.0:1": "node"})
    assert told.startswith("no answer: 10 workers: tcp://10.0.0.0:1 (host node), ")
    assert told.endswith(" and 6 more")


def test_memory_of_this_process_is_no_output_of_workers(shards: Path) -> None:
    pipeline = Pipeline([FilePartitioningStage(str(shards)), ImageReaderStage(), ImageWriterStage()])
    with pytest.raises(ConfigError, match="memory of this process, and what worker processes write there is lost"):
        pipeline.run("memory://lost")
