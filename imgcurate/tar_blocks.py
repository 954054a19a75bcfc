"""The blocks of a tar: headers, PAX records, padding, end mark. Bytes to fields and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from zlib import adler32

import numpy as np

from imgcurate.errors import TarError

__all__ = [
    "BLOCK",
    "PLAIN_HEADER",
    "checksum_is_right",
    "end_of_archive",
    "header_name",
    "header_size",
    "padding",
    "pax_records",
    "plain_names",
    "quoted_name",
    "shown_name",
    "tar_header",
]

BLOCK: Final = 512
_RECORD: Final = 20 * BLOCK
_ADLER_MODULUS: Final = 65521
_CHECKSUM: Final = slice(148, 156)
_NAME_SHOWN: Final = 200
_EIGHTS: Final = 8 ** np.arange(5, -1, -1)
PLAIN_HEADER: Final = (b"\0" * 100 + b"0000644\0" + b"0000000\0" * 2 + b"\0" * 12 + b"00000000000\0").ljust(
    BLOCK, b"\0"
)
"""A template for :func:`tar_header` of members that come from no tar: mode 0644, owner 0, time 0."""


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


def header_name(block: bytes) -> bytes:
    """Return the path in a header, with ustar's prefix."""
    name = block[:100].split(b"\0", 1)[0]
    if block[345] and block[257:263] == b"ustar\0":
        return block[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def header_size(block: bytes) -> int:
    """Return the size in a header; negative where the field holds no number."""
    try:
        return int(block[124:135], 8) if block[135] in b"\0 " else _number(block[124:136])
    except ValueError:
        return _number(block[124:136])


def checksum_is_right(block: bytes) -> bool:
    """Return whether a header's checksum is the sum of its bytes, taken as unsigned or as signed ones."""
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


def plain_names(blocks: Sequence[bytes]) -> bytes | None:
    """Return the paths in headers of files that are as nearly all are, each with a zero byte after it.

    Parameters
    ----------
    blocks : sequence of bytes
        Headers, at least one, whose type is that of a file and whose size has eleven octal digits.

    Returns
    -------
    bytes or None
        None if a header needs a closer look: an odd checksum, a size of twelve digits, the name of a
        directory.
    """
    headers = np.frombuffer(b"".join(blocks), np.uint8).reshape(-1, BLOCK)
    digits = headers[:, 148:154] - np.uint8(ord("0"))
    sums = headers.sum(axis=1, dtype=np.uint32) - headers[:, _CHECKSUM] @ np.ones(8, np.int64) + 8 * 32
    # Behind eleven digits stands zero or a space, which differ in one bit alone.
    longer = headers[:, 135] & ~np.uint8(ord(" "))
    if digits.max() > 7 or (digits @ _EIGHTS != sums).any() or longer.any():
        return None
    names: list[bytes] = np.ascontiguousarray(headers[:, :100]).view("S100").ravel().tolist()
    for i in np.flatnonzero(headers[:, 345]).tolist():
        names[i] = header_name(blocks[i])
    joined = b"\0".join(names) + b"\0"
    if joined.count(b"\0") != len(names):
        names = [name.split(b"\0", 1)[0] for name in names]
        joined = b"\0".join(names) + b"\0"
    return None if b"/\0" in joined else joined


def pax_records(data: bytes, position: int) -> dict[bytes, bytes]:
    """Return the records of a PAX header whose data lie at `position`.

    Raises
    ------
    TarError
        If they are damaged.
    """
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


def shown_name(name: bytes) -> str:
    r"""Return a member's name as valid text: bytes that are not UTF-8 become ``\xff``."""
    return name.decode("utf-8", "backslashreplace")


def quoted_name(name: bytes) -> str:
    """Return a member's name for a message: in quotes, control characters escaped, a long one cut."""
    shown = shown_name(name[: 4 * _NAME_SHOWN + 1])
    more = f"... ({len(name):,} bytes)" if len(shown) > _NAME_SHOWN else ""
    return repr(shown[:_NAME_SHOWN]) + more


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
