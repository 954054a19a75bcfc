"""Parquet and Arrow files with a column of encoded images -> samples, one per row.

A row is read as the piece of a tar that it would make, so that indexing, decoding and export go the
way of tar shards:

- The *image* is the column that the Hugging Face metadata call an image, else the first struct of
  ``bytes`` and ``path``, else a binary column called as in :data:`IMAGE_COLUMNS`, else the only binary one.
- The *key* is the column ``__key__`` or ``key``, else the image's path, else ``file_name``, ``image_id``
  or ``id``, else the name of the file and the number of the row. An extension is cut off, dots in the base
  name become ``_``, ``..`` is left out, and ``__x`` becomes ``_x``, for WebDataset skips such names.
- A column ``caption``, ``text`` or ``txt`` is the member ``txt``; all columns that are not binary are the
  member ``json`` (NaN is null there); other binary columns are members of their own, ``mask.png``.

Offsets are those of that tar; those of row group `g` begin at ``g << 40``.
"""

from __future__ import annotations

import base64
import functools
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgcurate.errors import InputError
from imgcurate.extensions import IMAGE_EXTENSIONS, REFUSED_EXTENSIONS
from imgcurate.storage import Source, StorageOptions, open_source
from imgcurate.streams import UNKNOWN_SIZE, DamagedStreamError, ForwardSource, SourceFile
from imgcurate.tar import Damage, Members, TarScan
from imgcurate.tar_blocks import BLOCK, PLAIN_HEADER, padding, tar_header

__all__ = ["IMAGE_COLUMNS", "TableSource", "check_table", "image_column", "is_table"]

IMAGE_COLUMNS: Final = ("image", "image_bytes", "jpg", "jpeg", "png", "webp", "img", "bytes", "image_data", "content")
_KEY_COLUMNS: Final = ("__key__", "key")
_NAME_COLUMNS: Final = ("file_name", "filename", "image_id", "id")
_CAPTION_COLUMNS: Final = ("caption", "text", "txt", "TEXT")
_PARQUET_MAGIC: Final = b"PAR1"
_ARROW_MAGIC: Final = b"ARROW1"
_STREAM_MAGIC: Final = b"\xff\xff\xff\xff"
_SEGMENT_BITS: Final = 40
_BATCH_ROWS: Final = 64
_BUFFER_BYTES: Final = 1024 * 1024
_MAGICS: Final = (
    (0, b"\xff\xd8\xff", "jpg"), (0, b"\x89PNG", "png"), (8, b"WEBP", "webp"), (0, b"GIF8", "gif"), (0, b"BM", "bmp"),
    (0, b"II*\0", "tif"), (0, b"MM\0*", "tif"), (8, b"avif", "avif"), (8, b"heic", "heic"), (4, b"jP  ", "jp2"),
)  # fmt: skip

_Row = list[tuple[str, Any]]


def is_table(head: bytes) -> bool:
    """Return whether a file that begins with `head` is a Parquet or Arrow file."""
    return head.startswith((_PARQUET_MAGIC, _ARROW_MAGIC, _STREAM_MAGIC))


def check_table(url: str, storage_options: StorageOptions | None = None) -> None:
    """Check that a table has a column of images; one that is damaged passes, for it becomes a row.

    Raises
    ------
    InputError
        If it has none.
    """
    source = open_source(url, storage_options)
    try:
        schema = _open(source).schema
    except DamagedStreamError:
        return
    finally:
        source.close()
    _Layout.of(schema, url)


def image_column(schema: pa.Schema) -> str | None:
    """Return the column with the encoded images, by the rules above; None if there is none."""
    names = [f.name for f in schema if _is_binary(f.type) or _is_image_struct(f.type)]
    structs = [n for n in names if _is_image_struct(schema.field(n).type)]
    for candidates in (_features(schema), structs, IMAGE_COLUMNS):
        found = [n for n in candidates if n in names]
        if found:
            return found[0]
    return names[0] if len(names) == 1 else None


class TableSource:
    """A Parquet or Arrow file as the tar that its rows would make; see the rules above.

    Parameters
    ----------
    source : Source
        The file; closed with this object.

    Raises
    ------
    DamagedStreamError
        If it cannot be read.
    InputError
        If it has no column of images.

    Notes
    -----
    Memory is 64 rows and a buffer per column. Reading forward within a row group is cheap; going back
    begins the row group anew.
    """

    def __init__(self, source: Source) -> None:
        self.url, self.size = source.url, UNKNOWN_SIZE
        self._source = source
        self._file = _open(source)
        self._layout = _Layout.of(self._file.schema, source.url)
        self.image_column = self._layout.image
        self._segment: tuple[int, ForwardSource] | None = None

    def scan(self) -> tuple[TarScan, np.ndarray]:
        """Return the members of all rows, and of each the number of its row.

        What is damaged is told by ``damage``, at its first place; what can be read of each row group is there.
        """
        names: list[bytes] = []
        spans: list[tuple[int, int, int, int]] = []
        rows: list[int] = []
        damages: list[Damage] = []
        lost = 0
        for group in range(self._file.n_groups):
            position, number = group << _SEGMENT_BITS, self._file.first_row(group)
            try:
                for row in self._rows(group):
                    for name, data in row:
                        raw, size = name.encode("utf-8", "surrogateescape"), len(data)
                        start = position + _header_bytes(name, len(raw), size)
                        end = start + size + -size % BLOCK
                        names.append(raw + b"\0")
                        spans.append((position, start, size, end))
                        rows.append(number)
                        position = end
                    number += 1
            except DamagedStreamError as exc:
                lost += max(0, self._file.first_row(group + 1) - number)
                damages.append(Damage(position, str(exc), ""))
        damage = damages[0] if damages else None
        if damage is not None and lost:
            more = f", and {len(damages) - 1} more row groups" if len(damages) > 1 else ""
            damage = damage._replace(reason=f"{damage.reason}{more} ({lost:,} rows are lost)")
        columns = np.array(spans, np.int64).reshape(-1, 4).T
        return TarScan(Members(b"".join(names), *columns), [], damage), np.array(rows, np.int64)

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`, fewer only where a row group ends."""
        group, within = offset >> _SEGMENT_BITS, offset & (1 << _SEGMENT_BITS) - 1
        if self._segment is None or self._segment[0] != group:
            blocks = functools.partial(self._blocks, group)
            self._segment = group, ForwardSource(self.url, blocks, lambda: None)
        return self._segment[1].pread(within, length)

    def close(self) -> None:
        """Close the file."""
        self._segment = None
        self._source.close()

    def _blocks(self, group: int) -> Iterator[bytes]:
        for row in self._rows(group):
            for name, data in row:
                yield b"".join((tar_header(name, len(data), PLAIN_HEADER), data, padding(len(data))))

    def _rows(self, group: int) -> Iterator[_Row]:
        number = self._file.first_row(group)
        try:
            for batch in self._file.batches(group):
                yield from self._layout.rows(batch, number)
                number += len(batch)
        except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError) as exc:
            raise DamagedStreamError(f"damaged table: row group {group}, row {number:,}: {exc}") from exc


@dataclass(frozen=True, slots=True)
class _Layout:
    """Which column is what.

    Attributes
    ----------
    image : str
        The encoded images.
    binaries : tuple of str
        Other columns of bytes.
    key, name, caption : str or None
        The columns of keys, of names where there are no keys and the image has no path, and of captions.
    words : tuple of str
        What the members of `binaries` are called, all different.
    stem : str
        What keys begin with where the rows have none.
    """

    image: str
    binaries: tuple[str, ...]
    key: str | None
    name: str | None
    caption: str | None
    stem: str
    words: tuple[str, ...]

    @staticmethod
    def of(schema: pa.Schema, url: str) -> _Layout:
        twice = next((n for i, n in enumerate(schema.names) if n in schema.names[:i]), None)
        if twice is not None:
            raise InputError(f"{url} has two columns {twice!r}: expected names that are all different")
        image = image_column(schema)
        if image is None:
            raise InputError(
                f"{url} has no column of images among {', '.join(schema.names)}: expected a struct of bytes and path, "
                f"or a binary column called {', '.join(IMAGE_COLUMNS[:4])} ..."
            )
        caption = next((n for n in _CAPTION_COLUMNS if n in schema.names and _is_text(schema.field(n).type)), None)
        binaries = tuple(f.name for f in schema if _is_bytes(f.type) and f.name not in (image, caption))
        words = [_word(n) for n in binaries]
        words = [w if w not in words[:i] else f"{w}_{i}" for i, w in enumerate(words)]
        key = _first(schema, _KEY_COLUMNS)
        name = _first(schema, _NAME_COLUMNS)
        stem = url.rsplit("/", 1)[-1].rpartition(".")[0]
        return _Layout(image, binaries, key, name, caption, stem, tuple(words))

    def rows(self, batch: pa.RecordBatch, first_row: int) -> Iterator[_Row]:
        """Return the members, (name, bytes) each, of the rows of a batch."""
        images = _Bytes(batch[self.image])
        others = {word: _Bytes(batch[name]) for word, name in zip(self.words, self.binaries, strict=True)}
        captions = None if self.caption is None else _Bytes(batch[self.caption])
        plain = [n for n in batch.schema.names if n != self.image and not _is_bytes(batch.schema.field(n).type)]
        records = _records(batch.select(plain)) if plain else [{}] * len(batch)
        for i, record in enumerate(records):
            path, image = images.path(i), images.data(i)
            name = path if self.key is None else record[self.key]
            if name is None and self.key is None and self.name is not None:
                name = record[self.name]
            key = _clean_key(name) or f"{_clean_key(self.stem)}/{first_row + i:09d}"
            members: _Row = []
            if image is not None:
                members.append((f"{key}.{_extension(image, path, 'jpg')}", image))
            if captions is not None and (caption := captions.data(i)) is not None:
                members.append((f"{key}.txt", caption))
            if path is not None:
                record = {self.image: path, **record}
            if record or not members:
                members.append((f"{key}.json", _json(record)))
            for word, values in others.items():
                data = values.data(i)
                if data is not None:
                    members.append((f"{key}.{word}.{_extension(data, values.path(i), 'bin')}", data))
            yield members


class _Bytes:
    """A column of bytes or text, or of structs of bytes and path, without copies."""

    def __init__(self, column: pa.Array) -> None:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        self._paths: list[str | None] = [None] * len(column)
        if pa.types.is_struct(column.type):
            if column.type.get_field_index("path") >= 0:
                self._paths = [_cell(value) for value in pc.struct_field(column, "path")]
            column = pc.struct_field(column, "bytes")
        self._column = column

    def data(self, i: int) -> Any:
        scalar = self._column[i]
        return memoryview(scalar.as_buffer()) if scalar.is_valid else None

    def path(self, i: int) -> str | None:
        return self._paths[i]


def _records(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Return the rows of a batch as dicts; a cell that Python cannot hold does not spoil the others."""
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except Exception:  # noqa: BLE001 - text that is not UTF-8, dates after the year 9999, unknown time zones
        columns = [[_cell(value) for value in column] for column in batch.columns]
        rows = [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]
    return rows


def _cell(scalar: Any) -> Any:
    """Return a value: of text that is not UTF-8 with escapes, of times that Python cannot hold the number."""
    try:
        return scalar.as_py()
    except Exception:  # noqa: BLE001 - as above
        if hasattr(scalar, "as_buffer"):
            return scalar.as_buffer().to_pybytes().decode("utf-8", "backslashreplace")
        return getattr(scalar, "value", None)


def _clean_key(name: object) -> str:
    """Return a key made of a name or path; empty if there is nothing to make one of."""
    if name is None:
        return ""
    parts = [p for p in str(name).replace("\0", "_").split("/") if p not in ("", ".", "..")]
    if not parts:
        return ""
    stem, dot, ext = parts[-1].rpartition(".")
    base = stem if dot and stem and len(ext) <= 5 and ext.isalnum() and not ext.isdigit() else parts[-1]
    parts[-1] = base.replace(".", "_")
    # WebDataset takes names that begin with two underscores for metadata.
    parts[0] = f"_{parts[0].lstrip('_')}" if parts[0].startswith("__") else parts[0]
    return "/".join(parts)


def _word(column: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in column.lower()) or "_"


def _extension(data: Any, path: str | None, otherwise: str) -> str:
    head = bytes(data[:16])
    for offset, magic, ext in _MAGICS:
        if head[offset : offset + len(magic)] == magic:
            return ext
    ext = (path or "").rpartition(".")[2].lower()
    return ext if ext in IMAGE_EXTENSIONS or ext in REFUSED_EXTENSIONS else otherwise


def _json(record: dict[str, Any]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False, default=_plain, allow_nan=False).encode()
    except ValueError:
        return json.dumps(_finite(record), ensure_ascii=False, default=_plain).encode()


def _finite(value: Any) -> Any:
    """Return a value without numbers that JSON does not know: NaN is null, infinity a word."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def _plain(value: object) -> object:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _header_bytes(name: str, name_bytes: int, size: int) -> int:
    return BLOCK if name_bytes <= 100 and size < 8**11 else len(tar_header(name, size, PLAIN_HEADER))


def _first(schema: pa.Schema, names: Sequence[str]) -> str | None:
    plain = (n for n in names if n in schema.names)
    return next(
        (n for n in plain if not (pa.types.is_nested(schema.field(n).type) or _is_binary(schema.field(n).type))), None
    )


def _is_binary(type_: pa.DataType) -> bool:
    type_ = type_.value_type if pa.types.is_dictionary(type_) else type_
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_) or pa.types.is_binary_view(type_))


def _is_text(type_: pa.DataType) -> bool:
    """Return whether a column can hold captions: text, also as bytes."""
    plain = type_.value_type if pa.types.is_dictionary(type_) else type_
    is_string = pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_string_view(plain)
    return bool(is_string or _is_binary(type_))


def _is_bytes(type_: pa.DataType) -> bool:
    return _is_binary(type_) or _is_image_struct(type_)


def _is_image_struct(type_: pa.DataType) -> bool:
    at = type_.get_field_index("bytes") if pa.types.is_struct(type_) else -1
    return at >= 0 and _is_binary(type_.field(at).type)


def _features(schema: pa.Schema) -> list[str]:
    """Return the columns that the metadata of the Hugging Face library call images."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [name for name, feature in features.items() if feature.get("_type") == "Image"]
    except (KeyError, ValueError, TypeError, AttributeError):
        return []


class _ParquetRows:
    def __init__(self, source: Source) -> None:
        self._file = pq.ParquetFile(SourceFile(source), buffer_size=_BUFFER_BYTES, pre_buffer=False)
        self.schema = self._file.schema_arrow
        self.n_groups = self._file.num_row_groups

        counts = [self._file.metadata.row_group(g).num_rows for g in range(self.n_groups)]
        self._first_rows: list[int] = [0, *itertools.accumulate(counts)]

    def first_row(self, group: int) -> int:
        return self._first_rows[group]

    def batches(self, group: int) -> Iterator[pa.RecordBatch]:
        yield from self._file.iter_batches(_BATCH_ROWS, row_groups=[group], use_threads=False)


class _ArrowRows:
    """An Arrow file or stream, which is one group: its batches can be of any size."""

    n_groups = 1

    def __init__(self, source: Source) -> None:
        self._source = source
        self.schema = self._reader().schema

    def _reader(self) -> Any:
        file = SourceFile(self._source)
        if self._source.pread(0, len(_ARROW_MAGIC)) == _ARROW_MAGIC:
            return pa.ipc.open_file(file)
        return pa.ipc.open_stream(file)

    def first_row(self, group: int) -> int:
        del group
        return 0

    def batches(self, group: int) -> Iterator[pa.RecordBatch]:
        del group
        reader = self._reader()
        numbered = hasattr(reader, "get_batch")
        all_ = map(reader.get_batch, range(reader.num_record_batches)) if numbered else reader
        for batch in all_:
            for start in range(0, len(batch), _BATCH_ROWS):
                yield batch.slice(start, _BATCH_ROWS)


def _open(source: Source) -> Any:
    try:
        return (_ParquetRows if source.pread(0, 4) == _PARQUET_MAGIC else _ArrowRows)(source)
    except (pa.ArrowException, OSError) as exc:
        raise DamagedStreamError(f"not a readable Parquet or Arrow file: {exc}") from exc
