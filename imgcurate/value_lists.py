"""Lists of values in files -> which values of a column are in one."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from imgcurate.errors import ImgcurateError, InputError
from imgcurate.storage import Source, file_size, modified, open_source
from imgcurate.streams import SourceFile
from imgcurate.success import file_digest

__all__ = ["ValueList", "as_texts", "value_list"]

_KEYS: Final = ("imgcurate-list-0", "imgcurate-list-1")
_BLOCK_BYTES: Final = 16 * 1024**2
_MAX_LINE_BYTES: Final = 1024**2
_ROWS: Final = 1_000_000
_Hashes = npt.NDArray[np.uint64]


class ValueList:
    """Values, each as a hash of 128 bits, in 16 bytes; two of 10^10 share one with a probability below 10^-18.

    Parameters
    ----------
    hashes : ndarray of shape (n, 2), uint64
        From :func:`_hashes`, in any order, also several times.
    """

    def __init__(self, hashes: _Hashes) -> None:
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))
        first, second = hashes[order, 0], hashes[order, 1]
        new = np.ones(len(first), bool)
        new[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
        self._first, self._second = first[new], second[new]
        starts = np.flatnonzero(np.diff(self._first, prepend=self._first[:1] ^ np.uint64(1)))
        self._longest = int(np.diff(np.append(starts, len(self._first))).max(initial=0))

    def __len__(self) -> int:
        """Return the number of distinct values."""
        return len(self._first)

    def contains(self, texts: npt.NDArray[np.object_]) -> npt.NDArray[np.bool_]:
        """Return which of some texts are in the list."""
        wanted = _hashes(texts)
        at = np.searchsorted(self._first, wanted[:, 0])
        found = np.zeros(len(texts), bool)
        for step in range(self._longest):
            here = np.minimum(at + step, len(self._first) - 1)
            found |= (self._first[here] == wanted[:, 0]) & (self._second[here] == wanted[:, 1])
        return found


def as_texts(values: Any) -> npt.NDArray[np.object_]:
    """Return the values of a column of text, whole numbers or booleans as texts: ``true``, ``17``."""
    values = np.asarray(values)
    if values.dtype.kind == "b":
        return np.where(values, "true", "false").astype(object)
    texts: npt.NDArray[np.object_] = values if values.dtype.kind == "O" else values.astype(str).astype(object)
    return texts


def value_list(url: str, column: str, sha256: str | None = None) -> ValueList:
    """Return the values of a file; read once per process, unless it changes.

    Parameters
    ----------
    url : str
        Path or fsspec URL of a ``.parquet`` or ``.csv`` file, or of text with a value in each line.
    column : str
        Of a table the column; where it has none of this name, and one column alone, it is that one.
    sha256 : str, optional
        Checksum that the file should have.

    Raises
    ------
    InputError
        If it cannot be understood, or is another file than the checksum says.
    StorageError
        If it cannot be read.
    """
    return _value_list(url, column, sha256, f"{file_size(url)} {modified(url)}")


@functools.lru_cache(maxsize=4)
def _value_list(url: str, column: str, sha256: str | None, _state: str) -> ValueList:
    if sha256 is not None and file_digest(url).sha256 != sha256:
        raise InputError(f"the list {url} has changed since the run began: put it back, or begin another run")
    source = open_source(url)
    try:
        parts = [_hashes(texts) for texts in _texts(source, column)]
    except ImgcurateError:
        raise
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise InputError(f"cannot read the list {url}: {exc}") from exc
    finally:
        source.close()
    return ValueList(np.concatenate(parts) if parts else np.empty((0, 2), np.uint64))


def _texts(source: Source, column: str) -> Iterator[npt.NDArray[np.object_]]:
    """Yield the values of a file, some at a time."""
    ending = source.url.lower().rpartition(".")[2]
    if ending == "parquet":
        with SourceFile(source) as raw, pq.ParquetFile(raw, pre_buffer=False) as file:
            name = _column_of(source.url, file.schema_arrow.names, column)
            for batch in file.iter_batches(_ROWS, columns=[name], use_threads=False):
                yield _plain(source.url, name, batch.column(0))
    elif ending == "csv":
        data = source.pread(0, source.size)
        options = pacsv.ReadOptions(use_threads=False, block_size=max(len(data) + 1, 1 << 20))
        header = pacsv.read_csv(pa.BufferReader(data), options).schema.names if data.strip() else []
        name = _column_of(source.url, header, column)
        # As it stands there: 007 is no 7.
        as_text = pacsv.ConvertOptions(include_columns=[name], column_types={name: pa.string()})
        yield _plain(source.url, name, pacsv.read_csv(pa.BufferReader(data), options, convert_options=as_text)[name])
    else:
        yield from _lines(source)


def _lines(source: Source) -> Iterator[npt.NDArray[np.object_]]:
    position, rest = 0, b""
    while block := source.pread(position, _BLOCK_BYTES):
        position += len(block)
        whole, newline, after = (rest + block).rpartition(b"\n")
        if len(after) > _MAX_LINE_BYTES:
            raise InputError(
                f"the list {source.url} has a line of more than {_MAX_LINE_BYTES:,} bytes: it should be text with a "
                "value in each line, .csv or .parquet"
            )
        rest = after
        if newline:
            yield _stripped(source.url, whole, is_first=position == len(block))
    yield _stripped(source.url, rest, is_first=position == len(rest))


def _stripped(url: str, data: bytes, *, is_first: bool) -> npt.NDArray[np.object_]:
    try:
        text = data.decode("utf-8-sig" if is_first else "utf-8")
    except UnicodeDecodeError as exc:
        raise InputError(f"the list {url} is no text in UTF-8: {exc}") from exc
    return np.array([line for each in text.split("\n") if (line := each.strip())], dtype=object)


def _column_of(url: str, names: list[str], column: str) -> str:
    if column in names:
        return column
    if len(names) != 1:
        raise InputError(f"the list {url} has no column {column!r}: {', '.join(names) or 'it has none at all'}")
    return names[0]


def _plain(url: str, name: str, values: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.object_]:
    """Return the values of a column of a list, but for those that are null, as texts."""
    type_ = values.type
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
        values = values.cast(type_)
    if not (pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_integer(type_)):
        raise InputError(f"the list {url}: the column {name!r} is {type_}: it should hold text or whole numbers")
    return as_texts(values.drop_null().to_numpy(zero_copy_only=False))


def _hashes(texts: npt.NDArray[np.object_]) -> _Hashes:
    """Return the hashes of some texts, of shape (n, 2)."""
    return np.stack([pd.util.hash_array(texts, hash_key=key, categorize=False) for key in _KEYS], axis=1)
