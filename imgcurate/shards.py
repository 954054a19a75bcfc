r"""Tar shards -> the index of their samples: key, members, byte offsets. No pixel is decoded here.

The rules, after WebDataset's, and what becomes of what they leave open:

- A member's *key* is its path up to the first dot of its base name; the rest is its extension, lower
  case: ``a/b.seg.png`` is the member ``seg.png`` of the sample ``a/b``. Keys are never changed, only
  bytes that are not UTF-8 are shown as ``\xff``.
- Members of one key are one sample, also where others lie between them ("scattered"). A member whose
  extension the sample has already begins a new sample of the same key ("duplicate key").
- Directories, links, devices, sparse files, names without an extension, hidden files (``.x``, macOS'
  ``._x``) and WebDataset's metadata (``__x__``) belong to no sample. They are reported.
- The image is the first member whose extension is one of :data:`IMAGE_EXTENSIONS`, else the first
  whose extension ends with one (``v2.jpg``). A sample without an image has the status ``no_image``.
- Where the archive is damaged, the samples before stay, and one row has the status ``tar_error``: the
  sample whose member was cut, or, where no name can be read, a row with an empty key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa

from imgcurate import schema
from imgcurate.storage import Source, is_local, open_source, read_ranges
from imgcurate.tar import Damage, Member, Problem, TarScan, scan_tar, shown_name

__all__ = ["IMAGE_EXTENSIONS", "ShardIndex", "index_shard", "split_key"]

IMAGE_EXTENSIONS: Final = frozenset(
    "jpg jpeg jpe jfif png webp gif bmp tif tiff ppm pgm pbm pnm jp2 j2k avif heic heif".split()
)
_META_NAME: Final = re.compile(r"__[^/]*__($|/)")
_REMOTE_WINDOW_BYTES: Final = 4 * 1024 * 1024
_LOCAL_WINDOW_BYTES: Final = 2048
_MAX_TEXT_BYTES: Final = 16 * 1024 * 1024
_MEMBERS_SHOWN: Final = 8


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
class _Sample:
    key: str
    members: list[tuple[str, Member]] = field(default_factory=list)
    error: str = ""


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
    url: str,
    shard_number: int,
    *,
    storage_options: Mapping[str, Any] | None = None,
    texts: Sequence[str] = (),
) -> ShardIndex:
    """Index one shard.

    Parameters
    ----------
    url : str
        Path or fsspec URL of a tar.
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
    Of a local file only the headers are read; a remote one is read in large blocks.
    """
    source = open_source(url, storage_options)
    try:
        scan = scan_tar(source, window_bytes=_LOCAL_WINDOW_BYTES if is_local(url) else _REMOTE_WINDOW_BYTES)
        problems = scan.problems
        samples = _group(scan, problems)
        _mark_damage(samples, scan.damage, problems)
        columns = _columns(samples, url, shard_number)
        columns |= {ext: _texts(source, samples, ext, problems) for ext in texts}
    finally:
        source.close()
    names = schema.arrow_schema(columns, dict.fromkeys(texts, pa.string()))
    problems.sort()
    return ShardIndex(pa.table(columns, schema=names), problems, source.size)


def _group(scan: TarScan, problems: list[Problem]) -> list[_Sample]:
    samples: list[_Sample] = []
    latest: dict[str, int] = {}
    for member in scan.members:
        name = member.name
        key, ext = split_key(name)
        at = latest.get(key, -1) if ext else -1
        if at >= 0:
            sample = samples[at]
            if all(ext != e for e, _ in sample.members):
                if at != len(samples) - 1:
                    detail = f"{shown_name(name)!r} lies apart from the other members of its sample"
                    problems.append(Problem(member.header_offset, "scattered members", detail))
                sample.members.append((ext, member))
                continue
            detail = f"{shown_name(name)!r} is there already: a new sample begins"
            problems.append(Problem(member.header_offset, "duplicate key", detail))
        elif (problem := _left_out(name, key, ext)) is not None:
            problems.append(Problem(member.header_offset, problem, f"{shown_name(name)!r} belongs to no sample"))
            continue
        latest[key] = len(samples)
        samples.append(_Sample(key, [(ext, member)]))
    return samples


def _left_out(name: str, key: str, ext: str) -> str | None:
    if not key or key.endswith("/"):
        return "hidden file"
    if name.startswith("__") and _META_NAME.match(name):
        return "metadata"
    return None if ext else "no extension"


def _mark_damage(samples: list[_Sample], damage: Damage | None, problems: list[Problem]) -> None:
    if damage is None:
        return
    problems.append(Problem(damage.offset, "damaged", damage.reason))
    key, ext = split_key(damage.name)
    known = bool(ext) and _left_out(damage.name, key, ext) is None
    latest = next((s for s in reversed(samples if known else []) if s.key == key), None)
    if latest is not None and all(ext != e for e, _ in latest.members):
        latest.error = damage.reason
        return
    samples.append(_Sample(key if known else "", error=damage.reason))


def _columns(samples: Sequence[_Sample], url: str, shard_number: int) -> dict[str, pa.Array]:
    n = len(samples)
    images = [_image(s) for s in samples]
    status = [schema.STATUS_OK if image else schema.STATUS_NO_IMAGE for image in images]
    reason = ["" if image else _no_image(s) for image, s in zip(images, samples, strict=True)]
    for i, sample in enumerate(samples):
        if sample.error:
            status[i], reason[i] = schema.STATUS_TAR_ERROR, sample.error
    return {
        schema.UID: pa.array(np.arange(n, dtype=np.int64) + schema.make_uid(shard_number, 0)),
        schema.SHARD: pa.array([url] * n, pa.string()),
        schema.KEY: pa.array([shown_name(s.key) for s in samples], pa.string()),
        schema.EXT: pa.array([i[0] if i else "" for i in images], pa.string()),
        schema.MEMBERS: pa.array([[shown_name(e) for e, _ in s.members] for s in samples], pa.list_(pa.string())),
        schema.SPANS: pa.array([_spans(s.members) for s in samples], pa.list_(pa.int64())),
        schema.OFFSET: pa.array([i[1].data_offset if i else -1 for i in images], pa.int64()),
        schema.NBYTES: pa.array([i[1].size if i else 0 for i in images], pa.int64()),
        schema.WIDTH: pa.array(np.zeros(n, np.int32)),
        schema.HEIGHT: pa.array(np.zeros(n, np.int32)),
        schema.STATUS: pa.array(status, pa.string()),
        schema.REASON: pa.array(reason, pa.string()),
    }


def _image(sample: _Sample) -> tuple[str, Member] | None:
    for entry in sample.members:
        if entry[0] in IMAGE_EXTENSIONS:
            return entry
    for entry in sample.members:
        if entry[0].rpartition(".")[2] in IMAGE_EXTENSIONS:
            return entry
    return None


def _no_image(sample: _Sample) -> str:
    shown = [shown_name(e) for e, _ in sample.members[:_MEMBERS_SHOWN]]
    more = len(sample.members) - len(shown)
    return f"no image among its members: {', '.join(shown)}{f' and {more} more' if more else ''}"


def _spans(members: Sequence[tuple[str, Member]]) -> list[int]:
    """Return the byte spans (start, length, ...) of the members, neighbours joined."""
    spans: list[int] = []
    stop = -1
    for _, member in members:
        if member.header_offset == stop:
            spans[-1] += member.end - stop
        else:
            spans += (member.header_offset, member.end - member.header_offset)
        stop = member.end
    return spans


def _texts(source: Source, samples: Sequence[_Sample], ext: str, problems: list[Problem]) -> pa.Array:
    values: list[str | None] = [None] * len(samples)
    rows, ranges = [], []
    for i, sample in enumerate(samples):
        for e, member in sample.members:
            if e != ext:
                continue
            if member.size > _MAX_TEXT_BYTES:
                detail = f"{shown_name(member.name)!r} has {member.size:,} bytes: no text column is made of it"
                problems.append(Problem(member.header_offset, "text too long", detail))
                continue
            rows.append(i)
            ranges.append((member.data_offset, member.size))
    for i, data in zip(rows, read_ranges(source, ranges), strict=True):
        values[i] = data.decode("utf-8", "replace")
    return pa.array(values, pa.string())
