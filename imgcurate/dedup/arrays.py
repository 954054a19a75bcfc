"""Deduplication of embeddings that lie in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from imgcurate.backend import Backend, cpu_count, get_backend
from imgcurate.dedup.config import DedupConfig
from imgcurate.dedup.kmeans import fit_clustering
from imgcurate.dedup.passes import Decisions, Pairs, Rows, across, choose, orphans_of, within
from imgcurate.dedup.rows import make_rows, sample_order, unit_rows
from imgcurate.errors import ConfigError

__all__ = ["DedupResult", "dedup_arrays"]


@dataclass(frozen=True)
class DedupResult:
    """Which rows are duplicates of which.

    Attributes
    ----------
    duplicate_of : ndarray of int64 of shape (n,)
        Position of the row that stays, for a row that goes; -1 for a row that stays.
    similarity : ndarray of float32 of shape (n,)
        Cosine similarity to it, at least ``1 - eps``; NaN for a row that stays.
    cluster : ndarray of int32 of shape (n,)
        Nearest centroid; -1 for a row without a direction (zeros, NaN), which is never a duplicate.
    centroids : ndarray of float32 of shape (k, d)
        Unit rows.
    """

    duplicate_of: npt.NDArray[np.int64]
    similarity: npt.NDArray[np.float32]
    cluster: npt.NDArray[np.int32]
    centroids: npt.NDArray[np.float32]

    @property
    def kept(self) -> npt.NDArray[np.bool_]:
        """Mask of the rows that stay."""
        return self.duplicate_of < 0


def dedup_arrays(
    embeddings: npt.NDArray[Any],
    *,
    uid: npt.NDArray[np.int64] | None = None,
    columns: Mapping[str, npt.NDArray[Any]] | None = None,
    device: str = "auto",
    config: DedupConfig | None = None,
    **parameters: Any,
) -> DedupResult:
    """Find duplicates among embeddings in memory.

    Parameters
    ----------
    embeddings : ndarray of shape (n, d)
        Rows of any length other than zero.
    uid : ndarray of int64 of shape (n,), optional
        Identity of the rows, each once, which decides ties and which rows k-means is fitted on; by
        default their position.
    columns : mapping of str to ndarray of shape (n,), optional
        Numeric values for ``keep_by``.
    device : {"auto", "cpu", "gpu"}
        Where.
    config : DedupConfig, optional
        All parameters; or give them one by one, as in :class:`DedupConfig`.

    Raises
    ------
    ConfigError
        If `embeddings` is not 2-D, a column is missing, or a parameter is out of range.

    Notes
    -----
    Memory is about twice that of the embeddings as float32, beside these.
    """
    config = config or DedupConfig(**parameters)
    embeddings = np.asarray(embeddings)
    if embeddings.ndim != 2:
        raise ConfigError(f"embeddings have {embeddings.ndim} dimensions, and should have 2: (n, d)")
    n = len(embeddings)
    uid = np.arange(n) if uid is None else np.asarray(uid, dtype=np.int64)
    if len(np.unique(uid)) != n:
        raise ConfigError(f"uid should hold {n} different values, one for each row")
    given = {"uid": uid, **(columns or {})}
    missing = [c for c in config.keep_order.columns if c not in given]
    if missing:
        raise ConfigError(f"keep_by needs the column {missing[0]!r}; given are {', '.join(given)}")
    backend = get_backend(device)
    x, valid = unit_rows(embeddings, cpu_count())
    index = np.flatnonzero(valid)
    x = x if len(index) == n else x[index]
    duplicate_of, cluster = np.full(n, -1, np.int64), np.full(n, -1, np.int32)
    similarity = np.full(n, np.nan, np.float32)
    if not len(index):
        return DedupResult(duplicate_of, similarity, cluster, np.empty((0, embeddings.shape[1]), np.float32))
    sample = sample_order(uid[index], config.fit_rows(len(index)), config.random_state)
    clustering = fit_clustering(x[sample], config.clusters_for(len(index)), config, backend)
    keep_columns = {c: np.asarray(given[c])[index] for c in config.keep_order.columns}
    names = np.full(len(index), "", object)
    rows = make_rows(x, uid[index], uid[index], names, keep_columns, clustering, config, backend)
    decisions = _decide(rows, config, backend)
    order = np.argsort(uid)

    def positions(wanted: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return order[np.searchsorted(uid, wanted, sorter=order)]

    at = positions(decisions.uid)
    duplicate_of[at[decisions.goes]] = positions(decisions.keeper[decisions.goes])
    similarity[at] = decisions.similarity
    cluster[index] = rows.cluster
    return DedupResult(duplicate_of, similarity, cluster, clustering.centroids)


def _decide(rows: Rows, config: DedupConfig, backend: Backend) -> Decisions:
    decisions = within(rows, config, backend)
    if config.probes == 1:
        return decisions
    kept = ~decisions.goes
    crossed = choose(across(rows.at_home(kept), [rows.away(kept)], config, backend))
    orphaned = orphans_of(decisions, crossed)
    decisions = decisions.overridden(crossed)
    kept = ~decisions.goes
    while orphaned.any():
        # Orphans are not compared with each other at once: they may be many and all alike.
        pairs = [
            across(rows.at_home(orphaned), [rows.at_home(kept), rows.away(kept)], config, backend),
            across(rows.away(orphaned), [rows.at_home(kept)], config, backend),
        ]
        taken = choose(Pairs.concat(pairs, rows.keys.shape[1]), rows.uid[kept])
        decisions = decisions.overridden(Decisions.stay(rows.uid[orphaned])).overridden(taken)
        at = np.flatnonzero(orphaned)
        at = at[~np.isin(rows.uid[at], taken.uid)]
        left = rows.take(at)
        led = within(left, config, backend)
        leads = ~led.goes
        crossed = choose(across(left.at_home(leads), [left.away(leads)], config, backend))
        decisions = decisions.overridden(led).overridden(crossed)
        kept, orphaned = np.zeros(len(rows), bool), np.zeros(len(rows), bool)
        kept[at[leads & ~np.isin(left.uid, crossed.uid[crossed.goes])]] = True
        orphaned[at[orphans_of(led, crossed)]] = True
    return decisions
