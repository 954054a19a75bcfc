"""Decisions of a dedup stage -> columns, with what stages before it decided about rows that have left.

A row may have left as a duplicate of one that leaves now. It is then made a duplicate of what that one
leaves for, so that every duplicate names a sample that is kept, however many stages there are. These
rows lie in any part, so they are brought together in buckets:

=================  ===========  ========================================================
file               a batch per  holds
=================  ===========  ========================================================
``named/<part>``   bucket       the uids that former duplicates of the part name
``gone/<part>``    bucket       the rows of the part that leave now
``moved/<b...>``   part         of these, the ones that former duplicates of a part name
=================  ===========  ========================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgcurate import schema
from imgcurate.dedup.exchange import RowParts, Scratch, TaskRunner
from imgcurate.dedup.keep import hash_uids
from imgcurate.dedup.records import Records
from imgcurate.storage import join_url

__all__ = ["CONTENT", "DECIDED", "EMBEDDING", "PHASH", "PIXELS", "DedupJob", "Ledger", "Verdicts"]

CONTENT: Final = "content"
PIXELS: Final = "pixels"
PHASH: Final = "phash"
EMBEDDING: Final = "embedding"
_LOOSER: Final = (CONTENT, PIXELS, PHASH, EMBEDDING)
_EXACT: Final = (CONTENT, PIXELS)

DECIDED: Final = (schema.DUPLICATE_OF, schema.DUPLICATE_IN, schema.DUPLICATE_BY, schema.SIMILARITY)
"""The columns that dedup stages share."""

_BUCKET_ROWS: Final = 1_000_000


@dataclass(frozen=True)
class Verdicts(Records):
    """What a stage decided about rows.

    Attributes
    ----------
    uid : ndarray of int64 of shape (n,)
        The rows.
    keeper : ndarray of int64 of shape (n,)
        uid of the row that each leaves for; -1 for a row that does not leave.
    where : ndarray of object of shape (n,)
        The run folder that the keeper belongs to; ``""`` if it is this run.
    similarity : ndarray of float64 of shape (n,)
        Cosine similarity to it; NaN if there is none.
    reason : ndarray of object of shape (n,)
        Why it leaves, in words; ``""`` for a row that does not leave.
    """

    uid: npt.NDArray[np.int64]
    keeper: npt.NDArray[np.int64]
    where: npt.NDArray[Any]
    similarity: npt.NDArray[np.float64]
    reason: npt.NDArray[Any]

    @property
    def goes(self) -> npt.NDArray[np.bool_]:
        """Mask of the rows that leave."""
        return self.keeper >= 0

    @staticmethod
    def stay(uid: npt.NDArray[np.int64]) -> Verdicts:
        """Return verdicts by which no row leaves."""
        n = len(uid)
        nothing = np.full(n, "", dtype=object)
        return Verdicts(uid, np.full(n, -1, np.int64), nothing, np.full(n, np.nan), nothing.copy())


class DedupJob(Protocol):
    """A way of deduplication over a catalog; picklable."""

    @property
    def catalog(self) -> RowParts:
        """What it is about."""

    @property
    def scratch(self) -> str:
        """URL of a folder that all workers can write to."""

    @property
    def kind(self) -> str:
        """How alike its duplicates are; the value of ``duplicate_by``."""

    def run(self, run_tasks: TaskRunner) -> Any:
        """Decide about all rows."""

    def outcome(self, number: int) -> tuple[Verdicts, Mapping[str, pa.Array]]:
        """Return the decisions about a part's rows, in their order, and columns of its own."""


@dataclass(frozen=True)
class Ledger:
    """A part's duplicates after a job has run: its own, and those of stages before it.

    Attributes
    ----------
    job : DedupJob
        What has decided.
    """

    job: DedupJob

    def run(self, run_tasks: TaskRunner) -> None:
        """Find the former duplicates of rows that leave now; without any, this ends at once."""
        parts = range(self.job.catalog.n_parts)
        former = 0
        if schema.DUPLICATE_OF in self.job.catalog.schema.names:
            counts = run_tasks("former duplicates", self._count, parts, light=True)
            former = sum(r["former"] for r in counts.values())
        self._scratch.make("", "named", "gone", "moved")
        self._scratch.write_json("plan", {"buckets": -(-former // _BUCKET_ROWS)})
        if former:
            run_tasks("who leaves", self._spread, parts, light=True)
            run_tasks("who is named", self._join, range(self._n_buckets))

    def table(self, number: int, columns: Sequence[str]) -> pa.Table:
        """Return columns of a part as they are now."""
        given = self.job.catalog.schema.names
        wanted = {*columns, schema.UID, schema.STATUS, schema.REASON, *DECIDED}
        old = self.job.catalog.read(number, [c for c in given if c in wanted])
        verdicts, own = self.job.outcome(number)
        goes = verdicts.goes
        former = _is_former(old)
        to, by, where, similarity = (
            _objects(old, column, former)
            for column in (schema.DUPLICATE_OF, schema.DUPLICATE_BY, schema.DUPLICATE_IN, schema.SIMILARITY)
        )
        reason = _objects(old, schema.REASON)
        reason[goes], to[goes], by[goes] = verdicts.reason[goes], verdicts.keeper[goes], self.job.kind
        where[goes] = [w or None for w in verdicts.where[goes]]
        similarity[goes] = [None if np.isnan(s) else s for s in verdicts.similarity[goes]]
        moved, index = self._moved(number, old)
        for i, m in zip(index.tolist(), range(len(index)), strict=True):
            reason[i] = f"{reason[i]}, which is a {moved.reason[m]}"
            to[i], where[i] = moved.keeper[m], moved.where[m] or None
            by[i], similarity[i] = self._joined(by[i], similarity[i], float(moved.similarity[m]))
        made = {
            schema.STATUS: np.where(goes, schema.STATUS_DUPLICATE, _objects(old, schema.STATUS)),
            schema.REASON: reason,
            schema.DUPLICATE_OF: to,
            schema.DUPLICATE_IN: where,
            schema.DUPLICATE_BY: by,
            schema.SIMILARITY: similarity,
        }
        made = {name: pa.array(values.tolist(), schema.arrow_type(name)) for name, values in made.items()}
        return pa.table({c: made[c] if c in made else own[c] if c in own else old[c] for c in columns})

    def _joined(self, by: str | None, similarity: Any, step: float) -> tuple[str, Any]:
        """Return (``duplicate_by``, similarity) of a row whose keeper leaves by one more step.

        A cosine holds over a step between equal images; over two steps nothing is known of it.
        """
        before = by if by in _LOOSER else EMBEDDING
        loosest = max(before, self.job.kind, key=_LOOSER.index)
        if before in _EXACT:
            return loosest, None if np.isnan(step) else step
        return loosest, similarity if self.job.kind in _EXACT else None

    def _count(self, part: int) -> dict[str, Any]:
        return {"former": int(_is_former(self._former_columns(part)).sum())}

    def _spread(self, part: int) -> dict[str, Any]:
        name = f"gone/{part:05d}"
        if self._scratch.has(name):
            return {}
        table = self._former_columns(part)
        named = np.unique(table[schema.DUPLICATE_OF].filter(pa.array(_is_ours(table))).to_numpy().astype(np.int64))
        bucket = self._bucket(named)
        batches = [pa.record_batch({"uid": pa.array(named[bucket == b])}) for b in range(self._n_buckets)]
        self._scratch.write(f"named/{part:05d}", batches)
        verdicts, _ = self.job.outcome(part)
        gone = verdicts.take(verdicts.goes)
        bucket = self._bucket(gone.uid)
        self._scratch.write(name, [gone.take(bucket == b).to_arrow() for b in range(self._n_buckets)])
        return {}

    def _join(self, bucket: int) -> dict[str, Any]:
        name = f"moved/{bucket:05d}"
        if not self._scratch.has(name):
            parts = range(self.job.catalog.n_parts)
            files = (self._scratch.read(f"gone/{p:05d}", bucket) for p in parts)
            gone = Verdicts.concat([Verdicts.from_arrow(f) for f in files])
            gone = gone.take(np.argsort(gone.uid))
            named = (self._scratch.read(f"named/{p:05d}", bucket)["uid"].to_numpy() for p in parts)
            self._scratch.write(name, (gone.take(_found(gone.uid, uids)).to_arrow() for uids in named))
        return {}

    def _moved(self, part: int, old: pa.Table) -> tuple[Verdicts, npt.NDArray[np.int64]]:
        """Return what happens to the rows that former duplicates name, and which of `old` these are."""
        files = [self._scratch.read(f"moved/{b:05d}", part) for b in range(self._n_buckets)]
        moved = Verdicts.concat([Verdicts.stay(np.empty(0, np.int64)), *(Verdicts.from_arrow(f) for f in files)])
        if not len(moved):
            return moved, np.empty(0, np.int64)
        moved = moved.take(np.argsort(moved.uid))
        ours = np.flatnonzero(_is_ours(old))
        named = old[schema.DUPLICATE_OF].take(pa.array(ours)).to_numpy().astype(np.int64)
        at = np.minimum(np.searchsorted(moved.uid, named), len(moved) - 1)
        found = moved.uid[at] == named
        return moved.take(at[found]), ours[found]

    def _former_columns(self, part: int) -> pa.Table:
        names = (schema.STATUS, schema.DUPLICATE_OF, schema.DUPLICATE_IN)
        return self.job.catalog.read(part, [c for c in self.job.catalog.schema.names if c in names])

    @property
    def _scratch(self) -> Scratch:
        return Scratch(join_url(self.job.scratch, "ledger"), self.job.catalog.storage_options)

    @property
    def _n_buckets(self) -> int:
        return int(self._scratch.read_json("plan")["buckets"])

    def _bucket(self, uid: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return (hash_uids(uid, 0) % np.uint64(self._n_buckets)).astype(np.int64)


def _found(uid: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return where those of `wanted` that are there stand in `uid`, which is sorted."""
    if not len(uid):
        return np.empty(0, np.int64)
    at: npt.NDArray[np.int64] = np.minimum(np.searchsorted(uid, wanted), len(uid) - 1)
    return at[np.equal(uid[at], wanted)]


def _is_former(table: pa.Table) -> npt.NDArray[np.bool_]:
    """Return the mask of the rows that stages before have found to be duplicates."""
    if schema.DUPLICATE_OF not in table.column_names:
        return np.zeros(len(table), dtype=bool)
    left = pc.equal(table[schema.STATUS], schema.STATUS_DUPLICATE)
    mask: npt.NDArray[np.bool_] = pc.and_(left, pc.is_valid(table[schema.DUPLICATE_OF])).to_numpy()
    return mask


def _is_ours(table: pa.Table) -> npt.NDArray[np.bool_]:
    """Return the mask of those that name a row of this run."""
    former = _is_former(table)
    if schema.DUPLICATE_IN in table.column_names:
        former &= pc.is_null(table[schema.DUPLICATE_IN]).to_numpy()
    return former


def _objects(table: pa.Table, column: str, mask: npt.NDArray[np.bool_] | None = None) -> npt.NDArray[Any]:
    """Return a column as objects, None where it is null, not there or outside the mask."""
    out = np.full(len(table), None, dtype=object)
    if column in table.column_names:
        out[:] = table[column].to_pylist()
    if mask is not None:
        out[~mask] = None
    return out
