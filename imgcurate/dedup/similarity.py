"""The kernels: cosine similarities of unit rows, as blocked matrix products.

Products in float32, or of half-precision values where a GPU's tensor cores take these, pick the candidates; each pair
that may reach the threshold is decided in float64, so that the outcome does not depend on block sizes, threads,
precision or the device's order of summation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from imgcurate.backend import Backend

__all__ = [
    "Vectors",
    "cosine_similarity",
    "exact_similarity",
    "greedy_keep",
    "near_pairs",
    "product_error",
    "remove_chains",
    "rounding_error",
]

_BLOCK_ROWS: Final = 512
# A GPU waits for the host after each block, so there its blocks are larger.
_GPU_BLOCK_ROWS: Final = 4096
_SLICE_ROWS: Final = 16_384
_EXACT_ROWS: Final = 8192
_PAIRS_PER_ROW: Final = 8

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Vectors:
    """Unit rows on the host, all or some of an array, and where it lies on the device already, that array there.

    Attributes
    ----------
    x : ndarray of float32 of shape (m, d)
        The array.
    index : ndarray of int64 of shape (n,), optional
        Which of its rows are meant; by default all, in their order.
    on_device : array of shape (m, d), optional
        :meth:`Backend.product_operand` of `x`; what is multiplied is taken from it, and not carried there again.
    """

    x: Floats
    index: Ints | None = None
    on_device: Any = None

    @staticmethod
    def of(x: Floats | Vectors) -> Vectors:
        """Return vectors as such."""
        return x if isinstance(x, Vectors) else Vectors(x)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.x) if self.index is None else len(self.index)

    @property
    def dim(self) -> int:
        """Length of a row."""
        return int(self.x.shape[1])

    def rows(self, at: Any) -> Floats:
        """Return rows on the host, by their positions among these, or a slice of them."""
        rows: Floats = self.x[at if self.index is None else self.index[at]]
        return rows

    def operand(self, at: Any, backend: Backend) -> Any:
        """Return rows as an operand of products, on the device."""
        if self.on_device is None:
            return backend.product_operand(self.rows(at))
        if self.index is None:
            return self.on_device[at if isinstance(at, slice) else backend.asarray(at)]
        return self.on_device[backend.asarray(self.index[at])]


def _block_rows(backend: Backend) -> int:
    return _GPU_BLOCK_ROWS if backend.is_gpu else _BLOCK_ROWS


def rounding_error(dim: int) -> float:
    """Return the largest error of a float32 inner product of two unit rows of `dim` values, whose length was rounded.

    References
    ----------
    Higham: Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1.
    """
    return (max(dim, 16) + 2) * 2.0**-24


def product_error(dim: int, dtype: npt.DTypeLike) -> float:
    """Return the largest error of an inner product of two unit rows that are rounded to `dtype`, sums being float32.

    Half precision rounds each value, and the result, by 2^-11 of itself, and what is nearly 0 by 2^-25.
    """
    if np.dtype(dtype) != np.float16:
        return rounding_error(dim)
    unit = 2.0**-11
    return rounding_error(dim) + 3 * unit + unit * unit + 2.0**-24 * math.sqrt(dim)


def exact_similarity(
    a: Floats | Vectors, b: Floats | Vectors, i: npt.NDArray[Any], j: npt.NDArray[Any]
) -> npt.NDArray[np.float64]:
    """Return the inner products ``a[i] . b[j]`` in float64, each computed in the same way."""
    a, b = Vectors.of(a), Vectors.of(b)
    out = np.empty(len(i))
    for start in range(0, len(i), _EXACT_ROWS):
        at = slice(start, start + _EXACT_ROWS)
        left = a.rows(i[at]).astype(np.float64)
        left *= b.rows(j[at])
        out[at] = left.sum(axis=1)
    return out


def cosine_similarity(
    a: Floats | Vectors, b: Floats | Vectors, i: npt.NDArray[Any], j: npt.NDArray[Any]
) -> npt.NDArray[np.float64]:
    """Return the cosine similarities of ``a[i]`` and ``b[j]`` in float64: exactly 1 for equal rows.

    Lengths are not taken to be 1, from which rounding to float32 takes them by 1e-8 or so.
    """
    a, b = Vectors.of(a), Vectors.of(b)
    out = np.empty(len(i))
    for start in range(0, len(i), _EXACT_ROWS):
        at = slice(start, start + _EXACT_ROWS)
        left, right = a.rows(i[at]).astype(np.float64), b.rows(j[at]).astype(np.float64)
        product = (left * right).sum(axis=1)
        np.multiply(left, left, out=left)
        np.multiply(right, right, out=right)
        squares = left.sum(axis=1) * right.sum(axis=1)
        out[at] = product / np.sqrt(np.where(squares > 0, squares, 1))
    return np.minimum(out, 1.0, out=out)


def greedy_keep(
    x: Floats | Vectors, threshold: float, backend: Backend, *, n_fixed: int = 0, only_fixed: bool = False
) -> tuple[Ints, npt.NDArray[np.float64]]:
    """Go through rows in order; keep each that is not near a row kept before.

    Parameters
    ----------
    x : ndarray of float32 of shape (n, d), or Vectors
        Unit rows, the preferred first.
    threshold : float
        Rows with a cosine similarity >= this are near.
    backend : Backend
        Where the products are computed.
    n_fixed : int
        The first rows, which are kept in any case.
    only_fixed : bool
        Compare with these alone.

    Returns
    -------
    keeper : ndarray of int64 of shape (n,)
        For a row that goes, the most similar of the kept rows before it; -1 for a row that stays.
    similarity : ndarray of float64 of shape (n,)
        To that row; NaN for a row that stays.

    Notes
    -----
    Time is O(n x kept x d); device memory beside the kept rows is one block of products.
    """
    x = Vectors.of(x)
    n, size = len(x), _block_rows(backend)
    keeper = np.full(n, -1, dtype=np.int64)
    similarity = np.full(n, np.nan)
    kept = _KeptRows(x, backend)
    kept.add(np.arange(n_fixed))
    for start in range(n_fixed, n, size):
        stop = min(n, start + size)
        block = x.operand(slice(start, stop), backend)
        i, j = kept.candidates(block, threshold)
        _take_best(keeper, similarity, start + i, j, cosine_similarity(x, x, start + i, j), threshold)
        if only_fixed:
            continue
        _within_block(block, x, keeper[start:], similarity[start:], start, threshold, backend)
        if stop < n:
            kept.add(start + np.flatnonzero(keeper[start:stop] < 0))
    return keeper, similarity


def remove_chains(
    x: Floats | Vectors, threshold: float, backend: Backend, *, n_fixed: int = 0, only_fixed: bool = False
) -> tuple[Ints, npt.NDArray[np.float64]]:
    """Go through rows in order; remove each that is near *any* row before it, as SemDeDup does.

    Parameters
    ----------
    x : ndarray of float32 of shape (n, d)
        Unit rows, the preferred first.
    threshold : float
        Rows with a cosine similarity > this are near.
    backend : Backend
        Where the products are computed.
    n_fixed : int
        The first rows, which stay in any case.
    only_fixed : bool
        Compare with these alone.

    Returns
    -------
    keeper : ndarray of int64 of shape (n,)
        For a row that goes, the most similar row before it, which may go itself; else -1.
    similarity : ndarray of float64 of shape (n,)
        To that row; NaN for a row that stays.

    References
    ----------
    Abbas et al.: SemDeDup, 2023, algorithm A7 and ``semdedup.py`` of the published code.
    """
    x = Vectors.of(x)
    n, size = len(x), _block_rows(backend)
    keeper = np.full(n, -1, dtype=np.int64)
    similarity = np.full(n, np.nan)
    index = np.arange(n) if x.index is None else x.index
    for start in range(n_fixed, n, size):
        stop = min(n, start + size)
        block, before = replace(x, index=index[start:stop]), replace(x, index=index[: n_fixed if only_fixed else stop])
        i, j, values = near_pairs(block, before, threshold, backend)
        earlier = (j < start + i) & (values > threshold)
        _take_best(keeper, similarity, start + i[earlier], j[earlier], values[earlier], threshold)
    return keeper, similarity


class _KeptRows:
    """The rows kept so far, on the device, in slices of fixed size."""

    def __init__(self, x: Vectors, backend: Backend) -> None:
        self._x, self._backend = x, backend
        self._index: Ints = np.empty(len(x), dtype=np.int64)
        self._n = 0
        self._slices: list[Any] = []

    def add(self, rows: Ints) -> None:
        self._index[self._n : self._n + len(rows)] = rows
        while len(rows):
            used = self._n % _SLICE_ROWS
            if used == 0:
                size = min(_SLICE_ROWS, len(self._x) - self._n)
                self._slices.append(self._backend.xp.empty((size, self._x.dim), self._backend.product_dtype))
            now, rows = rows[: _SLICE_ROWS - used], rows[_SLICE_ROWS - used :]
            self._slices[-1][used : used + len(now)] = self._x.operand(now, self._backend)
            self._n += len(now)

    def candidates(self, block: Any, threshold: float) -> tuple[Ints, Ints]:
        """Return (row of the block, kept row) of all pairs that may reach the threshold; `block` is an operand."""
        found_i, found_j = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
        for k, part in enumerate(self._slices):
            start = k * _SLICE_ROWS
            i, j = _nonzero(block @ part[: self._n - start].T, threshold, self._x.dim, self._backend)
            found_i.append(i)
            found_j.append(self._index[start + j])
        return np.concatenate(found_i), np.concatenate(found_j)


def _nonzero(products: Any, threshold: float, dim: int, backend: Backend) -> tuple[Ints, Ints]:
    lowest = np.float32(threshold - product_error(dim, backend.product_dtype))
    # Of two dimensions it takes ten times as long.
    found = backend.to_host(backend.xp.flatnonzero(products >= lowest)).astype(np.int64)
    i, j = np.divmod(found, max(1, products.shape[1]))
    return i, j


def _take_best(
    keeper: Ints,
    similarity: npt.NDArray[np.float64],
    rows: Ints,
    others: Ints,
    values: npt.NDArray[np.float64],
    threshold: float,
) -> None:
    """Give each row its most similar other, of equally similar ones the preferred one."""
    near = values >= threshold
    rows, others, values = rows[near], others[near], values[near]
    order = np.lexsort((others, -values, rows))
    rows, first = np.unique(rows[order], return_index=True)
    keeper[rows] = others[order][first]
    similarity[rows] = values[order][first]


def _within_block(
    block: Any,
    x: Vectors,
    keeper: Ints,
    similarity: npt.NDArray[np.float64],
    start: int,
    threshold: float,
    backend: Backend,
) -> None:
    """Compare the rows of a block with those of them that stay; `keeper` and `similarity` begin with the block."""
    i, j = _nonzero(backend.xp.triu(block @ block.T, 1), threshold, x.dim, backend)
    later = j > i
    i, j = i[later], j[later]
    bounds = np.searchsorted(i, np.arange(len(block) + 1))
    # All at once, unless most of them may be those of rows that turn out to go.
    known = cosine_similarity(x, x, start + i, start + j) if len(i) <= _PAIRS_PER_ROW * len(block) else None
    for a in np.unique(i):
        if keeper[a] >= 0:
            continue
        at = slice(bounds[a], bounds[a + 1])
        b = j[at]
        values = known[at] if known is not None else cosine_similarity(x, x, np.full(len(b), start + a), start + b)
        better = (values >= threshold) & ~(values <= similarity[b])
        keeper[b[better]] = start + a
        similarity[b[better]] = values[better]


def near_pairs(
    a: Floats | Vectors, b: Floats | Vectors, threshold: float, backend: Backend
) -> tuple[Ints, Ints, npt.NDArray[np.float64]]:
    """Return all pairs of rows of `a` and of `b` with a cosine similarity >= `threshold`.

    Returns
    -------
    i, j : ndarray of int64
        Rows of `a` and of `b`.
    similarity : ndarray of float64
        Of each pair.
    """
    found: list[tuple[Ints, Ints]] = [(np.empty(0, np.int64), np.empty(0, np.int64))]
    a, b, size = Vectors.of(a), Vectors.of(b), _block_rows(backend)
    for right in range(0, len(b), _SLICE_ROWS):
        part = b.operand(slice(right, right + _SLICE_ROWS), backend)
        for left in range(0, len(a), size):
            block = a.operand(slice(left, left + size), backend)
            i, j = _nonzero(block @ part.T, threshold, a.dim, backend)
            found.append((left + i, right + j))
    i, j = (np.concatenate(c) for c in zip(*found, strict=True))
    values = cosine_similarity(a, b, i, j)
    near = values >= threshold
    return i[near], j[near], values[near]
