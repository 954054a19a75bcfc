"""The tar format itself: header blocks -> members with their byte offsets. Reads headers, not data.

Understood are ustar with its name prefix, GNU long names and base-256 numbers, PAX records that
override path and size, archives without an end mark and archives put one after another. Links,
directories, devices and sparse files hold no bytes that could be copied as a file: they are reported.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, NamedTuple
from zlib import adler32

from imgcurate.errors import TarError
from imgcurate.storage import Source

__all__ = ["BLOCK", "Damage", "Member", "Problem", "TarScan", "end_of_archive", "padding", "scan_tar", "tar_header"]

BLOCK: Final = 512
_RECORD: Final = 20 * BLOCK
_ADLER_MODULUS: Final = 65521
_CHECKSUM: Final = slice(148, 156)
_MAX_EXTENSION_BYTES: Final = 1024 * 1024
_ZERO_SCAN_BYTES: Final = 1024 * 1024
_FILE_TYPES: Final = frozenset(b"\x000\x007")
_LINK_TYPES: Final = {ord("1"): "hard link", ord("2"): "symbolic link"}
_OTHER_TYPES: Final = {
    ord("3"): "character device", ord("4"): "block device", ord("5"): "directory", ord("6"): "fifo",
}  # fmt: skip
_SPARSE: Final = ord("S")
_SPARSE_RECORDS: Final = frozenset({b"GNU.sparse.major", b"GNU.sparse.map", b"GNU.sparse.size"})
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL, _PAX_SOLARIS = (ord(c) for c in "LKxgX")
_EXTENSIONS: Final = frozenset({_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL, _PAX_SOLARIS})
_MAGICS: Final = {
    b"\x1f\x8b": "gzip-compressed tar: decompress it first",
    b"\x28\xb5\x2f\xfd": "zstd-compressed tar: decompress it first",
    b"BZh": "bzip2-compressed tar: decompress it first",
    b"\xfd7zXZ\x00": "xz-compressed tar: decompress it first",
    b"PK\x03\x04": "a zip archive, not a tar",
}


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
    members : list of Member
        The regular files, in order.
    problems : list of Problem
        What was left out, and oddities.
    damage : Damage or None
        Where reading had to stop before the end of the file.
    """

    members: list[Member] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    damage: Damage | None = None


def scan_tar(source: Source, *, window_bytes: int = 4 * BLOCK) -> TarScan:
    """List the members of an archive by reading its headers.

    Parameters
    ----------
    source : Source
        The archive.
    window_bytes : int
        Bytes to read at once: little more than a header where a read costs little (a local file),
        megabytes where it costs a round trip.

    Returns
    -------
    TarScan
        The members before the first damage, if there is one. Never raises for what the archive holds.

    References
    ----------
    POSIX.1-2017, ``pax`` interchange format; GNU tar manual, "Basic Tar Format".
    """
    return _Scanner(source, max(window_bytes, BLOCK)).scan()


def tar_header(name: str, size: int, template: bytes) -> bytes:
    """Return the header blocks of a member under another name.

    Parameters
    ----------
    name : str
        The new path, of any length.
    size : int
        Bytes of the member.
    template : bytes
        The 512 bytes of a header whose owner, mode and time are taken over.

    Returns
    -------
    bytes
        A ustar header, with a PAX header before it where the name or the size needs one.
    """
    raw = name.encode("utf-8", "surrogateescape")
    size_field = b"%011o\0" % size if size < 8**11 else b"0" * 11 + b"\0"
    records = b""
    if len(raw) > 100:
        records += _pax_record(b"path", raw)
    if size >= 8**11:
        records += _pax_record(b"size", b"%d" % size)
    fields = template[100:124] + size_field + template[136:148]
    header = _sealed(raw[:100].ljust(100, b"\0") + fields, b"0", template[265:345])
    if not records:
        return header
    extension = _sealed(b"././@PaxHeader".ljust(100, b"\0") + template[100:124]
                        + b"%011o\0" % len(records) + template[136:148], b"x", template[265:345])  # fmt: skip
    return extension + records + padding(len(records)) + header


def end_of_archive(position: int) -> bytes:
    """Return the end mark for an archive of `position` bytes: zeros up to a record of 10,240 bytes."""
    total = -(-(position + 2 * BLOCK) // _RECORD) * _RECORD
    return b"\0" * (total - position)


def padding(size: int) -> bytes:
    """Return the zeros that fill `size` bytes up to whole blocks."""
    return b"\0" * (-size % BLOCK)


def _pax_record(key: bytes, value: bytes) -> bytes:
    body = b" " + key + b"=" + value + b"\n"
    length = len(body) + 1
    while length != len(b"%d" % length) + len(body):
        length = len(b"%d" % length) + len(body)
    return b"%d" % length + body


def _sealed(first_148: bytes, type_: bytes, owner_names: bytes) -> bytes:
    tail = b"\0" * 100 + b"ustar\x0000" + owner_names
    block = (first_148 + b" " * 8 + type_ + tail).ljust(BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


class _Scanner:
    """One pass over the headers of an archive."""

    def __init__(self, source: Source, window_bytes: int) -> None:
        self._source, self._size, self._window = source, source.size, window_bytes
        self._result = TarScan()
        self._pax: dict[bytes, bytes] = {}
        self._long_name: bytes | None = None

    def scan(self) -> TarScan:
        result = self._result
        if self._size == 0:
            result.damage = Damage(0, "empty file (0 bytes)", "")
            return result
        try:
            self._read_members()
        except TarError as exc:
            result.damage = Damage(exc.offset, str(exc), "")
        return result

    def _read_members(self) -> None:
        size_of_file, window, pread = self._size, self._window, self._source.pread
        members = self._result.members
        position, header_offset = 0, -1
        buffer, base = b"", 0
        ended = False
        while position < size_of_file:
            start = position - base
            if start + BLOCK > len(buffer):
                buffer, base, start = pread(position, window), position, 0
            block = buffer[start : start + BLOCK]
            if block and not block[0] and not any(block):
                if header_offset >= 0:
                    break
                position, ended = self._skip_zeros(position), True
                continue
            name, size, kind = self._parse(block, position, after_end=ended)
            if header_offset < 0:
                header_offset = position
                if ended:
                    self._problem(position, "concatenated", "another archive begins after the end mark")
                    ended = False
            alone = header_offset == position
            position += BLOCK
            if kind in _EXTENSIONS:
                position = self._extension(kind, size, position)
                if kind == _PAX_GLOBAL and alone:
                    header_offset = -1
                continue
            if self._pax or self._long_name is not None:
                name, size = self._overridden(name, size, position)
            if kind in _FILE_TYPES and not name.endswith("/") and self._pax.keys().isdisjoint(_SPARSE_RECORDS):
                end = position + size
                if end > size_of_file:
                    self._truncated(header_offset, name, size, position)
                    return
                end += -size % BLOCK
                members.append(Member(name, header_offset, position, size, min(size_of_file, end)))
                position = end
            else:
                position = self._skip(kind, name, size, header_offset, block, position)
            self._pax = {}
            self._long_name = None
            header_offset = -1
        if header_offset >= 0:
            raise TarError("truncated tar: an extension header without its member", header_offset)
        if not ended:
            self._problem(self._size, "no end mark", "the archive ends without two blocks of zeros")

    def _problem(self, offset: int, kind: str, detail: str) -> None:
        self._result.problems.append(Problem(offset, kind, detail))

    def _truncated(self, header_offset: int, name: str, size: int, position: int) -> None:
        shown = shown_name(name)
        reason = f"truncated tar: member {shown!r} needs {size:,} bytes, {max(0, self._size - position):,} are there"
        self._result.damage = Damage(header_offset, f"{reason} at byte {header_offset}", name)

    def _parse(self, block: bytes, position: int, *, after_end: bool) -> tuple[str, int, int]:
        if len(block) < BLOCK:
            raise TarError(
                self._no_header(block, position, f"truncated tar: {len(block)} of 512 header bytes"), position
            )
        if not _checksum_is_right(block):
            what = "data after the end mark that is no tar header" if after_end else "no valid tar header"
            raise TarError(self._no_header(block, position, what), position)
        try:
            size = int(block[124:135], 8) if block[135] in b"\0 " else _number(block[124:136])
        except ValueError:
            size = _number(block[124:136])
        if size < 0:
            raise TarError("a tar header with an impossible size", position)
        nul = block.find(b"\0", 0, 100)
        raw = block[:nul] if nul >= 0 else block[:100]
        if block[345] and block[257:263] == b"ustar\0":
            raw = block[345:500].split(b"\0", 1)[0] + b"/" + raw
        return raw.decode("utf-8", "surrogateescape"), size, block[156]

    def _no_header(self, block: bytes, position: int, what: str) -> str:
        if position:
            return what
        for magic, meaning in _MAGICS.items():
            if block.startswith(magic):
                return meaning
        return f"not a tar file: {what}"

    def _skip_zeros(self, position: int) -> int:
        """Return where the zeros that begin with a block of them end, rounded down to a block."""
        position += BLOCK
        while position < self._size:
            data = self._source.pread(position, _ZERO_SCAN_BYTES)
            rest = data.lstrip(b"\0")
            if rest:
                return (position + len(data) - len(rest)) // BLOCK * BLOCK
            if not data:
                break
            position += len(data)
        return self._size

    def _extension(self, kind: int, size: int, position: int) -> int:
        """Take in a long name or PAX records, and return where the next header starts."""
        if kind == _LONG_LINK or (kind == _PAX_GLOBAL and size <= _MAX_EXTENSION_BYTES):
            # A link is left out anyway; global records name neither a path nor a size of one member.
            return position + size + -size % BLOCK
        if size > _MAX_EXTENSION_BYTES:
            raise TarError(
                f"an extension header of {size:,} bytes, over the limit of {_MAX_EXTENSION_BYTES:,}", position
            )
        data = self._source.pread(position, size)
        if len(data) < size:
            raise TarError(
                f"truncated tar: an extension header needs {size:,} bytes, {len(data):,} are there", position
            )
        if kind == _LONG_NAME:
            self._long_name = data.split(b"\0", 1)[0]
        else:
            self._pax |= _pax_records(data, position)
        return position + size + -size % BLOCK

    def _overridden(self, name: str, size: int, position: int) -> tuple[str, int]:
        raw = self._pax.get(b"GNU.sparse.name", self._pax.get(b"path", self._long_name))
        if raw is not None:
            name = raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
        if b"size" in self._pax:
            try:
                size = int(self._pax[b"size"])
            except ValueError:
                size = -1
            if size < 0:
                raise TarError("a PAX record with an impossible size", position)
        return name, size

    def _skip(self, kind: int, name: str, size: int, header_offset: int, block: bytes, position: int) -> int:
        """Report a member that is no regular file, and return where the next header starts."""
        shown = shown_name(name)
        if kind in _LINK_TYPES:
            target = shown_name(block[157:257].split(b"\0", 1)[0].decode("utf-8", "surrogateescape"))
            self._problem(header_offset, "link", f"{_LINK_TYPES[kind]} {shown!r} to {target!r}")
            return position
        if kind in _OTHER_TYPES:
            label = _OTHER_TYPES[kind]
            self._problem(header_offset, label if label == "directory" else "special file", f"{label} {shown!r}")
            return position
        if kind == _SPARSE:
            extended = block[482] != 0
            while extended:
                more = self._source.pread(position, BLOCK)
                if len(more) < BLOCK:
                    raise TarError("truncated tar: the map of a sparse file is cut", position)
                extended, position = more[504] != 0, position + BLOCK
        if kind in _FILE_TYPES and name.endswith("/"):
            # So did tars write directories before they had a type of their own, and without data.
            self._problem(header_offset, "directory", repr(shown))
            size = size if kind else 0
        else:
            label = "sparse file" if kind == _SPARSE or kind in _FILE_TYPES else "unknown type"
            self._problem(header_offset, label, f"{shown!r} (type {chr(kind)!r}) is left out")
        end = position + size
        if end > self._size:
            raise TarError(f"truncated tar: member {shown!r} needs {size:,} bytes", header_offset)
        return end + -size % BLOCK


def shown_name(name: str) -> str:
    r"""Return a member's name as valid text: bytes that are not UTF-8 become ``\xff``."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return name


def _checksum_is_right(block: bytes) -> bool:
    # The low half of Adler-32 is 1 + the sum of all bytes, modulo 65521; a header's sum stays below twice that.
    total = (adler32(block) & 0xFFFF) - 1 - sum(block[_CHECKSUM]) + 8 * 32
    try:
        claimed = int(block[148:154], 8)
        if claimed in (total, total + _ADLER_MODULUS):
            return True
    except ValueError:
        pass
    claimed = _number(block[_CHECKSUM])
    if claimed in (total, total + _ADLER_MODULUS):
        return True
    # Some old programs summed signed bytes.
    unsigned = sum(block) - sum(block[_CHECKSUM]) + 8 * 32
    signed = unsigned - 256 * sum(b > 127 for b in block[:148] + block[156:])
    return claimed in (unsigned, signed)


def _number(raw: bytes) -> int:
    """Return a header's number: octal digits, or base-256 if the first bit is set; -1 if neither."""
    if raw[0] == 0x80:
        return int.from_bytes(raw[1:], "big")
    if raw[0] & 0x80:
        return -1
    digits = raw.split(b"\0", 1)[0].strip()
    try:
        return int(digits, 8) if digits else 0
    except ValueError:
        return -1


def _pax_records(data: bytes, position: int) -> dict[bytes, bytes]:
    records: dict[bytes, bytes] = {}
    start = 0
    while start < len(data) and data[start]:
        space = data.find(b" ", start, start + 20)
        digits = data[start:space] if space > 0 else b""
        length = int(digits) if digits.isdigit() else 0
        record = data[space + 1 : start + length]
        key, equals, value = record.partition(b"=")
        if not len(digits) + 1 < length <= len(data) - start or not equals or not value.endswith(b"\n"):
            raise TarError("a PAX header that is damaged", position + start)
        records[key] = value[:-1]
        start += length
    return records
