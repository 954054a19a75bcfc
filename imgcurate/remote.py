"""Remote files as sources: what is read in order is fetched ahead, and what was fetched is kept for a second reading.

Reads that follow each other make a *stream*: whole pages of 1 MiB are fetched, up to 4 MiB in a request,
by threads that run ahead of the reader, at first a few pages, then twice as far as it has come, 32 MiB at
most. The pages go to the process's spool, where the decoder finds what the index fetched. Other reads
fetch just the bytes that are asked for. In a run the bytes of a shard so travel once for its index and
its images, and those of the kept samples once more for the export, unless the spool is too small for
what the tasks of a process have in hand.

Memory is at most 64 MiB in requests under way, whatever the number of readers, and the bytes that are
returned.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Hashable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import IO, Final

from imgcurate.errors import ImgcurateError
from imgcurate.filesystems import StorageError, StorageOptions, shown_url
from imgcurate.objects import RemoteFile, open_remote
from imgcurate.spool import PAGE_BYTES, Page, shared_spool

__all__ = ["GAP_BYTES", "RemoteSource", "read_ahead"]

GAP_BYTES: Final = 256 * 1024
_PAGES_PER_REQUEST: Final = 4
_AHEAD_BYTES: Final = 32 * 1024 * 1024
_THREADS: Final = 8
_REQUEST_BYTES: Final = _PAGES_PER_REQUEST * PAGE_BYTES
_readers = itertools.count()


class RemoteSource:
    """A file of an fsspec filesystem, read by ranges; safe to use from several threads.

    Parameters
    ----------
    url : str
        Where it lies.
    storage_options : mapping, optional
        Passed to fsspec.
    gap_bytes : int
        Reads that begin no further behind the end of the last one are one stream: what lies between
        is fetched as well.

    Attributes
    ----------
    size : int
        Its length in bytes.
    """

    def __init__(self, url: str, storage_options: StorageOptions | None = None, *, gap_bytes: int = GAP_BYTES) -> None:
        self.url, self._options, self._gap_bytes = url, storage_options, gap_bytes
        self._reader = next(_readers)
        self._last_stop = self._run_bytes = self._asked_bytes = 0
        self._whole: IO[bytes] | None = None
        self._open()

    def _open(self) -> None:
        # Again in a forked process, for a thread of its parent may have held the lock.
        self._process, self._whole, self._lock = os.getpid(), None, threading.Lock()
        self._file = open_remote(self.url, self._options)
        # What cannot be told from another state of the file is not kept for other readers.
        self._key: Hashable = (
            (self.url, repr(self._options), self._file.size, self._file.version) if self._file.version else object()
        )
        self._fetches = _fetches()
        if self._file.size < 0:
            self._fetch_whole()
        self.size = self._file.size

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`, fewer only where the file ends.

        Raises
        ------
        StorageError
            If they cannot be read, or the file changed since it was opened.
        """
        stop = min(offset + length, self.size)
        if stop <= offset:
            return b""
        if self._process != os.getpid():
            self._open()
        if not self._file.has_ranges:
            return os.pread((self._whole or self._fetch_whole()).fileno(), stop - offset, offset)
        ask_for = self._next_range(offset, stop)
        if ask_for is not None:
            self._fetches.start(self._file, self._key, *ask_for)
        elif not self._fetches.hold(self._key, offset, stop):
            return self._fetches.exactly(self._file, offset, stop)
        return self._fetches.pages(self._file, self._key, offset, stop, self._reader)

    def _next_range(self, offset: int, stop: int) -> tuple[int, int] | None:
        """Return the range to ask for, so that the stream goes on, which may be empty; None for a read in no stream."""
        with self._lock:
            in_order = -self._gap_bytes <= offset - self._last_stop <= self._gap_bytes
            if not in_order and self.size > PAGE_BYTES:
                self._last_stop, self._run_bytes, self._asked_bytes = stop, 0, 0
                return None
            self._run_bytes += max(0, stop - self._last_stop)
            self._last_stop = max(stop, self._last_stop)
            ahead = min(_AHEAD_BYTES, max(2 * self._run_bytes, 4 * self._gap_bytes))
            target = min(stop + ahead, self.size)
            asked = self._asked_bytes
            if asked < stop:
                begin = max(offset, asked)
            elif target - asked >= _REQUEST_BYTES or target == self.size:
                begin = asked
                if target < self.size:
                    target -= (target - asked) % _REQUEST_BYTES
            else:
                return asked, asked
            self._asked_bytes = max(asked, min(-(-target // PAGE_BYTES) * PAGE_BYTES, self.size))
            return begin, max(begin, target)

    def read_ahead(self) -> None:
        """Fetch the beginning of the file in the background, for who will read it."""
        if self._file.version and self._file.has_ranges:
            self._fetches.start(self._file, self._key, 0, min(self.size, _AHEAD_BYTES // 4))

    def _fetch_whole(self) -> IO[bytes]:
        try:
            self._whole = shared_spool().whole(self._key, self._file.download)
        except OSError as exc:
            raise StorageError(f"cannot keep {shown_url(self.url)}, which its server gives only whole: {exc}") from exc
        if self._file.size < 0:
            self._file.size = os.fstat(self._whole.fileno()).st_size
        return self._whole

    def close(self) -> None:
        """Let what is fetched ahead, and was not begun, be; the connections belong to the filesystem."""
        self._file.closed = True
        self._fetches.cancel(self._file)
        if not self._file.version:
            shared_spool().forget(self._key)


class _Fetches:
    """The requests of a process that are under way: each page is asked for once, by a few threads."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="imgcurate-fetch")
        self._lock = threading.Lock()
        self._under_way: dict[Page, tuple[RemoteFile, int, Future[bytes]]] = {}

    def hold(self, key: Hashable, offset: int, stop: int) -> bool:
        """Return whether all pages of a range are kept or under way."""
        spool = shared_spool()
        pages = [(key, number) for number in _pages(offset, stop)]
        with self._lock:
            return all(page in self._under_way or spool.has(page) for page in pages)

    def pages(self, file: RemoteFile, key: Hashable, offset: int, stop: int, reader: int) -> bytes:
        """Return a range from pages that are kept or under way; those that are not are asked for."""
        parts = []
        for number in _pages(offset, stop):
            begin, end = max(offset - number * PAGE_BYTES, 0), min(stop - number * PAGE_BYTES, PAGE_BYTES)
            parts.append(self._part(file, (key, number), begin, end, reader))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _part(self, file: RemoteFile, page: Page, begin: int, end: int, reader: int) -> bytes:
        spool = shared_spool()
        while True:
            with self._lock:
                fetch = self._under_way.get(page)
            if fetch is None:
                part = spool.read(page, begin, end, reader)
                if part is not None:
                    return part
                # It was dropped already, or never kept.
                self.start(file, page[0], page[1] * PAGE_BYTES, page[1] * PAGE_BYTES + end)
                with self._lock:
                    fetch = self._under_way.get(page)
                if fetch is None:
                    continue
            at = (page[1] - fetch[1]) * PAGE_BYTES
            try:
                return fetch[2].result()[at + begin : at + end]
            except (CancelledError, StorageError):
                # Given up by a reader that was closed meanwhile.
                if fetch[0] is file or not fetch[0].closed:
                    raise

    def start(self, file: RemoteFile, key: Hashable, offset: int, stop: int) -> None:
        """Begin to fetch the pages of a range that are neither kept nor under way."""
        spool, numbers = shared_spool(), list[int]()
        with self._lock:
            for number in _pages(offset, stop):
                page = (key, number)
                if page in self._under_way or spool.has(page):
                    self._submit(file, key, numbers)
                    numbers = []
                    continue
                numbers.append(number)
                if len(numbers) == _PAGES_PER_REQUEST:
                    self._submit(file, key, numbers)
                    numbers = []
            self._submit(file, key, numbers)

    def _submit(self, file: RemoteFile, key: Hashable, numbers: list[int]) -> None:
        if numbers:
            future = self._pool.submit(self._fetch, file, key, numbers)
            self._under_way |= {(key, n): (file, numbers[0], future) for n in numbers}

    def _fetch(self, file: RemoteFile, key: Hashable, numbers: list[int]) -> bytes:
        try:
            data = file.read(numbers[0] * PAGE_BYTES, min((numbers[-1] + 1) * PAGE_BYTES, file.size))
            for i, number in enumerate(numbers):
                shared_spool().put((key, number), data[i * PAGE_BYTES : (i + 1) * PAGE_BYTES])
            return data
        finally:
            self._ended(key, numbers)

    def _ended(self, key: Hashable, numbers: list[int]) -> None:
        with self._lock:
            for number in numbers:
                self._under_way.pop((key, number), None)

    def exactly(self, file: RemoteFile, offset: int, stop: int) -> bytes:
        """Return a range that belongs to no stream, and keep nothing of it."""
        starts = range(offset, stop, _REQUEST_BYTES)
        if len(starts) == 1:
            return file.read(offset, stop)
        return b"".join(self._pool.map(lambda start: file.read(start, min(start + _REQUEST_BYTES, stop)), starts))

    def cancel(self, file: RemoteFile) -> None:
        """Forget the requests for a file that have not begun."""
        with self._lock:
            for page in [p for p, fetch in self._under_way.items() if fetch[0] is file and fetch[2].cancel()]:
                del self._under_way[page]

    def ahead(self, url: str, storage_options: StorageOptions | None) -> None:
        """Open a file in the background and begin to fetch it."""

        def begin() -> None:
            # Who reads it meets the same error, and says so.
            with contextlib.suppress(ImgcurateError):
                RemoteSource(url, storage_options).read_ahead()

        self._pool.submit(begin)


def _pages(offset: int, stop: int) -> range:
    return range(offset // PAGE_BYTES, -(-stop // PAGE_BYTES))


_shared: _Fetches | None = None
_shared_lock = threading.Lock()


def _fetches() -> _Fetches:
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = _Fetches()
        return _shared


def _forget() -> None:
    """Begin anew in a forked process: it has none of its parent's threads."""
    global _shared, _shared_lock
    _shared, _shared_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)


def read_ahead(url: str, storage_options: StorageOptions | None = None) -> None:
    """Begin to fetch a remote file that will be read soon; returns at once, and never fails."""
    _fetches().ahead(url, storage_options)
