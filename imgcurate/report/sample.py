"""The rows of a catalog that a report looks at: all of them, or those of parts spread evenly over a large one."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgcurate import schema
from imgcurate.catalog import Catalog

__all__ = ["CatalogSample", "embeddings", "load_sample", "spread"]

_MAX_ROWS: Final = 1_000_000
_MAX_EMBEDDED: Final = 1_000
_EMBEDDING_PARTS: Final = 16
_THREADS: Final = 8
# Long, and of no use in a picture.
_LEFT_OUT: Final = frozenset(
    {
        schema.EMBEDDING, schema.MEMBERS, schema.SPANS, schema.EXT, schema.CONTENT_HASH, schema.PIXEL_HASH,
        schema.PHASH, schema.ENCODER,
    }
)  # fmt: skip


@dataclass(frozen=True)
class CatalogSample:
    """Rows of a catalog.

    Attributes
    ----------
    table : pa.Table
        The rows, without what is long.
    part : ndarray of int64 of shape (n,)
        Of each row its part.
    n_rows : int
        How many rows the catalog has.
    """

    table: pa.Table
    part: npt.NDArray[np.int64]
    n_rows: int

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.table)

    @property
    def is_whole(self) -> bool:
        """Whether these are all rows of the catalog."""
        return len(self) == self.n_rows

    @property
    def kept(self) -> npt.NDArray[np.bool_]:
        """Mask of the samples that stayed."""
        return self.has_status(schema.STATUS_OK)

    def has_status(self, *statuses: str) -> npt.NDArray[np.bool_]:
        """Return the mask of the rows with one of these statuses."""
        found = pc.is_in(self.table[schema.STATUS], value_set=pa.array(statuses, pa.string()))
        mask: npt.NDArray[np.bool_] = found.to_numpy(zero_copy_only=False)
        return mask

    def numbers(self, column: str) -> npt.NDArray[np.float64]:
        """Return a numeric column as float64 of shape (n,), NaN where there is none."""
        if column not in self.table.column_names:
            return np.full(len(self), np.nan)
        values = self.table[column].cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        return np.asarray(values, dtype=np.float64)

    def values(self, column: str, rows: Sequence[int]) -> list[Any]:
        """Return a column at some rows; None where the catalog has no such column."""
        if column not in self.table.column_names:
            return [None] * len(rows)
        values: list[Any] = self.table[column].take(pa.array(rows, pa.int64())).to_pylist()
        return values


def load_sample(catalog: Catalog, n_rows: int) -> CatalogSample:
    """Read a catalog, or if it has more than a million rows parts of it that hold about so many."""
    n_parts = catalog.n_parts
    wanted = n_parts if n_rows <= _MAX_ROWS else max(1, n_parts * _MAX_ROWS // n_rows)
    numbers = spread(n_parts, wanted).tolist()
    columns = [f.name for f in catalog.schema if f.name not in _LEFT_OUT and not _is_nested(f)]
    with ThreadPoolExecutor(_THREADS) as pool:
        tables = list(pool.map(lambda n: _compact(catalog.read(n, columns)), numbers))
    part = np.repeat(np.array(numbers, np.int64), [len(t) for t in tables])
    return CatalogSample(pa.concat_tables(tables).unify_dictionaries(), part, n_rows)


def embeddings(catalog: Catalog, sample: CatalogSample) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return some rows of a sample that have embeddings, and these: at most 1,000, of at most 16 parts.

    Returns
    -------
    rows : ndarray of int64 of shape (m,)
        Places in the sample.
    embeddings : ndarray of float32 of shape (m, d)
    """
    if schema.EMBEDDING not in catalog.schema.names:
        return np.zeros(0, np.int64), np.zeros((0, 0), np.float32)
    parts = np.unique(sample.part)
    chosen = parts[spread(len(parts), _EMBEDDING_PARTS)]
    rows, vectors = [], []
    for number in chosen.tolist():
        column = catalog.read(number, [schema.EMBEDDING])[schema.EMBEDDING].combine_chunks()
        first = int(np.searchsorted(sample.part, number))
        there = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
        there = there[spread(len(there), -(-_MAX_EMBEDDED // len(chosen)))]
        if len(there):
            taken = column.take(pa.array(there))
            vectors.append(np.asarray(taken.flatten(), np.float32).reshape(len(there), -1))
            rows.append(first + there)
    if not rows:
        return np.zeros(0, np.int64), np.zeros((0, 0), np.float32)
    return np.concatenate(rows)[:_MAX_EMBEDDED], np.concatenate(vectors)[:_MAX_EMBEDDED]


def spread(n: int, wanted: int) -> npt.NDArray[np.int64]:
    """Return at most `wanted` of the numbers 0 to n - 1, spread evenly."""
    if n <= wanted:
        return np.arange(n, dtype=np.int64)
    return np.unique(np.linspace(0, n - 1, max(wanted, 1)).round().astype(np.int64))


def _is_nested(field: pa.Field) -> bool:
    # The files of a sample are needed to read its image.
    return bool(pa.types.is_nested(field.type)) and field.name != schema.FILES


def _compact(table: pa.Table) -> pa.Table:
    """Keep what comes again and again once."""
    for name in (schema.SHARD, schema.STATUS):
        column = table[name].dictionary_encode()
        table = table.set_column(table.column_names.index(name), name, column)
    return table
