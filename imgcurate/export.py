"""Kept samples -> tar shards: whole samples are copied as byte spans, never decoded or encoded again.

An output shard is ``00000.tar`` with ``00000.parquet`` beside it, one row per sample. Samples come in
the order of their uid, ``images_per_tar`` to a shard, so the same input gives the same bytes whatever
the number of workers. Two samples of one shard cannot share a key: the later one's members get the
key ``<key>_<uid>`` in new headers, and the sidecar's ``source_key`` tells the old one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from imgcurate import schema
from imgcurate.archives import Archives
from imgcurate.catalog import Catalog, write_parquet
from imgcurate.errors import ImgcurateError
from imgcurate.folders import copy_files
from imgcurate.metrics import counted
from imgcurate.storage import Source, StorageOptions, atomic_write, join_url
from imgcurate.success import FileDigest, HashingWriter, file_digest
from imgcurate.tar import BLOCK, end_of_archive, padding, scan_tar, tar_header

__all__ = [
    "SOURCE_KEY",
    "OutputShard",
    "ShardContent",
    "describe_shard",
    "kept_counts",
    "plan_shards",
    "shard_name",
    "write_shard",
]

SOURCE_KEY: Final = "source_key"
_COPY_BYTES: Final = 1024 * 1024
_WHOLE_BYTES: Final = 8 * 1024 * 1024
_INTERNAL: Final = frozenset(
    {
        schema.SPANS, schema.FILES, schema.OFFSET, schema.STATUS, schema.REASON,
        schema.DUPLICATE_OF, schema.DUPLICATE_IN, schema.SIMILARITY, schema.PHASE,
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class OutputShard:
    """Which kept samples go into one output shard.

    Attributes
    ----------
    number : int
        0-based number, which names the files.
    slices : tuple of (part, start, stop)
        Per part of the catalog, the range among its kept rows.
    """

    number: int
    slices: tuple[tuple[int, int, int], ...]

    @property
    def samples(self) -> int:
        """Number of samples in the shard."""
        return sum(stop - start for _, start, stop in self.slices)


def shard_name(number: int) -> str:
    """Return the name of an output shard without its extension."""
    return f"{number:05d}"


def plan_shards(kept: Sequence[int], images_per_tar: int) -> list[OutputShard]:
    """Divide the kept samples into output shards.

    Parameters
    ----------
    kept : sequence of int
        Kept samples of each part, in the order of the parts.
    images_per_tar : int
        Samples per output shard; the last one may hold fewer.
    """
    shards: list[OutputShard] = []
    slices: list[tuple[int, int, int]] = []
    room = images_per_tar
    for part, count in enumerate(kept):
        start = 0
        while start < count:
            stop = min(count, start + room)
            slices.append((part, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                shards.append(OutputShard(len(shards), tuple(slices)))
                slices, room = [], images_per_tar
    if slices:
        shards.append(OutputShard(len(shards), tuple(slices)))
    return shards


def kept_counts(table: pa.Table) -> dict[str, int]:
    """Return the number of rows per status, the accounting of a part."""
    counts = table[schema.STATUS].value_counts().to_pylist()
    return {c["values"]: c["counts"] for c in counts}


def write_shard(
    shard: OutputShard,
    catalog: Catalog,
    folder: str,
    *,
    read_options: StorageOptions | None = None,
) -> dict[str, Any]:
    """Write one output shard and its sidecar.

    Parameters
    ----------
    shard : OutputShard
        What goes in.
    catalog : Catalog
        Where the rows are.
    folder : str
        URL of the folder for ``00000.tar`` and ``00000.parquet``.
    read_options : mapping, optional
        fsspec options of the input shards.

    Returns
    -------
    dict
        As from :func:`describe_shard`.

    Raises
    ------
    ImgcurateError
        If an input shard is no longer as it was indexed.
    StorageError
        If the output cannot be written.

    Notes
    -----
    Memory is one copy block and the rows of the shard. The sidecar is written last: a shard that
    has one is complete.
    """
    name = shard_name(shard.number)
    with counted("write") as work:
        content = ShardContent.of(shard, catalog)
        with atomic_write(join_url(folder, f"{name}.tar"), catalog.storage_options) as out:
            hashing = HashingWriter(out)
            content.write_tar(hashing, read_options)
            digest = hashing.digest
        write_parquet(join_url(folder, f"{name}.parquet"), content.sidecar, catalog.storage_options)
        work.counts = {schema.STATUS_OK: shard.samples}
    return _description(shard, digest, folder, catalog.storage_options)


def describe_shard(shard: OutputShard, folder: str, storage_options: StorageOptions | None = None) -> dict[str, Any]:
    """Return what an output shard that was written is: ``name``, ``samples``, ``nbytes``, ``sha256``, ``sidecar``.

    Both digests are those of the files as they are; that of the tar is ``nbytes`` and ``sha256``.
    """
    tar = file_digest(join_url(folder, f"{shard_name(shard.number)}.tar"), storage_options)
    return _description(shard, tar, folder, storage_options)


def _description(
    shard: OutputShard, tar: FileDigest, folder: str, storage_options: StorageOptions | None
) -> dict[str, Any]:
    name = shard_name(shard.number)
    sidecar = file_digest(join_url(folder, f"{name}.parquet"), storage_options)
    return {"name": f"{name}.tar", "samples": shard.samples, **asdict(tar), "sidecar": asdict(sidecar)}


@dataclass(frozen=True)
class ShardContent:
    """What an output shard consists of, which follows from catalog and inputs alone.

    Attributes
    ----------
    rows : pa.Table
        The rows of its samples, without embeddings.
    keys : list of str
        The keys of the samples in the shard, each once.
    """

    rows: pa.Table
    keys: list[str]

    @staticmethod
    def of(shard: OutputShard, catalog: Catalog) -> ShardContent:
        """Read the rows of an output shard."""
        rows = _rows(shard, catalog)
        return ShardContent(rows, _unique_keys(rows))

    @property
    def sidecar(self) -> pa.Table:
        """The table that lies beside the tar."""
        return _sidecar(self.rows, self.keys)

    def write_tar(self, out: HashingWriter, read_options: StorageOptions | None = None) -> None:
        """Write the tar; `read_options` are those of the input shards."""
        _copy_samples(self.rows, self.keys, out, read_options)


def _rows(shard: OutputShard, catalog: Catalog) -> pa.Table:
    columns = [c for c in catalog.schema.names if c != schema.EMBEDDING]
    tables = []
    for part, start, stop in shard.slices:
        table = catalog.read(part, columns)
        kept = table.filter(pc.equal(table[schema.STATUS], schema.STATUS_OK))
        tables.append(kept.slice(start, stop - start))
    rows = pa.concat_tables(tables)
    if len(rows) != shard.samples:
        raise ImgcurateError(f"shard {shard.number} should have {shard.samples} samples and has {len(rows)}")
    return rows


def _unique_keys(rows: pa.Table) -> list[str]:
    taken = set(rows[schema.KEY].to_pylist())
    seen: set[str] = set()
    keys = []
    for key, uid in zip(rows[schema.KEY].to_pylist(), rows[schema.UID].to_pylist(), strict=True):
        unique = key
        if key in seen:
            unique = f"{key}_{uid}"
            while unique in taken:
                unique += "_"
            taken.add(unique)
        seen.add(unique)
        keys.append(unique)
    return keys


def _sidecar(rows: pa.Table, keys: Sequence[str]) -> pa.Table:
    columns = {}
    for name in rows.column_names:
        if name == schema.KEY:
            columns[schema.KEY] = pa.array(keys, pa.string())
            columns[SOURCE_KEY] = rows[schema.KEY]
        elif name not in _INTERNAL:
            columns[name] = rows[name]
    return pa.table(columns)


def _copy_samples(rows: pa.Table, keys: Sequence[str], out: HashingWriter, read_options: StorageOptions | None) -> None:
    position = 0
    columns = (schema.SHARD, schema.KEY, schema.SPANS, schema.FILES)
    samples = zip(keys, *(rows[c].to_pylist() for c in columns), strict=True)
    with Archives(read_options) as archives:
        for (url, is_plain), group in itertools.groupby(samples, key=lambda s: (s[1], s[0] == s[2] and s[4] is None)):
            if is_plain:
                for start, stop in _joined(itertools.chain.from_iterable(spans for *_, spans, _ in group)):
                    position += _copy(archives(url), start, stop, out)
                continue
            for key, _, source_key, spans, files in group:
                new_key = key if key != source_key else None
                if files is not None:
                    position += copy_files(url, files, spans, new_key, out, read_options)
                else:
                    position += _copy_renamed(archives(url), spans, key, out)
    out.write(end_of_archive(position))


def _joined(spans: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Return spans (start, length, ...) as (start, stop), neighbours joined."""
    numbers = iter(spans)
    first = last = -1
    for start, length in zip(numbers, numbers, strict=True):
        if start != last:
            if last >= 0:
                yield first, last
            first = start
        last = start + length
    if last >= 0:
        yield first, last


def _copy(source: Source, start: int, stop: int, out: HashingWriter) -> int:
    position = start
    while position < stop:
        block = source.pread(position, min(_COPY_BYTES, stop - position))
        if not block:
            raise ImgcurateError(
                f"{source.url} ends at byte {position:,}, before {stop:,}: it changed since it was indexed"
            )
        out.write(block)
        position += len(block)
    # The last member of an archive may lack its padding.
    filled = padding(stop - start)
    out.write(filled)
    return stop - start + len(filled)


def _copy_renamed(source: Source, spans: Sequence[int], new_key: str, out: HashingWriter) -> int:
    """Copy a sample under another key: new headers, the same data."""
    sample = _SpanSource(source, spans)
    written = 0
    for member in scan_tar(sample).members:
        ext = member.name[member.name.index(".", member.name.rfind("/") + 1) :]
        template = sample.pread(member.data_offset - BLOCK, BLOCK)
        header = tar_header(f"{new_key}{ext}", member.size, template)
        out.write(header)
        written += len(header) + _copy(sample, member.data_offset, member.end, out)
    return written


class _SpanSource:
    """The byte spans of one sample, one after the other, as a file of their own."""

    def __init__(self, source: Source, spans: Sequence[int]) -> None:
        self.url = source.url
        self._source = source
        self._spans = list(zip(spans[::2], spans[1::2], strict=True))
        self.size = sum(spans[1::2])
        # Of an archive that is read forward, going back to a header would begin all anew.
        self._whole = self._read(0, self.size) if self.size <= _WHOLE_BYTES else None

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`, fewer only where the sample ends."""
        if self._whole is not None:
            return self._whole[offset : offset + length]
        return self._read(offset, length)

    def _read(self, offset: int, length: int) -> bytes:
        blocks = []
        for start, n in self._spans:
            if offset < n and length > 0:
                blocks.append(self._source.pread(start + offset, min(length, n - offset)))
                length -= len(blocks[-1])
            offset = max(0, offset - n)
        return b"".join(blocks)

    def close(self) -> None:
        """Do nothing: the source belongs to the caller."""
