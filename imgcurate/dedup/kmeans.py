"""Spherical k-means: fit on a sample, assign block by block, and tell where near rows may lie.

Rows have unit length, so the nearest centroid is that of the largest inner product once centroids
have unit length too.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from imgcurate.backend import Backend
from imgcurate.dedup.config import DedupConfig
from imgcurate.dedup.similarity import exact_similarity, rounding_error

__all__ = ["Clustering", "assign", "find_probes", "fit_clustering"]

# Products at once, and rows that a thread takes at a time.
_BLOCK_VALUES: Final = {"cpu": 8 * 1024 * 1024, "gpu": 64 * 1024 * 1024}
_THREAD_ROWS: Final = 65_536
_SPLIT_OVER: Final = 4.0
_REACH_SLACK: Final = 1e-3
_MAX_SPREAD_ROWS: Final = 8192
# Centroids, all pairs of which are computed at once: 128 MiB.
_MOST_IN_TABLE: Final = 4096
# Of 16 bytes each.
_MOST_PAIRS: Final = 16 * 1024 * 1024

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Clustering:
    """Clusters, and how the rows spread about them.

    Attributes
    ----------
    centroids : ndarray of float32 of shape (k, d)
        Unit rows.
    dimensions : int
        In how many directions rows vary, 1 to d: the participation ratio ``tr(C)^2 / tr(C^2)`` of their
        covariance C. Near d for noise; a few dozen for what encoders make of photos.
    """

    centroids: Floats
    dimensions: int


def fit_clustering(x: Floats, n_clusters: int, config: DedupConfig, backend: Backend) -> Clustering:
    """Fit k-means on a sample, and measure the spread of its rows.

    Parameters
    ----------
    x : ndarray of float32 of shape (n, d)
        Unit rows, in a random order that does not depend on partitions.
    n_clusters, config, backend
        As in :func:`fit_centroids`.
    """
    rows = x[:_MAX_SPREAD_ROWS].astype(np.float64)
    rows -= rows.mean(axis=0)
    # The smaller of the two products has the same trace of its square.
    product = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
    trace, square = np.trace(product), float((product * product).sum())
    # Whole, so that rounding, which depends on threads, does not show.
    dimensions = round(trace * trace / square) if square > 0 else 1
    return Clustering(fit_centroids(x, min(n_clusters, len(x)), config, backend), max(1, dimensions))


def fit_centroids(x: Floats, n_clusters: int, config: DedupConfig, backend: Backend) -> Floats:
    """Fit k-means on a sample and split the clusters that come out far too large.

    Parameters
    ----------
    x : ndarray of float32 of shape (n, d)
        Unit rows, in a random order that does not depend on partitions.
    n_clusters : int
        Clusters to fit; fewer come out if fewer rows are distinct.
    config : DedupConfig
        The parameters of k-means.
    backend : Backend
        Where.

    Returns
    -------
    ndarray of float32 of shape (k, d)
        Unit rows. k exceeds `n_clusters` where clusters of more than 4 times the mean size were split.
    """
    if n_clusters <= 1 or len(x) <= 1:
        return _normalised(x.mean(axis=0, keepdims=True, dtype=np.float64))
    centroids = _fit(x, n_clusters, config, backend)
    mean = len(x) / n_clusters
    labels, _ = assign(x, centroids, 1, backend)
    counts = np.bincount(labels[:, 0], minlength=len(centroids))
    pieces = []
    for cluster, count in enumerate(counts):
        if count > _SPLIT_OVER * mean:
            n_pieces = min(int(np.ceil(count / mean)), int(count))
            pieces.append(_fit(x[labels[:, 0] == cluster], n_pieces, config, backend))
        else:
            pieces.append(centroids[cluster : cluster + 1])
    return np.concatenate(pieces)


def _fit(x: Floats, n_clusters: int, config: DedupConfig, backend: Backend) -> Floats:
    with warnings.catch_warnings():
        # scikit-learn warns where fewer rows are distinct than there are clusters: centroids are equal then.
        warnings.simplefilter("ignore")
        centroids = backend.fit_kmeans(
            x,
            n_clusters,
            init=config.init,
            n_init=config.n_init,
            max_iter=config.max_iter,
            tol=config.tol,
            random_state=config.random_state,
            oversampling_factor=config.oversampling_factor,
        )
    return np.unique(_normalised(centroids), axis=0)


def assign(
    x: Floats, centroids: Floats, n_probe: int, backend: Backend
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Return the nearest centroids of each row.

    Parameters
    ----------
    x : ndarray of float32 of shape (n, d)
        Unit rows.
    centroids : ndarray of float32 of shape (k, d)
        Unit rows.
    n_probe : int
        How many; at most k are returned.
    backend : Backend
        Where the products are computed.

    Returns
    -------
    labels : ndarray of int32 of shape (n, min(n_probe, k))
        Nearest first, decided in float64; of equally near ones the lower index first.
    similarity : ndarray of float32 of the same shape
        Cosine similarity to them, up to the rounding of float32 products.

    Notes
    -----
    Memory is one block of 8 M products beside `x`, on a GPU of 64 M.
    """
    n_probe = min(n_probe, len(centroids))
    labels = np.zeros((len(x), n_probe), dtype=np.int32)
    similarity = np.zeros(labels.shape, dtype=np.float32)
    if len(centroids) == 1:
        similarity[:, 0] = x @ centroids[0]
        return labels, similarity
    device_centroids = backend.asarray(centroids).T
    rows = max(1, _BLOCK_VALUES[backend.name] // len(centroids))
    for start in range(0, len(x), rows):
        at = slice(start, start + rows)
        products = backend.asarray(x[at]) @ device_centroids
        labels[at], similarity[at] = _nearest(products, x[at], centroids, n_probe, backend)
    return labels, similarity


def find_probes(
    x: Floats, clustering: Clustering, config: DedupConfig, backend: Backend
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64], npt.NDArray[np.int32]]:
    """Assign rows to clusters, and say in which others rows near to them may lie.

    A row at distance m from the border to another cluster has nothing behind it within less than m, and two
    unit rows with a cosine similarity >= 1 - eps lie at most ``r = sqrt(2 eps)`` apart. So the next
    ``n_probe - 1`` clusters are looked at where m <= r. From there on a cluster has to be likely: if rows vary
    in D directions, a step of length r goes about r / sqrt(D) in the direction of one border, and clusters
    farther than that are left out.

    Parameters
    ----------
    x : ndarray of float32 of shape (n, d)
        Unit rows.
    clustering : Clustering
        The k clusters.
    config : DedupConfig
        ``n_probe``, ``max_probe`` and the thresholds.
    backend : Backend
        Where the products are computed.

    Returns
    -------
    cluster : ndarray of int32 of shape (n,)
        The nearest.
    similarity : ndarray of float64 of shape (n,)
        Cosine similarity to it, independent of how rows are put into blocks.
    probes : ndarray of int32 of shape (n, p)
        p >= 1 further clusters; -1 where there is none.
    """
    if backend.host_threads == 1 or len(x) <= _THREAD_ROWS:
        return _find_probes(x, clustering, config, backend)
    starts = range(0, len(x), _THREAD_ROWS)
    with ThreadPoolExecutor(backend.host_threads) as pool:
        # What is left of this to the host, float64 and ties, takes longer than the products on a GPU.
        parts = list(pool.map(lambda s: _find_probes(x[s : s + _THREAD_ROWS], clustering, config, backend), starts))
    cluster, similarity, probes = (np.concatenate(each) for each in zip(*parts, strict=True))
    return cluster, similarity, probes


def _find_probes(
    x: Floats, clustering: Clustering, config: DedupConfig, backend: Backend
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64], npt.NDArray[np.int32]]:
    centroids = clustering.centroids
    labels, approximate = assign(x, centroids, config.probes, backend)
    rows = np.arange(len(x))
    similarity = exact_similarity(x, centroids, rows, labels[:, 0])
    # Arrow divides by zero where lists of fixed length are empty: there is always one column.
    probes = np.full((len(x), max(1, labels.shape[1] - 1)), -1, dtype=np.int32)
    reach = np.sqrt(2 * config.largest_eps)
    likely = reach / np.sqrt(clustering.dimensions)
    band = 4 * rounding_error(x.shape[1])
    distances = _apart(hashlib.blake2b(centroids.tobytes()).digest())(centroids, labels)
    for i in range(1, labels.shape[1]):
        limit = distances[:, i - 1] * ((reach if i < config.n_probe else min(reach, likely)) + _REACH_SLACK)
        farther = approximate[:, 0] - approximate[:, i]
        is_near = farther <= limit - band
        unsure = np.flatnonzero(~is_near & (farther <= limit + band))
        is_near[unsure] = (
            similarity[unsure] - exact_similarity(x, centroids, unsure, labels[unsure, i]) <= limit[unsure]
        )
        probes[is_near, i - 1] = labels[is_near, i]
    return labels[:, 0].copy(), similarity, probes


class _Apart:
    """How far centroids lie apart; each pair is computed once, of many centroids when it is first asked for.

    Nearly all parts ask for the same pairs: those of clusters that lie next to each other.
    """

    def __init__(self) -> None:
        self._table: npt.NDArray[np.float64] | None = None
        self._known: tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]] = (np.empty(0, np.int64), np.empty(0))

    def __call__(self, centroids: Floats, labels: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
        """Return how far the first centroid of each row of labels lies from the others, (n, p - 1)."""
        if labels.shape[1] == 1:
            return np.empty((len(labels), 0))
        if len(centroids) <= _MOST_IN_TABLE:
            if self._table is None:
                self._table = _all_distances(centroids)
            return self._table[labels[:, :1], labels[:, 1:]]
        first, others = labels[:, :1].astype(np.int64), labels[:, 1:].astype(np.int64)
        low, high = np.minimum(first, others), np.maximum(first, others)
        asked = low * len(centroids) + high
        # Threads may replace it meanwhile, by one that knows more or less: what is taken here is one state.
        pairs, distances = self._known
        missing = np.unique(asked)
        at = np.searchsorted(pairs, missing)
        missing = missing[np.append(pairs, -1)[at] != missing]
        if len(missing):
            at = np.searchsorted(pairs, missing)
            pairs = np.insert(pairs, at, missing)
            distances = np.insert(distances, at, _distances(centroids, missing))
            if len(pairs) <= _MOST_PAIRS:
                self._known = pairs, distances
        return distances[np.searchsorted(pairs, asked)]


@functools.lru_cache(maxsize=2)
def _apart(digest: bytes) -> _Apart:
    """Return what this process knows of the distances of some centroids."""
    del digest
    return _Apart()


def _all_distances(centroids: Floats) -> npt.NDArray[np.float64]:
    """Return the distances of all pairs of centroids, (k, k)."""
    rows = centroids.astype(np.float64)
    squares = np.einsum("ij,ij->i", rows, rows)
    table: npt.NDArray[np.float64] = rows @ rows.T
    table *= -2
    table += squares
    table += squares[:, None]
    np.sqrt(np.maximum(table, 0, out=table), out=table)
    return table


def _distances(centroids: Floats, pairs: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the distances of pairs of centroids, each ``low * k + high``."""
    low, high = np.divmod(pairs, len(centroids))
    distances: npt.NDArray[np.float64] = np.empty(len(pairs))
    for start in range(0, len(pairs), _MAX_SPREAD_ROWS):
        at = slice(start, start + _MAX_SPREAD_ROWS)
        apart = centroids[low[at]].astype(np.float64)
        apart -= centroids[high[at]]
        distances[at] = np.sqrt(np.einsum("ij,ij->i", apart, apart))
    return distances


def _nearest(
    products: Any, x: Floats, centroids: Floats, n_probe: int, backend: Backend
) -> tuple[npt.NDArray[np.int32], Floats]:
    """Return the `n_probe` largest products per row, and where; near ties are decided in float64."""
    xp, k = backend.xp, len(centroids)
    n_top = min(n_probe + 1, k)
    top = backend.largest(products, n_top)
    values = xp.take_along_axis(products, top, axis=1)
    order = xp.argsort(-values, axis=1)
    top = backend.to_host(xp.take_along_axis(top, order, axis=1))
    values = backend.to_host(xp.take_along_axis(values, order, axis=1))
    band = 2 * rounding_error(x.shape[1])
    tied = values[:, :-1] - values[:, 1:] < band
    # Who is among them is not in question, but in which order.
    rows = np.flatnonzero(tied.any(axis=1))
    exact = exact_similarity(x, centroids, np.repeat(rows, n_top), top[rows].reshape(-1)).reshape(-1, n_top)
    order = np.lexsort((top[rows], -exact), axis=1)
    top[rows] = np.take_along_axis(top[rows], order, axis=1)
    labels = top[:, :n_probe].astype(np.int32)
    values[rows] = np.take_along_axis(exact, order, axis=1)
    # Here it is: more centroids may be as near as the last one.
    last = np.flatnonzero(tied[:, n_probe - 1 :].any(axis=1))
    if len(last):
        lowest = values[last, n_probe - 1] - values.dtype.type(band)
        near = xp.nonzero(products[backend.asarray(last)] >= backend.asarray(lowest)[:, None])
        at, column = (backend.to_host(each) for each in near)
        similarity = exact_similarity(x, centroids, last[at], column)
        order = np.lexsort((column, -similarity, at))
        best = order[np.searchsorted(at, np.arange(len(last)))[:, None] + np.arange(n_probe)]
        labels[last], values[last, :n_probe] = column[best], similarity[best]
    return labels, values[:, :n_probe]


def _normalised(x: npt.NDArray[Any]) -> Floats:
    norm = np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    return np.ascontiguousarray(x / np.where(norm > 0, norm, 1), dtype=np.float32)
