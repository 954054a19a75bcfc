"""Buckets -> decisions, for one threshold: the three passes as tasks on a cluster.

==========================  ===========  ==================================================
file in the folder          a batch per  holds
==========================  ===========  ==================================================
``decisions/<bucket>``      part         what :func:`~imgcurate.dedup.passes.within` decided
``kept/<bucket>``                        the rows that stay
``gone/<bucket>``                        the rows that go
``visitors/<bucket>``       bucket       the same, where they visit other clusters
``pairs/<bucket>``                       near pairs across borders
``crossed``                              what is decided by these
``orphans/<bucket>``                     rows to examine again
``orphan_visitors/<b...>``  bucket       the same, where they visit other clusters
``orphan_pairs/<bucket>``                near pairs of these
``overrides``                            all decisions after the first pass
==========================  ===========  ==================================================
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imgcurate.backend import Backend, get_backend
from imgcurate.dedup.config import DedupConfig
from imgcurate.dedup.exchange import Exchange, Scratch, TaskRunner
from imgcurate.dedup.passes import Decisions, Pairs, Places, Rows, across, choose, orphans_of, within

__all__ = ["Decider"]

_FOLDERS: Final = ("decisions", "kept", "gone", "visitors", "pairs", "orphans", "orphan_visitors", "orphan_pairs")
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
        self.scratch.make(*_FOLDERS)
        buckets = range(self.exchange.n_buckets)
        label = f"eps {self.config.eps:g}: "
        gone: int = sum(r["goes"] for r in run_tasks(f"{label}within clusters", self._within, buckets).values())
        overrides = Decisions.stay(np.empty(0, np.int64))
        if self.config.probes > 1:
            run_tasks(f"{label}across clusters", self._across, buckets)
            overrides = choose(self._all_pairs("pairs"))
            self.scratch.write("crossed", [overrides.to_arrow()])
            gone += int(overrides.goes.sum())
        if overrides.goes.any():
            run_tasks(f"{label}orphans", self._find_orphans, buckets)
            run_tasks(f"{label}orphans again", self._examine_orphans, buckets)
            orphans = np.concatenate([self._rows("orphans", b).uid for b in buckets])
            pairs = self._all_pairs("orphan_pairs")
            fixed = np.setdiff1d(pairs.uid.reshape(-1), orphans)
            examined = Decisions.stay(orphans).overridden(choose(pairs, fixed))
            gone -= int((~examined.goes).sum())
            overrides = Decisions.concat([overrides, examined])
        self.scratch.write("overrides", [overrides.to_arrow()])
        return gone

    def decided(self, part: int) -> tuple[Decisions, npt.NDArray[np.int32]]:
        """Return the decisions about a part's rows, in no particular order, and their clusters."""
        batches = [self.scratch.read(f"decisions/{b:05d}", part) for b in range(self.exchange.n_buckets)]
        if not batches:
            return Decisions.stay(np.empty(0, np.int64)), np.empty(0, np.int32)
        decisions = Decisions.concat([Decisions.from_arrow(b) for b in batches])
        overrides = Decisions.from_arrow(self.scratch.read("overrides"))
        return decisions.overridden(overrides), np.concatenate([b["cluster"].to_numpy() for b in batches])

    def _within(self, bucket: int) -> dict[str, Any]:
        name = f"decisions/{bucket:05d}"
        n_parts = self.exchange.n_parts
        if self.scratch.has(name):
            batches = [Decisions.from_arrow(self.scratch.read(name, p)) for p in range(n_parts)]
            return {"goes": sum(int(b.goes.sum()) for b in batches)}
        found = [self.exchange.read(i, bucket) for i in range(n_parts)]
        bounds = np.append(0, np.cumsum([len(rows) for rows in found]))
        rows = Rows.concat(found)
        del found
        decisions = within(rows, self.config, self._backend)
        self.scratch.write(f"gone/{bucket:05d}", [rows.take(decisions.goes).to_arrow()])
        kept = ~decisions.goes
        self.scratch.write(f"kept/{bucket:05d}", [rows.take(kept).to_arrow()])
        self.scratch.write(f"visitors/{bucket:05d}", self.exchange.by_bucket(rows.away(kept)))
        batches = []
        for start, stop in itertools.pairwise(bounds):
            mine = np.arange(start, stop)
            batch = decisions.take(mine).to_arrow()
            batches.append(batch.append_column("cluster", pa.array(rows.cluster[mine])))
        self.scratch.write(name, batches)
        return {"goes": int(decisions.goes.sum())}

    def _across(self, bucket: int) -> dict[str, Any]:
        name = f"pairs/{bucket:05d}"
        if not self.scratch.has(name):
            kept = self._rows("kept", bucket)
            guests = (rows.at_home() for rows in self._guests("visitors", bucket))
            pairs = across(kept.at_home(), guests, self.config, self._backend)
            self.scratch.write(name, [pairs.to_arrow()])
        return {}

    def _find_orphans(self, bucket: int) -> dict[str, Any]:
        name = f"orphan_visitors/{bucket:05d}"
        if self.scratch.has(name):
            return {}
        crossed = Decisions.from_arrow(self.scratch.read("crossed"))
        parts = range(self.exchange.n_parts)
        decisions = Decisions.concat(
            [Decisions.from_arrow(self.scratch.read(f"decisions/{bucket:05d}", p)) for p in parts]
        )
        gone = self._rows("gone", bucket)
        orphans = gone.take(np.isin(gone.uid, decisions.uid[orphans_of(decisions, crossed)]))
        self.scratch.write(f"orphans/{bucket:05d}", [orphans.to_arrow()])
        self.scratch.write(name, self.exchange.by_bucket(orphans.away()))
        return {}

    def _examine_orphans(self, bucket: int) -> dict[str, Any]:
        name = f"orphan_pairs/{bucket:05d}"
        if self.scratch.has(name):
            return {}
        crossed = Decisions.from_arrow(self.scratch.read("crossed"))
        gone = crossed.uid[crossed.goes]
        still: Callable[[Rows], Places] = lambda rows: rows.at_home(~np.isin(rows.uid, gone))  # noqa: E731
        kept = still(self._rows("kept", bucket))
        orphans = self._rows("orphans", bucket).at_home()
        visiting = [rows.at_home() for rows in self._guests("orphan_visitors", bucket)]
        guests = map(still, self._guests("visitors", bucket))
        pairs = [
            across(orphans, itertools.chain([kept, orphans], visiting, guests), self.config, self._backend),
            *(across(visitors, [kept, orphans], self.config, self._backend) for visitors in visiting),
        ]
        self.scratch.write(name, [Pairs.concat(pairs, self.config.keep_order.n_keys).to_arrow()])
        return {}

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
