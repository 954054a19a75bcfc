"""Ids and embeddings of many types, as deduplication wants them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from imgcurate.errors import InputError
from imgcurate.storage import Source

__all__ = ["NpyFile", "ids_as_keys", "ids_from_keys", "list_lengths", "unified_type"]

_MAX_HEADER_BYTES: Final = 64 * 1024


class NpyFile:
    """An npy file of embeddings, of which ranges of rows are read; nothing in it is executed.

    Parameters
    ----------
    source : Source
        The file.

    Attributes
    ----------
    n_rows, dim : int
        The shape of the array.
    row_bytes : int
        Bytes of a row.

    Raises
    ------
    InputError
        If it is no array of floating-point numbers of two dimensions in C order, or ends early.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        head = io.BytesIO(source.pread(0, _MAX_HEADER_BYTES))
        try:
            version = np.lib.format.read_magic(head)
            reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, fortran, self._dtype = reader[version](head)
        except (ValueError, KeyError) as exc:
            raise InputError(f"{source.url} is no npy file: {exc}") from exc
        if len(shape) != 2 or fortran or self._dtype.kind != "f" or self._dtype.itemsize > 8 or not shape[1]:
            order = "Fortran" if fortran else "C"
            raise InputError(
                f"{source.url} holds {self._dtype} of shape {shape} in {order} order: expected float16, float32 or "
                "float64 of shape (rows, values) in C order"
            )
        self.n_rows, self.dim = shape
        self.row_bytes = self.dim * self._dtype.itemsize
        self._start = head.tell()
        if self._start + self.n_rows * self.row_bytes > source.size:
            raise InputError(f"{source.url} is cut off: {source.size:,} bytes are too few for its {self.n_rows:,} rows")

    def read(self, first: int, n_rows: int) -> npt.NDArray[Any]:
        """Return some rows, (n_rows, dim) floating-point."""
        data = self._source.pread(self._start + first * self.row_bytes, n_rows * self.row_bytes)
        x = np.frombuffer(data, self._dtype).reshape(n_rows, self.dim)
        return x.astype(self._dtype.newbyteorder("="), copy=False)


def list_lengths(column: pa.Array, name: str = "") -> pa.Array:
    """Return the length of each list, null where it is null.

    Raises
    ------
    InputError
        If `column` does not hold lists of numbers; `name` says what it is.
    """
    type_ = column.type
    if isinstance(type_, pa.BaseExtensionType):
        type_ = type_.storage_type
    lists = pt.is_list(type_) or pt.is_large_list(type_) or pt.is_fixed_size_list(type_)
    if not lists or not (pt.is_floating(type_.value_type) or pt.is_integer(type_.value_type)):
        raise InputError(f"{name} holds {column.type}: expected lists of numbers")
    return pc.list_value_length(column.storage if isinstance(column.type, pa.BaseExtensionType) else column)


def unified_type(id_field: str, types: Mapping[str, pa.DataType]) -> pa.DataType:
    """Return the type of all ids, from that of each file: the same, or the widest of its kind.

    Raises
    ------
    InputError
        If they are of several kinds, or of one that cannot name rows.
    """
    plain = {url: _plain(t) for url, t in types.items()}
    for url, type_ in plain.items():
        if _kind(type_) is None:
            raise InputError(f"{url}: {id_field} holds {type_}: ids should be integers, strings or bytes")
    kinds = {_kind(t): url for url, t in plain.items()}
    if len(kinds) > 1:
        raise InputError(f"{id_field} holds " + " and ".join(f"{kind}s in {url}" for kind, url in kinds.items()))
    distinct = set(plain.values())
    if len(distinct) == 1:
        return distinct.pop()
    return {"integer": pa.int64(), "string": pa.large_string(), "byte": pa.large_binary()}[next(iter(kinds)) or ""]


def _plain(type_: pa.DataType) -> pa.DataType:
    if isinstance(type_, pa.BaseExtensionType):
        type_ = type_.storage_type
    type_ = type_.value_type if pt.is_dictionary(type_) else type_
    # Arrow does not filter views.
    return pa.large_string() if pt.is_string_view(type_) else type_


def _kind(type_: pa.DataType) -> str | None:
    if pt.is_integer(type_):
        return "integer"
    if pt.is_string(type_) or pt.is_large_string(type_) or pt.is_string_view(type_):
        return "string"
    binary = pt.is_binary(type_) or pt.is_large_binary(type_) or pt.is_fixed_size_binary(type_)
    return "byte" if binary else None


def ids_as_keys(ids: pa.Array) -> pa.Array:
    """Return ids as text that :func:`ids_from_keys` turns back: bytes in hexadecimal, others as they are."""
    if _kind(ids.type) == "byte":
        return pa.array([v.hex() for v in ids.to_pylist()], pa.string())
    return ids.cast(pa.string())


def ids_from_keys(keys: Sequence[str], type_: pa.DataType) -> pa.Array:
    """Return the ids that :func:`ids_as_keys` made text, of a type."""
    if _kind(type_) == "byte":
        return pa.array([bytes.fromhex(k) for k in keys], type_)
    return pa.array(list(keys), pa.string()).cast(type_)
