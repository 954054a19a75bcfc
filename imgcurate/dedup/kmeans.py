"""Spherical k-means: fit on a sample, assign block by block.

Rows have unit length, so the nearest centroid is that of the largest inner product once centroids
have unit length too.
"""

from __future__ import annotations

import warnings
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from imgcurate.backend import Backend
from imgcurate.dedup.config import DedupConfig
from imgcurate.dedup.similarity import exact_similarity, rounding_error

__all__ = ["assign", "fit_centroids"]

_BLOCK_VALUES: Final = 32 * 1024 * 1024
_SPLIT_OVER: Final = 4.0

Floats = npt.NDArray[np.float32]


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
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]:
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
        Nearest first; of equally near ones the lower index first.
    similarity : ndarray of float64 of the same shape
        Cosine similarity to them, exact, so independent of how rows are put into blocks.

    Notes
    -----
    Memory is one block of 32 M products beside `x`.
    """
    n_probe = min(n_probe, len(centroids))
    labels = np.zeros((len(x), n_probe), dtype=np.int32)
    if len(centroids) > 1:
        device_centroids = backend.asarray(centroids).T
        rows = max(1, _BLOCK_VALUES // len(centroids))
        for start in range(0, len(x), rows):
            block = x[start : start + rows]
            products = backend.asarray(block) @ device_centroids
            labels[start : start + rows] = _nearest(products, block, centroids, n_probe, backend)
    similarity = np.empty(labels.shape)
    for i in range(n_probe):
        similarity[:, i] = exact_similarity(x, centroids, np.arange(len(x)), labels[:, i])
    return labels, similarity


def _nearest(products: Any, x: Floats, centroids: Floats, n_probe: int, backend: Backend) -> npt.NDArray[np.int32]:
    """Return the `n_probe` largest products per row; near ties are decided in float64."""
    xp, k = backend.xp, len(centroids)
    n_top = min(n_probe + 1, k)
    top = xp.argpartition(products, k - n_top, axis=1)[:, k - n_top :]
    values = xp.take_along_axis(products, top, axis=1)
    order = xp.argsort(-values, axis=1)
    top = backend.to_host(xp.take_along_axis(top, order, axis=1))
    values = backend.to_host(xp.take_along_axis(values, order, axis=1))
    band = 2 * rounding_error(x.shape[1])
    labels = top[:, :n_probe].astype(np.int32)
    for row in np.flatnonzero((values[:, :-1] - values[:, 1:] < band).any(axis=1)):
        near = np.flatnonzero(backend.to_host(products[row]) >= values[row, n_probe - 1] - band)
        similarity = exact_similarity(x, centroids, np.full(len(near), row), near)
        labels[row] = near[np.lexsort((near, -similarity))][:n_probe]
    return labels


def _normalised(x: npt.NDArray[Any]) -> Floats:
    norm = np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    return np.ascontiguousarray(x / np.where(norm > 0, norm, 1), dtype=np.float32)
