"""Running schedulers: how they are named, and TLS between processes with real certificates."""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
from clusters import Daemons, make_certificates
from clusters import tls_options as options
from distributed import Client
from typer.testing import CliRunner

import imgcurate.cluster as cluster_module
from imgcurate.backend import cpu_count
from imgcurate.cli import app
from imgcurate.cluster import open_client, tls_security
from imgcurate.errors import ClusterError, ConfigError
from imgcurate.liveness import known_workers

Start = Callable[..., str]


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_certificates(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Return a function that starts ``dask scheduler`` or ``dask worker``, see :class:`clusters.Daemons`."""
    with Daemons(tmp_path_factory.mktemp("daemons")) as daemons:
        yield daemons.start


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def tls_scheduler(tls: dict[str, str], start: Start) -> str:
    """Return the address of a scheduler with a worker that speak TLS."""
    address = start(
        "scheduler", "--host", "127.0.0.1", "--port", "0", "--protocol", "tls", *options(tls),
        says=r"Scheduler at: +(tls://\S+)",
    )  # fmt: skip
    start("worker", address, "--nthreads", "1", *options(tls), says=r"Registered to: +(\S+)")
    return address


@pytest.fixture(scope="module")
def tcp_scheduler(start: Start) -> str:
    return start("scheduler", "--host", "127.0.0.1", "--port", "0", says=r"Scheduler at: +(tcp://\S+)")


def refused(address: str, security=None) -> str:
    """Return why a client cannot connect; it is said in time."""
    begin = time.monotonic()
    with pytest.raises(ClusterError) as error, open_client(scheduler=address, security=security):
        pass
    assert time.monotonic() - begin < 20
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_run_on_a_tls_cluster(tls_scheduler: str, tls: dict[str, str], shards: Path, tmp_path: Path) -> None:
    curate = ["curate", str(shards / "*.tar"), "--encoder", "tiny-image", "-q"]
    result = CliRunner().invoke(app, [*curate, "-o", str(tmp_path / "A"), "--scheduler", tls_scheduler, *options(tls)])
    assert result.exit_code == 0, result.output
    assert "72 samples in = 60 kept + 12 duplicate" in result.output


def test_dasks_own_configuration_gives_the_certificates(tls_scheduler: str, tls: dict[str, str]) -> None:
    names = {"ca-file": tls["ca_file"], "client.cert": tls["cert"], "client.key": tls["key"]}
    with (
        dask.config.set({f"distributed.comm.tls.{k}": v for k, v in names.items()}),
        open_client(scheduler=tls_scheduler) as client,
    ):
        assert len(known_workers(client)) == 1


def test_a_plain_client_at_a_tls_scheduler(tls_scheduler: str) -> None:
    assert "tls://" in refused(tls_scheduler.replace("tls://", "tcp://"))
    assert "needs certificates: --tls-ca-file" in refused(tls_scheduler)


def test_a_tls_client_at_a_plain_scheduler(tcp_scheduler: str, tls: dict[str, str]) -> None:
    security = tls_security(**tls)
    assert "speak TLS" in refused(tcp_scheduler.replace("tcp://", "tls://"), security)
    assert "not one of tls://" in refused(tcp_scheduler, security)


def test_a_certificate_of_another_ca(tls_scheduler: str, tls: dict[str, str], tmp_path: Path) -> None:
    other = make_certificates(tmp_path / "other")
    assert "not signed by the CA" in refused(tls_scheduler, tls_security(**other))
    # The right CA for the scheduler, but a certificate that the scheduler's CA did not sign.
    mixed = tls_security(tls["ca_file"], other["cert"], other["key"])
    assert "no Dask scheduler can be used" in refused(tls_scheduler, mixed)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("foo://host:1", "unknown address scheme 'foo'"),
        ("host", "missing port number"),
        ("tcp://127.0.0.1:{port}", "Connection refused|Timed out trying to connect"),
    ],
)
def test_addresses_where_no_scheduler_is(address: str, message: str) -> None:
    assert re.search(message, refused(address.format(port=free_port())))


def test_a_server_that_never_answers(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert "no Dask scheduler" in refused(f"tcp://127.0.0.1:{server.getsockname()[1]}")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"address": '])
def test_a_scheduler_file_that_is_none(content: str, tmp_path: Path) -> None:
    path = tmp_path / "scheduler.json"
    path.write_text(content)
    assert "is not the file of a Dask scheduler" in refused(str(path))


def test_tls_files_are_checked(tls: dict[str, str], tmp_path: Path) -> None:
    assert tls_security(None, None, None) is None
    with pytest.raises(ConfigError, match="no key is named"):
        tls_security(tls["ca_file"], tls["cert"], None)
    with pytest.raises(ConfigError, match="there is no TLS CA file nowhere.pem"):
        tls_security("nowhere.pem", tls["cert"], tls["key"])
    other = make_certificates(tmp_path / "other")
    with pytest.raises(ConfigError, match="cannot be used"):
        tls_security(tls["ca_file"], tls["cert"], other["key"])
    (tmp_path / "text.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match="cannot be used"):
        tls_security(str(tmp_path / "text.pem"), tls["cert"], tls["key"])


@pytest.mark.parametrize("command", ["curate", "run", "dedup"])
def test_tls_options_need_a_scheduler(command: str, tls: dict[str, str], shards: Path, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(f"inputs: {shards}/*.tar\nstages: [ImageReaderStage]\n")
    given = {"curate": f"{shards}/*.tar", "run": str(tmp_path / "p.yaml"), "dedup": str(tmp_path)}[command]
    arguments = [command, given, "-o", str(tmp_path / "OUT"), *options(tls)]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ConfigError)
    assert "go with --scheduler" in str(result.exception)


def test_a_scheduler_that_is_lost(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "daemons").mkdir()
    (tmp_path / "in").mkdir()
    for k in range(16):
        shutil.copy(shards / f"{k % 4:05d}.tar", tmp_path / "in" / f"{k:05d}.tar")
    command = ["curate", f"{tmp_path}/in/*.tar", "-o", str(tmp_path / "OUT"), "--encoder", "tiny-image", "-q"]
    with Daemons(tmp_path / "daemons") as daemons:
        address = daemons.start("scheduler", "--host", "127.0.0.1", "--port", "0")
        daemons.start("worker", address, "--nthreads", "1")
        run = subprocess.Popen(
            [sys.executable, "-m", "imgcurate.cli", *command, "--scheduler", address],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while not list((tmp_path / "OUT").glob("catalog/part-*")):
            assert run.poll() is None, run.communicate()
            time.sleep(0.02)
        daemons.running[0].kill()
        _, err = run.communicate(timeout=120)
    assert run.returncode == 1
    assert err.count("\n") == 1, err
    assert f"the connection to the scheduler at {address} was lost" in err


def test_workers_are_known_also_while_the_client_fetches_less(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every two seconds it does, and puts an answer without workers in the place of a full one.
    monkeypatch.setattr(client, "_scheduler_identity", {"workers": {}})
    monkeypatch.setattr(client, "_update_scheduler_info", None)
    workers = known_workers(client)
    assert len(workers) == 2
    assert all(worker["nthreads"] == 1 for worker in workers.values())


def test_a_worker_that_dies_as_it_starts_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def die(**options: Any) -> None:
        del options
        raise RuntimeError("Cluster failed to start") from RuntimeError("Nanny failed\nto start worker process")

    monkeypatch.setattr(cluster_module, "LocalCluster", die)
    mask, handler = signal.pthread_sigmask(signal.SIG_BLOCK, ()), signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(ClusterError, match=r"\(Nanny failed to start worker process\).*run the same command again"),
        open_client(device="cpu", n_workers=1, dashboard_address=None),
    ):
        pass
    assert (signal.pthread_sigmask(signal.SIG_BLOCK, ()), signal.getsignal(signal.SIGTERM)) == (mask, handler)


def test_workers_never_get_an_interrupt_also_those_that_come_later() -> None:
    with open_client(device="cpu", n_workers=1, dashboard_address=None) as client:
        for _ in range(2):
            (pid,) = client.run(os.getpid).values()
            os.kill(pid, signal.SIGINT)
            time.sleep(0.3)
            assert list(client.run(os.getpid).values()) == [pid]
            os.kill(pid, signal.SIGKILL)
            end = time.monotonic() + 60
            while list(client.run(os.getpid, on_error="ignore").values()) in ([], [pid]):
                assert time.monotonic() < end
                time.sleep(0.2)


def test_a_cluster_leaves_the_environment_of_this_process_alone() -> None:
    before = dict(os.environ)
    with open_client(device="cpu", n_workers=1, dashboard_address=None) as client:
        assert dict(os.environ) == before
        # The workers have what Dask sets for them.
        assert set(client.run(os.getenv, "OMP_NUM_THREADS").values()) == {str(cpu_count())}
    assert dict(os.environ) == before


ARRAYS = """
import resource, sys
import numpy as np
from imgcurate.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(200):
        np.ones(2**18, np.float32)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before = faults()
keep_freed_memory()
faults()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
@pytest.mark.parametrize(
    ("environment", "is_kept"),
    [
        ({"MALLOC_TRIM_THRESHOLD_": "65536"}, True),
        ({"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "131072"}, False),
    ],
)
def test_workers_do_not_fetch_memory_page_by_page(environment: dict[str, str], is_kept: bool) -> None:
    names = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", ARRAYS], env={**names, **environment}, capture_output=True, text=True, check=True
    )
    before, after = map(int, done.stdout.split())
    # 200 arrays of 256 pages each, which are too small for large pages.
    assert before > 25_000
    assert (after < 2_000) == is_kept


def test_rmm_gives_no_memory_to_torch_and_takes_no_share_of_a_part_of_a_gpu() -> None:
    from imgcurate.cluster import _rmm_options

    for devices in ("", "0,1", "GPU-8f6a", "MIG-41b3"):
        options = _rmm_options(devices)
        assert options["rmm_allocator_external_lib_list"] == ["cupy"]
        assert isinstance(options["rmm_pool_size"], str) == devices.startswith("MIG")
        assert ("rmm_maximum_pool_size" in options) != devices.startswith("MIG")
