r"""Members of an archive -> samples, by WebDataset's rules and some more.

These settle what WebDataset leaves open:

- A member's *key* is its path up to the first dot of its base name; the rest is its extension, lower
  case: ``a/b.seg.png`` is the member ``seg.png`` of the sample ``a/b``. Keys are never changed, only
  bytes that are not UTF-8 are shown as ``\xff``, which is reported ("not UTF-8").
- Members of one key are one sample, also where others lie between them ("scattered"). A member whose
  extension the sample has already begins a new sample of the same key ("duplicate key").
- Directories, links, devices, sparse files, names without an extension, hidden files (``.x``, macOS'
  ``._x``) and WebDataset's metadata (``__x__``) belong to no sample. They are reported.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa

from imgcurate.tar import Damage, Members, Problem, quoted_name

__all__ = ["Samples", "group_members", "mark_damage", "split_key"]

_META_NAME: Final = re.compile(rb"__[^/]*__($|/)")


@dataclass(slots=True)
class Samples:
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


def group_members(members: Members, problems: list[Problem], rows: np.ndarray | None) -> Samples:
    """Group the members of an archive into samples.

    Parameters
    ----------
    members : Members
        In the order of the archive.
    problems : list of Problem
        Gets what belongs to no sample, and oddities.
    rows : ndarray of shape (n,), int64, optional
        Of each member the number of its sample, ascending, where keys do not say it.
    """
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
    return Samples(words.take(key[first]), list(exts), kept[order], sample[order], ext[order])


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


def mark_damage(samples: Samples, damage: Damage | None, problems: list[Problem]) -> None:
    """Mark the sample that the damage of an archive cut, or add one for it; does nothing without damage."""
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
