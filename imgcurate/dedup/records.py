"""Rows as arrays of the same length, which travel as Arrow record batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["Records", "array_from_arrow", "array_to_arrow"]


@dataclass(frozen=True)
class Records:
    """Base of dataclasses whose fields are arrays, one entry (or row) of each for every record."""

    def __len__(self) -> int:
        """Return the number of records."""
        return len(getattr(self, fields(self)[0].name))

    def take(self, index: npt.NDArray[Any]) -> Self:
        """Return some records: positions, or a mask."""
        return type(self)(*(getattr(self, f.name)[index] for f in fields(self)))

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        """Return the records of several, at least one, one after the other."""
        if len(parts) == 1:
            return parts[0]
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))

    def to_arrow(self) -> pa.RecordBatch:
        """Return them as an Arrow record batch; see :meth:`from_arrow`."""
        columns = {f.name: array_to_arrow(getattr(self, f.name)) for f in fields(self)}
        return pa.record_batch(list(columns.values()), names=list(columns))

    @classmethod
    def from_arrow(cls, batch: pa.RecordBatch) -> Self:
        """Return the records of a record batch of :meth:`to_arrow`."""
        return cls(*(array_from_arrow(batch[f.name]) for f in fields(cls)))


def array_to_arrow(array: npt.NDArray[Any]) -> pa.Array:
    """Return an array of one or two dimensions as an Arrow array; objects are strings."""
    if array.ndim == 1:
        return pa.array(array, pa.string() if array.dtype == object else None)
    flat = pa.array(np.ascontiguousarray(array).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, type=pa.list_(flat.type, array.shape[1]))


def array_from_arrow(array: pa.Array) -> npt.NDArray[Any]:
    """Return what :func:`array_to_arrow` was given."""
    n: int = len(array)
    width: tuple[int, ...] = ()
    if pa.types.is_fixed_size_list(array.type):
        array, width = array.flatten(), (array.type.list_size,)
    values: npt.NDArray[Any] = array.to_numpy(zero_copy_only=False).reshape(n, *width)
    return values
