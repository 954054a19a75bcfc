"""A run's record in its output folder: the manifest, the catalog, and the checkpoints of its phases.

::

    OUT/manifest.json                    what ran, on what, and how it ended
    OUT/_SUCCESS                         checksums of all files, once all is done
    OUT/catalog/part-00000.parquet       every row of the first partition
    OUT/checkpoint/01-.../part-00000...  what a later phase changed, until the run is done
    OUT/shards/00000.tar, .parquet       the kept samples
    OUT/dedup/                           centroids, and how many samples stay for which eps

The first phase writes the parts of the catalog. Each later phase writes, per part, only the columns
that it sets (a *delta*); when all phases are done the deltas are merged into the parts, which can be
repeated at any time with the same result, and taken back (:meth:`Catalog.reset`). Every file appears whole or
not at all, so a run that was killed goes on with the files that are missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Final, TypeVar

import dask.dataframe as dd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgcurate import schema
from imgcurate.backend import get_backend, lazy_frame
from imgcurate.errors import CatalogError, InputError
from imgcurate.storage import (
    StorageOptions,
    atomic_write,
    exists,
    join_url,
    list_files,
    make_folder,
    open_source,
    read_bytes,
    remove,
    remove_tree,
)
from imgcurate.streams import SourceFile, read_table

__all__ = [
    "Attempts",
    "Catalog",
    "Manifest",
    "fingerprint",
    "load_record",
    "part_name",
    "read_batch",
    "read_parquet",
    "undecided",
    "write_batches",
    "write_parquet",
]

MANIFEST: Final = "manifest.json"
_FORMAT: Final = 1
_ROW_GROUP_ROWS: Final = 16_384
_Record = TypeVar("_Record")


def part_name(number: int) -> str:
    """Return the file name of a part."""
    return f"part-{number:05d}.parquet"


def fingerprint(content: Mapping[str, Any]) -> str:
    """Return a SHA-256 over plain data, independent of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def write_parquet(url: str, table: pa.Table, storage_options: StorageOptions | None = None) -> None:
    """Write a table atomically; columns of lists of floats uncompressed, for they do not compress.

    Of its metadata only what pandas needs is written.
    """
    floats = {f"{f.name}.list.element" for f in table.schema if _is_float_list(f.type)}
    paths = [f"{f.name}.list.element" if pa.types.is_list(f.type) else f.name for f in table.schema]
    with atomic_write(url, storage_options) as out:
        pq.write_table(
            table.replace_schema_metadata(schema.pandas_metadata(table.schema)),
            out,
            row_group_size=_ROW_GROUP_ROWS,
            compression={p: "NONE" if p in floats else "ZSTD" for p in paths},
            use_dictionary=[p for p in paths if p not in floats],
        )


def read_parquet(
    url: str, columns: Sequence[str] | None = None, storage_options: StorageOptions | None = None
) -> pa.Table:
    """Read a Parquet file that imgcurate wrote.

    Raises
    ------
    CatalogError
        If the file is damaged or lacks a column.
    """
    source = open_source(url, storage_options)
    try:
        return read_table(source, columns).replace_schema_metadata(None)
    except (pa.ArrowException, OSError, ValueError, KeyError) as exc:
        raise CatalogError(f"cannot read {url}: {exc}") from exc
    finally:
        source.close()


def write_batches(url: str, batches: Iterable[pa.RecordBatch], storage_options: StorageOptions | None = None) -> None:
    """Write record batches of one schema, one at least, as an Arrow file, atomically; one at a time is in memory."""
    rest = iter(batches)
    first = next(rest)
    with atomic_write(url, storage_options) as out, pa.ipc.new_file(out, first.schema) as writer:
        writer.write_batch(first)
        del first
        for batch in rest:
            writer.write_batch(batch)


def read_batch(url: str, number: int, storage_options: StorageOptions | None = None) -> pa.RecordBatch:
    """Read one record batch of an Arrow file, and no other.

    Raises
    ------
    CatalogError
        If the file is damaged.
    """
    source = open_source(url, storage_options)
    try:
        with SourceFile(source) as file:
            return pa.ipc.open_file(file).get_batch(number)
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise CatalogError(f"cannot read {url}: {exc}") from exc
    finally:
        source.close()


def undecided(table: pa.Table) -> pa.Table:
    """Return the rows of a part as the first phase left them, with the columns of all."""
    if schema.PHASE not in table.column_names:
        return table
    # A later phase looks at samples that are there still: what it dropped was 'ok' before.
    later = pc.fill_null(pc.greater(table[schema.PHASE], 0), fill_value=False)
    for name, value in ((schema.STATUS, schema.STATUS_OK), (schema.REASON, "")):
        column = pc.if_else(later, value, table[name])
        table = table.set_column(table.column_names.index(name), name, column)
    return table.drop_columns([schema.PHASE])


def _is_float_list(type_: pa.DataType) -> bool:
    return bool(pa.types.is_list(type_) and pa.types.is_floating(type_.value_type))


def load_record(
    url: str, format_: int, make: Callable[[dict[str, Any]], _Record], storage_options: StorageOptions | None = None
) -> _Record | None:
    """Read a JSON file that imgcurate wrote, and return what is made of it; None if there is none.

    Raises
    ------
    CatalogError
        If it cannot be understood, or was written by another version.
    """
    if not exists(url, storage_options):
        return None
    try:
        content = json.loads(read_bytes(url, storage_options))
        if content.pop("format") != format_:
            raise CatalogError(f"{url} was written by another version of imgcurate")
        return make(content)
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise CatalogError(f"{url} is damaged: {exc}") from exc


@dataclass
class Manifest:
    """What ran, on what, and how it ended; one JSON file.

    Attributes
    ----------
    fingerprint : str
        SHA-256 of all that decides the results.
    config : dict
        The stages with their parameters, the inputs and the versions that the fingerprint covers.
    state : {"running", "growing", "clearing", "done"}
        ``done`` once every phase ended and the accounting was checked; ``growing`` while what was decided
        before more inputs came, or otherwise, is taken back; ``clearing`` while what another run left is deleted.
    n_parts : int
        Parts of the catalog.
    samples : int
        Input samples; 0 while running.
    counts : dict of str to int
        Samples by status.
    shards : list of dict
        ``name``, ``samples``, ``nbytes`` and ``sha256`` of each output shard.
    increments : list of int
        How many inputs there were in all each time that the run began or grew; the last one is all of
        them. Partitions never hold inputs of two increments.
    source : dict
        Where the inputs were looked for and how they are divided: ``file_paths``, ``files_per_partition``,
        ``sidecar_columns``, ``text_columns``, ``json_columns``; or ``refilter``, the folder of the run that was decided
        anew; ``code``, checksums of the classes of stages of one's own; ``model_dir``, the folder of the
        weights, if one was named.
    exporting : bool
        Whether the shards that are there are of this run as it is decided now.
    timeline : list of [float, int]
        Of the phase that decodes, since the run began or went on last: seconds, and samples done until then.
    """

    fingerprint: str
    config: dict[str, Any]
    n_parts: int
    state: str = "running"
    samples: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    shards: list[dict[str, Any]] = field(default_factory=list)
    timings_s: dict[str, float] = field(default_factory=dict)
    increments: list[int] = field(default_factory=list)
    source: dict[str, Any] = field(default_factory=dict)
    exporting: bool = False
    timeline: list[tuple[float, int]] = field(default_factory=list)

    def save(self, folder: str, storage_options: StorageOptions | None = None) -> None:
        """Write ``folder/manifest.json`` atomically."""
        content = {"format": _FORMAT, **self.__dict__}
        with atomic_write(join_url(folder, MANIFEST), storage_options) as out:
            out.write(json.dumps(content, indent=1, default=str).encode())

    @staticmethod
    def load(folder: str, storage_options: StorageOptions | None = None) -> Manifest | None:
        """Read ``folder/manifest.json``; None if there is none.

        Raises
        ------
        CatalogError
            If it cannot be understood.
        """
        return load_record(join_url(folder, MANIFEST), _FORMAT, lambda content: Manifest(**content), storage_options)

    @staticmethod
    def of_finished(folder: str) -> Manifest:
        """Read the manifest of a finished run of stages.

        Raises
        ------
        InputError
            If the folder holds none.
        """
        manifest = Manifest.load(folder)
        if manifest is not None and manifest.state != "done":
            raise InputError(f"the run in {folder} is not finished: give its command again, and it goes on")
        if manifest is not None and "stages" not in manifest.config:
            raise InputError(f"{folder} holds deduplicated embeddings, and this takes the run of a pipeline")
        if manifest is None:
            raise InputError(f"{folder} is not the output folder of a finished run")
        return manifest


@dataclass(frozen=True)
class Attempts:
    """Markers of the partitions that are being decoded: what a worker that died leaves behind.

    Attributes
    ----------
    folder : str
        URL of the folder of markers, empty files named by the numbers of the parts.
    storage_options : mapping, optional
        Passed to fsspec.

    Notes
    -----
    A marker says that some process began to decode the partition and did not end it: its worker
    died or was killed, or the whole run was. Then an image of it may be at fault.
    """

    folder: str
    storage_options: StorageOptions | None = None

    def begin(self, number: int, shard: int | None = None) -> bool:
        """Mark a partition, or one of its shards, and tell if a former attempt has marked it and not ended."""
        url = self._url(number, shard)
        if exists(url, self.storage_options):
            return True
        with atomic_write(url, self.storage_options):
            return False

    def end(self, number: int, shard: int | None = None) -> None:
        """Take the mark off: the part is written, or an error was raised, which no image's decoder did."""
        remove(self._url(number, shard), self.storage_options)

    def _url(self, number: int, shard: int | None) -> str:
        return join_url(self.folder, f"{number:05d}" if shard is None else f"{number:05d}.{shard}")


@dataclass(frozen=True)
class Catalog:
    """The Parquet parts of a run and their deltas; small and picklable, so tasks carry it.

    Attributes
    ----------
    folder : str
        The run's output folder.
    n_parts : int
        Number of parts, one per partition.
    phases : tuple of str
        Names of the phases that have run after the first, in order: each has a folder of deltas.
    storage_options : mapping, optional
        Passed to fsspec.
    """

    folder: str
    n_parts: int
    phases: tuple[str, ...] = ()
    storage_options: StorageOptions | None = None
    identity: ClassVar[str] = "uid"

    @property
    def parts_folder(self) -> str:
        """URL of the folder with the parts."""
        return join_url(self.folder, "catalog")

    @property
    def checkpoint_folder(self) -> str:
        """URL of the folder that is removed when the run is done."""
        return join_url(self.folder, "checkpoint")

    @property
    def attempts(self) -> Attempts:
        """The markers of parts that are being made."""
        return Attempts(join_url(self.checkpoint_folder, "attempts"), self.storage_options)

    def part_url(self, number: int) -> str:
        """Return the URL of a part."""
        return join_url(self.parts_folder, part_name(number))

    def phase_folder(self, phase: str) -> str:
        """Return the URL of a phase's deltas."""
        return join_url(self.checkpoint_folder, phase)

    def with_phase(self, phase: str) -> Catalog:
        """Return the catalog as it is after one more phase."""
        return replace(self, phases=(*self.phases, phase))

    def make_folders(self) -> None:
        """Make the folders that parts and deltas are written to."""
        for folder in (self.parts_folder, self.attempts.folder, *map(self.phase_folder, self.phases)):
            make_folder(folder, self.storage_options)

    def missing_parts(self) -> list[int]:
        """Return the numbers of the parts that the first phase has not written yet."""
        return self._missing(self.parts_folder)

    def missing_deltas(self) -> list[int]:
        """Return the numbers of the parts for which the last phase has not written its delta yet."""
        return self._missing(self.phase_folder(self.phases[-1]))

    def _missing(self, folder: str) -> list[int]:
        there = set(list_files(folder, ".parquet", self.storage_options))
        return [i for i in range(self.n_parts) if part_name(i) not in there]

    def write_part(self, number: int, table: pa.Table) -> None:
        """Write a part of the first phase, or the merged one."""
        write_parquet(self.part_url(number), table, self.storage_options)

    def remove_part(self, number: int) -> None:
        """Delete a part, so that it is made again."""
        remove(self.part_url(number), self.storage_options)

    def write_delta(self, number: int, table: pa.Table) -> None:
        """Write what the last phase set in a part."""
        url = join_url(self.phase_folder(self.phases[-1]), part_name(number))
        write_parquet(url, table, self.storage_options)

    def read(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Read a part as it is after :attr:`phases`.

        Parameters
        ----------
        number : int
            The part.
        columns : sequence of str, optional
            Columns to read; by default all.
        """
        names = list(columns) if columns is not None else None
        merged: dict[str, Any] = {}
        for phase in reversed(self.phases):
            url = join_url(self.phase_folder(phase), part_name(number))
            there = _parquet_schema(url, self.storage_options).names
            wanted = [c for c in there if c not in merged and (names is None or c in names)]
            if wanted:
                delta = read_parquet(url, wanted, self.storage_options)
                merged |= {c: delta[c] for c in wanted}
        url = self.part_url(number)
        rest = None if names is None else [c for c in names if c not in merged]
        if rest is None or rest or not merged:
            base = read_parquet(url, rest, self.storage_options)
            merged = {c: base[c] for c in base.column_names if c not in merged} | merged
        types = {name: column.type for name, column in merged.items()}
        order = schema.arrow_schema(types, types).names if names is None else names
        return pa.table({name: merged[name] for name in order})

    def merge(self, number: int) -> None:
        """Merge the deltas into a part, and note in which phase each sample left; repeating it changes nothing."""
        url = self.part_url(number)
        if not self.phases or schema.PHASE in _parquet_schema(url, self.storage_options).names:
            return
        type_ = schema.arrow_type(schema.PHASE)
        left: Any = pa.scalar(None, type_)
        for n in range(len(self.phases), -1, -1):
            status = replace(self, phases=self.phases[:n]).read(number, [schema.STATUS])[schema.STATUS]
            left = pc.if_else(pc.not_equal(status, schema.STATUS_OK), pa.scalar(n, type_), left)
        self.write_part(number, self.read(number).append_column(schema.PHASE, left))

    def reset(self, number: int, columns: Sequence[str]) -> None:
        """Take back what the phases after the first one did to a part; repeating it changes nothing.

        Parameters
        ----------
        number : int
            The part.
        columns : sequence of str
            The columns that the first phase made.
        """
        url = self.part_url(number)
        if schema.PHASE in _parquet_schema(url, self.storage_options).names:
            self.write_part(number, undecided(self.read(number)).select(list(columns)))

    @cached_property
    def schema(self) -> pa.Schema:
        """The Arrow schema of the parts after :attr:`phases`, read from the first part's metadata."""
        types: dict[str, pa.DataType] = {}
        for folder in (*map(self.phase_folder, reversed(self.phases)), self.parts_folder):
            for column in _parquet_schema(join_url(folder, part_name(0)), self.storage_options):
                types.setdefault(column.name, column.type)
        return schema.arrow_schema(types, types)

    def frame(self, columns: Sequence[str] | None = None, *, device: str = "auto") -> dd.DataFrame:
        """Return the catalog as a lazy Dask DataFrame, a partition per part."""
        names = list(columns) if columns is not None else self.schema.names
        backend = get_backend(device)
        return lazy_frame(
            _read_frame,
            list(range(self.n_parts)),
            catalog=self,
            names=names,
            device=backend.name,
            meta=backend.meta(pa.schema([self.schema.field(n) for n in names])),
            label="read-catalog",
        )

    def remove_checkpoints(self) -> None:
        """Delete the deltas and scratch files of a finished run."""
        remove_tree(self.checkpoint_folder, self.storage_options)


def _read_frame(number: int, catalog: Catalog, names: Sequence[str], device: str) -> Any:
    return get_backend(device).frame_from_arrow(catalog.read(number, names))


def _parquet_schema(url: str, storage_options: StorageOptions | None) -> pa.Schema:
    source = open_source(url, storage_options)
    try:
        with SourceFile(source) as file:
            return pq.read_schema(file)
    except (pa.ArrowException, OSError) as exc:
        raise CatalogError(f"cannot read {url}: {exc}") from exc
    finally:
        source.close()
