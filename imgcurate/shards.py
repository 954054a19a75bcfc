r"""Shards -> the index of their samples: key, members, byte offsets. No pixel is decoded here.

Which members make a sample is said in :mod:`imgcurate.samples`. Further:

- The image is the first member whose extension is one of :data:`~imgcurate.extensions.IMAGE_EXTENSIONS`, else the first
  whose extension ends with one (``v2.jpg``), else the first of a format that is known and not
  decoded (``exr``, ``svg`` ...), which is reported as such. A sample without an image has the status ``no_image``.
- Where the archive is damaged, the samples before stay, and one row has the status ``tar_error``: the
  sample whose member was cut, or, where no name can be read, a row with an empty key.

The same holds for the files of a folder (:mod:`imgcurate.folders`) and, but that each row is a sample of its
own, for tables (:mod:`imgcurate.tables`). A sample with a file that cannot be read has the status ``read_error``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa

from imgcurate import schema
from imgcurate.archives import open_archive
from imgcurate.errors import InputError, printable
from imgcurate.extensions import IMAGE_EXTENSIONS, REFUSED_EXTENSIONS
from imgcurate.folders import file_url, files_members
from imgcurate.members import NO_MEMBERS, MemberColumns
from imgcurate.samples import Samples, group_members, mark_damage
from imgcurate.storage import Source, file_size, is_local, read_bytes, read_ranges
from imgcurate.streams import DamagedStreamError, ForwardSource
from imgcurate.tables import TableSource
from imgcurate.tar import Damage, Members, Problem, TarScan, quoted_name, scan_tar, shown_name

__all__ = ["Shard", "ShardIndex", "index_shard"]

# A remote shard is read through a spool, so small windows cost no requests; where images are larger than the
# gap, nothing but headers is fetched here.
_REMOTE_WINDOW_BYTES: Final = 64 * 1024
_REMOTE_GAP_BYTES: Final = 1024 * 1024
_MAX_TEXT_BYTES: Final = 16 * 1024 * 1024
_MEMBERS_SHOWN: Final = 8
_EXT_SHOWN: Final = 40


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard of the input.

    Attributes
    ----------
    url : str
        A tar, a table, or the folder of `files`.
    files : tuple of str
        Names of files below a folder, as :func:`imgcurate.folders.quoted` writes them, sorted; of a
        tar or table empty.
    sizes : tuple of int
        Bytes of the files; empty for a local folder.
    state : str
        What :func:`imgcurate.inputs.state_of` said of it when the run began; "" where nobody looked.
    tables : tuple of str
        Names of the tables in the folder that may tell of its files; see :mod:`imgcurate.sidecars`.
    """

    url: str
    files: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    state: str = ""
    tables: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """The samples of one shard.

    Attributes
    ----------
    table : pa.Table
        One row per sample: the columns of :data:`imgcurate.schema.INDEX_COLUMNS` and the text columns.
    problems : list of Problem
        What belongs to no sample, and what is damaged.
    nbytes : int
        Size of the shard.
    """

    table: pa.Table
    problems: list[Problem]
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Contents:
    """What is in a shard of any kind.

    Attributes
    ----------
    scan : TarScan
        Its members.
    rows : ndarray of shape (n,), int64, or None
        Of each member the row of the table, if it is one.
    unreadable : dict of int to str
        Why a member's file cannot be read, by its position.
    read : callable
        Returns the bytes of the members at some positions.
    nbytes : int
        Size of the shard.
    files : sequence of str
        Of a shard of files the name of each member's, quoted.
    image_column : str
        Of a table the column of images.
    """

    scan: TarScan
    rows: np.ndarray | None
    unreadable: Mapping[int, str]
    read: Callable[[np.ndarray], Iterator[bytes]]
    nbytes: int
    files: Sequence[str] = ()
    image_column: str = ""


def index_shard(
    shard: str | Shard,
    shard_number: int,
    *,
    storage_options: Mapping[str, Any] | None = None,
    columns: MemberColumns = NO_MEMBERS,
) -> ShardIndex:
    """Index one shard.

    Parameters
    ----------
    shard : str or Shard
        Path or fsspec URL of a tar or table, or a shard of files.
    shard_number : int
        Its number in the sorted list of inputs; goes into the uids.
    storage_options : mapping, optional
        Passed to fsspec.
    columns : MemberColumns
        Columns to make of members; invalid UTF-8 is replaced, null where absent.

    Raises
    ------
    StorageError
        If the shard cannot be read. What it *holds* never raises.

    Notes
    -----
    Computes at once. Of a local file only the headers are read; a remote one is fetched
    in large blocks, which the decoder finds again.
    Time and memory grow with the members, not with their bytes.
    """
    if isinstance(shard, str):
        shard = Shard(shard)
    with _open(shard, storage_options) as contents:
        members, problems = contents.scan.members, contents.scan.problems
        samples = group_members(members, problems, contents.rows)
        mark_damage(samples, contents.scan.damage, problems)
        index = _columns(samples, shard, shard_number, contents)
        index |= columns.arrays(_texts(contents, samples, columns.extensions))
        _mark_unreadable(index, samples, contents.unreadable)
        nbytes = contents.nbytes
    problems.sort()
    return ShardIndex(pa.table(index, schema=schema.arrow_schema(index, columns.types)), problems, nbytes)


@contextlib.contextmanager
def _open(shard: Shard, storage_options: Mapping[str, Any] | None) -> Iterator[_Contents]:
    """Yield what is in a shard, which stays open meanwhile."""
    if shard.files:
        problems: list[Problem] = []
        found = files_members(shard.url, shard.files, shard.sizes, problems)

        def read(wanted: np.ndarray) -> Iterator[bytes]:
            for i in wanted.tolist():
                url = file_url(shard.url, found.files[i])
                yield b"" if i in found.unreadable else read_bytes(url, storage_options)

        nbytes = int(found.members.size.sum())
        yield _Contents(TarScan(found.members, problems), found.rows, found.unreadable, read, nbytes, found.files)
        return
    try:
        source = open_archive(shard.url, storage_options, gap_bytes=_REMOTE_GAP_BYTES)
    except (DamagedStreamError, InputError) as exc:
        scan = TarScan(Members.none(), [], Damage(0, str(exc), ""))
        yield _Contents(scan, None, {}, lambda _: iter(()), file_size(shard.url, storage_options))
        return
    try:
        yield _archive_contents(source, storage_options)
    finally:
        source.close()


def _archive_contents(source: Source, storage_options: Mapping[str, Any] | None) -> _Contents:
    rows, image_column = None, ""
    if isinstance(source, TableSource):
        scan, rows = source.scan()
        image_column = source.image_column
    else:
        scan = scan_tar(source) if is_local(source.url) else scan_tar(source, window_bytes=_REMOTE_WINDOW_BYTES)
    members = scan.members

    def read(wanted: np.ndarray) -> Iterator[bytes]:
        ranges = list(zip(members.data_offset[wanted].tolist(), members.size[wanted].tolist(), strict=True))
        # Between two texts lies an image: on a local disk one more read costs less than that.
        yield from (source.pread(*r) for r in ranges) if is_local(source.url) else read_ranges(source, ranges)

    is_plain = not isinstance(source, (TableSource, ForwardSource))
    nbytes = source.size if is_plain else file_size(source.url, storage_options)
    return _Contents(scan, rows, {}, read, nbytes, image_column=image_column)


def _mark_unreadable(columns: dict[str, pa.Array], samples: Samples, unreadable: Mapping[int, str]) -> None:
    if not unreadable:
        return
    status, reason = columns[schema.STATUS].to_pylist(), columns[schema.REASON].to_pylist()
    for sample, ext, member in zip(samples.sample.tolist(), samples.ext.tolist(), samples.member.tolist(), strict=True):
        if member in unreadable:
            status[sample] = schema.STATUS_READ_ERROR
            reason[sample] = f"member {_shown(samples.exts[ext])}: {unreadable[member]}"
    columns |= {schema.STATUS: pa.array(status, pa.string()), schema.REASON: pa.array(reason, pa.string())}


def _columns(samples: Samples, shard: Shard, shard_number: int, contents: _Contents) -> dict[str, pa.Array]:
    n, members, files = len(samples.keys), contents.scan.members, contents.files
    image = _images(samples, alike=not contents.image_column)
    if shard.files:
        image = _image_first(samples, image)
    found = image >= 0
    exts = pa.array([*map(_shown, samples.exts), ""], pa.string())
    values = exts.take(samples.ext)
    bounds = np.append(0, np.cumsum(np.bincount(samples.sample, minlength=n)))
    offset, nbytes = np.full(n, -1), np.zeros(n, np.int64)
    offset[found] = members.data_offset[samples.member[image[found]]]
    nbytes[found] = members.size[samples.member[image[found]]]
    ext = np.full(n, len(exts) - 1)
    ext[found] = samples.ext[image[found]]
    status, reason = np.where(found, 0, 1), np.full(n, "", object)
    for i in np.flatnonzero(~found):
        reason[i] = _no_image(values.slice(bounds[i], bounds[i + 1] - bounds[i]), contents.image_column)
    if samples.damaged >= 0:
        status[samples.damaged], reason[samples.damaged] = 2, samples.reason
    statuses = pa.array([schema.STATUS_OK, schema.STATUS_NO_IMAGE, schema.STATUS_TAR_ERROR], pa.string())
    return {
        schema.UID: pa.array(np.arange(n, dtype=np.int64) + schema.make_uid(shard_number, 0)),
        schema.SHARD: pa.repeat(pa.scalar(shard.url, pa.string()), n),
        schema.KEY: _shown_keys(samples.keys),
        schema.EXT: exts.take(ext),
        schema.MEMBERS: pa.ListArray.from_arrays(bounds.astype(np.int32), values),
        schema.FILES: _files(samples, files, bounds) if shard.files else pa.nulls(n, pa.list_(pa.string())),
        schema.SPANS: _file_spans(samples, members, bounds) if shard.files else _spans(samples, members),
        schema.OFFSET: pa.array(offset),
        schema.NBYTES: pa.array(nbytes),
        schema.WIDTH: pa.array(np.zeros(n, np.int32)),
        schema.HEIGHT: pa.array(np.zeros(n, np.int32)),
        schema.STATUS: statuses.take(pa.array(status)),
        schema.REASON: pa.array(reason, pa.string()),
    }


def _images(samples: Samples, *, alike: bool) -> np.ndarray:
    """Return each sample's image among the members of all samples, -1 where there is none.

    Where no member is an image by its extension, with `alike` one is by the end of it: ``seg.png``.
    """
    image = np.full(len(samples.keys), -1)
    exact = np.array([e in IMAGE_EXTENSIONS for e in samples.exts], bool)
    ends_alike = np.array([alike and e.rpartition(".")[2] in IMAGE_EXTENSIONS for e in samples.exts], bool)
    refused = np.array([e in REFUSED_EXTENSIONS for e in samples.exts], bool)
    for wanted in (refused, ends_alike, exact):
        candidates = np.flatnonzero(wanted[samples.ext])[::-1]
        # Of several values for one place NumPy keeps the last: here the first member.
        image[samples.sample[candidates]] = candidates
    return image


def _image_first(samples: Samples, image: np.ndarray) -> np.ndarray:
    """Put each sample's image before its other members, and return where the images are then."""
    later = np.ones(len(samples.member), bool)
    later[image[image >= 0]] = False
    order = np.lexsort((later, samples.sample))
    samples.member, samples.sample, samples.ext = samples.member[order], samples.sample[order], samples.ext[order]
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    return np.where(image >= 0, place[image], -1)


def _files(samples: Samples, files: Sequence[str], bounds: np.ndarray) -> pa.Array:
    names = [files[i] for i in samples.member.tolist()]
    return pa.ListArray.from_arrays(bounds.astype(np.int32), pa.array(names, pa.string()))


def _file_spans(samples: Samples, members: Members, bounds: np.ndarray) -> pa.Array:
    sizes = members.size[samples.member]
    spans = np.stack([np.zeros_like(sizes), sizes], axis=1).ravel()
    return pa.ListArray.from_arrays((2 * bounds).astype(np.int32), pa.array(spans))


def _no_image(exts: pa.Array, image_column: str) -> str:
    if image_column:
        return f"column {printable(image_column)!r} has no bytes in this row; paths are not followed"
    more = len(exts) - _MEMBERS_SHOWN
    names = exts[:_MEMBERS_SHOWN].to_pylist()
    shown = ", ".join(printable(n if len(n) <= _EXT_SHOWN else f"{n[:_EXT_SHOWN]}...") for n in names)
    return f"no image among its members: {shown}{f' and {more} more' if more > 0 else ''}"


def _spans(samples: Samples, members: Members) -> pa.Array:
    """Return the byte spans (start, length, ...) of the samples, neighbours joined."""
    start, stop = members.header_offset[samples.member], members.end[samples.member]
    first = np.flatnonzero((np.diff(samples.sample, prepend=-1) != 0) | (start != np.roll(stop, 1)))
    last = np.append(first, len(start))[1:] - 1
    counts = np.bincount(samples.sample[first], minlength=len(samples.keys))
    spans = np.stack([start[first], stop[last] - start[first]], axis=1).ravel()
    return pa.ListArray.from_arrays(np.append(0, 2 * np.cumsum(counts)).astype(np.int32), pa.array(spans))


def _shown_keys(keys: pa.Array) -> pa.Array:
    try:
        return keys.cast(pa.large_string()).cast(pa.string())
    except pa.ArrowInvalid:
        return pa.array([shown_name(k) for k in keys.to_pylist()], pa.string())


def _shown(text: str) -> str:
    return shown_name(text.encode("utf-8", "surrogateescape"))


def _texts(contents: _Contents, samples: Samples, texts: Sequence[str]) -> dict[str, list[str | None]]:
    """Return of each extension the texts of the samples' members; None where there is none."""
    members, problems = contents.scan.members, contents.scan.problems
    columns: dict[str, list[str | None]] = {ext: [None] * len(samples.keys) for ext in texts}
    column_of = [columns.get(ext, []) for ext in samples.exts]
    wanted = np.flatnonzero(np.array([ext in columns for ext in samples.exts], bool)[samples.ext])
    wanted = wanted[np.argsort(samples.member[wanted])]
    too_long = members.size[samples.member[wanted]] > _MAX_TEXT_BYTES
    for i in samples.member[wanted[too_long]].tolist():
        detail = f"{quoted_name(members.names[i])} has {members.size[i]:,} bytes: no text column is made of it"
        problems.append(Problem(int(members.header_offset[i]), "text too long", detail))
    wanted = wanted[~too_long]
    blobs = contents.read(samples.member[wanted])
    for ext, row, data in zip(samples.ext[wanted].tolist(), samples.sample[wanted].tolist(), blobs, strict=True):
        column_of[ext][row] = data.decode("utf-8", "replace")
    return columns
