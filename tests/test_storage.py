"""Files by URL: patterns, ranges, atomic writes, faults."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
import pytest

from imgcurate import filesystems, storage
from imgcurate.errors import InputError
from imgcurate.patterns import expand_urls


def test_expand_urls_braces_globs_and_order(tmp_path: Path) -> None:
    for name in ("b1.tar", "a0.tar", "a1.tar", "x.txt"):
        (tmp_path / name).touch()
    expanded = expand_urls([f"{tmp_path}/{{a0,b1}}.tar", f"{tmp_path}/*1.tar"])
    assert [Path(u).name for u in expanded] == ["a0.tar", "a1.tar", "b1.tar"]
    assert [Path(u).name for u in expand_urls(f"{tmp_path}/a{{0..1}}.tar")] == ["a0.tar", "a1.tar"]
    assert expand_urls("s3://bucket/{00..02}.tar")[-1] == "s3://bucket/02.tar"


def test_expand_urls_takes_an_existing_name_with_braces_as_it_is(tmp_path: Path) -> None:
    odd = tmp_path / "a{1,2}[x].tar"
    odd.touch()
    assert expand_urls(str(odd)) == [str(odd)]


def test_expand_urls_makes_local_paths_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.tar").touch()
    assert expand_urls("a.tar") == [str(tmp_path / "a.tar")]
    assert expand_urls("*.tar") == [str(tmp_path / "a.tar")]


def test_expand_urls_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing matches"):
        expand_urls(f"{tmp_path}/*.tar")
    with pytest.raises(InputError, match="no input was given"):
        expand_urls([])
    with pytest.raises(InputError, match="unbalanced braces"):
        expand_urls("a{1,2.tar")
    with pytest.raises(InputError, match="no such input"):
        storage.file_size(str(tmp_path / "none.tar"))
    with pytest.raises(InputError, match="is a folder"):
        storage.file_size(str(tmp_path))


def test_atomic_write_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="stop"), storage.atomic_write(str(target)) as out:
        out.write(b"half")
        raise RuntimeError("stop")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out.bin"]
    with storage.atomic_write(str(target)) as out:
        out.write(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"


def test_atomic_write_into_a_missing_folder_is_a_clear_error(tmp_path: Path) -> None:
    with (
        pytest.raises(storage.StorageError, match="cannot write .*No such file or directory"),
        storage.atomic_write(str(tmp_path / "no" / "x")),
    ):
        pass


@pytest.mark.parametrize("protocol", ["local", "memory"])
def test_source_reads_ranges(protocol: str, tmp_path: Path) -> None:
    url = str(tmp_path / "x.bin") if protocol == "local" else "memory://storage-test/x.bin"
    with storage.atomic_write(url) as out:
        out.write(bytes(range(100)))
    source = storage.open_source(url)
    assert source.size == 100
    assert source.pread(10, 5) == bytes(range(10, 15))
    assert source.pread(95, 50) == bytes(range(95, 100))
    assert source.pread(100, 5) == b""
    source.close()


def test_remote_short_reads_and_errors_are_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "memory://storage-test/flaky.bin"
    with storage.atomic_write(url) as out:
        out.write(b"0123456789" * 100)
    filesystem = fsspec.filesystem("memory")
    whole = filesystem.cat_file
    faults = iter(["short", "reset", "fine"])

    def flaky(path: str, start: int | None = None, end: int | None = None, **kwargs: object) -> bytes:
        fault = next(faults)
        if fault == "reset":
            raise ConnectionResetError("reset by peer")
        data = whole(path, start=start, end=end, **kwargs)
        return data[: len(data) // 2] if fault == "short" else data

    source = storage.open_source(url)
    monkeypatch.setattr(source._file._fs, "cat_file", flaky)
    monkeypatch.setattr(filesystems.time, "sleep", lambda _: None)
    assert source.pread(5, 20) == b"56789012345678901234"
    assert next(faults, None) is None


def test_remote_read_gives_up_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "memory://storage-test/dead.bin"
    with storage.atomic_write(url) as out:
        out.write(b"x" * 10)
    source = storage.open_source(url)

    def dead(*args: object, **kwargs: object) -> bytes:
        raise OSError("503 slow down")

    monkeypatch.setattr(source._file._fs, "cat_file", dead)
    monkeypatch.setattr(filesystems.time, "sleep", lambda _: None)
    with pytest.raises(storage.StorageError, match="cannot read .*dead.bin at byte 0: 503 slow down .10 attempts"):
        source.pread(0, 5)
