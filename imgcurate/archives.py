"""Open what a row's ``shard`` names, by its first bytes: a tar, a compressed tar, a table of images.

Compressed tars and tables can only be read forward. Their open sources are kept for a while, so that
the task which writes the next output shard goes on where the last one stopped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from imgcurate.remote import GAP_BYTES
from imgcurate.storage import Source, StorageOptions, is_local, modified, open_source
from imgcurate.streams import ForwardSource, decompressed, is_compressed
from imgcurate.tables import TableSource, is_table

__all__ = ["Archives", "open_archive"]

_HEAD_BYTES: Final = 8
_MAX_IDLE: Final = 4
_idle: dict[tuple[str, str], Source] = {}
_idle_lock = threading.Lock()


def open_archive(url: str, storage_options: StorageOptions | None = None, *, gap_bytes: int = GAP_BYTES) -> Source:
    """Open a tar, compressed or not, or a table of images for ranged reads; see :func:`open_source`.

    Raises
    ------
    StorageError
        If it cannot be opened.
    DamagedStreamError
        If it is a Parquet or Arrow file that cannot be read.
    InputError
        If it is one without a column of images.
    """
    source = open_source(url, storage_options, gap_bytes=gap_bytes)
    try:
        head = source.pread(0, _HEAD_BYTES)
        if is_compressed(head):
            return decompressed(source)
        return TableSource(source) if is_table(head) else source
    except BaseException:
        source.close()
        raise


class Archives:
    """The archives that are open while samples are read or written: at most a few at a time.

    Parameters
    ----------
    storage_options : mapping, optional
        Passed to fsspec.
    limit : int
        Number of archives that are open at the same time.
    """

    def __init__(self, storage_options: StorageOptions | None = None, limit: int = 8) -> None:
        self._options, self._limit, self._open = storage_options, limit, dict[str, tuple[str, Source]]()

    def __enter__(self) -> Callable[[str], Source]:
        return self._get

    def __exit__(self, *exc: object) -> None:
        while self._open:
            self._release(next(iter(self._open)))

    def _get(self, url: str) -> Source:
        if url not in self._open:
            if len(self._open) >= self._limit:
                self._release(next(iter(self._open)))
            # Taken before it is opened: should the file be replaced meanwhile, the old one is not kept as the new.
            state = _state(url)
            self._open[url] = state, _take_idle(url, state) or open_archive(url, self._options)
        return self._open[url][1]

    def _release(self, url: str) -> None:
        state, source = self._open.pop(url)
        if isinstance(source, (ForwardSource, TableSource)) and state:
            _keep_idle(url, state, source)
        else:
            source.close()


def _state(url: str) -> str:
    """Return what tells one state of a local file from another; '' of a remote one, and of one that is gone."""
    try:
        return modified(url) if is_local(url) else ""
    except OSError:
        return ""


def _take_idle(url: str, state: str) -> Source | None:
    with _idle_lock:
        return _idle.pop((url, state), None)


def _keep_idle(url: str, state: str, source: Source) -> None:
    with _idle_lock:
        surplus = [_idle[url, state]] if (url, state) in _idle else []
        _idle[url, state] = source
        surplus += [_idle.pop(next(iter(_idle))) for _ in range(len(_idle) - _MAX_IDLE)]
    for old in surplus:
        old.close()
