"""Shards in a real S3 server (moto on loopback), whole pipelines, and requests that fail."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from distributed import Client
from servers import Answer, Proxy, Server
from test_pipeline import OUTPUT, Flaky, checksums, tiny_pipeline

from imgcurate import SemanticDedupStage, cli, filesystems, remote, storage
from imgcurate.errors import ClusterError, ConfigError, ImgcurateError, InputError
from imgcurate.patterns import expand_urls

moto_server = pytest.importorskip("moto.server")
boto3 = pytest.importorskip("boto3")
pytest.importorskip("s3fs")

Options = dict[str, Any]


@pytest.fixture(scope="module")
def moto() -> Iterator[tuple[str, int]]:
    """Yield the address of an S3 server."""
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture
def s3(moto: tuple[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """Yield a proxy before the server; its address and credentials are in the environment."""
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-test")
    with Server(Proxy(*moto)) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        yield server
    forget_filesystems()


def forget_filesystems() -> None:
    # fsspec keeps filesystems by their options, and does not see that the environment changed.
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(scope="module")
def shards(shards: Path, tmp_path_factory: pytest.TempPathFactory, read_tar, write_tar) -> Path:
    """Return a folder of the four shards with one more member in each sample, so that a shard has 6 MB."""
    folder = tmp_path_factory.mktemp("large-shards")
    for path in shards.glob("*.tar"):
        samples: dict[str, dict[str, bytes]] = {}
        for name, data in read_tar(path).items():
            key, ext = name.split(".", 1)
            samples.setdefault(key, {})[ext] = data
        for number, members in enumerate(samples.values()):
            members["bin"] = random.Random(f"{path.name} {number}").randbytes(330_000)
        write_tar(folder / path.name, list(samples.items()))
    return folder


@pytest.fixture
def bucket(s3: Server, moto: tuple[str, int], shards: Path) -> Iterator[str]:
    """Yield the URL of a bucket with the four shards."""
    client = boto3.client("s3", endpoint_url=f"http://{moto[0]}:{moto[1]}")
    client.create_bucket(Bucket="data", ACL="public-read")
    for path in shards.glob("*.tar"):
        client.put_object(Bucket="data", Key=f"in/{path.name}", Body=path.read_bytes(), ACL="public-read")
    yield "s3://data"
    everything = [{"Key": o["Key"]} for o in client.list_objects_v2(Bucket="data").get("Contents", [])]
    client.delete_objects(Bucket="data", Delete={"Objects": everything})
    client.delete_bucket(Bucket="data")


def faulty_options(server: Server) -> Options:
    """Return options of an address of its own, and with short time-outs: the server stalls."""
    return {"client_kwargs": {"endpoint_url": server.url}, "config_kwargs": {"read_timeout": 1, "connect_timeout": 1}}


def pipeline(source: str, options: Options | None = None):
    made = tiny_pipeline(source, SemanticDedupStage(eps=0.05, n_clusters=4), text_columns=("txt",))
    object.__setattr__(made.stages[0], "storage_options", options)
    return made


@pytest.fixture(scope="module")
def from_disk(shards: Path, client: Client, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("from-disk") / "OUT"
    return pipeline(str(shards / "*.tar")).run(str(out), client=client)


def tars_of(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in checksums(folder).items() if name.endswith(".tar")}


def without_urls(result) -> Any:
    columns = ["shard", "duplicate_in"]
    frame = result.catalog.compute()
    return frame.drop(columns=[c for c in columns if c in frame])


def test_a_fifth_of_the_requests_fails_and_the_output_is_the_same(
    bucket: str, s3: Server, from_disk, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # More requests for the same bytes.
    monkeypatch.setattr(remote, "_PAGES_PER_REQUEST", 1)
    s3.fault_rate = 0.2
    result = pipeline(f"{bucket}/in/*.tar", faulty_options(s3)).run(str(tmp_path / "OUT"), client=client)
    s3.fault_rate = 0.0
    assert set(s3.failed) == {"500", "503", "reset", "short", "stall"}
    assert tars_of(tmp_path / "OUT") == tars_of(Path(from_disk.output_dir))
    assert without_urls(result).equals(without_urls(from_disk))
    assert "secret-of-the-test" not in (tmp_path / "OUT" / "manifest.json").read_text()


def test_bytes_travel_once_for_index_and_images_and_once_for_the_export(
    bucket: str, s3: Server, from_disk, client: Client, shards: Path, tmp_path: Path
) -> None:
    options = faulty_options(s3)
    result = pipeline(f"{bucket}/in/*.tar", options).run(str(tmp_path / "OUT"), client=client)
    assert result.counts == from_disk.counts
    nbytes = sum(p.stat().st_size for p in shards.glob("*.tar"))
    ranges = [r for r in s3.log if r[2]]
    assert nbytes <= sum(r[3] for r in ranges) <= 2 * nbytes
    # 6 MB are 1 MiB, then what fits into requests of 4 MiB.
    assert len(ranges) <= 2 * 3 * 4


def test_a_run_on_worker_processes_takes_options_and_tells_no_secret(
    bucket: str, s3: Server, client: Client, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    options = {"secret": "another-secret", "key": "test", "client_kwargs.endpoint_url": s3.url}
    command = [sys.executable, "-m", "imgcurate.cli", "curate", f"{bucket}/in/*.tar", "-o", str(tmp_path / "OUT"),
               "--encoder", "tiny-image", "--no-dedup", "--images-per-tar", "25", "--workers", "2",
               "--files-per-partition", "2"]  # fmt: skip
    command += [f"--storage-option={key}={value}" for key, value in options.items()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "72 samples in = 72 kept\n"
    local = tiny_pipeline(str(shards / "*.tar")).run(str(tmp_path / "LOCAL"), client=client)
    assert tars_of(tmp_path / "OUT") == tars_of(Path(local.output_dir))
    assert s3.sent_bytes <= 2.01 * sum(p.stat().st_size for p in shards.glob("*.tar"))
    assert not [p for p in (tmp_path / "OUT").rglob("*") if p.is_file() and b"another-secret" in p.read_bytes()]
    assert "another-secret" not in done.stdout + done.stderr


def test_a_server_that_is_gone_ends_the_run_in_a_line_and_it_can_go_on(
    bucket: str, s3: Server, from_disk, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystems, "_FIRST_DELAY_S", 0.001)
    run = pipeline(f"{bucket}/in/*.tar", faulty_options(s3))
    s3.gone_after = 20
    with pytest.raises(ClusterError, match=r"cannot read s3://data/in/0000..tar.*10 attempts.*run again") as caught:
        run.run(str(tmp_path / "OUT"), client=client)
    assert "\n" not in str(caught.value)
    s3.gone_after = None
    run.run(str(tmp_path / "OUT"), client=client)
    assert tars_of(tmp_path / "OUT") == tars_of(Path(from_disk.output_dir))


def test_the_command_line_says_in_a_line_that_there_is_no_server(
    s3: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(filesystems, "_FIRST_DELAY_S", 0.001)
    option = "client_kwargs.endpoint_url=http://127.0.0.1:9"
    monkeypatch.setattr(sys, "argv", ["imgcurate", "inspect", "s3://data/in/*.tar", "--storage-option", option])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 1
    assert line.startswith("imgcurate: failed: cannot list s3://data/in/*.tar: Could not connect to the endpoint URL")
    assert line.endswith("(10 attempts)")


def test_the_output_may_lie_in_a_bucket(
    bucket: str, s3: Server, from_disk, shards: Path, client: Client, tmp_path: Path
) -> None:
    trap = tmp_path / "trap"
    trap.touch()
    run = tiny_pipeline(
        str(shards / "*.tar"), Flaky(str(trap), "00002.tar"), SemanticDedupStage(eps=0.05, n_clusters=4)
    )
    s3.fault_rate, s3.faults = 0.1, ("500", "503", "reset", "short")
    with pytest.raises(ImgcurateError, match="the trap is set"):
        run.run(f"{bucket}/OUT", client=client)
    assert "part-00002.parquet" not in storage.list_files(f"{bucket}/OUT/catalog", ".parquet")
    trap.unlink()
    result = run.run(f"{bucket}/OUT", client=client)
    s3.fault_rate = 0.0
    assert result.counts == from_disk.counts
    assert storage.list_files(f"{bucket}/OUT", "") == OUTPUT
    for path in sorted((Path(from_disk.output_dir) / "shards").glob("*.tar")):
        assert storage.read_bytes(f"{bucket}/OUT/shards/{path.name}") == path.read_bytes()
    assert len(result.catalog) == 72
    before = len(s3.log)
    assert run.run(f"{bucket}/OUT", client=client).counts == result.counts
    assert not [r for r in s3.log[before:] if r[0] in ("PUT", "POST", "DELETE")]
    other = tiny_pipeline(str(shards / "*.tar"), images_per_tar=30)
    with pytest.raises(ConfigError, match="holds another run"):
        other.run(f"{bucket}/OUT", client=client)
    assert other.run(f"{bucket}/OUT", client=client, overwrite=True).counts == {"ok": 72}


def test_new_shards_are_seen(bucket: str, s3: Server, shards: Path) -> None:
    assert len(expand_urls(f"{bucket}/in/*.tar")) == 4
    with storage.atomic_write(f"{bucket}/in/00004.tar") as out:
        out.write((shards / "00000.tar").read_bytes())
    assert expand_urls(f"{bucket}/in/*.tar")[-1] == f"{bucket}/in/00004.tar"
    assert storage.file_size(f"{bucket}/in/00004.tar") == (shards / "00000.tar").stat().st_size
    with storage.atomic_write(f"{bucket}/in/00004.tar") as out:
        out.write(b"shorter")
    assert storage.file_size(f"{bucket}/in/00004.tar") == 7


def test_an_object_that_changes_is_an_error_not_mixed_bytes(bucket: str, s3: Server, shards: Path) -> None:
    url = f"{bucket}/in/00000.tar"
    source = storage.open_source(url)
    assert source.pread(0, 512) == (shards / "00000.tar").read_bytes()[:512]
    with storage.atomic_write(url) as out:
        out.write(b"x" * source.size)
    with pytest.raises(storage.StorageError, match="00000.tar changed while it was read"):
        source.pread(source.size - 100, 100)
    assert storage.open_source(url).pread(0, 3) == b"xxx"


def test_credentials(bucket: str, s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    forget_filesystems()
    with pytest.raises(
        storage.StorageError, match=r"Unable to locate credentials; credentials are looked for in.*AWS_"
    ):
        storage.file_size(f"{bucket}/in/00000.tar")
    assert storage.file_size(f"{bucket}/in/00000.tar", {"anon": True}) > 0
    assert len(expand_urls(f"{bucket}/in/*.tar", {"anon": True})) == 4
    assert storage.file_size(f"{bucket}/in/00000.tar", {"key": "a", "secret": "b", "endpoint_url": s3.url}) > 0


def test_what_is_not_there_or_not_allowed_is_not_tried_again(bucket: str, s3: Server) -> None:
    with pytest.raises(InputError, match="no such input: s3://data/in/none.tar"):
        storage.file_size(f"{bucket}/in/none.tar")
    with pytest.raises(InputError, match="no such input: s3://no-bucket/x.tar"):
        storage.file_size("s3://no-bucket/x.tar")
    with pytest.raises(InputError, match="nothing matches"):
        expand_urls(f"{bucket}/other/*.tar")
    with Server(lambda *_: Answer(403, {}, b"")) as closed:
        options = faulty_options(closed)
        with pytest.raises(storage.StorageError, match=r"cannot read s3://data/in/00000.tar: access denied"):
            storage.file_size(f"{bucket}/in/00000.tar", options)
        assert len(closed.log) == 1
