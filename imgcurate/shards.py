r"""Shards -> the index of their samples: key, members, byte offsets. No pixel is decoded here.

The rules, after WebDataset's, and what becomes of what they leave open:

- A member's *key* is its path up to the first dot of its base name; the rest is its extension, lower
  case: ``a/b.seg.png`` is the member ``seg.png`` of the sample ``a/b``. Keys are never changed, only
  bytes that are not UTF-8 are shown as ``\xff``, which is reported ("not UTF-8").
- Members of one key are one sample, also where others lie between them ("scattered"). A member whose
  extension the sample has already begins a new sample of the same key ("duplicate key").
- Directories, links, devices, sparse files, names without an extension, hidden files (``.x``, macOS'
  ``._x``) and WebDataset's metadata (``__x__``) belong to no sample. They are reported.
- The image is the first member whose extension is one of :data:`IMAGE_EXTENSIONS`, else the first
  whose extension ends with one (``v2.jpg``), else the first of a format that is known and not
  decoded (``exr``, ``svg`` ...), which is reported as such. A sample without an image has the status ``no_image``.
- Where the archive is damaged, the samples before stay, and one row has the status ``tar_error``: the
  sample whose member was cut, or, where no name can be read, a row with an empty key.

The same holds for the files of a folder (:mod:`imgcurate.folders`) and, but that each row is a sample of its
own, for tables (:mod:`imgcurate.tables`). A sample with a file that cannot be read has the status ``read_error``.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa

from imgcurate import schema
from imgcurate.archives import open_archive
from imgcurate.errors import printable
from imgcurate.folders import files_members, quoted
from imgcurate.storage import Source, file_size, is_local, join_url, read_bytes, read_ranges
from imgcurate.streams import DamagedStreamError, ForwardSource
from imgcurate.tables import TableSource
from imgcurate.tar import Damage, Members, Problem, TarScan, quoted_name, scan_tar, shown_name

__all__ = ["IMAGE_EXTENSIONS", "TAR_ENDINGS", "Shard", "ShardIndex", "index_shard", "split_key"]

IMAGE_EXTENSIONS: Final = frozenset(
    "jpg jpeg jpe jfif mpo png apng webp gif bmp dib tif tiff ppm pgm pbm pnm pam jp2 j2k j2c jpc jpf jpx avif heic "
    "heif hif ico tga qoi pcx sgi".split()
)
TAR_ENDINGS: Final = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
# Images that are not decoded: each gets a reason that names its format.
_REFUSED_EXTENSIONS: Final = frozenset("exr hdr ff svg psd dds jxl jxr icns".split())
_META_NAME: Final = re.compile(rb"__[^/]*__($|/)")
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
    """

    url: str
    files: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()


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


@dataclass(slots=True)
class _Samples:
    """The samples of a shard, in order, and their members, sample by sample.

    Attributes
    ----------
    keys : pa.Array of binary values
        The keys of the samples, as stored.
    exts : list of str
        The distinct extensions, lower case.
    member, sample, ext : ndarray of shape (m,), int64
        Of each member its position in the archive, its sample, and its place in `exts`.
    damaged, reason : int, str
        The sample that is damaged, -1 if none is, and by what.
    """

    keys: pa.Array
    exts: list[str]
    member: np.ndarray
    sample: np.ndarray
    ext: np.ndarray
    damaged: int = -1
    reason: str = ""


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
    """

    scan: TarScan
    rows: np.ndarray | None
    unreadable: Mapping[int, str]
    read: Callable[[np.ndarray], Iterator[bytes]]
    nbytes: int


def split_key(name: str) -> tuple[str, str]:
    """Return (key, extension) of a member's path; the extension is empty where the path has none.

    Examples
    --------
    >>> split_key("train/000.seg.PNG")
    ('train/000', 'seg.png')
    >>> split_key("v1.2/readme")
    ('v1.2/readme', '')
    """
    dot = name.find(".", name.rfind("/") + 1)
    return (name, "") if dot < 0 else (name[:dot], name[dot + 1 :].lower())


def index_shard(
    shard: str | Shard,
    shard_number: int,
    *,
    storage_options: Mapping[str, Any] | None = None,
    texts: Sequence[str] = (),
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
    texts : sequence of str
        Extensions of members to read as string columns; invalid UTF-8 is replaced, null where absent.

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
        samples = _group(members, problems, contents.rows)
        _mark_damage(samples, contents.scan.damage, problems)
        columns = _columns(samples, members, shard, shard_number)
        columns |= _texts(contents, samples, texts)
        _mark_unreadable(columns, samples, contents.unreadable)
        nbytes = contents.nbytes
    names = schema.arrow_schema(columns, dict.fromkeys(texts, pa.string()))
    problems.sort()
    return ShardIndex(pa.table(columns, schema=names), problems, nbytes)


@contextlib.contextmanager
def _open(shard: Shard, storage_options: Mapping[str, Any] | None) -> Iterator[_Contents]:
    """Yield what is in a shard, which stays open meanwhile."""
    if shard.files:
        problems: list[Problem] = []
        members, unreadable = files_members(shard.url, shard.files, shard.sizes, problems)
        names = members.names

        def read(wanted: np.ndarray) -> Iterator[bytes]:
            for i in wanted.tolist():
                url = join_url(shard.url, names[i].decode("utf-8", "surrogateescape"))
                yield b"" if i in unreadable else read_bytes(url, storage_options)

        yield _Contents(TarScan(members, problems), None, unreadable, read, int(members.size.sum()))
        return
    try:
        source = open_archive(shard.url, storage_options, gap_bytes=_REMOTE_GAP_BYTES)
    except DamagedStreamError as exc:
        scan = TarScan(Members.none(), [], Damage(0, str(exc), ""))
        yield _Contents(scan, None, {}, lambda _: iter(()), file_size(shard.url, storage_options))
        return
    try:
        yield _archive_contents(source, storage_options)
    finally:
        source.close()


def _archive_contents(source: Source, storage_options: Mapping[str, Any] | None) -> _Contents:
    rows = None
    if isinstance(source, TableSource):
        scan, rows = source.scan()
    else:
        scan = scan_tar(source) if is_local(source.url) else scan_tar(source, window_bytes=_REMOTE_WINDOW_BYTES)
    members = scan.members

    def read(wanted: np.ndarray) -> Iterator[bytes]:
        ranges = list(zip(members.data_offset[wanted].tolist(), members.size[wanted].tolist(), strict=True))
        # Between two texts lies an image: on a local disk one more read costs less than that.
        yield from (source.pread(*r) for r in ranges) if is_local(source.url) else read_ranges(source, ranges)

    is_plain = not isinstance(source, (TableSource, ForwardSource))
    return _Contents(scan, rows, {}, read, source.size if is_plain else file_size(source.url, storage_options))


def _group(members: Members, problems: list[Problem], rows: np.ndarray | None) -> _Samples:
    kept, key, ext, words = _split(members, problems)
    found = np.flatnonzero(np.bincount(ext, minlength=len(words)))
    lowered = [raw[1:-1].decode("utf-8", "surrogateescape").lower() for raw in words.take(found).to_pylist()]
    exts = {name: i for i, name in enumerate(dict.fromkeys(lowered))}
    place = np.zeros(len(words), np.int64)
    place[found] = [exts[name] for name in lowered]
    ext = place[ext]
    begins = np.diff(key if rows is None else rows[kept], prepend=-1) != 0
    first, sample = np.flatnonzero(begins), np.cumsum(begins) - 1
    pairs = np.sort(key * len(exts) + ext, kind="stable")
    if rows is None and ((np.bincount(key[first]) > 1).any() or (pairs[1:] == pairs[:-1]).any()):
        first, sample = _group_one_by_one(key.tolist(), ext.tolist(), members, kept, problems)
    order = np.argsort(sample, kind="stable")
    return _Samples(words.take(key[first]), list(exts), kept[order], sample[order], ext[order])


def _group_one_by_one(
    keys: Sequence[int], exts: Sequence[int], members: Members, kept: np.ndarray, problems: list[Problem]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the first member of each sample and each member's sample, where keys come back."""
    names = members.names
    latest: dict[int, int] = {}
    taken: set[tuple[int, int]] = set()
    firsts: list[int] = []
    samples: list[int] = []
    for i, (key, ext) in enumerate(zip(keys, exts, strict=True)):
        at = latest.get(key, -1)
        new = at < 0 or (at, ext) in taken
        if at >= 0 and (new or at != len(firsts) - 1):
            name, offset = names[kept[i]], int(members.header_offset[kept[i]])
            kind, what = ("duplicate key", "is there already: a new sample begins") if new else (
                "scattered members", "lies apart from the other members of its sample")  # fmt: skip
            problems.append(Problem(offset, kind, f"{quoted_name(name)} {what}"))
        if new:
            latest[key] = at = len(firsts)
            firsts.append(i)
        taken.add((at, ext))
        samples.append(at)
    return np.array(firsts, np.int64), np.array(samples, np.int64)


def _split(members: Members, problems: list[Problem]) -> tuple[np.ndarray, np.ndarray, np.ndarray, pa.Array]:
    """Return the members that belong to samples, the numbers of their keys and extensions, and all words by number.

    As :func:`split_key`, but for all names at once: they make up one text, in which each is two words,
    its key, and the rest with the dot before and the zero byte behind.
    """
    text = np.frombuffer(members.text + b"\0", np.uint8)
    ends = np.flatnonzero(text[:-1] == 0)
    starts = np.append(0, ends[:-1] + 1)[: len(ends)]
    slashes = np.append(-1, np.flatnonzero(text == ord("/")))
    dots = np.append(np.flatnonzero(text == ord(".")), len(text))
    base = np.maximum(starts, slashes[np.searchsorted(slashes, ends) - 1] + 1)
    dot = np.minimum(dots[np.searchsorted(dots, base)], ends)
    borders = np.append(np.stack([starts, dot], axis=1), len(members.text))
    buffers = [None, pa.py_buffer(borders), pa.py_buffer(members.text)]
    words = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 2 * len(members), buffers).dictionary_encode()
    numbers = words.indices.to_numpy().astype(np.int64)
    underscores = (text[starts] == ord("_")) & (text[starts + 1] == ord("_"))
    belongs = np.ones(len(members), bool)
    for i in np.flatnonzero((dot == base) | (dot + 1 >= ends) | underscores).tolist():
        name = members.text[starts[i] : ends[i]]
        if (kind := _left_out(name)) is not None:
            problems.append(Problem(int(members.header_offset[i]), kind, f"{quoted_name(name)} belongs to no sample"))
            belongs[i] = False
    if not _is_utf8(members.text):
        odd = [(i, name) for i, name in enumerate(members.names) if belongs[i] and not _is_utf8(name)]
        problems += [
            Problem(int(members.header_offset[i]), "not UTF-8", f"the name {quoted_name(name)}") for i, name in odd
        ]
    return np.flatnonzero(belongs), numbers[::2][belongs], numbers[1::2][belongs], words.dictionary


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _left_out(name: bytes) -> str | None:
    key, ext = split_key(name.decode("utf-8", "surrogateescape"))
    if not key or key.endswith("/"):
        return "hidden file"
    if _META_NAME.match(name):
        return "metadata"
    return None if ext else "no extension"


def _mark_damage(samples: _Samples, damage: Damage | None, problems: list[Problem]) -> None:
    if damage is None:
        return
    problems.append(Problem(damage.offset, "damaged", damage.reason))
    samples.reason = damage.reason
    key, ext = split_key(damage.name)
    raw = b"" if _left_out(damage.name.encode("utf-8", "surrogateescape")) else key.encode("utf-8", "surrogateescape")
    same = [i for i, k in enumerate(samples.keys.to_pylist()) if k == raw]
    if same and all(samples.exts[e] != ext for e in samples.ext[samples.sample == same[-1]]):
        samples.damaged = same[-1]
        return
    samples.damaged = len(samples.keys)
    samples.keys = pa.concat_arrays([samples.keys, pa.array([raw], pa.large_binary())])


def _mark_unreadable(columns: dict[str, pa.Array], samples: _Samples, unreadable: Mapping[int, str]) -> None:
    if not unreadable:
        return
    status, reason = columns[schema.STATUS].to_pylist(), columns[schema.REASON].to_pylist()
    for sample, ext, member in zip(samples.sample.tolist(), samples.ext.tolist(), samples.member.tolist(), strict=True):
        if member in unreadable:
            status[sample] = schema.STATUS_READ_ERROR
            reason[sample] = f"member {_shown(samples.exts[ext])}: {unreadable[member]}"
    columns |= {schema.STATUS: pa.array(status, pa.string()), schema.REASON: pa.array(reason, pa.string())}


def _columns(samples: _Samples, members: Members, shard: Shard, shard_number: int) -> dict[str, pa.Array]:
    n = len(samples.keys)
    image = _images(samples)
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
        reason[i] = _no_image(values.slice(bounds[i], bounds[i + 1] - bounds[i]))
    if samples.damaged >= 0:
        status[samples.damaged], reason[samples.damaged] = 2, samples.reason
    statuses = pa.array([schema.STATUS_OK, schema.STATUS_NO_IMAGE, schema.STATUS_TAR_ERROR], pa.string())
    return {
        schema.UID: pa.array(np.arange(n, dtype=np.int64) + schema.make_uid(shard_number, 0)),
        schema.SHARD: pa.repeat(pa.scalar(shard.url, pa.string()), n),
        schema.KEY: _shown_keys(samples.keys),
        schema.EXT: exts.take(ext),
        schema.MEMBERS: pa.ListArray.from_arrays(bounds.astype(np.int32), values),
        schema.FILES: _files(samples, members, bounds) if shard.files else pa.nulls(n, pa.list_(pa.string())),
        schema.SPANS: _file_spans(samples, members, bounds) if shard.files else _spans(samples, members),
        schema.OFFSET: pa.array(offset),
        schema.NBYTES: pa.array(nbytes),
        schema.WIDTH: pa.array(np.zeros(n, np.int32)),
        schema.HEIGHT: pa.array(np.zeros(n, np.int32)),
        schema.STATUS: statuses.take(pa.array(status)),
        schema.REASON: pa.array(reason, pa.string()),
    }


def _images(samples: _Samples) -> np.ndarray:
    """Return each sample's image among the members of all samples, -1 where there is none."""
    image = np.full(len(samples.keys), -1)
    exact = np.array([e in IMAGE_EXTENSIONS for e in samples.exts], bool)
    alike = np.array([e.rpartition(".")[2] in IMAGE_EXTENSIONS for e in samples.exts], bool)
    refused = np.array([e in _REFUSED_EXTENSIONS for e in samples.exts], bool)
    for wanted in (refused, alike, exact):
        candidates = np.flatnonzero(wanted[samples.ext])[::-1]
        # Of several values for one place NumPy keeps the last: here the first member.
        image[samples.sample[candidates]] = candidates
    return image


def _image_first(samples: _Samples, image: np.ndarray) -> np.ndarray:
    """Put each sample's image before its other members, and return where the images are then."""
    later = np.ones(len(samples.member), bool)
    later[image[image >= 0]] = False
    order = np.lexsort((later, samples.sample))
    samples.member, samples.sample, samples.ext = samples.member[order], samples.sample[order], samples.ext[order]
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    return np.where(image >= 0, place[image], -1)


def _files(samples: _Samples, members: Members, bounds: np.ndarray) -> pa.Array:
    names = members.names
    files = [quoted(names[i].decode("utf-8", "surrogateescape")) for i in samples.member.tolist()]
    return pa.ListArray.from_arrays(bounds.astype(np.int32), pa.array(files, pa.string()))


def _file_spans(samples: _Samples, members: Members, bounds: np.ndarray) -> pa.Array:
    sizes = members.size[samples.member]
    spans = np.stack([np.zeros_like(sizes), sizes], axis=1).ravel()
    return pa.ListArray.from_arrays((2 * bounds).astype(np.int32), pa.array(spans))


def _no_image(exts: pa.Array) -> str:
    more = len(exts) - _MEMBERS_SHOWN
    names = exts[:_MEMBERS_SHOWN].to_pylist()
    shown = ", ".join(printable(n if len(n) <= _EXT_SHOWN else f"{n[:_EXT_SHOWN]}...") for n in names)
    return f"no image among its members: {shown}{f' and {more} more' if more > 0 else ''}"


def _spans(samples: _Samples, members: Members) -> pa.Array:
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


def _texts(contents: _Contents, samples: _Samples, texts: Sequence[str]) -> dict[str, pa.Array]:
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
    return {ext: pa.array(column, pa.string()) for ext, column in columns.items()}
