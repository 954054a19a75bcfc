"""Ranges of rows of Parquet files, one after the other, without decoding a large row group from its start each time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from imgcurate.errors import InputError
from imgcurate.storage import StorageOptions, file_size, modified, open_source
from imgcurate.streams import SourceFile

__all__ = ["open_parquet", "row_batches"]

_READ_ROWS: Final = 8192
_BUFFER_BYTES: Final = 1024**2
_MOST_IDLE: Final = 8
_Key = tuple[str, tuple[str, ...], str]


@contextmanager
def open_parquet(url: str, options: StorageOptions | None = None) -> Iterator[pq.ParquetFile]:
    """Open a file; that it cannot be read, there and in the body, is an InputError."""
    source = open_source(url, options)
    try:
        with SourceFile(source) as raw:
            yield pq.ParquetFile(raw, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    except (pa.ArrowException, OSError) as exc:
        raise InputError(f"cannot read {url} as Parquet: {exc}") from exc
    finally:
        source.close()


def row_batches(
    url: str, columns: Sequence[str], first: int, n_rows: int, options: StorageOptions | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield the rows from `first` on of a file, fewer than `n_rows` where it ends.

    Parquet decodes a row group from its start on. Where the rows begin within one, a reader that this process has left
    standing before them, in the same group, goes on; else those of the group before them are decoded and dropped.

    Raises
    ------
    InputError
        If the file cannot be read.
    """
    key = url, tuple(columns), f"{file_size(url, options)} {modified(url, options)}"
    reader = _take_idle(key, first) or _Reader(key, first, options)
    goes_on = False
    try:
        yield from reader.rows(first, first + n_rows)
        goes_on = not reader.is_at_a_border
    finally:
        if goes_on:
            _keep_idle(reader)
        else:
            reader.close()


class _Reader:
    """The rows of a file from the row group of one of them on."""

    def __init__(self, key: _Key, first: int, options: StorageOptions | None) -> None:
        self.key = key
        url, columns, _ = key
        with ExitStack() as stack:
            file = stack.enter_context(open_parquet(url, options))
            counts = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
            self.bounds = np.cumsum([0, *counts])
            group = int(np.searchsorted(self.bounds, first, side="right")) - 1
            groups = list(range(group, len(counts)))
            self.at = int(self.bounds[group])
            self._columns = list(columns)
            self._batches = (
                file.iter_batches(_READ_ROWS, row_groups=groups, columns=self._columns, use_threads=False)
                if groups
                else iter(())
            )
            self._rest: pa.RecordBatch | None = None
            self._stack = stack.pop_all()

    @property
    def is_at_a_border(self) -> bool:
        """Whether the next row is the first one of a row group, or there is none."""
        return self.at in self.bounds

    def rows(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        """Yield the rows from `start`, which lies ahead, up to and without `stop`."""
        while self.at < stop:
            try:
                batch = next(self._batches, None) if self._rest is None else self._rest
            except (pa.ArrowException, OSError) as exc:
                raise InputError(f"cannot read {self.key[0]} as Parquet: {exc}") from exc
            if batch is None:
                return
            skipped = min(max(start - self.at, 0), len(batch))
            taken = min(stop - self.at, len(batch))
            self._rest = batch.slice(taken) if taken < len(batch) else None
            self.at += taken
            if skipped < taken:
                yield batch.slice(skipped, taken - skipped).select(self._columns)

    def close(self) -> None:
        """Close the file."""
        self._stack.close()


_idle: list[_Reader] = []
_idle_lock = threading.Lock()


def _take_idle(key: _Key, first: int) -> _Reader | None:
    """Return the reader that stands nearest before a row, in its row group."""
    with _idle_lock:
        fitting = [
            r
            for r in _idle
            if r.key == key and r.at <= first and r.at >= r.bounds[np.searchsorted(r.bounds, first, side="right") - 1]
        ]
        if not fitting:
            return None
        nearest = max(fitting, key=lambda r: r.at)
        _idle.remove(nearest)
        return nearest


def _keep_idle(reader: _Reader) -> None:
    with _idle_lock:
        _idle.append(reader)
        surplus = [_idle.pop(0) for _ in range(len(_idle) - _MOST_IDLE)]
    for old in surplus:
        old.close()
