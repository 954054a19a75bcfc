"""Tar archives: header blocks -> members with their byte offsets. Reads headers, not data.

Understood are ustar with its name prefix, GNU long names and base-256 numbers, PAX records that
override path and size, archives without an end mark and archives put one after another. Links,
directories, devices and sparse files hold no bytes that could be copied as a file: they are reported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple, NoReturn

import numpy as np

from imgcurate.errors import TarError
from imgcurate.storage import Source
from imgcurate.streams import ForwardSource
from imgcurate.tar_blocks import (
    BLOCK,
    checksum_is_right,
    end_of_archive,
    header_name,
    header_size,
    padding,
    pax_records,
    plain_names,
    quoted_name,
    shown_name,
    tar_header,
)

__all__ = [
    "BLOCK",
    "Damage",
    "Member",
    "Members",
    "Problem",
    "TarScan",
    "end_of_archive",
    "padding",
    "quoted_name",
    "scan_tar",
    "shown_name",
    "tar_header",
]

_MAX_EXTENSION_BYTES: Final = 1024 * 1024
_ZERO_SCAN_BYTES: Final = 1024 * 1024
_FILE_TYPES: Final = frozenset(b"\x000\x007")
_LINK_TYPES: Final = {ord("1"): "hard link", ord("2"): "symbolic link"}
_OTHER_TYPES: Final = {
    ord("3"): "character device", ord("4"): "block device", ord("5"): "directory", ord("6"): "fifo",
}  # fmt: skip
_SPARSE: Final = ord("S")
_SPARSE_RECORDS: Final = frozenset({b"GNU.sparse.major", b"GNU.sparse.map", b"GNU.sparse.size"})
_MEMBER_RECORDS: Final = _SPARSE_RECORDS | {b"path", b"size", b"GNU.sparse.name"}
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL, _PAX_SOLARIS = (ord(c) for c in "LKxgX")
_EXTENSIONS: Final = frozenset({_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL, _PAX_SOLARIS})
_ZIP: Final = b"PK\x03\x04"


class Member(NamedTuple):
    """A regular file in an archive.

    Attributes
    ----------
    name : str
        Its path, as stored; bytes that are not UTF-8 are surrogates (PEP 383).
    header_offset : int
        Where its first header starts; extension headers belong to the member.
    data_offset : int
        Where its bytes start.
    size : int
        Their number.
    end : int
        Where the next header starts; in a file that lacks the last padding, its end.
    """

    name: str
    header_offset: int
    data_offset: int
    size: int
    end: int


@dataclass(frozen=True, slots=True)
class Members:
    """The regular files of an archive in order, column by column: see :class:`Member`.

    Attributes
    ----------
    text : bytes
        Their names, as stored, each with a zero byte after it.
    header_offset, data_offset, size, end : ndarray of shape (n,), int64
        Bytes.
    """

    text: bytes
    header_offset: np.ndarray
    data_offset: np.ndarray
    size: np.ndarray
    end: np.ndarray

    @staticmethod
    def none() -> Members:
        """Return no members."""
        zeros = np.zeros(0, np.int64)
        return Members(b"", zeros, zeros, zeros, zeros)

    @property
    def names(self) -> list[bytes]:
        """Their names, as stored; made anew at each call."""
        return self.text.split(b"\0")[:-1]

    def __len__(self) -> int:
        return len(self.size)

    def __iter__(self) -> Iterator[Member]:
        columns = (self.header_offset, self.data_offset, self.size, self.end)
        names = (name.decode("utf-8", "surrogateescape") for name in self.names)
        return map(Member, names, *(c.tolist() for c in columns))


class Problem(NamedTuple):
    """Something in an archive that is not as it should be.

    Attributes
    ----------
    offset : int
        Byte offset in the archive.
    kind : str
        A word or two, to count by.
    detail : str
        What it is.
    """

    offset: int
    kind: str
    detail: str


class Damage(NamedTuple):
    """Where an archive stops being readable.

    Attributes
    ----------
    offset : int
        Byte offset of the damage.
    reason : str
        What is wrong, in words.
    name : str
        The member that is damaged, as far as its header is there; else empty.
    """

    offset: int
    reason: str
    name: str


@dataclass(slots=True)
class TarScan:
    """What is in an archive.

    Attributes
    ----------
    members : Members
        The regular files, in order.
    problems : list of Problem
        What was left out, and oddities.
    damage : Damage or None
        Where reading had to stop before the end of the file.
    """

    members: Members
    problems: list[Problem] = field(default_factory=list)
    damage: Damage | None = None


def scan_tar(source: Source, *, window_bytes: int = 6 * BLOCK) -> TarScan:
    """List the members of an archive by reading its headers.

    Parameters
    ----------
    source : Source
        The archive.
    window_bytes : int
        Bytes to read at once: where a read costs little (a local file), just so many that the header of
        an image comes with the short files before it; megabytes where a read costs a round trip.

    Returns
    -------
    TarScan
        The members before the first damage, if there is one. Never raises for what the archive holds.

    References
    ----------
    POSIX.1-2017, ``pax`` interchange format; GNU tar manual, "Basic Tar Format".
    """
    return _Scanner(source, max(window_bytes, BLOCK)).scan()


class _Scanner:
    """One pass over the headers of an archive.

    Runs of plain headers, `least` to `most` at once, are taken in by :meth:`_plain_run`, other headers
    and those beside them by :meth:`_step`, one by one. Both give the same result.
    """

    def __init__(self, source: Source, window_bytes: int, *, least: int = 16, most: int = 1024) -> None:
        self._source, self._window = source, window_bytes
        self._at_random = not isinstance(source, ForwardSource)
        self._least, self._most = least, most
        self._buffer, self._base = b"", 0
        self._problems: list[Problem] = []
        self._damage: Damage | None = None
        self._names: list[bytes] = []
        self._offsets: list[np.ndarray] = [np.empty((4, 0), np.int64)]
        self._single: list[tuple[int, int, int, int]] = []
        self._header_offset, self._ended = -1, False
        self._pax: dict[bytes, bytes] = {}
        self._long_name: bytes | None = None

    def scan(self) -> TarScan:
        try:
            self._read_members()
        except TarError as exc:
            self._damage = Damage(exc.offset, str(exc), "")
        self._take_stream_damage()
        self._join()
        members = Members(b"".join(self._names), *np.concatenate(self._offsets, axis=1))
        return TarScan(members, self._problems, self._damage)

    def _take_stream_damage(self) -> None:
        """Say what became of a compressed archive that could not be read to its end."""
        if not isinstance(self._source, ForwardSource) or not (damage := self._source.damage):
            return
        if self._damage is not None:
            self._damage = self._damage._replace(reason=f"{self._damage.reason} ({damage})")
        elif self._ended and self._source.is_whole:
            self._problem(self._source.size, "damaged after the end mark", damage)
        elif self._ended:
            self._damage = Damage(self._source.size, f"{damage}: any sample before may not be as it was", "")
        else:
            self._damage = Damage(self._source.size, damage, "")

    def _read_members(self) -> None:
        if not self._reaches(1):
            self._damage = Damage(0, "empty file (0 bytes)", "")
        position, odd_until = 0, 0
        while self._reaches(position + 1):
            if self._at_random and position >= odd_until and self._header_offset < 0 and not self._ended:
                position, odd_until = self._plain_run(position)
            if self._reaches(position + 1):
                position = self._step(position)
        if self._damage is None and self._header_offset >= 0:
            self._no_member()
        if self._damage is None and not self._ended:
            self._problem(self._source.size, "no end mark", "the archive ends without two blocks of zeros")

    def _reaches(self, end: int) -> bool:
        if isinstance(self._source, ForwardSource):
            return self._source.reaches(end)
        return end <= self._source.size

    def _read(self, position: int, length: int) -> bytes:
        start = position - self._base
        if start < 0 or start + length > len(self._buffer):
            self._buffer = self._source.pread(position, max(length, self._window))
            self._base, start = position, 0
        return self._buffer[start : start + length]

    def _plain_run(self, position: int) -> tuple[int, int]:
        """Take in plain members at once; return where to go on, and up to where one by one."""
        if self._read(position, BLOCK)[156:157] != b"0":
            return position, position
        buffer, base, start = self._buffer, self._base, position - self._base
        last_start = len(buffer) - BLOCK
        blocks: list[bytes] = []
        sizes: list[int] = []
        # Local names: nearly all of the time of an index goes by in this loop.
        pread, window, regular = self._source.pread, self._window, ord("0")
        header, round_up, whole_blocks = BLOCK, 2 * BLOCK - 1, -BLOCK
        with contextlib.suppress(ValueError):
            for _ in range(self._most):
                if start > last_start:
                    base, start = base + start, 0
                    buffer = pread(base, window)
                    last_start = len(buffer) - header
                    if last_start < 0:
                        break
                block = buffer[start : start + header]
                size = int(block[124:135], 8)
                if block[156] != regular or size < 0:
                    break
                blocks.append(block)
                sizes.append(size)
                start += size + round_up & whole_blocks
        stop = base + start
        while stop > self._source.size:
            blocks.pop()
            stop -= sizes.pop() + round_up & whole_blocks
        names = plain_names(blocks) if len(blocks) >= self._least else None
        if names is None:
            return position, stop
        self._buffer, self._base = buffer, base
        self._join()
        self._names.append(names)
        size_of = np.array(sizes)
        end_of = position + np.cumsum(size_of + round_up & whole_blocks)
        start_of = np.append(position, end_of[:-1])
        self._offsets.append(np.stack([start_of, start_of + BLOCK, size_of, end_of]))
        return stop, stop

    def _join(self) -> None:
        """Add what was taken in one by one to the offsets."""
        if self._single:
            self._offsets.append(np.array(self._single, np.int64).T)
            self._single = []

    def _step(self, position: int) -> int:
        """Take in one header, and return where the next one starts."""
        block = self._read(position, BLOCK)
        if block and not block[0] and not any(block):
            if self._header_offset >= 0:
                self._no_member()
            self._ended = True
            return self._skip_zeros(position)
        name, size, kind = self._parse(block, position)
        if self._header_offset < 0:
            self._header_offset = position
            if self._ended:
                self._problem(position, "concatenated", "another archive begins after the end mark")
                self._ended = False
        alone = self._header_offset == position
        position += BLOCK
        if kind in _EXTENSIONS:
            if kind == _PAX_GLOBAL and alone:
                self._header_offset = -1
            return self._extension(kind, size, position)
        if self._pax or self._long_name is not None:
            name, size = self._overridden(name, size, position)
        if kind in _FILE_TYPES and not name.endswith(b"/") and self._pax.keys().isdisjoint(_SPARSE_RECORDS):
            if not self._reaches(position + size):
                return self._truncated(name, size, position)
            end = position + size + -size % BLOCK
            self._names.append(name + b"\0")
            there = end if self._reaches(end) else self._source.size
            self._single.append((self._header_offset, position, size, there))
        else:
            end = self._skip(kind, name, size, block, position)
        self._pax, self._long_name, self._header_offset = {}, None, -1
        return end

    def _problem(self, offset: int, kind: str, detail: str) -> None:
        self._problems.append(Problem(offset, kind, detail))

    def _no_member(self) -> NoReturn:
        raise TarError("truncated tar: an extension header without its member", self._header_offset)

    def _truncated(self, name: bytes, size: int, position: int) -> int:
        reason = f"truncated tar: member {quoted_name(name)} needs {size:,} bytes"
        reason += f", {max(0, self._source.size - position):,} are there at byte {self._header_offset}"
        self._damage = Damage(self._header_offset, reason, name.decode("utf-8", "surrogateescape"))
        return self._source.size

    def _parse(self, block: bytes, position: int) -> tuple[bytes, int, int]:
        if len(block) < BLOCK:
            what = f"truncated tar: {len(block)} of 512 header bytes"
            raise TarError(self._no_header(block, position, what), position)
        if not checksum_is_right(block):
            what = "data after the end mark that is no tar header" if self._ended else "no valid tar header"
            raise TarError(self._no_header(block, position, what), position)
        size = header_size(block)
        if size < 0:
            raise TarError("a tar header with an impossible size", position)
        return header_name(block), size, block[156]

    def _no_header(self, block: bytes, position: int, what: str) -> str:
        if position:
            return what
        return "a zip archive, not a tar" if block.startswith(_ZIP) else f"not a tar file: {what}"

    def _skip_zeros(self, position: int) -> int:
        """Return where the zeros that begin with a block of them end, rounded down to a block."""
        position += BLOCK
        while self._reaches(position + 1):
            data = self._source.pread(position, _ZERO_SCAN_BYTES)
            rest = data.lstrip(b"\0")
            if rest:
                return (position + len(data) - len(rest)) // BLOCK * BLOCK
            if not data:
                break
            position += len(data)
        return self._source.size

    def _extension(self, kind: int, size: int, position: int) -> int:
        """Take in a long name or PAX records, and return where the next header starts."""
        inside = kind == _PAX_GLOBAL and self._header_offset >= 0
        if kind == _LONG_LINK or (kind == _PAX_GLOBAL and not inside and size <= _MAX_EXTENSION_BYTES):
            # A link is left out anyway; global records name neither a path nor a size of one member.
            return position + size + -size % BLOCK
        if size > _MAX_EXTENSION_BYTES:
            raise TarError(
                f"an extension header of {size:,} bytes, over the limit of {_MAX_EXTENSION_BYTES:,}", position
            )
        data = self._read(position, size)
        if len(data) < size:
            raise TarError(
                f"truncated tar: an extension header needs {size:,} bytes, {len(data):,} are there", position
            )
        # Of several headers of one member the first one holds, as for tarfile.
        if kind == _LONG_NAME:
            if self._long_name is None and b"path" not in self._pax:
                self._long_name = data.split(b"\0", 1)[0]
            return position + size + -size % BLOCK
        records = pax_records(data, position)
        if inside:
            # It is copied with its member, and would rename others wherever it comes to.
            if not records.keys().isdisjoint(_MEMBER_RECORDS):
                raise TarError("a global header that names the path or size of a member", position)
        else:
            if self._long_name is not None:
                records.pop(b"path", None)
            self._pax = records | self._pax
        return position + size + -size % BLOCK

    def _overridden(self, name: bytes, size: int, position: int) -> tuple[bytes, int]:
        raw = self._pax.get(b"GNU.sparse.name", self._pax.get(b"path", self._long_name))
        if raw is not None:
            name = raw.split(b"\0", 1)[0]
        if b"size" in self._pax:
            try:
                size = int(self._pax[b"size"])
            except ValueError:
                size = -1
            if size < 0:
                raise TarError("a PAX record with an impossible size", position)
        return name, size

    def _skip(self, kind: int, name: bytes, size: int, block: bytes, position: int) -> int:
        """Report a member that is no regular file, and return where the next header starts."""
        shown, at = quoted_name(name), self._header_offset
        if kind in _LINK_TYPES:
            target = quoted_name(block[157:257].split(b"\0", 1)[0])
            self._problem(at, "link", f"{_LINK_TYPES[kind]} {shown} to {target}")
            return position
        if kind in _OTHER_TYPES:
            label = _OTHER_TYPES[kind]
            self._problem(at, label if label == "directory" else "special file", f"{label} {shown}")
            return position
        if kind == _SPARSE:
            position = self._skip_sparse_map(block, position)
        if kind in _FILE_TYPES and name.endswith(b"/"):
            # So did tars write directories before they had a type of their own, and without data.
            self._problem(at, "directory", shown)
            size = size if kind else 0
        else:
            label = "sparse file" if kind == _SPARSE or kind in _FILE_TYPES else "unknown type"
            self._problem(at, label, f"{shown} (type {chr(kind)!r}) is left out")
        end = position + size
        if not self._reaches(end):
            raise TarError(f"truncated tar: member {shown} needs {size:,} bytes", at)
        return end + -size % BLOCK

    def _skip_sparse_map(self, block: bytes, position: int) -> int:
        extended = block[482] != 0
        while extended:
            more = self._read(position, BLOCK)
            if len(more) < BLOCK:
                raise TarError("truncated tar: the map of a sparse file is cut", position)
            extended, position = more[504] != 0, position + BLOCK
        return position
