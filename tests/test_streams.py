"""Compressed tars, read by streaming: the same index and bytes as of the plain tar, and bounded bombs."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imgcurate import schema
from imgcurate.archives import Archives, open_archive
from imgcurate.members import MemberColumns
from imgcurate.shards import index_shard
from imgcurate.storage import open_source
from imgcurate.streams import UNKNOWN_SIZE, DamagedStreamError, ForwardSource, SourceFile, decompressed, is_compressed


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


def zstd_stream(data: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    return out.getvalue().to_pybytes()


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress, "zstd": zstd, "zstd stream": zstd_stream, "bzip2": bz2.compress, "xz": lzma.compress,
}  # fmt: skip


def tar_of(samples: int, seed: int = 0, image_bytes: int = 30_000) -> bytes:
    random, out = np.random.default_rng(seed), io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(samples):
            long = "x" * 150 if i % 7 == 3 else "s"
            for ext, data in (("jpg", random.bytes(int(random.integers(0, image_bytes)))), ("txt", f"c{i}".encode())):
                info = tarfile.TarInfo(f"{long}/{i:04d}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "plain.tar"
    path.write_bytes(tar_of(120))
    return path


@pytest.mark.parametrize("compress", COMPRESSORS.values(), ids=COMPRESSORS.keys())
def test_a_compressed_tar_has_the_index_and_the_bytes_of_the_plain_one(compress, plain: Path, tmp_path: Path) -> None:
    data = plain.read_bytes()
    # Two members or frames after one another are one stream; the name says nothing.
    path = tmp_path / "a.tar"
    path.write_bytes(compress(data[:700_000]) + compress(data[700_000:]))
    ours, expected = (index_shard(str(p), 3, columns=MemberColumns(("txt",))) for p in (path, plain))
    assert ours.problems == expected.problems
    assert ours.nbytes == path.stat().st_size
    assert ours.table.drop_columns("shard").equals(expected.table.drop_columns("shard"))
    with Archives() as archives:
        for row in ours.table.to_pylist():
            start, length = row["spans"]
            assert archives(str(path)).pread(start, length) == data[start : start + length]


@pytest.mark.parametrize("compress", COMPRESSORS.values(), ids=COMPRESSORS.keys())
def test_a_cut_stream_gives_the_samples_before_and_a_row(compress, tmp_path: Path) -> None:
    path = tmp_path / "a.tar.z"
    data = compress(tar_of(40, image_bytes=300_000))
    path.write_bytes(data[: len(data) // 2])
    table = index_shard(str(path), 0).table
    status = table[schema.STATUS].to_pylist()
    assert status == ["ok"] * (len(status) - 1) + ["tar_error"]
    assert 10 < len(status) < 30
    reason = table[schema.REASON].to_pylist()[-1]
    assert "truncated tar" in reason
    assert "stream is damaged after" in reason


def test_a_stream_that_breaks_between_two_members_is_not_taken_for_the_end(tmp_path: Path) -> None:
    data = tar_of(4)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        third = tar.getmembers()[4]
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(data[: third.offset])[:-8] + b"\0" * 8)
    table = index_shard(str(path), 0).table
    assert table[schema.STATUS].to_pylist() == ["ok", "ok", "tar_error"]
    assert table[schema.REASON].to_pylist()[2].startswith("the gzip stream is damaged after")


@pytest.mark.parametrize("compress", [gzip.compress, zstd, zstd_stream], ids=["gzip", "zstd", "zstd stream"])
def test_rubbish_after_the_end_mark_is_reported(compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(compress(tar_of(3)) + b"rubbish behind it, of some length")
    index = index_shard(str(path), 0)
    assert index.table[schema.STATUS].to_pylist() == ["ok"] * 3
    assert [p.kind for p in index.problems] == ["damaged after the end mark"]


def test_a_wrong_checksum_is_a_row(tmp_path: Path) -> None:
    """Bytes that were altered are found by the checksum behind them alone, when all samples are known."""
    data = bytearray(gzip.compress(tar_of(5), compresslevel=0))
    data[len(data) // 2] ^= 1
    path = tmp_path / "a.tar.gz"
    path.write_bytes(data)
    table = index_shard(str(path), 0).table
    assert table[schema.STATUS].to_pylist() == ["ok"] * 5 + ["tar_error"]
    reason = table[schema.REASON].to_pylist()[-1]
    assert "CRC check failed" in reason
    assert "any sample before may not be as it was" in reason


def test_frames_to_skip_are_skipped(plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tar.zst"
    path.write_bytes(b"\x5a\x2a\x4d\x18\x04\0\0\0abcd" + zstd(plain.read_bytes()))
    assert len(index_shard(str(path), 0).table) == 120


@given(
    st.lists(st.binary(max_size=700), max_size=12),
    st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 3000)), max_size=12),
)
@settings(max_examples=100, deadline=None)
def test_forward_source_reads_like_a_file(blocks: list[bytes], reads: list[tuple[int, int]]) -> None:
    blocks = [b for b in blocks if b]
    data = b"".join(blocks)
    source = ForwardSource("x", lambda: iter(blocks), lambda: None)
    for offset, length in reads:
        assert source.pread(offset, length) == data[offset : offset + length]
        assert source.reaches(offset) == (offset <= len(data))
    assert source.size in (len(data), UNKNOWN_SIZE)


def test_forward_source_keeps_little_and_begins_anew() -> None:
    started = []

    def blocks():
        started.append(True)
        yield from (bytes([i % 256]) * 100_000 for i in range(300))

    source = ForwardSource("x", blocks, lambda: None)
    assert source.reaches(29_000_000)
    assert sum(map(len, source._window)) < 2_000_000
    assert source.pread(28_950_000, 10) == bytes([289 % 256]) * 10
    assert len(started) == 1
    assert source.pread(5, 3) == b"\0\0\0"
    assert len(started) == 2


def test_forward_source_tells_damage_once_it_is_met() -> None:
    def blocks():
        yield b"abc"
        raise DamagedStreamError("broken")

    source = ForwardSource("x", blocks, lambda: None)
    assert (source.pread(0, 10), source.size, source.damage) == (b"abc", 3, "broken")


def test_is_compressed_goes_by_magic() -> None:
    assert all(is_compressed(c(b"abc")) for c in COMPRESSORS.values())
    assert not any(map(is_compressed, (b"", b"PK\x03\x04", b"abc", b"\x1f")))


def test_source_file_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(range(256)) * 10)
    file = SourceFile(open_source(str(path)))
    file.seek(-6, 2)
    assert (file.tell(), file.read(), file.readable(), file.seekable()) == (2554, bytes(range(250, 256)), True, True)
    file.seek(3)
    file.seek(1, 1)
    assert file.read(2) == b"\4\5"


BOMB = """
import resource, sys
from imgcurate.shards import index_shard
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
index = index_shard(sys.argv[1], 0)
print(index.table["status"].to_pylist(), index.table["reason"].to_pylist()[-1])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_bomb_ends_early_and_costs_no_memory(kind: str, tmp_path: Path) -> None:
    """Gigabytes of zeros in a megabyte or less, as the data of one member."""
    head = tarfile.TarInfo("good.jpg")
    head.size = 700
    bomb = tarfile.TarInfo("bomb.jpg")
    bomb.size = 8 * 1024**4
    start = head.tobuf() + b"j" * 700 + b"\0" * 324 + bomb.tobuf(tarfile.GNU_FORMAT)
    path = tmp_path / "bomb.tar.gz"
    if kind == "gzip":
        with gzip.open(path, "wb", compresslevel=1) as out:
            out.write(start)
            for _ in range(700):
                out.write(bytes(1024**2))
    else:
        with pa.CompressedOutputStream(str(path), "zstd") as out:
            out.write(start)
            for _ in range(3000):
                out.write(bytes(1024**2))
    done = subprocess.run(
        [sys.executable, "-c", BOMB, str(path)], capture_output=True, text=True, timeout=120, check=True
    )
    said, grown_mib = done.stdout.splitlines()
    assert said.startswith("['ok', 'tar_error']"), said
    assert "truncated tar" in said
    assert "more than" in said
    assert int(grown_mib) < 100


def test_decompressed_closes_its_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(b"abc"))
    inner = open_source(str(path))
    source = decompressed(inner)
    assert source.pread(1, 5) == b"bc"
    source.close()
    assert inner._fd == -1


def test_archives_go_on_where_the_last_task_stopped(plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(plain.read_bytes()))
    with Archives() as archives:
        first = archives(str(path))
        assert first.pread(0, 512) == plain.read_bytes()[:512]
    with Archives() as archives:
        assert archives(str(path)) is first
    path.write_bytes(gzip.compress(tar_of(1)))
    with Archives() as archives:
        assert archives(str(path)) is not first
    assert isinstance(open_archive(str(path)), ForwardSource)
