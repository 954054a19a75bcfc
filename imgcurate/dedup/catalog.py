"""Deduplication of a catalog on a cluster: what is on disk stays on disk but for one bucket at a time.

A *bucket* is a range of clusters whose rows fit into memory. Rows go from parts to buckets and back
through Arrow files in a scratch folder, one record batch per bucket or part, so that a task reads
what it needs and nothing else:

====================  ============  ===========  ==================================================
folder                a file per    a batch per  holds
====================  ============  ===========  ==================================================
``sample``            part                       rows for k-means
``exchange``          part          bucket       unit rows with cluster and preference
``decisions``         bucket        part         what :func:`~imgcurate.dedup.passes.within` decided
``kept``              bucket                     the rows that stay
``visitors``          bucket        bucket       the same, where they visit other clusters
``pairs``             bucket                     near pairs across borders
``orphans``           bucket                     rows to examine again
``orphan_visitors``   bucket        bucket       the same, where they visit other clusters
``orphan_pairs``      bucket                     near pairs of these
====================  ============  ===========  ==================================================

Every file appears whole or not at all, and a task whose files are there does nothing: a run that was
killed goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgcurate import schema
from imgcurate.backend import array_from_list_column, get_backend
from imgcurate.catalog import Catalog, read_batch, write_batches
from imgcurate.dedup.config import DedupConfig
from imgcurate.dedup.kmeans import fit_centroids
from imgcurate.dedup.passes import Decisions, Pairs, Rows, across, choose, orphans_of, within
from imgcurate.dedup.rows import make_rows, sample_mask, sample_order, unit_rows
from imgcurate.errors import ConfigError
from imgcurate.storage import StorageOptions, atomic_write, exists, join_url, make_folder, read_bytes

__all__ = ["CatalogDedup", "Decided", "TaskRunner"]

_MIN_BUCKET_BYTES: Final = 128 * 1024**2
_MAX_BUCKET_BYTES: Final = 1024**3
_BUCKETS: Final = 256
_FOLDERS: Final = (
    "sample", "exchange", "decisions", "kept", "visitors", "pairs", "orphans", "orphan_visitors", "orphan_pairs",
)  # fmt: skip

TaskRunner = Callable[[str, Callable[[int], dict[str, Any]], Sequence[int]], dict[int, dict[str, Any]]]
"""Runs ``function(number)`` for each number on the cluster; the first argument names the step."""


@dataclass(frozen=True)
class Decided:
    """What was decided about the rows of a part; every array has one entry per row.

    Attributes
    ----------
    cluster : ndarray of int64 of shape (n,)
        Nearest centroid; -1 for rows that took no part.
    keeper : ndarray of int64 of shape (n,)
        uid of the row that each goes for; -1 for a row that stays.
    keeper_name : ndarray of object of shape (n,)
        Its name, ``<shard stem>/<key>``.
    similarity : ndarray of float64 of shape (n,)
        To it.
    """

    cluster: npt.NDArray[np.int64]
    keeper: npt.NDArray[np.int64]
    keeper_name: npt.NDArray[Any]
    similarity: npt.NDArray[np.float64]


@dataclass(frozen=True)
class CatalogDedup:
    """The steps of one deduplication; picklable, so that tasks carry it.

    Attributes
    ----------
    catalog : Catalog
        Its parts have ``uid shard key status embedding`` and the columns of ``keep_by``.
    config : DedupConfig
        The parameters.
    scratch : str
        URL of a folder that all workers can write to.
    device : {"auto", "cpu", "gpu"}
        Where the workers compute.
    bucket_bytes : int, optional
        Bytes of embeddings in a bucket; a single cluster may be larger. By default a 256th of all,
        but at least 128 MiB and at most 1 GiB. A task needs about four times as much.
    """

    catalog: Catalog
    config: DedupConfig
    scratch: str
    device: str = "auto"
    bucket_bytes: int | None = None

    def run(self, run_tasks: TaskRunner) -> None:
        """Decide about all rows; :meth:`decided` then tells the outcome part by part."""
        for folder in _FOLDERS:
            make_folder(join_url(self.scratch, folder), self._options)
        parts = range(self.catalog.n_parts)
        counts = run_tasks("count", self._count, parts)
        n_rows = sum(c["rows"] for c in counts.values())
        if not n_rows:
            self._write_json("plan.json", {"starts": []})
            return
        plan = {"rows": n_rows}
        self._write_json("rows.json", plan)
        run_tasks("sample", self._sample, parts)
        run_tasks("cluster", self._fit, [0])
        run_tasks("assign", self._assign, parts)
        buckets = range(self._n_buckets())
        run_tasks("within clusters", self._within, buckets)
        run_tasks("across clusters", self._across, buckets)
        crossed = choose(self._all_pairs("pairs"))
        self._write("crossed", [crossed.to_arrow()])
        overrides = crossed
        if crossed.goes.any():
            run_tasks("orphans", self._find_orphans, buckets)
            run_tasks("orphans again", self._examine_orphans, buckets)
            orphans = np.concatenate([self._rows("orphans", b).uid for b in buckets])
            pairs = self._all_pairs("orphan_pairs")
            fixed = np.setdiff1d(pairs.uid.reshape(-1), orphans)
            examined = Decisions.stay(orphans).overridden(choose(pairs, fixed))
            overrides = Decisions.concat([crossed, examined])
        self._write("overrides", [overrides.to_arrow()])

    def decided(self, number: int) -> Decided:
        """Return the decisions about a part's rows, in their order."""
        uid = self.catalog.read(number, [schema.UID])[schema.UID].to_numpy()
        n = len(uid)
        out = Decided(np.full(n, -1, np.int64), np.full(n, -1, np.int64), np.full(n, "", object), np.full(n, np.nan))
        if not self._n_buckets():
            return out
        overrides = Decisions.from_arrow(self._read("overrides", 0))
        order = np.argsort(uid)
        for bucket in range(self._n_buckets()):
            batch = self._read(f"decisions/{bucket:05d}", number)
            decisions = Decisions.from_arrow(batch).overridden(overrides)
            at = order[np.searchsorted(uid, decisions.uid, sorter=order)]
            out.cluster[at] = batch["cluster"].to_numpy()
            for name in ("keeper", "keeper_name", "similarity"):
                getattr(out, name)[at] = getattr(decisions, name)
        return out

    def centroids(self) -> npt.NDArray[np.float32]:
        """Return the centroids, (k, d) float32 with unit rows."""
        array = self._read("centroids", 0)["x"]
        return np.asarray(array.flatten()).reshape(len(array), -1)

    def _count(self, number: int) -> dict[str, Any]:
        status = self.catalog.read(number, [schema.STATUS])[schema.STATUS]
        return {"rows": pc.sum(pc.equal(status, schema.STATUS_OK)).as_py() or 0}

    def _sample(self, number: int) -> dict[str, Any]:
        name = f"sample/{number:05d}"
        if not self._is_there(name):
            rows = self._n_rows()
            table = self._taking_part(number, [schema.UID, schema.EMBEDDING])
            uid = table[schema.UID].to_numpy()
            drawn = sample_mask(uid, rows, self.config.fit_rows(rows), self.config.random_state)
            x, valid = unit_rows(_matrix(table.filter(pa.array(drawn))))
            self._write(name, [_sample_batch(uid[drawn][valid], x[valid])])
        return {}

    def _fit(self, number: int) -> dict[str, Any]:
        del number
        if self._is_there("centroids"):
            return {}
        batches = [self._read(f"sample/{i:05d}", 0) for i in range(self.catalog.n_parts)]
        batches = [b for b in batches if len(b)]
        dims = sorted({b.schema.field("x").type.list_size for b in batches})
        if len(dims) > 1:
            raise ConfigError(f"embeddings of {' and '.join(map(str, dims))} values cannot be compared")
        if not batches:
            self._write_json("plan.json", {"starts": []})
            self._write("centroids", [_sample_batch(np.empty(0, np.int64), np.empty((0, 1), np.float32))])
            return {}
        uid = np.concatenate([b["uid"].to_numpy() for b in batches])
        x = np.concatenate([np.asarray(b["x"].flatten()).reshape(len(b), -1) for b in batches])
        n_rows = self._n_rows()
        sample = sample_order(uid, self.config.fit_rows(n_rows), self.config.random_state)
        sample = sample[np.argsort(uid[sample])]
        n_clusters = min(self.config.clusters_for(n_rows), len(sample))
        centroids = fit_centroids(x[sample], n_clusters, self.config, get_backend(self.device))
        self._write_json("plan.json", {"starts": self._bucket_starts(n_rows, *centroids.shape)})
        self._write("centroids", [_sample_batch(np.arange(len(centroids)), centroids)])
        return {}

    def _bucket_starts(self, n_rows: int, n_clusters: int, dim: int) -> list[int]:
        """Return the first cluster of each bucket."""
        nbytes = n_rows * dim * 4
        size = self.bucket_bytes or min(max(nbytes // _BUCKETS, _MIN_BUCKET_BYTES), _MAX_BUCKET_BYTES)
        n_buckets = max(1, min(n_clusters, -(-nbytes // size)))
        return [n_clusters * b // n_buckets for b in range(n_buckets)]

    def _assign(self, number: int) -> dict[str, Any]:
        name = f"exchange/{number:05d}"
        if self._is_there(name) or not self._n_buckets():
            return {}
        columns = self.config.keep_order.columns
        wanted = dict.fromkeys([schema.UID, schema.SHARD, schema.KEY, schema.EMBEDDING, *columns])
        table = self._taking_part(number, list(wanted))
        centroids = self.centroids()
        x, valid = unit_rows(_matrix(table, centroids.shape[1]))
        table, x = table.filter(pa.array(valid)), x[valid]
        names = sample_names(table[schema.SHARD].to_pylist(), table[schema.KEY].to_pylist())
        values = {c: _numbers(table, c) for c in columns}
        backend = get_backend(self.device)
        rows = make_rows(x, table[schema.UID].to_numpy(), names, values, centroids, self.config, backend)
        self._write(name, self._by_bucket(rows))
        return {}

    def _within(self, bucket: int) -> dict[str, Any]:
        name = f"decisions/{bucket:05d}"
        if self._is_there(name):
            return {}
        found = [Rows.from_arrow(self._read(f"exchange/{i:05d}", bucket)) for i in range(self.catalog.n_parts)]
        part_of = np.repeat(np.arange(len(found)), [len(rows) for rows in found])
        unordered = Rows.concat(found)
        by_uid = np.argsort(unordered.uid)
        rows, decisions = within(unordered, self.config.threshold, get_backend(self.device))
        part_of = part_of[by_uid][np.searchsorted(unordered.uid[by_uid], rows.uid)]
        kept = rows.take(~decisions.goes)
        self._write(f"kept/{bucket:05d}", [kept.to_arrow()])
        self._write(f"visitors/{bucket:05d}", self._by_bucket(kept.visitors()))
        batches = []
        for part in range(len(found)):
            mine = np.flatnonzero(part_of == part)
            batch = decisions.take(mine).to_arrow()
            batches.append(batch.append_column("cluster", pa.array(rows.cluster[mine])))
        self._write(name, batches)
        return {}

    def _across(self, bucket: int) -> dict[str, Any]:
        name = f"pairs/{bucket:05d}"
        if not self._is_there(name):
            kept = self._rows("kept", bucket, batch=0)
            visitors = self._rows("visitors", bucket, n_files=self._n_buckets())
            pairs = across(kept, visitors, self.config.threshold, get_backend(self.device))
            self._write(name, [pairs.to_arrow()])
        return {}

    def _find_orphans(self, bucket: int) -> dict[str, Any]:
        name = f"orphan_visitors/{bucket:05d}"
        if self._is_there(name):
            return {}
        crossed = Decisions.from_arrow(self._read("crossed", 0))
        found: list[Rows] = []
        for part in range(self.catalog.n_parts):
            decisions = Decisions.from_arrow(self._read(f"decisions/{bucket:05d}", part))
            uid = decisions.uid[orphans_of(decisions, crossed)]
            if len(uid) or not found:
                rows = Rows.from_arrow(self._read(f"exchange/{part:05d}", bucket))
                found.append(rows.take(np.isin(rows.uid, uid)))
        orphans = Rows.concat(found)
        self._write(f"orphans/{bucket:05d}", [orphans.to_arrow()])
        self._write(name, self._by_bucket(orphans.visitors()))
        return {}

    def _examine_orphans(self, bucket: int) -> dict[str, Any]:
        name = f"orphan_pairs/{bucket:05d}"
        if self._is_there(name):
            return {}
        backend, threshold = get_backend(self.device), self.config.threshold
        crossed = Decisions.from_arrow(self._read("crossed", 0))
        gone = crossed.uid[crossed.goes]
        orphans = self._rows("orphans", bucket, batch=0)
        visiting = self._rows("orphan_visitors", bucket, n_files=self._n_buckets())
        kept = self._rows("kept", bucket, batch=0)
        visitors = self._rows("visitors", bucket, n_files=self._n_buckets())
        clusters = np.union1d(orphans.cluster, visiting.cluster)
        residents = Rows.concat([_still_in(kept, clusters, gone), orphans])
        guests = Rows.concat([_still_in(visitors, clusters, gone), visiting])
        pairs = [
            across(orphans, Rows.concat([residents, guests]), threshold, backend),
            across(visiting, residents, threshold, backend),
        ]
        self._write(name, [Pairs.concat(pairs, self.config.keep_order.n_keys).to_arrow()])
        return {}

    def _taking_part(self, number: int, columns: list[str]) -> pa.Table:
        table = self.catalog.read(number, [*columns, *([] if schema.STATUS in columns else [schema.STATUS])])
        return table.filter(
            pc.and_(pc.equal(table[schema.STATUS], schema.STATUS_OK), pc.is_valid(table[schema.EMBEDDING]))
        )

    def _by_bucket(self, rows: Rows) -> list[pa.RecordBatch]:
        """Return the rows of each bucket as a record batch."""
        starts = np.array(self._starts())
        bucket = np.searchsorted(starts, rows.cluster, side="right") - 1
        return [rows.take(bucket == b).to_arrow() for b in range(len(starts))]

    def _rows(self, folder: str, bucket: int, *, n_files: int | None = None, batch: int | None = None) -> Rows:
        if n_files is None:
            return Rows.from_arrow(self._read(f"{folder}/{bucket:05d}", batch or 0))
        return Rows.concat([Rows.from_arrow(self._read(f"{folder}/{i:05d}", bucket)) for i in range(n_files)])

    def _all_pairs(self, folder: str) -> Pairs:
        found = [Pairs.from_arrow(self._read(f"{folder}/{b:05d}", 0)) for b in range(self._n_buckets())]
        return Pairs.concat(found, self.config.keep_order.n_keys)

    @property
    def _options(self) -> StorageOptions | None:
        return self.catalog.storage_options

    def _url(self, name: str) -> str:
        return join_url(self.scratch, f"{name}.arrow")

    def _is_there(self, name: str) -> bool:
        return exists(self._url(name), self._options)

    def _write(self, name: str, batches: list[pa.RecordBatch]) -> None:
        write_batches(self._url(name), batches, self._options)

    def _read(self, name: str, batch: int) -> pa.RecordBatch:
        return read_batch(self._url(name), batch, self._options)

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        with atomic_write(join_url(self.scratch, name), self._options) as out:
            out.write(json.dumps(content).encode())

    def _read_json(self, name: str) -> Any:
        return json.loads(read_bytes(join_url(self.scratch, name), self._options))

    def _n_rows(self) -> int:
        return int(self._read_json("rows.json")["rows"])

    def _starts(self) -> list[int]:
        starts: list[int] = self._read_json("plan.json")["starts"]
        return starts

    def _n_buckets(self) -> int:
        return len(self._starts())


def _still_in(rows: Rows, clusters: npt.NDArray[np.int32], gone: npt.NDArray[np.int64]) -> Rows:
    """Return the rows of some clusters that have not gone."""
    return rows.take(np.isin(rows.cluster, clusters) & ~np.isin(rows.uid, gone))


def sample_names(shards: Sequence[str], keys: Sequence[str]) -> npt.NDArray[Any]:
    """Return how samples are named in words: ``<shard stem>/<key>``."""
    stems = {s: s.rsplit("/", 1)[-1].split(".", 1)[0] for s in set(shards)}
    names = np.empty(len(keys), dtype=object)
    names[:] = [f"{stems[s]}/{k}" for s, k in zip(shards, keys, strict=True)]
    return names


def _matrix(table: pa.Table, dim: int = 1) -> npt.NDArray[np.float32]:
    if not len(table):
        return np.empty((0, dim), np.float32)
    matrix: npt.NDArray[np.float32] = array_from_list_column(table[schema.EMBEDDING])
    return matrix


def _numbers(table: pa.Table, column: str) -> npt.NDArray[np.float64]:
    try:
        values: npt.NDArray[np.float64] = table[column].cast(pa.float64()).to_numpy()
    except pa.ArrowException as exc:
        raise ConfigError(f"keep_by: the column {column!r} does not hold numbers, but {table[column].type}") from exc
    return values


def _sample_batch(uid: npt.NDArray[np.int64], x: npt.NDArray[np.float32]) -> pa.RecordBatch:
    flat = pa.array(np.ascontiguousarray(x).reshape(-1))
    values = pa.FixedSizeListArray.from_arrays(flat, x.shape[1])
    return pa.record_batch([pa.array(uid), values], names=["uid", "x"])
