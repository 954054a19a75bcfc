"""Parquet files beside tars, as img2dataset writes them: ``00000.tar`` and ``00000.parquet``, joined by key.

A column comes under its own name; if imgcurate or a stage has a column of that name, as ``source_<name>``.
Columns of lists, structs and the like come as JSON text. Samples of which the sidecar tells nothing have
nulls. The sidecars that imgcurate itself writes are joined only by name, not by ``"auto"``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgcurate import schema
from imgcurate.errors import ConfigError, InputError
from imgcurate.extensions import TAR_ENDINGS
from imgcurate.shards import Shard
from imgcurate.storage import StorageError, StorageOptions, exists, modified, open_source
from imgcurate.streams import SourceFile, read_table

__all__ = ["NO_SIDECARS", "SidecarColumns", "Sidecars", "find_sidecars"]

SidecarColumns = Literal["auto"] | Sequence[str]
"""``"auto"``, or names of columns; an empty sequence joins nothing."""

_KEY: Final = "key"
_OURS: Final = frozenset({schema.UID, "source_key"})
_LOOKED_AT: Final = 16
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
        url = _sidecar_url(shard)
        return modified(url, storage_options) if url is not None and exists(url, storage_options) else ""

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
        try:
            url = _sidecar_url(shard)
            if url is not None and exists(url, storage_options):
                found = _read(url, storage_options)
                if _KEY in found.column_names:
                    columns |= self._joined(table, found, url)
        except InputError as exc:
            if self.strict:
                raise
            logger.warning("%s: its columns are null", exc)
        for name, column in columns.items():
            table = table.append_column(name, column)
        return table

    def _joined(self, table: pa.Table, found: pa.Table, url: str) -> dict[str, Any]:
        keys = _cast(found[_KEY], pa.string(), f"{url}: column {_KEY!r}").combine_chunks()
        rows = pc.index_in(table[schema.KEY], keys)
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
    names = [n for n in merged.names if n != _KEY] if columns == "auto" else list(columns)
    missing = [n for n in names if n not in merged.names]
    if missing:
        there = ", ".join(merged.names) or "no sidecar was found"
        raise ConfigError(f"sidecar_columns: no column {missing[0]!r} beside the shards: {there}")
    used = {*schema.COLUMNS, *taken, "source_key"}
    out = []
    for name in names:
        shown = name
        while shown in used:
            shown = f"source_{shown}"
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
    for shard in shards[::step][:_LOOKED_AT]:
        url = _sidecar_url(shard)
        if url is None or not exists(url, storage_options):
            continue
        try:
            found = _read(url, storage_options, schema_only=True)
        except InputError as exc:
            if not auto:
                raise
            # Also a server that answers whatever name it is asked for.
            logger.warning("%s: its columns are not joined", exc)
            continue
        if _KEY in found.names and not (auto and set(found.names) >= _OURS):
            yield url, found.remove_metadata()


def _sidecar_url(shard: Shard) -> str | None:
    ending = next((e for e in TAR_ENDINGS if shard.url.lower().endswith(e)), None)
    return None if shard.files or ending is None else shard.url[: -len(ending)] + ".parquet"


def _read(url: str, storage_options: StorageOptions | None, *, schema_only: bool = False) -> Any:
    try:
        source = open_source(url, storage_options)
        try:
            return pq.read_schema(SourceFile(source)) if schema_only else read_table(source)
        finally:
            source.close()
    except (pa.ArrowException, OSError, StorageError) as exc:
        raise InputError(f"cannot read {url}, the sidecar of a shard (sidecar_columns=() joins none): {exc}") from exc


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
    except (pa.ArrowException, ValueError, OverflowError, TypeError) as exc:
        raise InputError(f"{where} is {column.type}, and {type_} in other shards: {exc}") from exc


def _text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return json.dumps(value, ensure_ascii=False, default=str)
