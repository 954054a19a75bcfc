"""Remote files: HTTP servers of several habits, streams that are fetched ahead, and the spool."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from servers import Answer, Files, Server

from imgcurate import filesystems, spool, storage
from imgcurate.errors import ConfigError, InputError
from imgcurate.frame import read_group
from imgcurate.patterns import expand_urls
from imgcurate.shards import Shard, index_shard
from imgcurate.spool import PAGE_BYTES, Spool

pytest.importorskip("aiohttp")

MIB = 1024 * 1024
SIZE = 12 * MIB + 345


@pytest.fixture(scope="module")
def data() -> bytes:
    return random.Random(0).randbytes(SIZE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> Path:
    folder = tmp_path_factory.mktemp("served")
    (folder / "x.bin").write_bytes(data)
    (folder / "empty.bin").touch()
    for status in (401, 403, 404, 410, 429, 500, 503):
        (folder / f"status-{status}").touch()
    return folder


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystems, "_FIRST_DELAY_S", 0.001)


@pytest.fixture
def serve(folder: Path) -> Iterator[Callable[..., Server]]:
    """Return a function that starts a server of the folder, with the given habits."""
    servers: list[Server] = []

    def start(**habits: object) -> Server:
        servers.append(Server(Files(folder, **habits)).__enter__())
        return servers[-1]

    yield start
    for server in servers:
        server.__exit__()


def read_all(url: str, step: int = 100_000) -> bytes:
    source = storage.open_source(url)
    try:
        return b"".join(source.pread(i, step) for i in range(0, source.size, step))
    finally:
        source.close()


@pytest.mark.parametrize(
    "habits",
    [
        {}, {"head": False}, {"etag": False}, {"cut_bytes": 700_000}, {"ranges": False},
        {"ranges": False, "encoding": "chunked"}, {"ranges": False, "encoding": "gzip"},
    ],
    ids=str,
)  # fmt: skip
def test_bytes_are_right_whatever_the_server_does(serve: Callable[..., Server], data: bytes, habits: dict) -> None:
    server = serve(**habits)
    assert read_all(f"{server.url}/x.bin") == data
    source = storage.open_source(f"{server.url}/x.bin")
    assert source.size == storage.file_size(f"{server.url}/x.bin") == SIZE
    for offset, length in [(7 * MIB, 3 * MIB), (5, 10), (SIZE - 5, 100), (SIZE, 1), (MIB - 1, 2), (0, SIZE + 1)]:
        assert source.pread(offset, length) == data[offset : offset + length]
    source.close()
    assert storage.read_bytes(f"{server.url}/moved/x.bin") == data
    assert storage.read_bytes(f"{server.url}/empty.bin") == b""


@pytest.mark.parametrize("ranges", [True, False])
def test_a_second_reader_fetches_nothing_again(serve: Callable[..., Server], data: bytes, ranges: bool) -> None:
    server = serve(ranges=ranges)
    for _ in range(3):
        assert read_all(f"{server.url}/x.bin") == data
    # A body that was not asked for is cut off when some of it is on its way, more where the machine is slow.
    assert SIZE <= server.sent_bytes <= 2 * SIZE
    assert len(server.log) <= 3 + 6


def test_reads_far_apart_fetch_what_they_return(serve: Callable[..., Server], data: bytes) -> None:
    server = serve()
    source = storage.open_source(f"{server.url}/x.bin")
    for offset in (11 * MIB, 2 * MIB, 9 * MIB, 4 * MIB, 7 * MIB):
        assert source.pread(offset, 1000) == data[offset : offset + 1000]
    assert server.sent_bytes == 1 + 5 * 1000


def test_the_index_of_large_members_fetches_headers(
    serve: Callable[..., Server], folder: Path, write_tar: Callable[..., Path]
) -> None:
    path = write_tar(folder / "large.tar", [(f"{i}", {"jpg": bytes(3 * MIB)}) for i in range(6)])
    server = serve()
    found = index_shard(f"{server.url}/large.tar", 0)
    expected = index_shard(str(path), 0)
    assert found.table.drop_columns("shard").equals(expected.table.drop_columns("shard"))
    assert server.sent_bytes < path.stat().st_size / 3


def test_the_next_shard_is_fetched_while_this_one_is_read(
    serve: Callable[..., Server], folder: Path, write_tar: Callable[..., Path]
) -> None:
    for name in "ab":
        write_tar(folder / f"{name}.tar", [(f"{name}{i}", {"jpg": bytes(100_000)}) for i in range(20)])
    server = serve()
    server.latency_s = 0.2
    urls = [f"{server.url}/{name}.tar" for name in "ab"]
    read_group(((0, Shard(urls[0])), (1, Shard(urls[1]))))
    paths = [path for _, path, _, _ in server.log]
    last_of_a = len(paths) - 1 - paths[::-1].index("/a.tar")
    assert paths.index("/b.tar") < last_of_a
    assert server.sent_bytes <= 1.01 * sum((folder / f"{name}.tar").stat().st_size for name in "ab")


def test_a_fifth_of_the_requests_fails(serve: Callable[..., Server], data: bytes) -> None:
    server = serve()
    server.fault_rate, server.stall_s = 0.2, 0.6
    options = {"timeout": 0.3}
    for _ in range(3):
        source = storage.open_source(f"{server.url}/x.bin", options)
        for offset in random.Random(1).sample(range(SIZE - 1000), 25):
            assert source.pread(offset, 1000) == data[offset : offset + 1000]
    assert set(server.failed) == {"500", "503", "reset", "short", "stall"}


@pytest.mark.parametrize(
    ("status", "error", "message", "requests"),
    [
        (404, InputError, "no such input", 1),
        (410, InputError, "no such input", 1),
        (401, storage.StorageError, "access denied .the server answers 401", 1),
        (403, storage.StorageError, "access denied .the server answers 403", 1),
        (429, storage.StorageError, "the server answers 429 .*10 attempts", 10),
        (503, storage.StorageError, "the server answers 503 .*10 attempts", 10),
    ],
)
def test_statuses(serve: Callable[..., Server], status: int, error: type, message: str, requests: int) -> None:
    server = serve()
    with pytest.raises(error, match=message) as caught:
        storage.file_size(f"{server.url}/status-{status}")
    assert server.url in str(caught.value)
    assert len(server.log) == requests


def test_a_server_may_ask_for_patience() -> None:
    answers = itertools.chain([Answer(503, {"Retry-After": "0"}, b""), Answer(429, {}, b"")], itertools.repeat(None))
    fine = Answer(206, {"Content-Range": "bytes 0-0/7"}, b"x")
    with Server(lambda *_: next(answers) or fine) as server:
        assert storage.file_size(server.url) == 7
        assert len(server.log) == 3


def test_a_circle_of_redirects_is_not_tried_again() -> None:
    with Server(lambda *_: Answer(302, {"Location": "/a.tar"}, b"")) as server:
        with pytest.raises(storage.StorageError, match="a.tar: the server redirects in a circle$"):
            storage.file_size(f"{server.url}/a.tar")
        assert len(server.log) < 30


def test_a_file_of_unknown_size_is_an_error(serve: Callable[..., Server]) -> None:
    server = serve(ranges=False, encoding="close")
    with pytest.raises(storage.StorageError, match="x.bin: the server does not tell its size"):
        storage.open_source(f"{server.url}/x.bin")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_body_that_never_comes_whole_is_an_error_not_the_end(folder: Path, ranges: bool) -> None:
    whole = Files(folder, ranges=ranges)

    def cut(handler, body: bytes) -> Answer:
        answer = whole(handler, body)
        headers = {**answer.headers, "Content-Length": str(len(answer.body)), "x-no-length": "1"}
        return Answer(answer.status, headers, answer.body if len(answer.body) == 1 else answer.body[:5_000])

    with Server(cut) as server:
        source = storage.open_source(f"{server.url}/x.bin")
        with pytest.raises(storage.StorageError, match=r"x.bin.*10 attempts"):
            source.pread(0, MIB)


@pytest.mark.parametrize("same_size", [True, False])
def test_a_file_that_changes_is_an_error(tmp_path: Path, same_size: bool) -> None:
    (tmp_path / "x.bin").write_bytes(bytes(5 * MIB))
    with Server(Files(tmp_path, etag=same_size)) as server:
        source = storage.open_source(f"{server.url}/x.bin")
        assert source.pread(3 * MIB, 10) == bytes(10)
        (tmp_path / "x.bin").write_bytes(b"x" * (5 * MIB - (not same_size)))
        with pytest.raises(storage.StorageError, match="x.bin changed while it was read"):
            source.pread(MIB, 10)
        assert storage.open_source(f"{server.url}/x.bin").pread(MIB, 2) == b"xx"


def test_shards_are_listed_by_a_glob(serve: Callable[..., Server], folder: Path) -> None:
    server = serve()
    assert f"{server.url}/x.bin" in expand_urls(f"{server.url}/*.bin")
    with pytest.raises(ConfigError, match="read from, not written to"):
        storage.make_folder(f"{server.url}/OUT")


def test_shown_url_hides_secrets() -> None:
    url = "https://me:pass@host/a.tar?X-Amz-Credential=AKIA&X-Amz-Signature=12&part=3&token=t"
    assert filesystems.shown_url(url) == (
        "https://host/a.tar?X-Amz-Credential=...&X-Amz-Signature=...&part=3&token=..."
    )
    with pytest.raises(storage.StorageError) as caught:
        storage.file_size("http://127.0.0.1:9/a.tar?X-Amz-Signature=12ab")
    assert "12ab" not in str(caught.value)


def test_many_threads_read_one_source(serve: Callable[..., Server], data: bytes) -> None:
    server = serve()
    source = storage.open_source(f"{server.url}/x.bin")
    offsets = [*range(0, SIZE, 150_000)]
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda o: source.pread(o, 150_000), offsets))
    assert b"".join(parts) == data


def test_a_forked_process_reads_too(serve: Callable[..., Server], data: bytes) -> None:
    server = serve()
    source = storage.open_source(f"{server.url}/x.bin")
    assert source.pread(0, 10) == data[:10]
    child = os.fork()
    if not child:
        right = source.pread(0, 2 * MIB) == data[: 2 * MIB]
        os._exit(0 if right and read_all(f"{server.url}/x.bin") == data else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert source.pread(20, 2 * MIB) == data[20 : 2 * MIB + 20]


@pytest.mark.parametrize("limit_bytes", [0, MIB, 3 * MIB])
def test_a_small_spool_costs_requests_not_bytes(
    serve: Callable[..., Server], data: bytes, limit_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "_shared", Spool(limit_bytes))
    server = serve()
    for _ in range(2):
        assert read_all(f"{server.url}/x.bin") == data


def test_a_full_disk_costs_nothing_but_requests(
    serve: Callable[..., Server], data: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small = Spool(100 * MIB)
    small._file = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115
    monkeypatch.setattr(spool, "_shared", small)
    server = serve()
    assert read_all(f"{server.url}/x.bin") == data
    assert "not kept on the disk any more: [Errno 28]" in caplog.text


def page(number: int) -> bytes:
    return bytes([number]) * PAGE_BYTES


def test_spool_drops_first_what_two_readers_have_read() -> None:
    kept = Spool(4 * PAGE_BYTES)
    for number in range(4):
        kept.put(("a", number), page(number))
    for reader in (1, 1, 2):
        assert kept.read(("a", 2), 5, 10, reader) == bytes([2]) * 5
    assert kept.read(("a", 1), 0, 3, 1) == bytes([1]) * 3
    kept.put(("b", 0), page(9))
    assert [kept.has(("a", n)) for n in range(4)] == [True, True, False, True]
    assert kept.read(("b", 0), PAGE_BYTES - 2, PAGE_BYTES, 1) == bytes([9]) * 2
    assert kept.read(("a", 2), 0, 5, 3) is None
    for number in range(50):
        kept.put(("c", number), page(number))
    assert sum(kept.has((key, n)) for key in "abc" for n in range(50)) == 4
    assert all(kept.read(("c", n), 0, 1, 1) in (None, bytes([n])) for n in range(50))
    kept.forget("c")
    assert not any(kept.has(("c", n)) for n in range(50))


def test_spool_keeps_whole_files_while_they_fit() -> None:
    kept = Spool(10)
    calls: list[str] = []

    def fetch(name: str) -> Callable[..., None]:
        return lambda file: (calls.append(name), file.write(b"123456"))

    first = kept.whole("a", fetch("a"))
    assert kept.whole("a", fetch("a")) is first
    kept.whole("b", fetch("b"))
    assert os.pread(first.fileno(), 6, 0) == b"123456"
    assert kept.whole("a", fetch("a")) is not first
    assert calls == ["a", "b", "a"]
