"""Tables beside images, joined by what they call them.

- ``00000.parquet`` beside ``00000.tar``, as img2dataset writes it: by the column ``key``.
- In a folder of images ``metadata.jsonl``, ``.csv`` or ``.parquet``, as Hugging Face's *imagefolder* has it: by
  ``file_name``, a path below the folder of the table, which tells of the files there and below.

A column comes under its own name; if imgcurate or a stage has a column of that name, as ``source_<name>``.
Columns of lists, structs and the like come as JSON text. Samples of which the sidecar tells nothing have
nulls. The sidecars that imgcurate itself writes are joined only by name, not by ``"auto"``.
"""

from __future__ import annotations

import json
import logging
import posixpath
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq

from imgcurate import schema
from imgcurate.errors import ConfigError, InputError, nearest
from imgcurate.extensions import TAR_ENDINGS
from imgcurate.folders import file_name, file_url
from imgcurate.members import free_name
from imgcurate.shards import Shard
from imgcurate.storage import StorageError, StorageOptions, exists, modified, open_source, read_bytes
from imgcurate.streams import SourceFile, read_table

__all__ = ["FOLDER_TABLES", "NO_SIDECARS", "SidecarColumns", "Sidecars", "find_sidecars"]

SidecarColumns = Literal["auto"] | Sequence[str]
"""``"auto"``, or names of columns; an empty sequence joins nothing."""

_MAX_DEPTH: Final = 200
FOLDER_TABLES: Final = frozenset({"metadata.jsonl", "metadata.csv", "metadata.parquet"})
"""Names of files in a folder of images that are no samples, but tell of samples."""

_KEY: Final = "key"
_FILE_NAME: Final = "file_name"
_OURS: Final = frozenset({schema.UID, "source_key"})
_LOOKED_AT: Final = 16
_MOST_KEPT: Final = 4
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sidecars:
    """Which columns are joined from sidecars; small and picklable, so tasks carry it.

    Attributes
    ----------
    columns : tuple of (str, str, pa.DataType)
        Name in the sidecar, name in the frame, type in the frame.
    strict : bool
        Whether a sidecar that cannot be joined is an error; else it is a warning, and its columns are null.
    """

    columns: tuple[tuple[str, str, pa.DataType], ...] = ()
    strict: bool = True

    @property
    def types(self) -> dict[str, pa.DataType]:
        """Arrow types by name in the frame."""
        return {name: type_ for _, name, type_ in self.columns}

    def state(self, shard: Shard, storage_options: StorageOptions | None = None) -> str:
        """Return what tells one state of a shard's sidecar from another; '' if it has none."""
        there = [t.url for t in _tables_of(shard) if exists(t.url, storage_options)]
        return " ".join(modified(url, storage_options) for url in there)

    def join(self, table: pa.Table, shard: Shard, storage_options: StorageOptions | None = None) -> pa.Table:
        """Return the index of a shard with the columns of its sidecar.

        Raises
        ------
        InputError
            If it is `strict` and the sidecar is damaged, or a column holds another type than that of other shards.
        """
        if not self.columns:
            return table
        columns = {name: pa.nulls(len(table), type_) for _, name, type_ in self.columns}
        for beside in _tables_of(shard):
            try:
                if exists(beside.url, storage_options):
                    found = beside.read(storage_options)
                    if beside.key in found.column_names:
                        for name, column in self._joined(table, found, beside).items():
                            columns[name] = pc.coalesce(columns[name], column)
            except InputError as exc:
                if self.strict:
                    raise
                logger.warning("%s: its columns are null", exc)
        for name, column in columns.items():
            table = table.append_column(name, column)
        return table

    def _joined(self, table: pa.Table, found: pa.Table, beside: _Table) -> dict[str, Any]:
        url = beside.url
        keys = _cast(found[beside.key], pa.string(), f"{url}: column {beside.key!r}").combine_chunks()
        rows = pc.index_in(beside.names_of(table), beside.names_in(keys))
        there = [c for c in self.columns if c[0] in found.column_names]
        return {name: _cast(found[c], type_, f"{url}: column {c!r}").take(rows) for c, name, type_ in there}


NO_SIDECARS: Final = Sidecars()


def find_sidecars(
    shards: Sequence[Shard],
    columns: SidecarColumns,
    storage_options: StorageOptions | None = None,
    *,
    taken: Iterable[str] = (),
) -> Sidecars:
    """Find out which columns the sidecars of some shards have.

    Parameters
    ----------
    shards : sequence of Shard
        The input; up to 16 of them, evenly spread, are looked at.
    columns : "auto" or sequence of str
        What to join; see :data:`SidecarColumns`.
    storage_options : mapping, optional
        Passed to fsspec.
    taken : iterable of str
        Names of columns that the frame will have besides imgcurate's own.

    Raises
    ------
    ConfigError
        If a column that is named is in no sidecar that was looked at.
    """
    if isinstance(columns, str) and columns != "auto":
        raise ConfigError(f"sidecar_columns={columns!r} should be 'auto' or a sequence of names, such as ('url',)")
    if columns != "auto" and not columns:
        return NO_SIDECARS
    merged = _merged(_schemas(shards, storage_options, columns == "auto"), columns == "auto")
    names = [n for n in merged.names if n not in (_KEY, _FILE_NAME)] if columns == "auto" else list(columns)
    missing = [n for n in names if n not in merged.names]
    if missing:
        there = ", ".join(merged.names) or "no sidecar was found"
        raise ConfigError(f"sidecar_columns: no column {missing[0]!r} beside the shards: {there}")
    used = {*schema.COLUMNS, *taken, "source_key"}
    out = []
    for name in names:
        shown = free_name(name, used)
        used.add(shown)
        out.append((name, shown, _frame_type(merged.field(name).type)))
    return Sidecars(tuple(out), columns != "auto")


def _merged(schemas: Iterable[tuple[str, pa.Schema]], auto: bool) -> pa.Schema:
    """Return the columns of some sidecars in one schema; of types that do not go together the first one counts."""
    merged = pa.schema([])
    for url, found in schemas:
        try:
            merged = pa.unify_schemas([merged, found], promote_options="permissive")
        except pa.ArrowException as exc:
            if not auto:
                raise InputError(f"the sidecar {url} and those before it differ: {exc}") from exc
            for field in found:
                try:
                    merged = pa.unify_schemas([merged, pa.schema([field])], promote_options="permissive")
                except pa.ArrowException:
                    logger.warning(
                        "%s: column %r is %s, and %s in other shards", url, field.name, field.type,
                        merged.field(field.name).type,
                    )  # fmt: skip
    return merged


def _schemas(
    shards: Sequence[Shard], storage_options: StorageOptions | None, auto: bool
) -> Iterable[tuple[str, pa.Schema]]:
    step = max(1, len(shards) // _LOOKED_AT)
    seen: set[str] = set()
    for beside in (each for shard in shards[::step][:_LOOKED_AT] for each in _tables_of(shard)):
        if beside.url in seen or not exists(beside.url, storage_options):
            continue
        seen.add(beside.url)
        try:
            found = beside.read_schema(storage_options)
        except InputError as exc:
            if not auto:
                raise
            # Also a server that answers whatever name it is asked for.
            logger.warning("%s: its columns are not joined", exc)
            continue
        if beside.folder is not None and beside.key not in found.names:
            logger.warning(
                "%s has no column %r, so it tells of no image%s", beside.url, beside.key,
                nearest(beside.key, found.names),
            )  # fmt: skip
        if beside.key in found.names and not (auto and set(found.names) >= _OURS):
            yield beside.url, found.remove_metadata()


@dataclass(frozen=True, slots=True)
class _Table:
    """A table that tells of samples.

    Attributes
    ----------
    url : str
        Where it is.
    key : str
        The column that names the samples.
    folder : str or None
        The folder that these names are below, relative to that of the shard; None if they are keys.
    """

    url: str
    key: str
    folder: str | None = None

    def read(self, storage_options: StorageOptions | None) -> pa.Table:
        """Read it; one that tells of a folder is kept, since many shards ask for it."""
        if self.folder is None:
            return _read(self.url, storage_options)
        state = modified(self.url, storage_options)
        with _lock:
            if (self.url, state) not in _kept:
                while len(_kept) >= _MOST_KEPT:
                    del _kept[next(iter(_kept))]
                _kept[self.url, state] = _read(self.url, storage_options)
            return _kept[self.url, state]

    def read_schema(self, storage_options: StorageOptions | None) -> pa.Schema:
        """Read the names and types of its columns."""
        if self.folder is None:
            return _read(self.url, storage_options, schema_only=True)
        return self.read(storage_options).schema

    def names_of(self, index: pa.Table) -> Any:
        """Return what the samples of an index are called in it."""
        if self.folder is None:
            return index[schema.KEY]
        first = (files[0].as_py() if files.is_valid and len(files) else "" for files in index[schema.FILES])
        return pa.array([file_name(name).encode("utf-8", "surrogateescape") for name in first], pa.binary())

    def names_in(self, keys: pa.Array) -> pa.Array:
        """Return the names in it as :meth:`names_of` has them."""
        if self.folder is None:
            return keys
        folder = self.folder
        paths = [None if name is None else posixpath.normpath(f"{folder}{name}") for name in keys.to_pylist()]
        # It tells of its own folder: of nothing that '..' leads to.
        return pa.array([p.encode() if p is not None and p.startswith(folder) else None for p in paths], pa.binary())


_lock = threading.Lock()
_kept: dict[tuple[str, str], pa.Table] = {}


def _tables_of(shard: Shard) -> list[_Table]:
    """Return the tables that may tell of the samples of a shard, whether they are there or not."""
    if shard.files:
        # Of two that tell of the same file the nearer one counts.
        nearest_first = sorted(shard.tables, key=lambda name: -name.count("/"))
        names = [(file_url(shard.url, t), file_name(t)) for t in nearest_first]
        return [_Table(url, _FILE_NAME, name[: name.rfind("/") + 1]) for url, name in names]
    ending = next((e for e in TAR_ENDINGS if shard.url.lower().endswith(e)), None)
    return [] if ending is None else [_Table(shard.url[: -len(ending)] + ".parquet", _KEY)]


def _read(url: str, storage_options: StorageOptions | None, *, schema_only: bool = False) -> Any:
    try:
        if url.lower().endswith((".jsonl", ".csv")):
            table = _read_text(read_bytes(url, storage_options), is_json=url.lower().endswith(".jsonl"))
            if twice := next((n for i, n in enumerate(table.column_names) if n in table.column_names[:i]), None):
                raise InputError(f"cannot read {url}, the sidecar of a shard: it has two columns {twice!r}")
            return table
        source = open_source(url, storage_options)
        try:
            return pq.read_schema(SourceFile(source)) if schema_only else read_table(source)
        finally:
            source.close()
    except (pa.ArrowException, OSError, StorageError, InputError) as exc:
        raise InputError(f"cannot read {url}, the sidecar of a shard (sidecar_columns=() joins none): {exc}") from exc


def _depth(data: bytes) -> int:
    """Return how deep brackets are nested within a line of JSON, at most: those in texts count, and do no harm."""
    if not data:
        return 0
    letters = np.frombuffer(data, np.uint8)
    steps = np.isin(letters, np.frombuffer(b"[{", np.uint8)).astype(np.int32)
    steps -= np.isin(letters, np.frombuffer(b"]}", np.uint8))
    starts = np.flatnonzero(np.append(True, letters[:-1] == ord("\n")))
    depths = np.cumsum(steps)
    before = depths[starts] - steps[starts]
    return int((np.maximum.reduceat(depths, starts) - before).max(initial=0))


def _read_text(data: bytes, *, is_json: bool) -> pa.Table:
    """Read lines of JSON objects, or of comma-separated values with a header; all rows decide the types."""
    if not data.strip():
        return pa.table({})
    whole = max(len(data) + 1, 1 << 20)
    if is_json:
        # Arrow's parser calls itself for each, and ends the process where that is too often.
        if (depth := _depth(data)) > _MAX_DEPTH:
            raise InputError(f"a line of it nests {depth:,} brackets, more than {_MAX_DEPTH}")
        return pajson.read_json(pa.BufferReader(data), pajson.ReadOptions(use_threads=False, block_size=whole))
    return pacsv.read_csv(pa.BufferReader(data), pacsv.ReadOptions(use_threads=False, block_size=whole))


def _frame_type(type_: pa.DataType) -> pa.DataType:
    """Return the type that a column has in the frame: numbers and booleans their own, all else text."""
    if pa.types.is_boolean(type_) or pa.types.is_integer(type_) or pa.types.is_floating(type_):
        return type_
    return pa.string()


def _cast(column: pa.ChunkedArray, type_: pa.DataType, where: str) -> pa.ChunkedArray:
    try:
        if pa.types.is_string(type_):
            if pa.types.is_nested(column.type):
                return pa.chunked_array([pa.array([_text(v) for v in column.to_pylist()], pa.string())])
            # Parquet does not check that text is UTF-8.
            raw = column.cast(pa.string()).cast(pa.binary()) if not pa.types.is_binary(column.type) else column
            try:
                return raw.cast(pa.string())
            except pa.ArrowInvalid:
                return pa.chunked_array([pa.array([_text(v) for v in raw.to_pylist()], pa.string())])
        return column.cast(type_)
    except (pa.ArrowException, ValueError, OverflowError, TypeError, RecursionError) as exc:
        raise InputError(f"{where} is {column.type}, and {type_} in other shards: {exc}") from exc


def _text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return json.dumps(value, ensure_ascii=False, default=str)
