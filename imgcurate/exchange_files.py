"""A finished run as files that other tools read: tables of what stayed and what left, embeddings, clip-retrieval.

=================  =====================================================================================
format             files
=================  =====================================================================================
``kept``           ``kept.parquet``: a row for each sample that stayed, with its scores
``removed``        ``removed.csv``: a row for each that left, with its status and reason, and ``removed.parquet``,
                   with all that the catalog says of it besides
``npy``            ``embeddings.npy``, (n, d) float32, a row for each row of ``kept.parquet`` in its order
``clip-retrieval`` ``img_emb/img_emb_<i>.npy``, float16, and ``metadata/metadata_<i>.parquet``
=================  =====================================================================================

Rows of samples that are files of a folder have the ``path`` of the image too. Parts of the catalog are read one after
the other, so memory is one of them.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from imgcurate import schema
from imgcurate.catalog import Catalog, Manifest, write_parquet
from imgcurate.errors import CatalogError, ConfigError, nearest
from imgcurate.folders import file_url
from imgcurate.members import free_name
from imgcurate.outputs import FOLDERS
from imgcurate.storage import (
    StorageError,
    atomic_write,
    exclusive,
    exists,
    is_local,
    join_url,
    list_files,
    local_path,
    make_folder,
    read_bytes,
    remove,
)
from imgcurate.success import UNFINISHED

__all__ = ["FORMATS", "export_run"]

_KEPT_LEFT_OUT: Final = frozenset(
    {schema.SPANS, schema.FILES, schema.OFFSET, schema.STATUS, schema.REASON, schema.DUPLICATE_OF, schema.DUPLICATE_IN,
     schema.DUPLICATE_BY, schema.SIMILARITY, schema.PHASE, schema.EMBEDDING}
)  # fmt: skip
_REMOVED_LEFT_OUT: Final = frozenset({schema.SPANS, schema.FILES, schema.OFFSET, schema.PHASE, schema.EMBEDDING})
_REMOVED: Final = (
    schema.UID, schema.SHARD, schema.KEY, schema.STATUS, schema.REASON, schema.DUPLICATE_OF, schema.DUPLICATE_BY,
    schema.SIMILARITY,
)  # fmt: skip
_FORMULA: Final = r"^([=+\-@\t\r])"
_IMAGE_PATH: Final = "image_path"
_PATH: Final = "path"


def export_run(run: str, output: str, formats: Sequence[str] = ("kept", "removed")) -> dict[str, int]:
    """Write what a finished run decided as files that other tools read.

    Parameters
    ----------
    run : str
        Output folder of a finished run.
    output : str
        Folder for the files, a path or fsspec URL, which must not hold files of these names; made if it is not there.
        While it is written it holds a file ``_UNFINISHED``; what an export left that was killed is written anew.
    formats : sequence of str
        Of ``kept``, ``removed``, ``npy``, ``clip-retrieval``; see :mod:`imgcurate.exchange_files`.

    Returns
    -------
    dict of str to int
        Rows written, by format.

    Raises
    ------
    InputError
        If `run` is no finished run.
    ConfigError
        If a format is unknown, needs embeddings that the run does not have, or its files are there already.
    StorageError
        If a file cannot be written, or another process writes to the folder; none of these formats is there then.
    """
    manifest = Manifest.of_finished(run)
    catalog = Catalog(run, manifest.n_parts)
    samples = _Run(catalog, has_files=any("files" in i for i in manifest.config["inputs"]))
    output = str(Path(local_path(output)).absolute()) if is_local(output) else output
    folder = (str(Path(local_path(run)).absolute()) if is_local(run) else run).rstrip("/")
    if f"{output.rstrip('/')}/".startswith(tuple(f"{folder}/{name}/" for name in FOLDERS)):
        raise ConfigError(f"{output} holds the data of the run itself: name another folder")
    kept = manifest.counts.get(schema.STATUS_OK, 0)
    for name in formats:
        if name not in FORMATS:
            raise ConfigError(f"format {name!r} is unknown{nearest(name, FORMATS)} (kept is Parquet, removed is CSV)")
        if name in ("npy", "clip-retrieval") and schema.EMBEDDING not in catalog.schema.names:
            raise ConfigError(f"{run} has no embeddings, so it cannot be exported as {name}")
    make_folder(output)
    with exclusive(output):
        return _write(samples, output, formats, kept)


def _write(run: _Run, output: str, formats: Sequence[str], kept: int) -> dict[str, int]:
    mark = join_url(output, UNFINISHED)
    if exists(mark):
        # What an export began that was killed is no more than a part of it.
        _clear(output, [name for name in read_bytes(mark).decode().split() if name in FORMATS])
    for name in formats:
        if clash := _there(output, name):
            raise ConfigError(f"{output}/{clash[0]} is there already: name another folder")
    with atomic_write(mark) as out:
        out.write("\n".join(formats).encode())
    try:
        written = {name: FORMATS[name](run, output, kept) for name in dict.fromkeys(formats)}
    except BaseException:
        _clear(output, formats)
        raise
    remove(mark)
    return written


def _there(output: str, format_: str) -> list[str]:
    """Return the files of a format that a folder holds."""
    folders = {folder for folder, _, _ in (name.rpartition("/") for name in _PATTERNS[format_])}
    places = {folder: join_url(output, folder) if folder else output for folder in folders}
    names = [f"{folder}/{n}".lstrip("/") for folder, place in places.items() for n in list_files(place, "")]
    return sorted(name for name in names for pattern in _PATTERNS[format_] if fnmatch.fnmatchcase(name, pattern))


def _clear(output: str, formats: Sequence[str]) -> None:
    """Take away what an export wrote that did not end, and its mark."""
    with contextlib.suppress(StorageError):
        for name in formats:
            for file in _there(output, name):
                remove(join_url(output, file))
        remove(join_url(output, UNFINISHED))


class _Run:
    """The rows of a catalog, with the path of the image too where they are files of a folder."""

    def __init__(self, catalog: Catalog, *, has_files: bool) -> None:
        self.catalog = catalog
        self._path = free_name(_PATH, set(catalog.schema.names)) if has_files else None

    @property
    def fields(self) -> dict[str, pa.Field]:
        """The columns, in the order in which they are written: the path stands behind the key."""
        fields = {}
        for field in self.catalog.schema:
            fields[field.name] = field
            if field.name == schema.KEY and self._path is not None:
                fields[self._path] = pa.field(self._path, pa.string())
        return fields

    @property
    def path(self) -> tuple[str, ...]:
        """The name of the column of paths, if there is one."""
        return (self._path,) if self._path is not None else ()

    def rows(self, columns: Sequence[str], *, kept: bool) -> Iterator[pa.Table]:
        """Yield these columns of the rows that stayed, or that left, part by part."""
        asked = [name for name in dict.fromkeys([*columns, schema.STATUS]) if name != self._path]
        asked += [name for name in (schema.SHARD, schema.FILES) if self._path in columns and name not in asked]
        for number in range(self.catalog.n_parts):
            table = self.catalog.read(number, asked)
            stayed = pc.equal(table[schema.STATUS], schema.STATUS_OK)
            table = table.filter(stayed if kept else pc.invert(stayed))
            if self._path in columns:
                table = table.append_column(self._path, _paths(table))
            yield table.select(list(columns))


def _paths(table: pa.Table) -> pa.Array:
    """Return the path or URL of each image that is a file of a folder; null for others."""
    both = zip(table[schema.SHARD].to_pylist(), table[schema.FILES].to_pylist(), strict=True)
    return pa.array([file_url(shard, files[0]) if files else None for shard, files in both], pa.string())


def _kept_columns(run: _Run) -> list[str]:
    return [name for name in run.fields if name not in _KEPT_LEFT_OUT]


def _write_table(run: _Run, url: str, columns: Sequence[str], *, kept: bool) -> None:
    out_schema = pa.schema([run.fields[name] for name in columns])
    out_schema = out_schema.with_metadata(schema.pandas_metadata(out_schema))
    with atomic_write(url) as out, pq.ParquetWriter(out, out_schema, compression="zstd") as writer:
        for table in run.rows(columns, kept=kept):
            if len(table):
                writer.write_table(table.cast(out_schema))


def _write_kept(run: _Run, output: str, kept: int) -> int:
    _write_table(run, join_url(output, "kept.parquet"), _kept_columns(run), kept=True)
    return kept


def _write_removed(run: _Run, output: str, kept: int) -> int:
    del kept
    columns = [name for name in run.fields if name not in _REMOVED_LEFT_OUT]
    _write_table(run, join_url(output, "removed.parquet"), columns, kept=False)
    columns = [name for name in (*_REMOVED[:3], *run.path, *_REMOVED[3:]) if name in run.fields]
    out_schema = pa.schema([run.fields[name] for name in columns])
    count = 0
    with (
        atomic_write(join_url(output, "removed.csv")) as out,
        pacsv.CSVWriter(out, out_schema) as writer,
    ):
        for table in run.rows(columns, kept=False):
            writer.write_table(_harmless(table.cast(out_schema)))
            count += len(table)
    return count


def _harmless(table: pa.Table) -> pa.Table:
    """Put a ``'`` before text that a spreadsheet would take for a formula: keys are strangers' words."""
    for i, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            text = pc.replace_substring_regex(table[i], pattern=_FORMULA, replacement=r"'\1")
            table = table.set_column(i, field, text)
    return table


def _embeddings(table: pa.Table) -> npt.NDArray[np.float32]:
    column = table[schema.EMBEDDING].combine_chunks()
    if column.null_count:
        raise CatalogError("a sample that stayed has no embedding: please report this bug")
    return np.asarray(column.flatten(), np.float32).reshape(len(column), -1)


def _write_npy(run: _Run, output: str, kept: int) -> int:
    parts = (_embeddings(t) for t in run.rows([schema.EMBEDDING], kept=True) if len(t))
    with atomic_write(join_url(output, "embeddings.npy")) as out:
        first = next(parts, np.empty((0, 0), np.float32))
        header = {"descr": "<f4", "fortran_order": False, "shape": (kept, first.shape[1])}
        np.lib.format.write_array_header_2_0(out, header)
        written = _append(out, first)
        for block in parts:
            written += _append(out, block)
        if written != kept:
            raise CatalogError(f"{written} embeddings for {kept} samples that stayed: please report this bug")
    return kept


def _append(out: IO[bytes], block: npt.NDArray[np.float32]) -> int:
    out.write(np.ascontiguousarray(block, dtype="<f4").tobytes())
    return len(block)


def _write_clip_retrieval(run: _Run, output: str, kept: int) -> int:
    for folder in ("img_emb", "metadata"):
        make_folder(join_url(output, folder))
    columns = [*_kept_columns(run), schema.EMBEDDING]
    digits, number = len(str(max(0, run.catalog.n_parts - 1))), 0
    for table in run.rows(columns, kept=True):
        if not len(table):
            continue
        name = f"{number:0{digits}d}"
        metadata = table.drop_columns([schema.EMBEDDING])
        metadata = metadata.add_column(0, _IMAGE_PATH, table[schema.KEY])
        write_parquet(join_url(output, "metadata", f"metadata_{name}.parquet"), metadata)
        # Last, so that whoever finds the embeddings finds what they belong to.
        with atomic_write(join_url(output, "img_emb", f"img_emb_{name}.npy")) as out:
            np.lib.format.write_array(out, _embeddings(table).astype(np.float16), allow_pickle=False)
        number += 1
    return kept


FORMATS: Final[Mapping[str, Callable[[_Run, str, int], int]]] = {
    "kept": _write_kept, "removed": _write_removed, "npy": _write_npy, "clip-retrieval": _write_clip_retrieval,
}  # fmt: skip
_PATTERNS: Final[Mapping[str, tuple[str, ...]]] = {
    "kept": ("kept.parquet",), "removed": ("removed.csv", "removed.parquet"), "npy": ("embeddings.npy",),
    "clip-retrieval": ("img_emb/img_emb_*.npy", "metadata/metadata_*.parquet"),
}  # fmt: skip
