"""The mark of a finished run: its counts, and size and checksum of every file that it wrote.

``OUT/_SUCCESS`` appears when all other files are there, and is taken away before any of them changes: who finds
it finds a whole data set. :mod:`imgcurate.verify` proves what it says.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from imgcurate.catalog import load_record
from imgcurate.errors import CatalogError
from imgcurate.storage import (
    StorageOptions,
    atomic_write,
    is_local,
    join_url,
    list_files,
    local_path,
    open_source,
    remove,
)

__all__ = ["SUCCESS", "UNFINISHED", "FileDigest", "HashingWriter", "Success", "file_digest"]

SUCCESS: Final = "_SUCCESS"
UNFINISHED: Final = "_UNFINISHED"
"""Stands in a folder as long as an export is written there."""
_FORMAT: Final = 1
_BLOCK_BYTES: Final = 1024**2
_THREAD_FROM_BYTES: Final = 2 * 1024**2
_WAITING_BYTES: Final = 8 * 1024**2
_FLUSH_BYTES: Final = 32 * 1024**2


@dataclass(frozen=True, slots=True)
class FileDigest:
    """What tells a file from every other.

    Attributes
    ----------
    nbytes : int
        Its size.
    sha256 : str
        64 hexadecimal digits.
    """

    nbytes: int
    sha256: str


class HashingWriter:
    """A binary file that is written from its beginning to its end, and hashed on the way.

    Parameters
    ----------
    out : binary file
        Where the bytes go; None only hashes them.

    Notes
    -----
    What is large is hashed by a thread of its own, while the caller reads and writes. Up to 8 MiB, or one piece, wait
    for it. Another one has the disk write what is there already, every 32 MiB, so that whoever flushes the file at its
    end has little to wait for.
    """

    def __init__(self, out: IO[bytes] | None = None) -> None:
        self._out = out
        self._hash = hashlib.sha256()
        self._nbytes = self._waiting_bytes = 0
        self._hasher: ThreadPoolExecutor | None = None
        self._waiting: deque[tuple[int, Future[None]]] = deque()
        self._flushed_bytes = 0
        self._flush: Future[None] | None = None

    def write(self, data: bytes) -> int:
        """Write some bytes."""
        self._nbytes += len(data)
        if self._nbytes > _THREAD_FROM_BYTES:
            self._hash_soon(data)
        else:
            self._hash.update(data)
        if self._out is not None:
            self._out.write(data)
            if self._nbytes - self._flushed_bytes >= _FLUSH_BYTES and (self._flush is None or self._flush.done()):
                self._take_flushed()
                self._flushed_bytes = self._nbytes
                self._flush = _flusher().submit(_to_disk, self._out)
        return len(data)

    def _take_flushed(self) -> None:
        if self._flush is not None:
            self._flush.result()

    def _hash_soon(self, data: bytes) -> None:
        if self._hasher is None:
            self._hasher = ThreadPoolExecutor(1, thread_name_prefix="imgcurate-hash")
        while self._waiting and self._waiting_bytes + len(data) > _WAITING_BYTES:
            self._take_hashed()
        self._waiting.append((len(data), self._hasher.submit(self._hash.update, data)))
        self._waiting_bytes += len(data)

    def _take_hashed(self) -> None:
        nbytes, future = self._waiting.popleft()
        future.result()
        self._waiting_bytes -= nbytes

    @property
    def digest(self) -> FileDigest:
        """Size and checksum of what was written so far; of a file it has to be asked for before that is closed."""
        while self._waiting:
            self._take_hashed()
        self._take_flushed()
        return FileDigest(self._nbytes, self._hash.hexdigest())


@functools.cache
def _flusher() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="imgcurate-flush")


def _to_disk(out: IO[bytes]) -> None:
    """Have the disk write what it was given of a file; an error is told once, so it must not be lost."""
    os.fdatasync(out.fileno())


def file_digest(url: str, storage_options: StorageOptions | None = None) -> FileDigest:
    """Read a file, and return its size and checksum.

    Raises
    ------
    StorageError
        If it does not exist, or cannot be read.
    """
    source = open_source(url, storage_options)
    hashing = HashingWriter()
    try:
        position = 0
        while block := source.pread(position, _BLOCK_BYTES):
            hashing.write(block)
            position += len(block)
    finally:
        source.close()
    return hashing.digest


@dataclass(frozen=True)
class Success:
    """What a finished run says about itself; one JSON file.

    Attributes
    ----------
    fingerprint : str
        That of the manifest.
    samples : int
        Input samples.
    counts : dict of str to int
        Samples by status.
    files : dict of str to FileDigest
        Every file that is part of the result, by its path within the folder.
    """

    fingerprint: str
    samples: int
    counts: Mapping[str, int]
    files: Mapping[str, FileDigest] = field(default_factory=dict)

    def save(self, folder: str, storage_options: StorageOptions | None = None) -> None:
        """Write ``folder/_SUCCESS`` atomically."""
        content: dict[str, Any] = {"format": _FORMAT, **asdict(self)}
        with atomic_write(join_url(folder, SUCCESS), storage_options) as out:
            out.write(json.dumps(content, indent=1).encode())

    def lost(self, folder: str) -> list[str]:
        """Return which files are gone, or, on this machine, have another size; contents are not looked at."""
        within: dict[str, list[str]] = {}
        for name in self.files:
            within.setdefault(name.rpartition("/")[0], []).append(name)
        there = {f"{sub}/{n}" if sub else n for sub in within for n in list_files(join_url(folder, sub), "")}
        lost = [name for name in self.files if name not in there]
        if is_local(folder):
            root = Path(local_path(folder))
            sizes = ((name, digest.nbytes) for name, digest in self.files.items() if name in there)
            lost += [name for name, nbytes in sizes if (root / name).stat().st_size != nbytes]
        return lost

    @staticmethod
    def lost_from(folder: str) -> list[str]:
        """Return the files of a run that is done which are not there any more as they were; this one, if it is not."""
        try:
            success = Success.load(folder)
        except CatalogError:
            success = None
        return [SUCCESS] if success is None else success.lost(folder)

    @staticmethod
    def load(folder: str, storage_options: StorageOptions | None = None) -> Success | None:
        """Read ``folder/_SUCCESS``; None if there is none.

        Raises
        ------
        CatalogError
            If it cannot be understood.
        """

        def make(content: dict[str, Any]) -> Success:
            files = {name: FileDigest(**digest) for name, digest in content.pop("files").items()}
            return Success(**content, files=files)

        return load_record(join_url(folder, SUCCESS), _FORMAT, make, storage_options)

    @staticmethod
    def withdraw(folder: str, storage_options: StorageOptions | None = None) -> None:
        """Take the mark away, before something changes."""
        remove(join_url(folder, SUCCESS), storage_options)
