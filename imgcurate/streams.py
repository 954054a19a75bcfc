"""Bytes that can only be made from their beginning, as a file with offsets; compressed archives are such.

Offsets are those of the bytes that come out. Whoever reads forward, as the index, the decoder and the
export do, makes them once; going back further than a little begins anew.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from imgcurate.storage import LocalSource, Source

__all__ = [
    "UNKNOWN_SIZE",
    "DamagedStreamError",
    "ForwardSource",
    "SourceFile",
    "decompressed",
    "is_compressed",
    "read_table",
]

UNKNOWN_SIZE: Final = 2**63 - 1
_BLOCK_BYTES: Final = 256 * 1024
_ZSTD_READ_BYTES: Final = 32 * 1024
_KEPT_BYTES: Final = 1024 * 1024
_READ_BYTES: Final = 4 * 1024 * 1024
# Tars of images hardly shrink, and tars of text some tenfold; only then does a limit matter.
_MAX_EXPANSION: Final = 100
_MAX_EXPANSION_FROM_BYTES: Final = 256 * 1024 * 1024
# What gzip and zstd say of bytes behind a stream that are not the beginning of another one.
_TRAILING: Final = ("Not a gzipped file", "Unknown frame descriptor")
_ERRORS: Final = (OSError, EOFError, zlib.error, lzma.LZMAError)


class DamagedStreamError(Exception):
    """Bytes that cannot be made any further; the message says why."""


class TrailingBytesError(DamagedStreamError):
    """What follows a stream that is whole, and is not another one."""


class ForwardSource:
    """Bytes that an iterator makes in order, as a :class:`Source`.

    Parameters
    ----------
    url : str
        Where they come from.
    blocks : callable
        Returns an iterator of non-empty blocks of bytes that begins at the beginning. It may raise
        :class:`DamagedStreamError`: the bytes before count.
    close : callable
        Releases what is held.

    Attributes
    ----------
    size : int
        Number of bytes; :data:`UNKNOWN_SIZE` until the end was seen.
    damage : str
        Why the bytes end before their end, or cannot be trusted, in words; else empty.
    is_whole : bool
        Whether what is damaged comes behind a stream that is whole.

    Notes
    -----
    Memory is one call's bytes and the last MiB before. For one thread at a time.
    """

    def __init__(self, url: str, blocks: Callable[[], Iterator[bytes]], close: Callable[[], None]) -> None:
        self.url, self.size, self.damage, self.is_whole = url, UNKNOWN_SIZE, "", False
        self._make, self._close = blocks, close
        self._blocks: Iterator[bytes] | None = None
        self._window: deque[bytes] = deque()
        self._start = self._end = 0

    def reaches(self, end: int) -> bool:
        """Return whether there are at least `end` bytes; makes bytes up to there if that is not known yet."""
        if self.size == UNKNOWN_SIZE and end > self._end:
            self._advance(end, end)
        return end <= self.size

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`, fewer only where the bytes end."""
        if length <= 0 or offset >= self.size:
            return b""
        if offset < self._start or self._blocks is None:
            self._rewind()
        self._advance(min(offset + length, self.size), offset)
        pieces, start = [], self._start
        for block in self._window:
            first, last = max(offset - start, 0), min(offset + length - start, len(block))
            if first < last:
                pieces.append(block[first:last])
            start += len(block)
        return b"".join(pieces)

    def close(self) -> None:
        """Release what is held."""
        self._rewind()
        self._close()

    def _rewind(self) -> None:
        close = getattr(self._blocks, "close", None)
        if close is not None:
            close()
        self._blocks, self._start, self._end = None, 0, 0
        self._window.clear()

    def _advance(self, end: int, keep_from: int) -> None:
        """Make bytes up to `end`; those from a little before `keep_from` stay in the window."""
        if self._blocks is None:
            self._blocks = self._make()
        while self._end < end:
            try:
                block = next(self._blocks, b"")
            except DamagedStreamError as exc:
                self.damage, self.is_whole, block = str(exc), isinstance(exc, TrailingBytesError), b""
            if not block:
                self.size = self._end
                return
            self._window.append(block)
            self._end += len(block)
            while self._start + len(self._window[0]) < min(keep_from, self._end) - _KEPT_BYTES:
                self._start += len(self._window.popleft())


class SourceFile(io.RawIOBase):
    """A :class:`Source` as a binary file, for libraries that read from one."""

    def __init__(self, source: Source) -> None:
        self._source, self._position = source, 0

    def readinto(self, buffer: Any) -> int:
        """Read into `buffer` and return the number of bytes."""
        data = self._source.pread(self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def read_buffer(self, nbytes: int) -> pa.Buffer:
        """Read as Arrow asks for it, without a copy.

        NumPy asks the system for large pages where it allocates much, which come many times as fast as others.
        """
        if isinstance(self._source, LocalSource):
            array = np.empty(max(0, min(nbytes, self._source.size - self._position)), np.uint8)
            data: Any = array[: self._source.pread_into(self._position, array.data)]
        else:
            data = self._source.pread(self._position, nbytes)
        self._position += len(data)
        return pa.py_buffer(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Set the position and return it."""
        self._position = offset + (0, self._position, self._source.size)[whence]
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True


def read_table(source: Source, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file.

    In this thread alone: threads of Arrow's hold a Python file for a moment after its last byte was read, and a
    process that ends in that moment is aborted.

    Raises
    ------
    KeyError
        If a column is missing.
    pyarrow.ArrowException, OSError
        If the file is damaged or cannot be read.
    """
    with SourceFile(source) as raw, pq.ParquetFile(raw, pre_buffer=False) as file:
        missing = [c for c in columns or () if c not in file.schema_arrow.names]
        if missing:
            raise KeyError(f"there is no column {missing[0]!r}")
        return file.read(None if columns is None else list(columns), use_threads=False)


def _buffered(source: Source) -> io.BufferedReader:
    return io.BufferedReader(SourceFile(source), _READ_BYTES)


class _ZstdFile:
    """A zstd file by Arrow, with the two methods of Python's own compressed files that are used here."""

    def __init__(self, source: Source) -> None:
        self._source, self._total, self._most = source, 0, _ZSTD_READ_BYTES
        self._open()

    def _open(self) -> None:
        self._stream = pa.CompressedInputStream(pa.PythonFile(_buffered(self._source), mode="r"), "zstd")

    def __enter__(self) -> _ZstdFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stream.close()

    def read1(self, size: int) -> bytes:
        try:
            data: bytes = self._stream.read(min(size, self._most))
        except OSError:
            if self._most == 1:
                raise
            # Arrow keeps nothing of a read in which it meets damage: what is before it is read in small bites.
            self._most = 512 if self._most > 512 else 1
            self._open()
            for start in range(0, self._total, _ZSTD_READ_BYTES):
                self._stream.read(min(_ZSTD_READ_BYTES, self._total - start))
            return self.read1(size)
        self._total += len(data)
        return data


_FORMATS: Final[dict[bytes, tuple[str, Callable[[Any], Any]]]] = {
    b"\x1f\x8b": ("gzip", lambda source: gzip.GzipFile(fileobj=_buffered(source))),
    b"\x28\xb5\x2f\xfd": ("zstd", _ZstdFile),
    **{bytes([i]) + b"\x2a\x4d\x18": ("zstd", _ZstdFile) for i in range(0x50, 0x60)},
    b"BZh": ("bzip2", lambda source: bz2.BZ2File(_buffered(source))),
    b"\xfd7zXZ\x00": ("xz", lambda source: lzma.LZMAFile(_buffered(source))),  # noqa: SIM115 - closed by who reads
}


def is_compressed(head: bytes) -> bool:
    """Return whether a file that begins with `head` is compressed by gzip, zstd, bzip2 or xz."""
    return any(head.startswith(magic) for magic in _FORMATS)


def decompressed(source: Source) -> ForwardSource:
    """Return the bytes that a compressed file holds; closing it closes `source`.

    Parameters
    ----------
    source : Source
        A file that begins with the magic of gzip, zstd, bzip2 or xz; several members or frames
        after one another are one stream.

    Notes
    -----
    A file that expands to more than 100 times its size is taken for a bomb, and ends there, with the
    reason in ``damage``; up to 256 MiB no ratio is too much.
    """
    head = source.pread(0, 8)
    name, open_ = next(format_ for magic, format_ in _FORMATS.items() if head.startswith(magic))
    limit = max(_MAX_EXPANSION_FROM_BYTES, _MAX_EXPANSION * source.size)

    def blocks() -> Iterator[bytes]:
        total = 0
        try:
            with open_(source) as stream:
                while block := stream.read1(_BLOCK_BYTES):
                    total += len(block)
                    if total > limit:
                        raise DamagedStreamError(
                            f"the {name} stream has more than {limit:,} bytes, {_MAX_EXPANSION} times those of the file"
                        )
                    yield block
        except _ERRORS as exc:
            if total and any(words in str(exc) for words in _TRAILING):
                raise TrailingBytesError(f"bytes that are no {name} follow the {name} stream") from exc
            raise DamagedStreamError(f"the {name} stream is damaged after {total:,} bytes: {exc}") from exc

    return ForwardSource(source.url, blocks, source.close)
