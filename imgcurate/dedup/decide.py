"""Buckets -> decisions, for one threshold: the three passes as tasks on a cluster.

Orphans may be orphaned again, by one of their own, so there are turns: turn 0 decides about all rows, each turn after
it about the orphans of the one before that nothing which stayed is near to. More than two are rare, even where rows
vary in few directions.

==============================  ===========  ==================================================
file in the folder              a batch per  holds
==============================  ===========  ==================================================
``decisions-<turn>/<bucket>``   part         what :func:`~imgcurate.dedup.passes.within` decided
``kept-<turn>/<bucket>``                     the rows that stay
``gone-<turn>/<bucket>``                     the rows that go
``visitors-<turn>/<bucket>``    bucket       those that stay, where they visit other clusters
``pairs-<turn>/<bucket>``                    near pairs across borders
``crossed-<turn>``                           what is decided by these
``orphans-<turn>/<bucket>``                  rows that went for one that goes by ``crossed``
``guests-<turn>/<bucket>``      bucket       the same, where they visit other clusters
``near-<turn>/<bucket>``                     near pairs of these and of rows that stay
``taken-<turn>``                             what is decided by these
``overrides``                                all decisions after the first pass
==============================  ===========  ==================================================

A later turn has no parts, and one batch of decisions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imgcurate.backend import Backend, get_backend
from imgcurate.dedup.config import DedupConfig
from imgcurate.dedup.exchange import Exchange, Scratch, TaskRunner
from imgcurate.dedup.passes import Decisions, Pairs, Places, Rows, across, choose, orphans_of, within

__all__ = ["Decider"]

_FOLDERS: Final = ("decisions", "kept", "gone", "visitors", "pairs", "orphans", "guests", "near")
_GUEST_BYTES: Final = 64 * 1024**2


@dataclass(frozen=True)
class Decider:
    """Decide about the rows of an exchange by one threshold; picklable, so that tasks carry it.

    Attributes
    ----------
    exchange : Exchange
        The rows, in their buckets.
    config : DedupConfig
        Threshold and mode.
    scratch : Scratch
        Where the decisions go.
    """

    exchange: Exchange
    config: DedupConfig
    scratch: Scratch

    def run(self, run_tasks: TaskRunner) -> int:
        """Decide about all rows, and return how many of the catalog's go."""
        buckets = range(self.exchange.n_buckets)
        label = f"eps {self.config.eps:g}: "
        self._make_folders(0)
        gone: int = sum(
            r["goes"] for r in run_tasks(f"{label}within clusters", self._within, buckets, on_device=True).values()
        )
        overrides = Decisions.stay(np.empty(0, np.int64))
        for turn in itertools.count() if self.config.probes > 1 else ():
            run_tasks(f"{label}across clusters", partial(self._across, turn=turn), buckets, on_device=True)
            crossed = choose(self._all_pairs(f"pairs-{turn}"))
            self.scratch.write(f"crossed-{turn}", [crossed.to_arrow()])
            overrides = overrides.overridden(self._all_decisions(turn)).overridden(crossed) if turn else crossed
            if not crossed.goes.any():
                break
            run_tasks(f"{label}orphans", partial(self._find_orphans, turn=turn), buckets)
            run_tasks(f"{label}orphans again", partial(self._compare_orphans, turn=turn), buckets, on_device=True)
            orphans = np.concatenate([self._rows(f"orphans-{turn}", b).uid for b in buckets])
            pairs = self._all_pairs(f"near-{turn}")
            taken = choose(pairs, np.setdiff1d(pairs.uid.reshape(-1), orphans))
            self.scratch.write(f"taken-{turn}", [taken.to_arrow()])
            examined = Decisions.stay(orphans).overridden(taken)
            if turn:
                overrides = overrides.overridden(examined)
            else:
                overrides, gone = Decisions.concat([overrides, examined]), gone - len(orphans)
            if examined.goes.all():
                break
            self._make_folders(turn + 1)
            run_tasks(
                f"{label}orphans within clusters", partial(self._within_orphans, turn=turn), buckets, on_device=True
            )
        self.scratch.write("overrides", [overrides.to_arrow()])
        return gone + int(overrides.goes.sum())

    def _make_folders(self, turn: int) -> None:
        self.scratch.make(*(f"{name}-{turn}" for name in _FOLDERS))

    def decided(self, part: int) -> tuple[Decisions, npt.NDArray[np.int32]]:
        """Return the decisions about a part's rows, in no particular order, and their clusters."""
        batches = [self.scratch.read(f"decisions-0/{b:05d}", part) for b in range(self.exchange.n_buckets)]
        if not batches:
            return Decisions.stay(np.empty(0, np.int64)), np.empty(0, np.int32)
        decisions = Decisions.concat([Decisions.from_arrow(b) for b in batches])
        overrides = Decisions.from_arrow(self.scratch.read("overrides"))
        return decisions.overridden(overrides), np.concatenate([b["cluster"].to_numpy() for b in batches])

    def _within(self, bucket: int) -> dict[str, Any]:
        name = f"decisions-0/{bucket:05d}"
        n_parts = self.exchange.n_parts
        if self.scratch.has(name):
            return {"goes": int(self._decisions(0, bucket).goes.sum())}
        found = [self.exchange.read(i, bucket) for i in range(n_parts)]
        bounds = np.append(0, np.cumsum([len(rows) for rows in found]))
        rows = Rows.concat(found)
        del found
        decisions = self._divide(rows, bucket, 0)
        batches = []
        for start, stop in itertools.pairwise(bounds):
            mine = np.arange(start, stop)
            batch = decisions.take(mine).to_arrow()
            batches.append(batch.append_column("cluster", pa.array(rows.cluster[mine])))
        self.scratch.write(name, batches)
        return {"goes": int(decisions.goes.sum())}

    def _within_orphans(self, bucket: int, turn: int) -> dict[str, Any]:
        """Decide among the orphans that nothing which stays is near to, for the next turn."""
        name = f"decisions-{turn + 1}/{bucket:05d}"
        if not self.scratch.has(name):
            taken = Decisions.from_arrow(self.scratch.read(f"taken-{turn}"))
            orphans = self._rows(f"orphans-{turn}", bucket)
            decisions = self._divide(orphans.take(~np.isin(orphans.uid, taken.uid)), bucket, turn + 1)
            self.scratch.write(name, [decisions.to_arrow()])
        return {}

    def _divide(self, rows: Rows, bucket: int, turn: int) -> Decisions:
        """Decide about rows in each cluster by itself, and write those that go, those that stay and their visits."""
        decisions = within(rows, self.config, self._backend)
        self.scratch.write(f"gone-{turn}/{bucket:05d}", [rows.take(decisions.goes).to_arrow()])
        kept = ~decisions.goes
        self.scratch.write(f"kept-{turn}/{bucket:05d}", [rows.take(kept).to_arrow()])
        self.scratch.write(f"visitors-{turn}/{bucket:05d}", self.exchange.by_bucket(rows.away(kept)))
        return decisions

    def _across(self, bucket: int, turn: int) -> dict[str, Any]:
        name = f"pairs-{turn}/{bucket:05d}"
        if not self.scratch.has(name):
            kept = self._rows(f"kept-{turn}", bucket)
            guests = (rows.at_home() for rows in self._guests(f"visitors-{turn}", bucket))
            pairs = across(kept.at_home(), guests, self.config, self._backend)
            self.scratch.write(name, [pairs.to_arrow()])
        return {}

    def _find_orphans(self, bucket: int, turn: int) -> dict[str, Any]:
        name = f"guests-{turn}/{bucket:05d}"
        if not self.scratch.has(name):
            crossed = Decisions.from_arrow(self.scratch.read(f"crossed-{turn}"))
            decisions, gone = self._decisions(turn, bucket), self._rows(f"gone-{turn}", bucket)
            orphans = gone.take(np.isin(gone.uid, decisions.uid[orphans_of(decisions, crossed)]))
            self.scratch.write(f"orphans-{turn}/{bucket:05d}", [orphans.to_arrow()])
            self.scratch.write(name, self.exchange.by_bucket(orphans.away()))
        return {}

    def _compare_orphans(self, bucket: int, turn: int) -> dict[str, Any]:
        """Find what stays near to orphans; they are not compared with each other, for they may be many and alike."""
        name = f"near-{turn}/{bucket:05d}"
        if self.scratch.has(name):
            return {}
        crossed = Decisions.from_arrow(self.scratch.read(f"crossed-{turn}"))
        gone = crossed.uid[crossed.goes]
        still: Callable[[Rows], Places] = lambda rows: rows.at_home(~np.isin(rows.uid, gone))  # noqa: E731
        kept = still(self._rows(f"kept-{turn}", bucket))
        orphans = self._rows(f"orphans-{turn}", bucket).at_home()
        visitors = map(still, self._guests(f"visitors-{turn}", bucket))
        guests = self._guests(f"guests-{turn}", bucket)
        pairs = [
            across(orphans, itertools.chain([kept], visitors), self.config, self._backend),
            *(across(rows.at_home(), [kept], self.config, self._backend) for rows in guests),
        ]
        self.scratch.write(name, [Pairs.concat(pairs, self.config.keep_order.n_keys).to_arrow()])
        return {}

    def _decisions(self, turn: int, bucket: int) -> Decisions:
        """Return what was decided within the clusters of a bucket."""
        batches = range(1 if turn else self.exchange.n_parts)
        name = f"decisions-{turn}/{bucket:05d}"
        return Decisions.concat([Decisions.from_arrow(self.scratch.read(name, n)) for n in batches])

    def _all_decisions(self, turn: int) -> Decisions:
        return Decisions.concat([self._decisions(turn, b) for b in range(self.exchange.n_buckets)])

    @property
    def _backend(self) -> Backend:
        return get_backend(self.exchange.device)

    def _rows(self, folder: str, bucket: int) -> Rows:
        return Rows.from_arrow(self.scratch.read(f"{folder}/{bucket:05d}"))

    def _guests(self, folder: str, bucket: int) -> Iterator[Rows]:
        """Yield the rows of all buckets that visit a cluster of this one, some 64 MiB at a time."""
        found: list[Rows] = []
        for b in range(self.exchange.n_buckets):
            found.append(Rows.from_arrow(self.scratch.read(f"{folder}/{b:05d}", bucket)))
            if sum(rows.x.nbytes for rows in found) >= _GUEST_BYTES:
                yield Rows.concat(found)
                found = []
        if found:
            yield Rows.concat(found)

    def _all_pairs(self, folder: str) -> Pairs:
        files = (self.scratch.read(f"{folder}/{b:05d}") for b in range(self.exchange.n_buckets))
        return Pairs.concat([Pairs.from_arrow(batch) for batch in files], self.config.keep_order.n_keys)
