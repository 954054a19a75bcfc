"""What is checked of a finished run: a task for each file, part of the catalog and output shard.

A task returns plain data: ``faults``, a list of (kind, place, message), of which it keeps the first few,
``n_faults``, and counts. Nothing that is wrong with a file raises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from imgcurate import schema
from imgcurate.catalog import Catalog, read_parquet
from imgcurate.errors import CatalogError, ImgcurateError, InputError, printable
from imgcurate.export import OutputShard, ShardContent, kept_counts, shard_name
from imgcurate.frame import read_group
from imgcurate.inputs import describe_shards
from imgcurate.members import MemberColumns
from imgcurate.shards import Shard
from imgcurate.sidecars import Sidecars
from imgcurate.storage import StorageError, StorageOptions, exists, join_url, open_source
from imgcurate.streams import SourceFile
from imgcurate.success import FileDigest, HashingWriter, file_digest

__all__ = ["Faults", "Output", "Part", "Reading", "check_file", "check_part", "check_shard"]

_MOST: Final = 20
_FROM_INDEX: Final = (
    schema.SHARD, schema.KEY, schema.EXT, schema.MEMBERS, schema.FILES, schema.SPANS, schema.OFFSET, schema.NBYTES,
)  # fmt: skip
_SHOWN: Final = 120
_Ints = npt.NDArray[np.int64]


@dataclass
class Faults:
    """What a task found to be wrong: the first few, and how many in all."""

    found: list[tuple[str, str, str]] = field(default_factory=list)
    n: int = 0

    def add(self, kind: str, place: str, message: str) -> None:
        """Note a fault."""
        self.n += 1
        if len(self.found) < _MOST:
            self.found.append((kind, place, message))

    def result(self, **counts: Any) -> dict[str, Any]:
        """Return what a task sends back."""
        return {"faults": self.found, "n_faults": self.n, **counts}


@dataclass(frozen=True)
class Part:
    """A part of the catalog, and the inputs that it is about.

    Attributes
    ----------
    number : int
        The part.
    first : int
        Number of its first input.
    described : tuple of dict
        Its inputs as the manifest describes them.
    shards : tuple of Shard or None
        The same to be read; None for files of a folder that are not there any more.
    """

    number: int
    first: int
    described: tuple[dict[str, Any], ...]
    shards: tuple[Shard | None, ...]


@dataclass(frozen=True)
class Output:
    """An output shard, and what its files should be.

    Attributes
    ----------
    shard : OutputShard
        Which samples are in it.
    digest : FileDigest, optional
        What the tar is; None if that is not known.
    sidecar : bool
        Whether its table can be read.
    """

    shard: OutputShard
    digest: FileDigest | None
    sidecar: bool


@dataclass(frozen=True)
class Reading:
    """How the inputs were read.

    Attributes
    ----------
    options : mapping, optional
        fsspec options of the inputs.
    members : MemberColumns
        Columns that come from members of the samples.
    sidecars : Sidecars
        Columns that come from tables beside the tars.
    """

    options: StorageOptions | None
    members: MemberColumns
    sidecars: Sidecars


def _guarded(check: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Make what a task raises a fault of the place that is its first argument."""

    @functools.wraps(check)
    def guarded(item: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return check(item, **kwargs)
        except ImgcurateError as exc:
            message = str(exc)
        except Exception as exc:  # noqa: BLE001 - a damaged file may break any library that reads it
            message = f"{type(exc).__name__}: {exc}"
        faults = Faults()
        faults.add("damaged", _place(item), " ".join(message.split()))
        return faults.result(failed=True)

    return guarded


def _place(item: Any) -> str:
    if isinstance(item, Part):
        return f"catalog part {item.number}"
    return f"shards/{shard_name(item.shard.number)}.tar" if isinstance(item, Output) else str(item[0])


@_guarded
def check_file(item: tuple[str, FileDigest | None], *, folder: str) -> dict[str, Any]:
    """Compare a file of the result with its size and checksum, if they are known."""
    name, expected = item
    faults = Faults()
    url = join_url(folder, name)
    try:
        found = file_digest(url)
    except StorageError as exc:
        if exists(url):
            raise
        faults.add("missing", name, "the file is not there")
        return faults.result(failed=True, error=str(exc))
    if expected is not None and found.nbytes != expected.nbytes:
        faults.add("damaged", name, f"has {found.nbytes:,} bytes, and {expected.nbytes:,} were written")
    elif expected is not None and found.sha256 != expected.sha256:
        faults.add("damaged", name, f"has other bytes than were written: SHA-256 {found.sha256[:16]}...")
    return faults.result(nbytes=found.nbytes, sha256=found.sha256, failed=faults.n > 0)


@_guarded
def check_part(part: Part, *, catalog: Catalog, reading: Reading | None) -> dict[str, Any]:
    """Check the rows of a part, and compare them with its inputs if it is said how to read these."""
    faults = Faults()
    place = f"catalog part {part.number}"
    columns = _columns(catalog.part_url(part.number))
    if missing := [c for c in schema.INDEX_COLUMNS if c not in columns]:
        raise CatalogError(f"has no column {missing[0]}")
    taken = [c for c in columns if c != schema.EMBEDDING]
    if reading is not None:
        taken = [c for c in taken if c in schema.COLUMNS or c in (*reading.members.types, *reading.sidecars.types)]
    else:
        taken = [c for c in taken if c in schema.COLUMNS]
    table = catalog.read(part.number, taken).combine_chunks()
    if never := [c for c in (schema.UID, schema.SHARD, schema.STATUS) if table[c].null_count]:
        raise CatalogError(f"has rows without {never[0]}")
    uids = table[schema.UID].to_numpy().astype(np.int64)
    numbers = uids >> schema.UID_SHARD_BITS
    _check_uids(uids, numbers, part, place, faults)
    _check_urls(table, numbers, part, place, faults)
    counts = kept_counts(table)
    if schema.DUPLICATE_OF in columns and counts.get(schema.STATUS_DUPLICATE):
        nameless = table.filter(table[schema.DUPLICATE_OF].is_null())
        lost = kept_counts(nameless).get(schema.STATUS_DUPLICATE, 0)
        if lost:
            faults.add("catalog", place, f"{lost:,} duplicates do not say of what")
    if schema.PHASE in columns:
        kept = table[schema.STATUS].to_numpy() == schema.STATUS_OK
        for i in np.flatnonzero(kept != table[schema.PHASE].is_null().to_numpy()).tolist():
            phase = table[schema.PHASE][i].as_py()
            faults.add("catalog", place, f"uid {uids[i]} is {table[schema.STATUS][i]}, and left in phase {phase}")
    gone: list[int] = []
    if reading is not None:
        for at in range(len(part.described)):
            rows = table.filter(pa.array(numbers == part.first + at))
            if not _check_input(part, at, rows, reading, faults):
                gone.append(part.first + at)
    return faults.result(
        counts=counts, kept=counts.get(schema.STATUS_OK, 0), columns=[f"{k}: {v}" for k, v in columns.items()],
        gone=gone, duplicates=counts.get(schema.STATUS_DUPLICATE, 0) if schema.DUPLICATE_OF in columns else 0,
    )  # fmt: skip


def _columns(url: str) -> dict[str, str]:
    """Return the columns of a Parquet file with their types."""
    source = open_source(url)
    try:
        with SourceFile(source) as file:
            return {f.name: str(f.type) for f in pq.read_schema(file)}
    finally:
        source.close()


def _check_uids(uids: _Ints, numbers: _Ints, part: Part, place: str, faults: Faults) -> None:
    """Check that each uid is there once, in order, and that positions of an input have no gap."""
    order = np.diff(uids)
    for i in np.flatnonzero(order == 0).tolist():
        faults.add("catalog", place, f"uid {uids[i]} is there twice")
    for i in np.flatnonzero(order < 0).tolist():
        faults.add("catalog", place, f"uid {uids[i + 1]} comes after {uids[i]}, out of order")
    last = part.first + len(part.described) - 1
    for uid in uids[(numbers < part.first) | (numbers > last)].tolist():
        faults.add("catalog", place, f"uid {uid} is of input {uid >> schema.UID_SHARD_BITS}, not of this part")
    for number in range(part.first, last + 1):
        positions = np.unique(uids[numbers == number] & ((1 << schema.UID_SHARD_BITS) - 1))
        gap = np.flatnonzero(positions != np.arange(len(positions)))
        if len(gap):
            faults.add("catalog", place, f"uid {schema.make_uid(number, int(gap[0]))} is missing before others")


def _check_urls(table: pa.Table, numbers: _Ints, part: Part, place: str, faults: Faults) -> None:
    """Check that the rows name the input that their uid says."""
    urls = table[schema.SHARD].combine_chunks().dictionary_encode()
    pairs = np.unique(np.stack([numbers, np.asarray(urls.indices)]), axis=1)
    for number, code in pairs.T.tolist():
        at = number - part.first
        url = urls.dictionary[code].as_py()
        if 0 <= at < len(part.described) and url != part.described[at]["url"]:
            faults.add("catalog", place, f"rows of input {number}, {part.described[at]['url']}, name {url}")


def _check_input(part: Part, at: int, rows: pa.Table, reading: Reading, faults: Faults) -> bool:
    """Compare rows with their input; False if it cannot be read any more."""
    shard, described, number = part.shards[at], part.described[at], part.first + at
    url = printable(str(described["url"]))
    if shard is None:
        faults.add("input", url, f"its {described.get('files', 0):,} files are not there as they were: gone or changed")
        return False
    try:
        (now,) = describe_shards([shard], reading.options, reading.sidecars)
    except (InputError, StorageError, OSError) as exc:
        faults.add("input", url, f"is gone: {exc}")
        return False
    if now != described:
        what = [f"{k} was {described.get(k)!r}, is {now.get(k)!r}" for k in now if now[k] != described.get(k)]
        faults.add("input", url, f"changed since the run: {'; '.join(what)}")
    try:
        index = read_group(((number, shard),), reading.members, reading.options, reading.sidecars)
    except ImgcurateError as exc:
        faults.add("input", url, f"cannot be read: {exc}")
        return False
    _compare(rows, index, url, reading, faults)
    return True


def _compare(rows: pa.Table, index: pa.Table, url: str, reading: Reading, faults: Faults) -> None:
    """Compare the catalog's rows of an input with the index of it."""
    ours, theirs = (t[schema.UID].to_numpy().astype(np.int64) for t in (rows, index))
    for i in np.flatnonzero(~np.isin(theirs, ours)).tolist():
        faults.add("source", url, f"the sample {_shown(index[schema.KEY][i].as_py())} (uid {theirs[i]}) has no row")
    for i in np.flatnonzero(~np.isin(ours, theirs)).tolist():
        faults.add("source", url, f"the row {_shown(rows[schema.KEY][i].as_py())} (uid {ours[i]}) has no sample")
    common, at, of = np.intersect1d(ours, theirs, return_indices=True)
    rows, index = rows.take(pa.array(at)), index.take(pa.array(of))
    extra = [c for c in (*reading.members.types, *reading.sidecars.types) if c in rows.column_names]
    for name in (*_FROM_INDEX, *extra):
        for i in _differing(rows[name], index[name]).tolist():
            was, now = rows[name][i].as_py(), index[name][i].as_py()
            faults.add("source", url, f"uid {common[i]}: the catalog has {name} {_shown(was)}, the input {_shown(now)}")
    # What the index found wrong with a sample, no later stage takes back.
    fine = np.asarray(index[schema.STATUS].to_pylist()) == schema.STATUS_OK
    for name in (schema.STATUS, schema.REASON):
        for i in _differing(rows[name], index[name]).tolist():
            if not fine[i]:
                was, now = rows[name][i].as_py(), index[name][i].as_py()
                faults.add("source", url, f"uid {common[i]}: {name} is {_shown(was)}, by the input {_shown(now)}")


def _differing(a: pa.ChunkedArray, b: pa.ChunkedArray) -> _Ints:
    """Return the positions at which two columns differ; of floats, null and NaN are one."""
    if a.type != b.type:
        b = b.cast(a.type)
    if a.equals(b):
        return np.empty(0, np.int64)
    if pa.types.is_floating(a.type):
        x, y = (c.to_pandas().to_numpy(float, na_value=np.nan) for c in (a, b))
        return np.flatnonzero(~((x == y) | (np.isnan(x) & np.isnan(y))))
    return np.array([i for i, (x, y) in enumerate(zip(a.to_pylist(), b.to_pylist(), strict=True)) if x != y], np.int64)


def _shown(value: object) -> str:
    text = printable(value) if isinstance(value, str) else str(value)
    text = repr(text) if isinstance(value, str) else text
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


@_guarded
def check_shard(item: Output, *, catalog: Catalog, reading: Reading | None, gone: Sequence[int] = ()) -> dict[str, Any]:
    """Compare the table beside an output shard with the catalog, and its tar with what the inputs give now."""
    faults = Faults()
    name = shard_name(item.shard.number)
    content = ShardContent.of(item.shard, catalog)
    if item.sidecar:
        _check_sidecar(content, catalog, f"shards/{name}.parquet", faults)
    if reading is None or item.digest is None:
        return faults.result(compared=0)
    numbers = np.unique(content.rows[schema.UID].to_numpy().astype(np.int64) >> schema.UID_SHARD_BITS)
    if np.isin(numbers, np.asarray(gone, np.int64)).any():
        return faults.result(compared=0, skipped=1)
    hashing = HashingWriter()
    try:
        content.write_tar(hashing, reading.options)
    except ImgcurateError as exc:
        faults.add("output", f"shards/{name}.tar", f"cannot be made anew from the inputs: {exc}")
        return faults.result(compared=0)
    if hashing.digest != item.digest:
        faults.add("output", f"shards/{name}.tar", "is not what catalog and inputs give: " + _unlike(hashing, item))
    return faults.result(compared=1)


def _unlike(made: HashingWriter, item: Output) -> str:
    assert item.digest is not None  # noqa: S101 - the caller has one
    if made.digest.nbytes != item.digest.nbytes:
        return f"{item.digest.nbytes:,} bytes, should have {made.digest.nbytes:,}"
    return "as many bytes, but others"


def _check_sidecar(content: ShardContent, catalog: Catalog, place: str, faults: Faults) -> None:
    expected = content.sidecar
    try:
        found = read_parquet(join_url(catalog.folder, place))
    except (CatalogError, StorageError) as exc:
        faults.add("damaged", place, str(exc))
        return
    # Columns that a stage made of others stand where they were when the shard was written.
    if odd := sorted({*found.column_names} ^ {*expected.column_names}):
        faults.add("output", place, f"has other columns than the catalog: {', '.join(odd)}")
    elif len(found) != len(expected):
        faults.add("output", place, f"has {len(found):,} rows, should have {len(expected):,}")
    else:
        for name in _unlike_columns(found, expected):
            faults.add("output", place, f"the column {name} is not what the catalog says")


def _unlike_columns(found: pa.Table, expected: pa.Table) -> Iterator[str]:
    columns: Mapping[str, tuple[Any, Any]] = {n: (found[n], expected[n]) for n in expected.column_names}
    return (n for n, (a, b) in columns.items() if a.type != b.type or len(_differing(a, b)))
