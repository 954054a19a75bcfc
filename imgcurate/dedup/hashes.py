"""Deduplication by hashes, on a cluster: equal ones, and those that differ in a few bits.

Rows go through buckets by their hash, so that equal ones meet; of each hash a part sends its preferred
row alone, however many it has. The preferred row of each hash then goes through buckets again, once for
each choice of bands (see :mod:`imgcurate.dedup.near_hashes`), so that near ones meet.

====================  ================  =====================================================
file                  a batch per       holds
====================  ================  =====================================================
``rows/<part>``       bucket            the part's preferred row of each of its hashes
``unique/<bucket>``                     the preferred row of each hash
``answers/<bucket>``  part              the same, for the hashes that the part sent
``bands/<bucket>``    choice x bucket   the same, by the bits that the choice looks at
``pairs/<number>``                      near pairs of one choice and bucket
``overrides``                           which preferred rows go for which others
====================  ================  =====================================================
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgcurate import schema
from imgcurate.catalog import Catalog
from imgcurate.dedup.exchange import Scratch, TaskRunner, numeric_column
from imgcurate.dedup.keep import KeepOrder, hash_uids
from imgcurate.dedup.names import sample_names, shard_names
from imgcurate.dedup.near_hashes import (
    HASH_BITS,
    Hashes,
    band_masks,
    best_of_each,
    near_pairs_of,
    positions_in,
)
from imgcurate.dedup.passes import Decisions, Pairs, choose
from imgcurate.dedup.verdicts import CONTENT, PHASH, PIXELS, Verdicts
from imgcurate.errors import ConfigError

__all__ = ["HASH_COLUMNS", "HashDedup"]

HASH_COLUMNS: Final[Mapping[str, str]] = {
    CONTENT: schema.CONTENT_HASH,
    PIXELS: schema.PIXEL_HASH,
    PHASH: schema.PHASH,
}
"""Which column holds the hash for each kind of duplicates."""

_WORDS: Final = {CONTENT: "same bytes", PIXELS: "same pixels"}
_ROW_BYTES: Final = 128
_BUCKET_BYTES: Final = 128 * 1024**2
_HEX_DIGITS: Final = 32


@dataclass(frozen=True)
class HashDedup:
    """One deduplication by hashes; picklable, so that tasks carry it.

    Attributes
    ----------
    catalog : Catalog
        Its parts have ``uid shard key status``, the hash and the columns of ``keep_by``.
    kind : {"content", "pixels", "phash"}
        Which hash.
    max_distance : int
        In how many bits duplicates may differ; 0 but for ``phash``.
    keep_by : tuple of str
        See :class:`~imgcurate.dedup.keep.KeepOrder`; ties go to the lower uid.
    scratch : str
        URL of a folder that all workers can write to.
    bucket_bytes : int
        About how many bytes of rows go into a bucket.
    """

    catalog: Catalog
    kind: str
    max_distance: int
    keep_by: tuple[str, ...]
    scratch: str
    bucket_bytes: int = _BUCKET_BYTES

    def run(self, run_tasks: TaskRunner) -> None:
        """Decide about all rows; :meth:`outcome` then tells the decisions part by part."""
        files, parts = self._files, range(self.catalog.n_parts)
        files.make("", "rows", "unique", "answers", "bands", "pairs")
        counts = run_tasks("count", self._count, parts, light=True).values()
        n_rows = sum(c["rows"] for c in counts)
        files.write_json("names", shard_names({s for c in counts for s in c["shards"]}))
        n_buckets = max(1, -(-n_rows * _ROW_BYTES // self.bucket_bytes))
        files.write_json("plan", {"buckets": n_buckets})
        run_tasks("hashes", self._send, parts, light=True)
        unique = sum(r["hashes"] for r in run_tasks("equal", self._unite, range(n_buckets)).values())
        overrides = Decisions.stay(np.empty(0, np.int64))
        if self.max_distance and unique:
            masks = band_masks(unique, self.max_distance, split=n_buckets > 1)
            files.write_json("bands", {"masks": masks})
            run_tasks("bands", self._cut, range(n_buckets))
            numbers = range(len(masks) * n_buckets)
            run_tasks("near", self._compare, numbers)
            pairs = [Pairs.from_arrow(files.read(f"pairs/{n:05d}")) for n in numbers]
            overrides = choose(Pairs.concat(pairs, self._order.n_keys))
        files.write("overrides", [overrides.take(overrides.goes).to_arrow()])

    def outcome(self, number: int) -> tuple[Verdicts, Mapping[str, pa.Array]]:
        """Return the decisions about a part's rows, in their order; there are no further columns."""
        table = self.catalog.read(number, [schema.UID, schema.STATUS, self._column])
        uid = table[schema.UID].to_numpy()
        index, words = self._hashes(table)
        answers = Hashes.concat(
            [Hashes.from_arrow(self._files.read(f"answers/{b:05d}", number)) for b in range(self._n_buckets)]
        )
        at = positions_in(words, answers.words)
        best = Decisions(answers.uid, answers.uid, answers.name, np.ones(len(answers)))
        best = best.overridden(Decisions.from_arrow(self._files.read("overrides"))).take(at)
        leaves = best.keeper != uid[index]
        out = Verdicts.stay(uid)
        out.keeper[index[leaves]] = best.keeper[leaves]
        reasons = [
            f"duplicate of {name}, {_WORDS.get(self.kind) or f'Hamming distance {_bits(similarity)}'}"
            for name, similarity in zip(best.keeper_name[leaves], best.similarity[leaves], strict=True)
        ]
        out.reason[index[leaves]] = reasons
        return out, {}

    def _count(self, part: int) -> dict[str, Any]:
        table = self.catalog.read(part, [schema.STATUS, schema.SHARD, self._column])
        shards = pc.unique(table[schema.SHARD]).to_pylist()
        return {"rows": int(_takes_part(table, self._column).sum()), "shards": shards}

    def _send(self, part: int) -> dict[str, Any]:
        name = f"rows/{part:05d}"
        if not self._files.has(name):
            named = (schema.UID, schema.SHARD, schema.KEY, schema.STATUS, self._column)
            table = self.catalog.read(part, list(dict.fromkeys((*named, *self._order.columns))))
            index, words = self._hashes(table)
            table = table.take(pa.array(index))
            uid, names = table[schema.UID].to_numpy(), self._files.read_json("names")
            values = {c: numeric_column(table, c) for c in self._order.columns}
            keys = self._order.keys(uid, np.zeros(len(uid)), values)
            rows = best_of_each(Hashes(uid, keys, words, sample_names(table, names)))
            bucket = self._bucket(rows.words[:, 0])
            self._files.write(name, [rows.take(bucket == b).to_arrow() for b in range(self._n_buckets)])
        return {}

    def _unite(self, bucket: int) -> dict[str, Any]:
        name = f"unique/{bucket:05d}"
        if self._files.has(name):
            return {"hashes": len(self._files.read(name))}
        sent = [Hashes.from_arrow(self._files.read(f"rows/{p:05d}", bucket)) for p in range(self.catalog.n_parts)]
        bounds = np.append(0, np.cumsum([len(rows) for rows in sent]))
        rows = Hashes.concat(sent)
        unique = best_of_each(rows)
        at = positions_in(rows.words, unique.words)
        answers = (unique.take(at[a:b]).to_arrow() for a, b in itertools.pairwise(bounds))
        self._files.write(f"answers/{bucket:05d}", answers)
        self._files.write(name, [unique.to_arrow()])
        return {"hashes": len(unique)}

    def _cut(self, bucket: int) -> dict[str, Any]:
        name = f"bands/{bucket:05d}"
        if not self._files.has(name):
            unique = Hashes.from_arrow(self._files.read(f"unique/{bucket:05d}"))
            batches = []
            for mask in self._masks:
                there = self._bucket(unique.words[:, 0] & np.uint64(mask))
                batches += [unique.take(there == b).to_arrow() for b in range(self._n_buckets)]
            self._files.write(name, batches)
        return {}

    def _compare(self, number: int) -> dict[str, Any]:
        name = f"pairs/{number:05d}"
        if not self._files.has(name):
            buckets = range(self._n_buckets)
            rows = Hashes.concat([Hashes.from_arrow(self._files.read(f"bands/{b:05d}", number)) for b in buckets])
            choice = number // self._n_buckets
            i, j, distance = near_pairs_of(rows.words[:, 0], self._masks, choice, self.max_distance)
            ij = np.stack([i, j], axis=1)
            pairs = Pairs(rows.uid[ij], rows.keys[ij], rows.name[ij], 1 - distance / HASH_BITS)
            self._files.write(name, [pairs.to_arrow()])
        return {}

    def _hashes(self, table: pa.Table) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
        """Return which rows take part, and their hashes, (n, 1) or (n, 2) uint64."""
        index = np.flatnonzero(_takes_part(table, self._column))
        column = table[self._column].take(pa.array(index))
        if self.kind == PHASH:
            if not pa.types.is_integer(column.type):
                raise ConfigError(f"the column {self._column!r} should hold 64-bit hashes as int64, not {column.type}")
            return index, column.cast(pa.int64()).to_numpy().view(np.uint64)[:, None]
        texts = column.cast(pa.string()).to_pylist()
        try:
            if any(len(text) != _HEX_DIGITS for text in texts):
                raise ValueError
            data = bytes.fromhex("".join(texts))
        except ValueError as exc:
            wrong = next(t for t in texts if len(t) != _HEX_DIGITS or not set(t) <= set("0123456789abcdefABCDEF"))
            raise ConfigError(
                f"the column {self._column!r} should hold hashes of {_HEX_DIGITS} hexadecimal digits, not {wrong!r}"
            ) from exc
        return index, np.frombuffer(data, ">u8").astype(np.uint64).reshape(-1, 2)

    def _bucket(self, words: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        return (hash_uids(words.view(np.int64), 0) % np.uint64(self._n_buckets)).astype(np.int64)

    @property
    def _column(self) -> str:
        return HASH_COLUMNS[self.kind]

    @property
    def _order(self) -> KeepOrder:
        return KeepOrder(keep_by=self.keep_by)

    @property
    def _files(self) -> Scratch:
        return Scratch(self.scratch, self.catalog.storage_options)

    @property
    def _n_buckets(self) -> int:
        return int(self._files.read_json("plan")["buckets"])

    @property
    def _masks(self) -> tuple[int, ...]:
        return tuple(self._files.read_json("bands")["masks"])


def _takes_part(table: pa.Table, column: str) -> npt.NDArray[np.bool_]:
    """Return the mask of the rows that are ok and have a hash."""
    ok = pc.equal(table[schema.STATUS], schema.STATUS_OK)
    mask: npt.NDArray[np.bool_] = pc.and_(ok, pc.is_valid(table[column])).to_numpy()
    return mask


def _bits(similarity: float) -> int:
    return round((1 - similarity) * HASH_BITS)
