"""From kernels to decisions: within clusters, across their borders, and who comes back.

1. *Within*: in each cluster rows are taken in keep order, and a row goes if a row kept before it is near.
2. *Across*: the rows that stay are compared with those that stay in their other probed clusters. Of
   each near pair the less preferred one goes, unless what it would go for has gone itself.
3. *Orphans*: rows that went in 1 for a row that went in 2 are compared with what is left in all
   their clusters, and go for the nearest of these. Among those that nothing is near to, 1 and 2 decide, until no
   more are orphaned: some come back, the others go for one of them.

So a row that goes always names a row that stays, and no two rows that stay and were compared are near.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imgcurate.backend import Backend
from imgcurate.dedup.config import DedupConfig
from imgcurate.dedup.records import Records, array_from_arrow, array_to_arrow
from imgcurate.dedup.similarity import Vectors, greedy_keep, near_pairs, remove_chains

__all__ = ["REFERENCE_BIT", "Decisions", "Pairs", "Places", "Rows", "across", "choose", "orphans_of", "within"]

REFERENCE_BIT: Final = 1 << 62
"""Set in the uid of a row of a reference set, which stays whatever it is near to."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rows(Records):
    """Embeddings with what decides about them.

    Attributes
    ----------
    uid : ndarray of int64 of shape (n,)
        Identity.
    keys : ndarray of float64 of shape (n, k)
        Preference, smaller first, column by column; then the uid.
    cluster : ndarray of int32 of shape (n,)
        The cluster that the row is looked at in: its nearest, but for rows that were taken from :meth:`away`.
    probes : ndarray of int32 of shape (n, p)
        p >= 1 further clusters to look at it in; -1 where no near row can be.
    name : ndarray of object of shape (n,)
        How the row is named in words.
    x : ndarray of float32 of shape (n, d)
        Unit rows.
    """

    uid: Ints
    keys: npt.NDArray[np.float64]
    cluster: npt.NDArray[np.int32]
    probes: npt.NDArray[np.int32]
    name: npt.NDArray[Any]
    x: npt.NDArray[np.float32]

    @property
    def fixed(self) -> npt.NDArray[np.bool_]:
        """Mask of the rows of reference sets."""
        return _is_reference(self.uid)

    def vectors(self, index: Ints, backend: Backend) -> Vectors:
        """Return some rows for products; on a GPU all are carried there the first time, if there is room for them."""
        if "_on_device" not in self.__dict__:
            self.__dict__["_on_device"] = backend.resident_operand(self.x)
        on_device = self.__dict__["_on_device"]
        return Vectors(self.x[index]) if on_device is None else Vectors(self.x, index, on_device)

    def at_home(self, index: npt.NDArray[Any] | None = None) -> Places:
        """Return where the rows are looked at first: all, or those at these positions or of this mask."""
        index = np.arange(len(self)) if index is None else np.arange(len(self))[index]
        return Places(self, index, self.cluster[index])

    def away(self, index: npt.NDArray[Any] | None = None) -> Places:
        """Return where they are looked at besides: in the clusters of their probes."""
        index = self.at_home(index).index
        at, probe = np.nonzero(self.probes[index] >= 0)
        return Places(self, index[at], self.probes[index[at], probe])

    def in_order(self) -> dict[int, Ints]:
        """Return the rows of each cluster, as positions: those of reference sets first, then the preferred ones."""
        return _runs(self.cluster, np.lexsort((self.uid, *self.keys.T[::-1], ~self.fixed, self.cluster)))


@dataclass(frozen=True)
class Places:
    """Rows, and clusters that they are looked at in; nothing is copied.

    Attributes
    ----------
    rows : Rows
        The rows, some of which have a place, or several.
    index : ndarray of int64 of shape (m,)
        Positions in `rows`.
    cluster : ndarray of int32 of shape (m,)
        Where each is looked at.
    """

    rows: Rows
    index: Ints
    cluster: npt.NDArray[np.int32]

    def take(self, index: npt.NDArray[Any]) -> Rows:
        """Return the rows of some places, as they are looked at there."""
        return replace(self.rows.take(self.index[index]), cluster=self.cluster[index])

    def by_cluster(self) -> dict[int, Ints]:
        """Return the rows that are looked at in each cluster, as positions in :attr:`rows`."""
        places = _runs(self.cluster, np.argsort(self.cluster, kind="stable"))
        return {cluster: self.index[at] for cluster, at in places.items()}


def _runs(cluster: npt.NDArray[np.int32], order: Ints) -> dict[int, Ints]:
    """Return `order`, which sorts by cluster, in pieces of one cluster each."""
    values, starts = np.unique(cluster[order], return_index=True)
    return dict(zip(values.tolist(), np.split(order, starts[1:]), strict=True)) if len(order) else {}


@dataclass(frozen=True)
class Decisions(Records):
    """Rows that go, and for which row.

    Attributes
    ----------
    uid : ndarray of int64 of shape (n,)
        The rows, in order.
    keeper : ndarray of int64 of shape (n,)
        The row that each goes for; -1 for a row that stays.
    keeper_name : ndarray of object of shape (n,)
        Its name.
    similarity : ndarray of float64 of shape (n,)
        To it; NaN for a row that stays.
    """

    uid: Ints
    keeper: Ints
    keeper_name: npt.NDArray[Any]
    similarity: npt.NDArray[np.float64]

    @property
    def goes(self) -> npt.NDArray[np.bool_]:
        """Mask of the rows that go."""
        return self.keeper >= 0

    @staticmethod
    def stay(uid: Ints) -> Decisions:
        """Return decisions by which all rows stay."""
        n = len(uid)
        return Decisions(uid, np.full(n, -1, np.int64), np.full(n, "", object), np.full(n, np.nan))

    def overridden(self, later: Decisions) -> Decisions:
        """Return these decisions, with those of `later` in place of them where it has any for a row."""
        if not len(later):
            return self
        order = np.argsort(later.uid)
        known = later.uid[order]
        at = np.minimum(np.searchsorted(known, self.uid), len(known) - 1)
        found = np.flatnonzero(known[at] == self.uid)
        new = later.take(order[at[found]])
        changed = Decisions(self.uid, self.keeper.copy(), self.keeper_name.copy(), self.similarity.copy())
        changed.keeper[found] = new.keeper
        changed.keeper_name[found] = new.keeper_name
        changed.similarity[found] = new.similarity
        return changed


@dataclass(frozen=True)
class Pairs:
    """Near pairs of rows, with what is needed to decide between them.

    Attributes
    ----------
    uid : ndarray of int64 of shape (n, 2)
        The rows.
    keys : ndarray of float64 of shape (n, 2, k)
        Their preference.
    name : ndarray of object of shape (n, 2)
        Their names.
    similarity : ndarray of float64 of shape (n,)
        Cosine similarity.
    """

    uid: Ints
    keys: npt.NDArray[np.float64]
    name: npt.NDArray[Any]
    similarity: npt.NDArray[np.float64]

    @staticmethod
    def concat(parts: Sequence[Pairs], n_keys: int) -> Pairs:
        """Return the pairs of several."""
        none = Pairs(np.empty((0, 2), np.int64), np.empty((0, 2, n_keys)), np.empty((0, 2), object), np.empty(0))
        return Pairs(*(np.concatenate([getattr(p, f.name) for p in [none, *parts]]) for f in fields(Pairs)))

    def to_arrow(self) -> pa.RecordBatch:
        """Return them as an Arrow record batch."""
        columns = {"similarity": array_to_arrow(self.similarity)}
        for name in ("uid", "keys", "name"):
            columns |= {f"{name}{s}": array_to_arrow(getattr(self, name)[:, s]) for s in (0, 1)}
        return pa.record_batch(list(columns.values()), names=list(columns))

    @staticmethod
    def from_arrow(batch: pa.RecordBatch) -> Pairs:
        """Return those of a record batch of :meth:`to_arrow`."""
        uid, keys, name = (
            np.stack([array_from_arrow(batch[f"{c}0"]), array_from_arrow(batch[f"{c}1"])], axis=1)
            for c in ("uid", "keys", "name")
        )
        return Pairs(uid, keys, name, array_from_arrow(batch["similarity"]))


def within(rows: Rows, config: DedupConfig, backend: Backend) -> Decisions:
    """Decide in each cluster by itself.

    Parameters
    ----------
    rows : Rows
        All rows of some clusters.
    config : DedupConfig
        Threshold and mode.
    backend : Backend
        Where.

    Returns
    -------
    Decisions
        One for each of `rows`, in their order.
    """
    keeper = np.full(len(rows), -1, dtype=np.int64)
    similarity = np.full(len(rows), np.nan)
    fixed = rows.fixed
    for place in rows.in_order().values():
        x = rows.vectors(place, backend)
        decide = remove_chains if config.mode == "semdedup" else greedy_keep
        local, similarity[place] = decide(
            x, config.threshold, backend, n_fixed=int(fixed[place].sum()), only_fixed=config.only_reference
        )
        keeper[place] = np.where(local >= 0, place[local], -1)
    return _decisions(rows.uid, rows.name, keeper, similarity)


def across(a: Places, b: Iterable[Places], config: DedupConfig, backend: Backend) -> Pairs:
    """Return the near pairs of rows of `a` and of each of `b` that are looked at in the same cluster.

    Rows may be on both sides; no row is compared with itself, and no two rows of reference sets are.
    """
    found: list[Pairs] = []
    residents, fixed = a.by_cluster(), a.rows.fixed
    for other in b:
        other_fixed = other.rows.fixed
        for cluster, right in other.by_cluster().items():
            left = residents.get(cluster)
            if left is None:
                continue
            right_fixed = other_fixed[right]
            sides = [
                (left[~fixed[left]], right[right_fixed] if config.only_reference else right),
                (left[fixed[left]], right[~right_fixed]),
            ]
            for i, j in sides:
                if len(i) and len(j):
                    found.append(_near(a.rows, i, other.rows, j, config.threshold, backend))
    return Pairs.concat(found, a.rows.keys.shape[1])


def _near(a: Rows, left: Ints, b: Rows, right: Ints, threshold: float, backend: Backend) -> Pairs:
    """Return the near pairs of rows at some positions of `a` and of `b`."""
    i, j, similarity = near_pairs(a.vectors(left, backend), b.vectors(right, backend), threshold, backend)
    i, j = left[i], right[j]
    distinct = a.uid[i] != b.uid[j]
    i, j = i[distinct], j[distinct]
    return Pairs(
        np.stack([a.uid[i], b.uid[j]], axis=1),
        np.stack([a.keys[i], b.keys[j]], axis=1),
        np.stack([a.name[i], b.name[j]], axis=1),
        similarity[distinct],
    )


def choose(pairs: Pairs, fixed: Ints | None = None) -> Decisions:
    """Decide between the rows of near pairs.

    Parameters
    ----------
    pairs : Pairs
        All near pairs among the rows in question.
    fixed : ndarray of int64, optional
        Rows that stay whatever they are near to, besides those of reference sets.

    Returns
    -------
    Decisions
        For each row of a pair that is not `fixed`, by uid: which row that stays it goes for, the most
        similar one, or that it stays.
    """
    uid, first = np.unique(pairs.uid.reshape(-1), return_index=True)
    keys = pairs.keys.reshape(-1, pairs.keys.shape[2])[first]
    names = pairs.name.reshape(-1)[first]
    rank = np.empty(len(uid), dtype=np.int64)
    is_fixed = _is_reference(uid) | np.isin(uid, [] if fixed is None else fixed)
    order = np.lexsort((uid, *keys.T[::-1], ~is_fixed))
    rank[order] = np.arange(len(uid))
    i, j = np.searchsorted(uid, pairs.uid[:, 0]), np.searchsorted(uid, pairs.uid[:, 1])
    swap = rank[i] > rank[j]
    winner, loser = np.where(swap, j, i), np.where(swap, i, j)
    # Losers in keep order, so that what may win over one is decided before it.
    by_loser = np.lexsort((rank[winner], -pairs.similarity, rank[loser]))
    winner, loser, similarity = winner[by_loser], loser[by_loser], pairs.similarity[by_loser]
    keeper = np.full(len(uid), -1, dtype=np.int64)
    best = np.full(len(uid), np.nan)
    for w, lo, s in zip(winner.tolist(), loser.tolist(), similarity.tolist(), strict=True):
        if keeper[lo] < 0 and keeper[w] < 0 and not is_fixed[lo]:
            keeper[lo], best[lo] = w, s
    return _decisions(uid, names, keeper, best).take(~is_fixed)


def _decisions(uid: Ints, names: npt.NDArray[Any], keeper: Ints, similarity: npt.NDArray[np.float64]) -> Decisions:
    """Return decisions whose keepers are given as positions."""
    if not len(uid):
        return Decisions.stay(uid)
    goes = keeper >= 0
    keeper_name = np.where(goes, names[keeper], "").astype(object)
    return Decisions(uid, np.where(goes, uid[keeper], -1), keeper_name, similarity)


def orphans_of(decisions: Decisions, later: Decisions) -> npt.NDArray[np.bool_]:
    """Return the mask of the rows that went for a row that goes by later decisions."""
    return decisions.goes & np.isin(decisions.keeper, later.uid[later.goes])


def _is_reference(uid: Ints) -> npt.NDArray[np.bool_]:
    return uid >= REFERENCE_BIT
