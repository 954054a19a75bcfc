"""Runs on three hosts and a client: network namespaces with an address, a name and working folders of their own.

What they have in common is the folder of inputs and outputs, as nodes with a network filesystem have.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clusters import Daemons, make_certificates, tls_options

IP = {"head": "10.213.77.1", "node-a": "10.213.77.2", "node-b": "10.213.77.3", "client": "10.213.77.4"}


def can_make_namespaces() -> bool:
    name = f"ic{os.getpid()}t"
    try:
        done = subprocess.run(["ip", "netns", "add", name], capture_output=True)
    except FileNotFoundError:
        return False
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return done.returncode == 0


pytestmark = pytest.mark.skipif(not can_make_namespaces(), reason="ip netns add is not permitted here")


class Hosts:
    """Hosts on one network, each a network namespace; what they run sees its own mounts."""

    def __init__(self, private: Path) -> None:
        self.private = private
        self.names = {host: f"ic{os.getpid()}{number}" for number, host in enumerate(IP)}
        self.switch = f"ic{os.getpid()}s"

    def __enter__(self) -> Hosts:
        self._ip(f"netns add {self.switch}")
        self._ip(f"-n {self.switch} link add bridge type bridge")
        self._ip(f"-n {self.switch} link set bridge up")
        for host, name in self.names.items():
            self._ip(f"netns add {name}")
            self._ip(f"-n {name} link add eth0 type veth peer name {name} netns {self.switch}")
            self._ip(f"-n {self.switch} link set {name} master bridge up")
            self._ip(f"-n {name} addr add {IP[host]}/24 dev eth0")
            self._ip(f"-n {name} link set eth0 up")
            self._ip(f"-n {name} link set lo up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in (*self.names.values(), self.switch):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    @staticmethod
    def _ip(arguments: str) -> None:
        subprocess.run(["ip", *arguments.split()], check=True)

    def on(self, host: str) -> list[str]:
        """Return what runs a command on a host."""
        mine = self.private / host
        script = (
            f"set -e; hostname {host}; mount -t tmpfs none {self.private}; mount -t tmpfs none /var/tmp; "
            f'mkdir {mine}; cd {mine}; export HOME={mine} TMPDIR={mine}; exec "$@"'
        )
        return ["ip", "netns", "exec", self.names[host], "unshare", "--mount", "--uts", "sh", "-c", script, "sh"]

    def imgcurate(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run the command on the client's host."""
        command = [*self.on("client"), sys.executable, "-m", "imgcurate.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(tmp_path_factory.mktemp("private")) as hosts:
        yield hosts


@contextlib.contextmanager
def cluster(hosts: Hosts, folder: Path, *tls: str) -> Iterator[str]:
    """Start a scheduler on the head and a worker on each node."""
    folder.mkdir()
    protocol = "tls" if tls else "tcp"
    with Daemons(folder) as daemons:
        address = daemons.start(
            "scheduler", "--host", IP["head"], "--port", "0", "--protocol", protocol, *tls, prefix=hosts.on("head")
        )
        assert address.startswith(f"{protocol}://{IP['head']}:")
        for node in ("node-a", "node-b"):
            daemons.start("worker", address, "--nthreads", "1", *tls, prefix=hosts.on(node))
        yield address


@pytest.fixture(scope="module")
def plain(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with cluster(hosts, tmp_path_factory.mktemp("plain") / "logs") as address:
        yield address


def files(folder: Path) -> dict[str, bytes]:
    """Return the shards and tables of a run."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for kind in ("tar", "parquet") for p in folder.rglob(f"*.{kind}")
    }


def curate(shards: Path, out: Path) -> list[str | Path]:
    options = ["--encoder", "tiny-image", "--exact-dedup", "--images-per-tar", "20", "-q"]
    return ["curate", shards / "*.tar", "-o", out, *options]


@pytest.fixture(scope="module")
def local(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files of the same run on this machine."""
    out = tmp_path_factory.mktemp("local") / "OUT"
    subprocess.run([sys.executable, "-m", "imgcurate.cli", *map(str, curate(shards, out))], check=True)
    found = files(out)
    assert sum(name.endswith(".tar") for name in found) == 3
    return found


def test_curate_on_hosts_gives_the_same_bytes(
    hosts: Hosts, plain: str, shards: Path, local: dict[str, bytes], tmp_path: Path
) -> None:
    done = hosts.imgcurate(*curate(shards, tmp_path / "OUT"), "--scheduler", plain)
    assert done.returncode == 0, done.stderr
    assert "72 samples in = 60 kept + 12 duplicate" in done.stdout
    assert files(tmp_path / "OUT") == local
    again = hosts.imgcurate(*curate(shards, tmp_path / "OUT"), "--scheduler", plain)
    assert (again.returncode, again.stdout) == (0, done.stdout)


def test_curate_on_hosts_with_tls(hosts: Hosts, shards: Path, local: dict[str, bytes], tmp_path: Path) -> None:
    tls = tls_options(make_certificates(tmp_path / "certificates"))
    with cluster(hosts, tmp_path / "logs", *tls) as address:
        done = hosts.imgcurate(*curate(shards, tmp_path / "OUT"), "--scheduler", address, *tls)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "OUT") == local


def test_dedup_on_hosts_gives_the_same_bytes(hosts: Hosts, plain: str, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(500, 32)).astype(np.float32)
    x[250:300] = x[:50] * 3
    table = pa.table({"id": np.arange(500), "embedding": list(x)})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=100)
    outputs = []
    for name, more in (("A", ["--scheduler", plain]), ("B", [])):
        done = hosts.imgcurate("dedup", tmp_path / "x.parquet", "-o", tmp_path / name, "-q", *more)
        assert done.returncode == 0, done.stderr
        assert "500 rows in = 450 kept + 50 duplicate" in done.stdout
        outputs.append(files(tmp_path / name))
    assert outputs[0] == outputs[1]
    assert {"kept.parquet", "removed.parquet"} <= set(outputs[0])


def test_an_output_folder_of_one_host_is_refused(hosts: Hosts, plain: str, shards: Path) -> None:
    done = hosts.imgcurate(*curate(shards, Path("OUT")), "--scheduler", plain)
    assert done.returncode == 1
    assert "OUT is not usable" in done.stderr
    assert "it must be a folder that all workers share, or a URL: 2 workers: " in done.stderr
    assert "(host node-a)" in done.stderr
    assert "(host node-b)" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_ssh_cluster_on_hosts(hosts: Hosts, shards: Path, local: dict[str, bytes], tmp_path: Path) -> None:
    ssh = tmp_path / "myssh"
    cases = "\n".join(f'{host}) exec {shlex.join(hosts.on(host))} sh -c "$*" ;;' for host in IP)
    ssh.write_text(f"#!/bin/sh\nhost=$1; shift\ncase $host in\n{cases}\nesac\n")
    ssh.chmod(0o755)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "SSH": str(ssh), "IMGCURATE_SCHEDULER": IP["node-a"]}
    script = Path(__file__).resolve().parents[1] / "scripts" / "ssh_cluster"
    command = [*hosts.on("client"), script, "node-a", "node-b", "--", *map(str, curate(shards, tmp_path / "OUT"))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "OUT") == local
