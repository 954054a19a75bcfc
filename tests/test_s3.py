"""Shards in a real S3 server (moto on loopback), whole pipelines, and requests that fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
from distributed import Client
from servers import Proxy, Server
from test_pipeline import Flaky, checksums, tiny_pipeline

from imgcurate import SemanticDedupStage, storage
from imgcurate.errors import ImgcurateError, InputError
from imgcurate.inspection import inspect_shards

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
    """Yield a proxy before the server, which counts requests and spoils some; credentials and address are in the environment."""
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
    _forget_filesystems()


def _forget_filesystems() -> None:
    # fsspec keeps filesystems by their options, and does not see that the environment changed.
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def bucket(s3: Server, moto: tuple[str, int], shards: Path) -> Iterator[str]:
    """Yield the URL of a bucket with the four shards."""
    client = boto3.client("s3", endpoint_url=f"http://{moto[0]}:{moto[1]}")
    client.create_bucket(Bucket="data")
    for path in shards.glob("*.tar"):
        client.put_object(Bucket="data", Key=f"in/{path.name}", Body=path.read_bytes())
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


def without_urls(result) -> Any:
    columns = ["shard", "duplicate_in"]
    frame = result.catalog.compute()
    return frame.drop(columns=[c for c in columns if c in frame])


def test_a_fifth_of_the_requests_fails_and_the_output_is_the_same(
    bucket: str, s3: Server, from_disk, client: Client, tmp_path: Path
) -> None:
    s3.fault_rate = 0.2
    result = pipeline(f"{bucket}/in/*.tar", faulty_options(s3)).run(str(tmp_path / "OUT"), client=client)
    s3.fault_rate = 0.0
    assert set(s3.failed) == {"500", "503", "reset", "short", "stall"}
    tars = {n: c for n, c in checksums(tmp_path / "OUT").items() if n.endswith(".tar")}
    assert tars == {n: c for n, c in checksums(Path(from_disk.output_dir)).items() if n.endswith(".tar")}
    assert without_urls(result).equals(without_urls(from_disk))
    assert "secret-of-the-test" not in (tmp_path / "OUT" / "manifest.json").read_text()
