"""Deduplication of a catalog on a cluster: what is on disk stays on disk but for one bucket at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imgcurate import schema
from imgcurate.dedup.config import DedupConfig
from imgcurate.dedup.decide import Decider
from imgcurate.dedup.exchange import REFERENCE_SHIFT, Exchange, RowParts, Scratch, TaskRunner
from imgcurate.dedup.passes import REFERENCE_BIT
from imgcurate.dedup.verdicts import EMBEDDING, Verdicts
from imgcurate.storage import join_url

__all__ = ["CatalogDedup", "Decided"]


@dataclass(frozen=True)
class Decided:
    """What was decided about the rows of a part; every array has one entry per row.

    Attributes
    ----------
    cluster : ndarray of int64 of shape (n,)
        Nearest centroid; -1 for rows that took no part.
    keeper : ndarray of int64 of shape (n,)
        uid of the row that each goes for; -1 for a row that stays. With ``REFERENCE_BIT`` set it is a
        row of a reference set.
    keeper_name : ndarray of object of shape (n,)
        Its name, ``<shard stem>/<key>``.
    similarity : ndarray of float64 of shape (n,)
        To it.
    """

    cluster: npt.NDArray[np.int64]
    keeper: npt.NDArray[np.int64]
    keeper_name: npt.NDArray[Any]
    similarity: npt.NDArray[np.float64]

    @property
    def goes(self) -> npt.NDArray[np.bool_]:
        """Mask of the rows that go."""
        return self.keeper >= 0

    @property
    def keeper_uid(self) -> npt.NDArray[np.int64]:
        """The uid of the row that each goes for, in its own catalog; -1 for a row that stays."""
        return np.where(self.goes, self.keeper & ((1 << REFERENCE_SHIFT) - 1), -1)

    @property
    def reference_index(self) -> npt.NDArray[np.int64]:
        """Position of the reference set of each row of :attr:`by_reference`."""
        return (self.keeper[self.by_reference] & ~REFERENCE_BIT) >> REFERENCE_SHIFT

    @property
    def by_reference(self) -> npt.NDArray[np.bool_]:
        """Mask of the rows that go for a row of a reference set."""
        return self.keeper >= REFERENCE_BIT


@dataclass(frozen=True)
class CatalogDedup:
    """One deduplication; picklable, so that tasks carry it.

    Attributes
    ----------
    catalog : RowParts
        Its parts have ``uid shard key status embedding`` and the columns of ``keep_by``.
    config : DedupConfig
        The parameters.
    scratch : str
        URL of a folder that all workers can write to.
    device : {"auto", "cpu", "gpu"}
        Where the workers compute.
    references : tuple of RowParts
        Sets whose rows stay in any case.
    bucket_bytes : int, optional
        As in :class:`~imgcurate.dedup.exchange.Exchange`.
    """

    catalog: RowParts
    config: DedupConfig
    scratch: str
    device: str = "auto"
    references: tuple[RowParts, ...] = ()
    bucket_bytes: int | None = None

    @property
    def exchange(self) -> Exchange:
        """The rows by bucket."""
        return Exchange(
            self.catalog, self.references, self.config, self._folder(), self.device, self.bucket_bytes
        )  # fmt: skip

    def run(self, run_tasks: TaskRunner) -> dict[float, int]:
        """Decide about all rows; :meth:`decided` then tells the outcome part by part.

        Returns
        -------
        dict of float to int
            For each threshold, in ascending order, how many rows go by it.
        """
        exchange = self.exchange
        exchange.prepare(run_tasks)
        thresholds = sorted({self.config.eps, *self.config.eps_list})
        if not exchange.n_buckets:
            return dict.fromkeys(thresholds, 0)
        return {eps: self._decider(eps).run(run_tasks) for eps in thresholds}

    def decided(self, number: int) -> Decided:
        """Return the decisions about a part's rows, in their order."""
        uid = self.catalog.read(number, [schema.UID])[schema.UID].to_numpy()
        n = len(uid)
        out = Decided(np.full(n, -1, np.int64), np.full(n, -1, np.int64), np.full(n, "", object), np.full(n, np.nan))
        order = np.argsort(uid)
        decisions, cluster = self._decider(self.config.eps).decided(number)
        at = order[np.searchsorted(uid, decisions.uid, sorter=order)]
        out.cluster[at] = cluster
        for name in ("keeper", "keeper_name", "similarity"):
            getattr(out, name)[at] = getattr(decisions, name)
        return out

    @property
    def kind(self) -> str:
        """How alike duplicates are."""
        return EMBEDDING

    def outcome(self, number: int) -> tuple[Verdicts, Mapping[str, pa.Array]]:
        """Return the decisions about a part's rows, in their order, and their clusters."""
        decided = self.decided(number)
        n = len(decided.keeper)
        where, reason = np.full(n, "", dtype=object), np.full(n, "", dtype=object)
        where[decided.by_reference] = [self.references[i].folder for i in decided.reference_index]
        for i in np.flatnonzero(decided.goes):
            name = f"{where[i]}: {decided.keeper_name[i]}" if where[i] else decided.keeper_name[i]
            reason[i] = f"duplicate of {name}, cosine {decided.similarity[i]:.3f}"
        uid = self.catalog.read(number, [schema.UID])[schema.UID].to_numpy()
        cluster = pa.array(decided.cluster.astype(np.int32), mask=decided.cluster < 0)
        return Verdicts(uid, decided.keeper_uid, where, decided.similarity, reason), {schema.CLUSTER: cluster}

    def _decider(self, eps: float) -> Decider:
        return Decider(self.exchange, self.config.with_eps(eps), self._folder(f"eps-{eps!r}"))

    def _folder(self, name: str = "") -> Scratch:
        folder = join_url(self.scratch, name) if name else self.scratch
        return Scratch(folder, self.catalog.storage_options)
