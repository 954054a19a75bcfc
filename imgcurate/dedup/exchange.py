"""Rows from parts to buckets: sample, cluster, assign.

A *bucket* is a range of clusters whose rows fit into memory. Rows travel through Arrow files in a
scratch folder, one record batch per bucket, so that a task reads what it needs and nothing else. Every
file appears whole or not at all, and a task whose file is there does nothing: a run that was killed
goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from imgcurate import schema
from imgcurate.backend import array_from_list_column, get_backend
from imgcurate.catalog import read_batch, write_batches
from imgcurate.dedup.config import DedupConfig
from imgcurate.dedup.kmeans import Clustering, fit_clustering
from imgcurate.dedup.names import sample_names, shard_names
from imgcurate.dedup.passes import REFERENCE_BIT, Places, Rows
from imgcurate.dedup.rows import has_direction, make_rows, sample_mask, sample_order, unit_rows
from imgcurate.errors import ConfigError
from imgcurate.storage import StorageOptions, atomic_write, exists, join_url, make_folder, read_bytes

__all__ = ["REFERENCE_SHIFT", "Exchange", "RowParts", "Scratch", "TaskRunner", "numeric_column"]

_MIN_BUCKET_BYTES: Final = 128 * 1024**2
_MAX_BUCKET_BYTES: Final = 1024**3
_BUCKETS: Final = 256
_LIGHT_ROWS: Final = 4096
REFERENCE_SHIFT: Final = 56
"""Below this bit lies a row's uid in its own reference set, above it the set's number."""


class TaskRunner(Protocol):
    """Runs the steps of a job on a cluster."""

    def __call__(
        self,
        step: str,
        function: Callable[[int], dict[str, Any]],
        numbers: Sequence[int],
        *,
        light: bool = False,
        on_device: bool = False,
    ) -> dict[int, dict[str, Any]]:
        """Run ``function(number)`` for each number, and return the results.

        A task may do several `light` ones. What computes `on_device` takes a share of a GPU, if there is one.
        """
        ...


class RowParts(Protocol):
    """Rows in numbered parts, of which a task reads one; picklable. A :class:`~imgcurate.catalog.Catalog` is one.

    Columns are those of a catalog: ``uid`` (int64, below 2^56, each once), ``shard``, ``key``, ``status``,
    ``embedding`` and any others.
    """

    @property
    def folder(self) -> str:
        """What it is called in messages."""
        ...

    @property
    def n_parts(self) -> int:
        """Number of parts."""
        ...

    @property
    def storage_options(self) -> StorageOptions | None:
        """Passed to fsspec for the scratch folder."""
        ...

    @property
    def identity(self) -> str:
        """What tells rows apart where order decides: ``"uid"``, or their key, as a ``"number"`` or a ``"hash"``."""
        ...

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema of all parts."""
        ...

    def read(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Read a part."""
        ...


@dataclass(frozen=True)
class Scratch:
    """A folder of Arrow and JSON files, by name.

    Attributes
    ----------
    folder : str
        Its URL.
    options : mapping, optional
        Passed to fsspec.
    """

    folder: str
    options: StorageOptions | None = None

    def make(self, *names: str) -> None:
        """Make folders in it."""
        for name in names:
            make_folder(join_url(self.folder, name), self.options)

    def has(self, name: str) -> bool:
        """Return whether an Arrow file is there."""
        return exists(self._url(name), self.options)

    def write(self, name: str, batches: Iterable[pa.RecordBatch]) -> None:
        """Write an Arrow file, of one batch at least."""
        write_batches(self._url(name), batches, self.options)

    def read(self, name: str, batch: int = 0) -> pa.RecordBatch:
        """Read one record batch of an Arrow file."""
        return read_batch(self._url(name), batch, self.options)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file."""
        with atomic_write(join_url(self.folder, f"{name}.json"), self.options) as out:
            out.write(json.dumps(content, indent=1).encode())

    def read_json(self, name: str) -> Any:
        """Read a JSON file."""
        return json.loads(read_bytes(join_url(self.folder, f"{name}.json"), self.options))

    def _url(self, name: str) -> str:
        return join_url(self.folder, f"{name}.arrow")


@dataclass(frozen=True)
class Exchange:
    """The rows of a catalog, and of reference sets, by bucket; picklable, so that tasks carry it.

    Files in the scratch folder: ``sample/<part>`` (rows for k-means; also ``sample-again`` if some rows have no
    direction), ``centroids``, ``rows.json``, ``valid.json``, ``names.json`` (of shards that share a stem),
    ``plan.json`` and ``exchange/<part>`` (unit rows with cluster and preference, a batch per bucket).
    Parts of the reference sets are numbered on after those of the catalog.

    Attributes
    ----------
    catalog : RowParts
        Its parts have ``uid shard key status embedding`` and the columns of ``keep_by``.
    references : tuple of RowParts
        Sets whose rows stay in any case; ``uid shard key status embedding``.
    config : DedupConfig
        The parameters.
    scratch : Scratch
        A folder that all workers can write to.
    device : {"auto", "cpu", "gpu"}
        Where the workers compute.
    bucket_bytes : int, optional
        Bytes of embeddings in a bucket; a single cluster may be larger. By default a 256th of all,
        but at least 128 MiB and at most 1 GiB. A task needs about four times as much.
    """

    catalog: RowParts
    references: tuple[RowParts, ...]
    config: DedupConfig
    scratch: Scratch
    device: str = "auto"
    bucket_bytes: int | None = None

    @property
    def n_parts(self) -> int:
        """Number of parts, with those of the reference sets."""
        return sum(c.n_parts for c in (self.catalog, *self.references))

    def prepare(self, run_tasks: TaskRunner) -> None:
        """Bring all rows to their buckets."""
        self.scratch.make("sample", "sample-again", "exchange")
        counts = run_tasks("count", self._count, range(self.n_parts), light=True)
        n_rows = sum(c["rows"] for c in counts.values())
        own = sum(counts[n]["rows"] for n in range(self.catalog.n_parts))
        self.scratch.write_json("rows", {"rows": n_rows, "own": own})
        self.scratch.write_json("names", shard_names({s for c in counts.values() for s in c["shards"]}))
        if not n_rows:
            self.scratch.write_json("plan", {"starts": []})
            return
        light = n_rows <= _LIGHT_ROWS * self.n_parts
        sample = partial(self._sample, n_rows=n_rows, folder="sample")
        n_valid = sum(c["valid"] for c in run_tasks("sample", sample, range(self.n_parts), light=light).values())
        self.scratch.write_json("valid", {"rows": n_valid})
        if n_valid < n_rows:
            # A share of all was drawn: of those that have a direction it may be too few.
            again = partial(self._sample, n_rows=n_valid, folder="sample-again")
            run_tasks("sample again", again, range(self.n_parts), light=light)
        run_tasks("cluster", self._fit, [0], on_device=True)
        run_tasks("assign", self._assign, range(self.n_parts), light=light, on_device=True)

    @property
    def n_buckets(self) -> int:
        """Number of buckets; 0 if there is nothing to compare."""
        return len(self._starts())

    def read(self, part: int, bucket: int) -> Rows:
        """Return the rows of a part in a bucket."""
        return Rows.from_arrow(self.scratch.read(f"exchange/{part:05d}", bucket))

    def by_bucket(self, places: Places) -> Iterator[pa.RecordBatch]:
        """Yield the rows that are looked at in each bucket as a record batch."""
        starts = np.array(self._starts())
        bucket = np.searchsorted(starts, places.cluster, side="right") - 1
        for b in range(len(starts)):
            yield places.take(np.flatnonzero(bucket == b)).to_arrow()

    def centroids(self) -> npt.NDArray[np.float32]:
        """Return the centroids, (k, d) float32 with unit rows."""
        return _matrix_of(self.scratch.read("centroids"))

    def _source(self, part: int) -> tuple[RowParts, int, int]:
        """Return (catalog, number of the part in it, what to set in its uids)."""
        for i, catalog in enumerate((self.catalog, *self.references)):
            if part < catalog.n_parts:
                return catalog, part, REFERENCE_BIT | (i - 1) << REFERENCE_SHIFT if i else 0
            part -= catalog.n_parts
        raise IndexError(part)

    def _taking_part(self, part: int, columns: Sequence[str]) -> tuple[pa.Table, npt.NDArray[np.int64]]:
        """Return the rows that are ok and have an embedding, and their uids."""
        catalog, number, bits = self._source(part)
        table = catalog.read(number, list(dict.fromkeys([schema.UID, schema.STATUS, schema.EMBEDDING, *columns])))
        takes = pc.and_(pc.equal(table[schema.STATUS], schema.STATUS_OK), pc.is_valid(table[schema.EMBEDDING]))
        # A copy of all embeddings is worth avoiding.
        if not pc.all(takes).as_py():
            table = table.filter(takes)
        return table, table[schema.UID].to_numpy() | bits

    def _identity(self, part: int, table: pa.Table, uid: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        kind = self._source(part)[0].identity
        if kind == "uid":
            return uid
        if kind == "number":
            numbers: npt.NDArray[np.int64] = table[schema.KEY].cast(pa.int64()).to_numpy()
            return numbers
        keys = table[schema.KEY].to_numpy(zero_copy_only=False)
        hashes: npt.NDArray[np.uint64] = pd.util.hash_array(keys, categorize=False)
        return hashes.view(np.int64)

    def _count(self, part: int) -> dict[str, Any]:
        catalog, number, _ = self._source(part)
        table = catalog.read(number, [schema.STATUS, schema.SHARD])
        rows = pc.sum(pc.equal(table[schema.STATUS], schema.STATUS_OK)).as_py() or 0
        return {"rows": rows, "shards": pc.unique(table[schema.SHARD]).to_pylist()}

    def _sample(self, part: int, n_rows: int, folder: str) -> dict[str, Any]:
        name = f"{folder}/{part:05d}"
        if not self.scratch.has(name):
            table, uid = self._taking_part(part, [] if self._source(part)[0].identity == "uid" else [schema.KEY])
            identity = self._identity(part, table, uid)
            x = _matrix(table)
            valid = has_direction(x)
            fit_rows, seed = self.config.fit_rows(n_rows), self.config.random_state
            drawn = valid & sample_mask(identity, n_rows, fit_rows, seed)
            self.scratch.write_json(name, {"valid": int(valid.sum())})
            self.scratch.write(name, [_batch(identity[drawn], unit_rows(x[drawn])[0])])
        counted: dict[str, Any] = self.scratch.read_json(name)
        return counted

    def _fit(self, number: int) -> dict[str, Any]:
        del number
        if self.scratch.has("centroids"):
            return {}
        n_rows = int(self.scratch.read_json("valid")["rows"])
        folder = "sample" if n_rows == self.n_rows else "sample-again"
        batches = [b for b in (self.scratch.read(f"{folder}/{i:05d}") for i in range(self.n_parts)) if len(b)]
        dims = sorted({b.schema.field("x").type.list_size for b in batches})
        if len(dims) > 1:
            raise ConfigError(f"embeddings of {' and '.join(map(str, dims))} values cannot be compared")
        if not batches:
            self.scratch.write_json("plan", {"starts": []})
            self.scratch.write("centroids", [_batch(np.empty(0, np.int64), np.empty((0, 1), np.float32))])
            return {}
        identity = np.concatenate([b["uid"].to_numpy() for b in batches])
        x = np.concatenate([_matrix_of(b) for b in batches])
        sample = sample_order(identity, self.config.fit_rows(n_rows), self.config.random_state)
        clustering = fit_clustering(x[sample], self.config.clusters_for(n_rows), self.config, get_backend(self.device))
        centroids = clustering.centroids
        starts = self._bucket_starts(n_rows, *centroids.shape)
        self.scratch.write_json("plan", {"starts": starts, "dimensions": clustering.dimensions})
        self.scratch.write("centroids", [_batch(np.arange(len(centroids)), centroids)])
        return {}

    def _bucket_starts(self, n_rows: int, n_clusters: int, dim: int) -> list[int]:
        """Return the first cluster of each bucket."""
        nbytes = n_rows * dim * 4
        size = self.bucket_bytes or min(max(nbytes // _BUCKETS, _MIN_BUCKET_BYTES), _MAX_BUCKET_BYTES)
        n_buckets = max(1, min(n_clusters, -(-nbytes // size)))
        return [n_clusters * b // n_buckets for b in range(n_buckets)]

    def _assign(self, part: int) -> dict[str, Any]:
        name = f"exchange/{part:05d}"
        if self.scratch.has(name) or not self.n_buckets:
            return {}
        columns = self.config.keep_order.columns
        is_reference = part >= self.catalog.n_parts
        table, uid = self._taking_part(part, [schema.SHARD, schema.KEY, *(() if is_reference else columns)])
        clustering = Clustering(self.centroids(), self.scratch.read_json("plan")["dimensions"])
        x, valid = unit_rows(_matrix(table, clustering.centroids.shape[1]))
        table = table.drop_columns([schema.EMBEDDING])
        if not valid.all():
            table, x, uid = table.filter(pa.array(valid)), x[valid], uid[valid]
        # What stays in any case needs no preference.
        values = {c: np.zeros(len(uid)) if is_reference else numeric_column(table, c) for c in columns}
        names = sample_names(table, self.scratch.read_json("names"))
        identity = self._identity(part, table, uid)
        rows = make_rows(x, uid, identity, names, values, clustering, self.config, get_backend(self.device))
        self.scratch.write(name, self.by_bucket(rows.at_home()))
        return {}

    @property
    def n_rows(self) -> int:
        """Number of rows that are ok, those of the reference sets included."""
        return int(self.scratch.read_json("rows")["rows"])

    @property
    def n_own_rows(self) -> int:
        """Number of rows of the catalog that are ok."""
        return int(self.scratch.read_json("rows")["own"])

    def _starts(self) -> list[int]:
        starts: list[int] = self.scratch.read_json("plan")["starts"]
        return starts


def _matrix(table: pa.Table, dim: int = 1) -> npt.NDArray[np.float32]:
    if not len(table):
        return np.empty((0, dim), np.float32)
    matrix: npt.NDArray[np.float32] = array_from_list_column(table[schema.EMBEDDING])
    return matrix


def numeric_column(table: pa.Table, column: str) -> npt.NDArray[np.float64]:
    """Return a column of ``keep_by`` as float64, NaN where it is null; whole numbers over 2^53 are rounded.

    Raises
    ------
    ConfigError
        If it does not hold numbers.
    """
    try:
        whole = pa.types.is_integer(table[column].type)
        values: npt.NDArray[np.float64] = table[column].cast(pa.float64(), safe=not whole).to_numpy()
    except pa.ArrowException as exc:
        raise ConfigError(f"keep_by: the column {column!r} does not hold numbers, but {table[column].type}") from exc
    return values


def _batch(uid: npt.NDArray[np.int64], x: npt.NDArray[np.float32]) -> pa.RecordBatch:
    flat = pa.array(np.ascontiguousarray(x).reshape(-1))
    values = pa.FixedSizeListArray.from_arrays(flat, x.shape[1])
    return pa.record_batch([pa.array(uid), values], names=["uid", "x"])


def _matrix_of(batch: pa.RecordBatch) -> npt.NDArray[np.float32]:
    return np.asarray(batch["x"].flatten()).reshape(len(batch), -1)
