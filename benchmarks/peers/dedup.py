"""Ways to find near-duplicates among vectors, one per function, each as its project offers it.

Each takes unit rows, (n, d) float32, and returns the mask of those that stay at ``EPS``. FAISS finds pairs; who
stays is then decided by the greedy rule, in the order of the rows. imagededup and FAISS are in
``requirements-dedup.txt``.
"""

from __future__ import annotations

import logging
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

EPS = 0.05
BLOCK = 2000


def imgcurate(x: np.ndarray) -> np.ndarray:
    from imgcurate.dedup import dedup_arrays

    return dedup_arrays(x, eps=EPS, device="cpu").kept


def imgcurate_one_probe(x: np.ndarray) -> np.ndarray:
    from imgcurate.dedup import dedup_arrays

    return dedup_arrays(x, eps=EPS, n_probe=1, device="cpu").kept


def brute_force(x: np.ndarray) -> np.ndarray:
    """Find all pairs with NumPy, and keep the first of each."""
    near: list[np.ndarray] = []
    for start in range(0, len(x), BLOCK):
        i, j = np.nonzero(x[start : start + BLOCK] @ x.T >= 1 - EPS)
        near.append(np.stack([i + start, j], axis=1))
    return greedy(np.concatenate(near), len(x))


def faiss_exact(x: np.ndarray) -> np.ndarray:
    import faiss

    index = faiss.IndexFlatIP(x.shape[1])
    index.add(x)
    return greedy(range_search(index, x), len(x))


def faiss_ivf(x: np.ndarray) -> np.ndarray:
    """FAISS with as many lists as imgcurate takes clusters, two of them probed."""
    import faiss

    n_lists = n_clusters(len(x))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(x.shape[1]), x.shape[1], n_lists, faiss.METRIC_INNER_PRODUCT)
    index.train(x[: 64 * n_lists] if n_lists > 1 else x)
    index.add(x)
    index.nprobe = 2
    return greedy(range_search(index, x), len(x))


def n_clusters(n: int) -> int:
    return max(1, n // 2000)


def range_search(index: object, x: np.ndarray) -> np.ndarray:
    near = []
    for start in range(0, len(x), BLOCK):
        limits, _, found = index.range_search(x[start : start + BLOCK], 1 - EPS)
        rows = np.repeat(np.arange(start, start + len(limits) - 1), np.diff(limits).astype(int))
        near.append(np.stack([rows, found], axis=1))
    return np.concatenate(near)


def semdedup(x: np.ndarray) -> np.ndarray:
    """The published rule, as in semdedup.py: per cluster, the largest value above each diagonal entry."""
    from sklearn.cluster import KMeans

    k = n_clusters(len(x))
    model = KMeans(k, n_init=1, max_iter=25, random_state=0).fit(x[: max(64 * k, 20_000)])
    centroids = model.cluster_centers_ / np.linalg.norm(model.cluster_centers_, axis=1, keepdims=True)
    labels = np.argmax(x @ centroids.T, axis=1)
    kept = np.ones(len(x), dtype=bool)
    for cluster in range(k):
        rows = np.flatnonzero(labels == cluster)
        rows = rows[np.argsort(x[rows] @ centroids[cluster])]
        similarity = np.triu(x[rows] @ x[rows].T, k=1)
        kept[rows[similarity.max(axis=0, initial=-1) > 1 - EPS]] = False
    return kept


def imagededup(x: np.ndarray) -> np.ndarray:
    from imagededup.methods import CNN

    # Its constructor downloads a network that finding duplicates among given encodings does not use.
    method = CNN.__new__(CNN)
    method.logger, method.verbose = logging.getLogger("imagededup"), False
    encodings = {str(i): row for i, row in enumerate(x)}
    remove = method.find_duplicates_to_remove(encoding_map=encodings, min_similarity_threshold=1 - EPS)
    kept = np.ones(len(x), dtype=bool)
    kept[[int(name) for name in remove]] = False
    return kept


def fastdup(python: str, x: np.ndarray) -> np.ndarray:
    """Run fastdup by a Python of its own."""
    driver = Path(__file__).with_name("fastdup_driver.py")
    with tempfile.TemporaryDirectory() as folder:
        vectors, kept = Path(folder) / "vectors.npy", Path(folder) / "kept.npy"
        np.save(vectors, x)
        subprocess.run([python, driver, vectors, kept, str(EPS)], check=True, capture_output=True)
        mask: np.ndarray = np.load(kept)
    return mask


def greedy(near: np.ndarray, n: int) -> np.ndarray:
    """Keep each row that has no kept row before it among its neighbours."""
    near = near[near[:, 1] < near[:, 0]]
    near = near[np.argsort(near[:, 0], kind="stable")]
    kept = np.ones(n, dtype=bool)
    for later, earlier in near.tolist():
        if kept[earlier]:
            kept[later] = False
    return kept


METHODS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    f.__name__: f for f in (brute_force, imgcurate, imgcurate_one_probe, faiss_exact, faiss_ivf, semdedup, imagededup)
}
