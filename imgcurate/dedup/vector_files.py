"""Files of ids and embeddings, from anywhere -> rows in parts, as deduplication reads them.

- *Parquet*: a column of ids and a column of lists of numbers, of one length in all files.
- *clip-retrieval*: a folder with ``img_emb/img_emb_<n>.npy`` and ``metadata/metadata_<n>.parquet``, whose
  rows belong together.
- *npy* files alone: the id of a row is its number.

A row is known by its number, over all files in the order of their URLs; so ids may repeat. A part is some
row groups of a file, or a range of rows of a larger one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgcurate import schema
from imgcurate.catalog import MANIFEST
from imgcurate.dedup.parquet_rows import open_parquet, row_batches
from imgcurate.dedup.vectors import NpyFile, ids_as_keys, ids_from_keys, list_lengths, unified_type
from imgcurate.errors import InputError, nearest
from imgcurate.inputs import CHANGED
from imgcurate.patterns import expand_urls
from imgcurate.storage import (
    StorageOptions,
    exists,
    file_size,
    is_folder,
    is_local,
    join_url,
    list_files,
    list_tree,
    local_path,
    modified,
    open_source,
)
from imgcurate.success import UNFINISHED

__all__ = ["VectorFiles", "find_vectors"]

_PART_BYTES: Final = 128 * 1024**2
_IMAGE_PATH: Final = "image_path"
_OTHER_ENDINGS: Final = (".npz", ".csv", ".tsv", ".json", ".jsonl", ".txt", ".pkl", ".pt", ".h5", ".tar", ".zip")
_PART_ROWS: Final = 262_144
_OWN_COLUMNS: Final = (schema.UID, schema.SHARD, schema.KEY, schema.STATUS, schema.EMBEDDING)


@dataclass(frozen=True)
class VectorPart:
    """A range of rows of a file.

    Attributes
    ----------
    table : str
        URL of the Parquet file of ids and other columns; "" if there is none.
    vectors : str
        URL of the npy file with the embeddings; "" if they are in the table.
    uid : int
        Number of its first row over all files.
    first, n_rows : int
        Its first row in the file, and how many it has.
    """

    table: str
    vectors: str
    uid: int
    first: int
    n_rows: int

    @property
    def url(self) -> str:
        """The file that the embeddings are in."""
        return self.vectors or self.table


@dataclass(frozen=True)
class VectorFiles:
    """Ids and embeddings in files; small and picklable, so tasks carry it. See :func:`find_vectors`.

    Attributes
    ----------
    folder : str
        What it is called in messages.
    parts : tuple of VectorPart
        In the order of the rows.
    id_field, embedding_field : str
        Columns of the tables.
    id_type : DataType
        Of all ids.
    dim : int
        Values of an embedding; 0 if there is none.
    input_options : mapping, optional
        Passed to fsspec for the files.
    storage_options : mapping, optional
        Passed to fsspec for what deduplication writes.
    states : mapping of str to str
        What the files were when the run began, by URL: one that is another when it is read is refused.
    """

    folder: str
    parts: tuple[VectorPart, ...]
    id_field: str
    embedding_field: str
    id_type: pa.DataType
    dim: int = 0
    input_options: StorageOptions | None = None
    storage_options: StorageOptions | None = None
    states: Mapping[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """Rows are known by their ids, in whatever order they come."""
        return "number" if pa.types.is_integer(self.id_type) and self.id_type != pa.uint64() else "hash"

    @property
    def n_parts(self) -> int:
        """Number of parts."""
        return len(self.parts)

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return sum(p.n_rows for p in self.parts)

    @property
    def schema(self) -> pa.Schema:
        """The columns that all files have in the names of a catalog."""
        return pa.schema([(c, schema.arrow_type(c)) for c in _OWN_COLUMNS])

    def read(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Read columns of a part by their names in a catalog, or in the files.

        ``uid`` is the number of the row, ``key`` the id as text, ``status`` always ``ok``.

        Raises
        ------
        InputError
            If a file changed or is damaged, an id is null, or an embedding has another length than the first.
        """
        part = self.parts[number]
        names = list(_OWN_COLUMNS if columns is None else columns)
        stored = [c for c in names if c not in _OWN_COLUMNS]
        if schema.KEY in names and part.table:
            stored.append(self.id_field)
        if schema.EMBEDDING in names and not part.vectors:
            stored.append(self.embedding_field)
        table = _read_rows(part, list(dict.fromkeys(stored)), self.input_options) if stored else None
        made = {}
        for name in names:
            if name == schema.UID:
                made[name] = pa.array(np.arange(part.uid, part.uid + part.n_rows, dtype=np.int64))
            elif name in (schema.STATUS, schema.SHARD):
                made[name] = pa.repeat(pa.scalar(schema.STATUS_OK if name == schema.STATUS else ""), part.n_rows)
            elif name == schema.KEY:
                made[name] = ids_as_keys(self._ids(part, table))
            elif name == schema.EMBEDDING:
                made[name] = self._embeddings(part, table)
            else:
                made[name] = table[name] if table is not None else None
        if stored or schema.EMBEDDING in names:
            self._check_unchanged(part)
        return pa.table(made)

    def ids(self, number: int) -> pa.Array:
        """Return the ids of a part, of type :attr:`id_type`."""
        part = self.parts[number]
        table = _read_rows(part, [self.id_field], self.input_options) if part.table else None
        self._check_unchanged(part)
        return self._ids(part, table)

    def ids_from_keys(self, keys: Sequence[str]) -> pa.Array:
        """Return the ids that were made keys by :meth:`read`."""
        return ids_from_keys(keys, self.id_type)

    def files(self) -> list[dict[str, Any]]:
        """Return what the files are now: URL, size and state of each, as plain data."""
        urls = dict.fromkeys(url for part in self.parts for url in (part.table, part.vectors) if url)
        return [_described(url, self.input_options) for url in urls]

    def pinned(self) -> VectorFiles:
        """Return the same, bound to the files as they are now."""
        return replace(self, states={f["url"]: _state(f) for f in self.files()})

    def _check_unchanged(self, part: VectorPart) -> None:
        """Refuse files that are not as they were: what was read of them has no meaning beside the rest."""
        for url in filter(None, (part.table, part.vectors)):
            if (before := self.states.get(url)) is not None and _state(_described(url, self.input_options)) != before:
                raise InputError(f"{url} {CHANGED}")

    def with_dim(self) -> VectorFiles:
        """Return the same with the length of the first embedding that is not null."""
        for part in self.parts:
            if part.vectors:
                with _npy(part.vectors, self.input_options) as npy:
                    return replace(self, dim=npy.dim)
            for batch in row_batches(part.table, [self.embedding_field], part.first, part.n_rows, self.input_options):
                lengths = list_lengths(batch[0]).drop_null()
                if len(lengths):
                    dim = lengths[0].as_py()
                    if not dim:
                        raise InputError(f"{part.url}: the first embedding that is not null has no values")
                    return replace(self, dim=dim)
        return self

    def _ids(self, part: VectorPart, table: pa.Table | None) -> pa.Array:
        if table is None:
            return pa.array(np.arange(part.uid, part.uid + part.n_rows, dtype=np.int64))
        ids = table[self.id_field].combine_chunks()
        if isinstance(ids.type, pa.BaseExtensionType):
            ids = ids.storage
        if ids.null_count:
            row = part.first + int(np.flatnonzero(ids.is_null().to_numpy(zero_copy_only=False))[0])
            raise InputError(f"{part.table}: row {row} has no {self.id_field}: every row needs an id to be named by")
        try:
            return ids.cast(self.id_type)
        except pa.ArrowException as exc:
            raise InputError(f"{part.table}: {self.id_field} does not fit the type of all ids: {exc}") from exc

    def _embeddings(self, part: VectorPart, table: pa.Table | None) -> pa.Array:
        if part.vectors:
            with _npy(part.vectors, self.input_options) as npy:
                x = npy.read(part.first, part.n_rows)
            if len(x) and npy.dim != self.dim:
                raise InputError(f"{part.vectors}: embeddings of {npy.dim} values; the first file has {self.dim}")
            return pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), self.dim or 1)
        assert table is not None  # noqa: S101 - read() reads the column where there is no npy file
        column = table[self.embedding_field].combine_chunks()
        if isinstance(column.type, pa.BaseExtensionType):
            column = column.storage
        lengths = list_lengths(column)
        wrong = np.flatnonzero(pc.fill_null(pc.not_equal(lengths, self.dim), False).to_numpy(zero_copy_only=False))
        if len(wrong):
            raise InputError(
                f"{part.table}: row {part.first + wrong[0]} has an embedding of {lengths[wrong[0]]} values, "
                f"and the first one has {self.dim}: all must have the same length"
            )
        return column


def _described(url: str, options: StorageOptions | None) -> dict[str, Any]:
    return {"url": url, "nbytes": file_size(url, options), "modified": modified(url, options)}


def _state(described: Mapping[str, Any]) -> str:
    return f"{described['nbytes']} bytes, {described['modified']}"


def find_vectors(
    inputs: str | Sequence[str],
    *,
    id_field: str = "id",
    embedding_field: str = "embedding",
    columns: Sequence[str] = (),
    output: str | None = None,
    input_options: StorageOptions | None = None,
) -> VectorFiles:
    """Find ids and embeddings, and plan the parts from the footers of the files.

    Parameters
    ----------
    inputs : str or sequence of str
        Paths, URLs, globs and braces: Parquet files, npy files, folders of either (to any depth), folders
        of clip-retrieval. Their order does not matter.
    id_field, embedding_field : str
        Columns of the Parquet files. Where clip-retrieval's metadata has no ``id``, that is ``image_path``.
    columns : sequence of str
        Other columns that must be there, with numbers.
    output : str, optional
        Folder whose files are left out, where a pattern or a folder holds them.
    input_options : mapping, optional
        Passed to fsspec.

    Raises
    ------
    InputError
        If a file does not exist, cannot be read, or lacks a column.
    """
    taken = [c for c in columns if c in _OWN_COLUMNS and c != schema.UID]
    if taken:
        raise InputError(f"keep_by: {taken[0]!r} cannot be used here; 'uid' is the number of the row")
    found: dict[str, str] = {}
    for url in expand_urls(inputs, input_options):
        found |= dict(_files_of(url, input_options))
    if output is not None:
        inside = [url for url in found if url.startswith(output.rstrip("/") + "/")]
        if len(inside) == len(found):
            raise InputError(f"the inputs lie in the output folder ({inside[0]}): name another output folder")
        found = {url: table for url, table in found.items() if url not in inside}
    if id_field == "id" and found and not _has_ids(found, input_options):
        id_field = _IMAGE_PATH
    parts: list[VectorPart] = []
    types: dict[str, pa.DataType] = {}
    uid = 0
    for url, table in sorted(found.items()):
        of_file, id_type = _plan_file(url, table, uid, (id_field, embedding_field, *columns), input_options)
        parts += of_file
        n_rows = sum(p.n_rows for p in of_file)
        if n_rows or not pa.types.is_null(id_type):
            # What wrote a file without rows may have known no type.
            types[url] = id_type
        uid += n_rows
    name = inputs if isinstance(inputs, str) else " ".join(map(str, inputs))
    id_type = unified_type(id_field, types or dict.fromkeys(found, pa.string()))
    files = VectorFiles(name, tuple(parts), id_field, embedding_field, id_type, input_options=input_options)
    return files.with_dim()


def _has_ids(found: Mapping[str, str], options: StorageOptions | None) -> bool:
    """Return whether ids are to be looked for in ``id``, and not in the column that clip-retrieval writes."""
    tables = [table for url, table in found.items() if table and table != url]
    if len(tables) < len(found):
        return True
    with open_parquet(min(tables), options) as file:
        return "id" in file.schema_arrow.names or _IMAGE_PATH not in file.schema_arrow.names


def _files_of(url: str, options: StorageOptions | None) -> Iterator[tuple[str, str]]:
    """Yield (file with embeddings, file with its ids or "") of a file or folder."""
    if not is_folder(url, options):
        file_size(url, options)  # Says so if there is no such file.
        if url.lower().endswith(_OTHER_ENDINGS):
            raise InputError(f"{url} is neither Parquet nor npy: expected such files, or folders of them")
        yield url, "" if url.endswith(".npy") else url
        return
    if exists(join_url(url, UNFINISHED), options):
        raise InputError(f"{url} is not whole: an export into it was stopped. Give its command again")
    vectors = list_files(join_url(url, "img_emb"), ".npy", options)
    if vectors:
        tables = {_number(n): n for n in list_files(join_url(url, "metadata"), ".parquet", options)}
        for name in vectors:
            if _number(name) not in tables:
                raise InputError(f"{url}: img_emb/{name} has no metadata/metadata_{_number(name)}.parquet beside it")
            yield join_url(url, "img_emb", name), join_url(url, "metadata", tables[_number(name)])
        return
    if exists(join_url(url, MANIFEST), options) and is_folder(join_url(url, "catalog"), options):
        raise InputError(
            f"{url} is the output folder of a run, whose embeddings are in {url}/catalog, and ids in 'uid'"
        )
    names = _tree(url, options)
    of_kind = [n for n in names if n.endswith((".parquet", ".pq"))] or [n for n in names if n.endswith(".npy")]
    if not of_kind:
        raise InputError(f"{url} holds no Parquet and no npy files, and no img_emb of clip-retrieval")
    for name in of_kind:
        yield join_url(url, name), "" if name.endswith(".npy") else join_url(url, name)


def _tree(folder: str, options: StorageOptions | None) -> list[str]:
    if not is_local(folder):
        return list(list_tree(folder, options))
    root = Path(local_path(folder))
    names = (p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    return [n for n in names if "/." not in f"/{n}"]


def _number(name: str) -> str:
    found = re.search(r"(\d+)\D*$", name)
    return found[1] if found else ""


def _plan_file(
    url: str, table: str, uid: int, columns: Sequence[str], options: StorageOptions | None
) -> tuple[list[VectorPart], pa.DataType]:
    """Return the parts of a file, and the type of its ids."""
    if not table:
        if len(columns) > 2:
            raise InputError(f"{url}: an npy file alone has no column {columns[2]!r}, which keep_by names")
        with _npy(url, options) as npy:
            return _ranges("", url, uid, [npy.n_rows], npy.row_bytes), pa.int64()
    vectors = "" if url == table else url
    with open_parquet(table, options) as file:
        fields = {f.name: f.type for f in file.schema_arrow}
        if twice := [name for name in columns if file.schema_arrow.names.count(name) > 1]:
            raise InputError(f"{table} has several columns {twice[0]!r}: expected one")
        for name in columns if not vectors else (columns[0], *columns[2:]):
            if name not in fields:
                what = {columns[0]: " of ids (id_field, --id-field)"}.get(name, "")
                what = what or (" of embeddings (embedding_field, --embedding-field)" if name == columns[1] else "")
                raise InputError(f"{table} has no column {name!r}{what}{nearest(name, fields)}")
        meta = file.metadata
        groups = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        if vectors:
            with _npy(vectors, options) as npy:
                if npy.n_rows != meta.num_rows:
                    raise InputError(
                        f"{vectors} has {npy.n_rows:,} rows and {table} {meta.num_rows:,}: they must be equal"
                    )
                row_bytes = npy.row_bytes
        else:
            # Of a file without rows pandas does not know what they would hold.
            if meta.num_rows or not pa.types.is_null(fields[columns[1]]):
                list_lengths(pa.array([], fields[columns[1]]), f"{table}: {columns[1]}")
            row_bytes = _row_bytes(meta, columns[1])
    return _ranges(table, vectors, uid, groups, row_bytes), fields[columns[0]]


def _row_bytes(meta: pq.FileMetaData, column: str) -> int:
    """Return the bytes of an embedding in float32, on average."""
    values, n_rows = 0, int(meta.num_rows)
    for group in (meta.row_group(i) for i in range(meta.num_row_groups)):
        chunks = (group.column(i) for i in range(group.num_columns))
        values += sum(int(c.num_values) for c in chunks if c.path_in_schema.split(".")[0] == column)
    return max(1, values * 4 // max(1, n_rows))


def _ranges(table: str, vectors: str, uid: int, groups: Sequence[int], row_bytes: int) -> list[VectorPart]:
    """Return parts of whole groups of rows, but for groups that are larger than a part."""
    most = min(_PART_ROWS, max(1, _PART_BYTES // row_bytes))
    sizes: list[int] = []
    for rows in groups:
        if sizes and sizes[-1] + rows <= most:
            sizes[-1] += rows
            continue
        sizes += [min(most, rows - start) for start in range(0, rows, most)]
    firsts = np.cumsum([0, *sizes]).tolist()
    return [VectorPart(table, vectors, uid + f, f, n) for f, n in zip(firsts, sizes, strict=False)]


def _read_rows(part: VectorPart, columns: Sequence[str], options: StorageOptions | None) -> pa.Table:
    batches = list(row_batches(part.table, columns, part.first, part.n_rows, options))
    if sum(map(len, batches)) != part.n_rows:
        raise InputError(f"{part.table} changed while it was read: row {part.first + part.n_rows - 1} is not there")
    return pa.Table.from_batches(batches) if batches else pa.table({c: [] for c in columns})


@contextmanager
def _npy(url: str, options: StorageOptions | None) -> Iterator[NpyFile]:
    source = open_source(url, options)
    try:
        yield NpyFile(source)
    finally:
        source.close()
