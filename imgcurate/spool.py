"""What was fetched from remote files, kept on the local disk until it is read again.

A process has one spool, of two kinds of anonymous temporary files: one of pages of 1 MiB, and one for
each whole file that could not be read by ranges. Nothing is left behind when the process ends, however it
ends. Where the disk is full, a few pages are kept in memory instead.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from imgcurate.errors import ConfigError

__all__ = ["PAGE_BYTES", "Spool", "check_room", "shared_spool", "temporary_file"]

PAGE_BYTES: Final = 1024 * 1024
_LIMIT_BYTES: Final = 4 * 1024**3
_SHARE_OF_FREE: Final = 4
_MEMORY_PAGES: Final = 32
_SPARE_BYTES: Final = 512 * 1024**2
logger = logging.getLogger(__name__)

Page = tuple[Hashable, int]


@dataclass(slots=True)
class _Kept:
    """A page: its place in the file, or its bytes; and who read it last."""

    slot: int
    data: bytes | None = None
    reader: int | None = None


class Spool:
    """Pages and whole files that were fetched; bounded, and safe to use from several threads.

    Parameters
    ----------
    limit_bytes : int
        Of the pages, and again of the whole files, on the disk.
    folder : str, optional
        Where the files lie.

    Notes
    -----
    A page is read twice as a rule: when its shard is indexed, and when its images are decoded. So pages
    that two readers have read go first, the least recently read ones before the others. Pages that wait
    for their second reader are dropped at random: shards are read in turn, and of files that together are
    larger than the spool, "least recently read" would always drop the one that comes next.
    """

    def __init__(self, limit_bytes: int, folder: str | None = None) -> None:
        self._slots, self._folder = limit_bytes // PAGE_BYTES, folder
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._used, self._free = 0, list[int]()
        self._waiting, self._done = dict[Page, _Kept](), OrderedDict[Page, _Kept]()
        self._whole, self._whole_locks = OrderedDict[Hashable, IO[bytes]](), dict[Hashable, threading.Lock]()
        self._disk_is_full = self._slots == 0

    def has(self, page: Page) -> bool:
        """Return whether a page is kept now."""
        with self._lock:
            return page in self._waiting or page in self._done

    def read(self, page: Page, start: int, stop: int, reader: int) -> bytes | None:
        """Return bytes `start` to `stop` of a page, None if it is not kept."""
        with self._lock:
            kept = self._find(page, reader)
        if kept is None:
            return None
        if kept.data is not None:
            return kept.data[start:stop]
        data = os.pread(self._open(), stop - start, kept.slot * PAGE_BYTES + start)
        with self._lock:
            # Meanwhile the slot may have been given to another page.
            same = (self._waiting.get(page) or self._done.get(page)) is kept
        return data if same and len(data) == stop - start else None

    def _find(self, page: Page, reader: int) -> _Kept | None:
        kept = self._done.get(page)
        if kept is not None:
            self._done.move_to_end(page)
            return kept
        kept = self._waiting.get(page)
        if kept is not None and kept.reader != reader:
            if kept.reader is not None:
                self._done[page] = self._waiting.pop(page)
            kept.reader = reader
        return kept

    def put(self, page: Page, data: bytes) -> None:
        """Keep a page, in the place of others where the spool is full."""
        kept = self._take()
        if kept is None:
            return
        if kept.slot >= 0:
            try:
                check_room(file := self._open())
                if os.pwrite(file, data, kept.slot * PAGE_BYTES) < len(data):
                    raise OSError(errno.ENOSPC, "the disk is full")
            except OSError as exc:
                self._give_up_disk(exc)
        with self._lock:
            if self._disk_is_full:
                kept = _Kept(-1, data)
                while len(self._waiting) + len(self._done) >= _MEMORY_PAGES:
                    self._drop()
            for pages in (self._waiting, self._done):
                if (old := pages.pop(page, None)) is not None:
                    self._free.append(old.slot)
            self._waiting[page] = kept

    def forget(self, key: Hashable) -> None:
        """Drop the pages of a file, and the file if it is kept whole."""
        with self._lock:
            for pages in (self._waiting, self._done):
                for page in [p for p in pages if p[0] == key]:
                    self._free.append(pages.pop(page).slot)
            self._whole.pop(key, None)
            self._whole_locks.pop(key, None)

    def _take(self) -> _Kept | None:
        """Return a place for a page, in memory if the disk is full; None if all are being written to."""
        with self._lock:
            if self._disk_is_full:
                return _Kept(-1)
            if not self._free and self._used < self._slots:
                self._used += 1
                return _Kept(self._used - 1)
            if not self._free and (self._waiting or self._done):
                self._free.append(self._drop().slot)
            return _Kept(self._free.pop()) if self._free else None

    def _drop(self) -> _Kept:
        if self._done:
            return self._done.popitem(last=False)[1]
        return self._waiting.pop(random.choice(list(self._waiting)))  # noqa: S311 - see the class

    def _open(self) -> int:
        with self._lock:
            if self._file is None:
                self._file = temporary_file(self._folder)
            return self._file.fileno()

    def _give_up_disk(self, exc: OSError) -> None:
        """Give the space back, for the output may need it, and go on with a few pages in memory."""
        with self._lock:
            if not self._disk_is_full:
                logger.warning("what is fetched is not kept on the disk any more: %s", exc)
            self._disk_is_full = True
            self._waiting.clear()
            self._done.clear()
            if self._file is not None:
                # Not closed: another thread may be reading, and finds nothing.
                with contextlib.suppress(OSError):
                    self._file.truncate(0)

    def whole(self, key: Hashable, fetch: Callable[[IO[bytes]], Any]) -> IO[bytes]:
        """Return a whole file, fetched by whoever asks first.

        Raises
        ------
        OSError
            If it does not fit on the disk.
        """
        with self._lock:
            lock = self._whole_locks.setdefault(key, threading.Lock())
        with lock:
            with self._lock:
                file = self._whole.get(key)
                if file is not None:
                    self._whole.move_to_end(key)
                    return file
            file = temporary_file(self._folder)
            fetch(file)
            file.flush()
            with self._lock:
                self._whole[key] = file
                # A file that is dropped here stays as long as somebody reads it.
                while len(self._whole) > 1 and sum(map(_size, self._whole.values())) > self._limit_bytes:
                    self._whole_locks.pop(self._whole.popitem(last=False)[0], None)
            return file


def _size(file: IO[bytes]) -> int:
    return os.fstat(file.fileno()).st_size


def temporary_file(folder: str | None = None) -> IO[bytes]:
    """Return an anonymous file in ``$TMPDIR`` if that is set, else in ``/var/tmp``, for ``/tmp`` may be memory."""
    return tempfile.TemporaryFile(dir=folder or _folder())


def check_room(file: int) -> None:
    """Refuse to take the last of a disk, which the output may need.

    Raises
    ------
    OSError
        If less than 512 MiB are free on the disk of an open file.
    """
    stats = os.fstatvfs(file)
    if stats.f_bavail * stats.f_frsize < _SPARE_BYTES:
        raise OSError(errno.ENOSPC, f"less than {_SPARE_BYTES:,} bytes are free on the disk of temporary files")


def _folder() -> str:
    usual = Path("/var/tmp")  # noqa: S108 - only anonymous files are made there
    return str(usual) if not os.environ.get("TMPDIR") and os.access(usual, os.W_OK) else tempfile.gettempdir()


_shared: Spool | None = None
_shared_lock = threading.Lock()


def shared_spool() -> Spool:
    """Return the process's spool, of ``$IMGCURATE_SPOOL_BYTES``, by default 4 GiB or a quarter of the free disk.

    Raises
    ------
    ConfigError
        If the variable is no number.
    """
    global _shared
    with _shared_lock:
        if _shared is None:
            stats = os.statvfs(_folder())
            limit = min(_LIMIT_BYTES, stats.f_bavail * stats.f_frsize // _SHARE_OF_FREE)
            asked = os.environ.get("IMGCURATE_SPOOL_BYTES") or str(limit)
            if not asked.isdecimal():
                raise ConfigError(f"IMGCURATE_SPOOL_BYTES={asked!r} should be a number of bytes, such as 4000000000")
            _shared = Spool(int(asked))
        return _shared


def _forget() -> None:
    """Begin anew in a forked process: it must not write to its parent's file."""
    global _shared, _shared_lock
    _shared, _shared_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)
