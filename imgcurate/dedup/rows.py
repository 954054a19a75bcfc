"""Embeddings -> unit rows with cluster and preference: what all ways of deduplication begin with."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from imgcurate.backend import Backend
from imgcurate.dedup.config import DedupConfig
from imgcurate.dedup.keep import hash_uids
from imgcurate.dedup.kmeans import Clustering, find_probes
from imgcurate.dedup.passes import Rows

__all__ = ["has_direction", "make_rows", "sample_mask", "sample_order", "unit_rows"]

_NORM_ROWS: Final = 8192


def unit_rows(x: npt.NDArray[Any], n_threads: int = 1) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Return rows divided by their length, and the mask of those that have one.

    Parameters
    ----------
    x : ndarray of shape (n, d)
        Embeddings; rows of zeros, and rows with a value that is not finite, have no direction.
    n_threads : int
        How many threads share the work.

    Returns
    -------
    x : ndarray of float32 of shape (n, d)
        Unit rows; zeros where there is no direction.
    valid : ndarray of bool of shape (n,)
        Which rows have one.
    """
    out = np.zeros(x.shape, dtype=np.float32)
    valid = np.zeros(len(x), dtype=bool)

    def divide(start: int) -> None:
        at = slice(start, start + _NORM_ROWS)
        block = x[at].astype(np.float64)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            norm = np.sqrt(np.einsum("ij,ij->i", block, block))
        odd: npt.NDArray[np.bool_] = ~(np.isfinite(norm) & (norm > 1e-150))
        if odd.any():
            block[odd], norm[odd] = _scaled(block[odd])
        valid[at] = norm > 0
        np.divide(block, np.where(norm > 0, norm, 1)[:, None], out=out[at], casting="same_kind")

    starts = range(0, len(x), _NORM_ROWS)
    if n_threads == 1 or len(starts) == 1:
        for start in starts:
            divide(start)
    else:
        with ThreadPoolExecutor(n_threads) as pool:
            list(pool.map(divide, starts))
    return out, valid


def _scaled(rows: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return rows whose squares are no float64, divided by their largest value, and their length; 0 if not finite."""
    rows = np.where(np.isfinite(rows).all(axis=1, keepdims=True), rows, 0)
    largest = np.abs(rows).max(axis=1, initial=0)
    rows /= np.where(largest > 0, largest, 1)[:, None]
    return rows, np.sqrt((rows**2).sum(axis=1))


def has_direction(x: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return the mask of the rows that :func:`unit_rows` finds valid, in a fraction of its time."""
    out = np.ones(len(x), dtype=bool)
    for start in range(0, len(x), _NORM_ROWS):
        block = x[start : start + _NORM_ROWS]
        if block.dtype.kind != "f":
            # Squares of whole numbers would not fit into their own type.
            block = block.astype(np.float64)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            square = np.einsum("ij,ij->i", block, block)
        odd = np.flatnonzero(~(np.isfinite(square) & (square > np.finfo(square.dtype).tiny)))
        out[start + odd] = unit_rows(block[odd])[1]
    return out


def sample_mask(uid: npt.NDArray[np.int64], n_rows: int, fit_rows: int, seed: int) -> npt.NDArray[np.bool_]:
    """Return the rows to draw for k-means: by a hash of the uid, so the same in any partitioning.

    Slightly more than `fit_rows` of `n_rows` are drawn; :func:`sample_order` says which to use.
    """
    share = fit_rows / max(1, n_rows) * (1 + 4 / np.sqrt(fit_rows + 1))
    if share >= 1:
        return np.ones(len(uid), dtype=bool)
    drawn: npt.NDArray[np.bool_] = hash_uids(uid, seed) < np.uint64(share * 2.0**64)
    return drawn


def sample_order(uid: npt.NDArray[np.int64], fit_rows: int, seed: int) -> npt.NDArray[np.int64]:
    """Return the positions of the first `fit_rows` rows, in the order of their hash."""
    return np.lexsort((uid, hash_uids(uid, seed)))[:fit_rows]


def make_rows(
    x: npt.NDArray[np.float32],
    uid: npt.NDArray[np.int64],
    identity: npt.NDArray[np.int64],
    name: npt.NDArray[Any],
    columns: Mapping[str, npt.NDArray[Any]],
    clustering: Clustering,
    config: DedupConfig,
    backend: Backend,
) -> Rows:
    """Assign unit rows to clusters and give them their preference.

    Parameters
    ----------
    x : ndarray of float32 of shape (n, d)
        Unit rows.
    uid, identity, name, columns
        Their numbers, what tells them apart (see :meth:`KeepOrder.keys`), names and the columns of
        ``config.keep_order``.
    clustering : Clustering
        The clusters.
    config : DedupConfig
        The parameters.
    backend : Backend
        Where.
    """
    cluster, similarity, probes = find_probes(x, clustering, config, backend)
    keys = config.keep_order.keys(identity, similarity, columns)
    return Rows(uid, keys, cluster, probes, name, x)
