"""The tar format: members, offsets and damage, against Python's tarfile and archives made by hand."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imgcurate.storage import open_source
from imgcurate.tar import BLOCK, Member, TarScan, _Scanner, end_of_archive, padding, scan_tar, tar_header

END = bytes(2 * BLOCK)
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
KINDS = {
    tarfile.DIRTYPE: "directory", tarfile.LNKTYPE: "link", tarfile.SYMTYPE: "link",
    tarfile.FIFOTYPE: "special file", tarfile.CHRTYPE: "special file", tarfile.BLKTYPE: "special file",
}  # fmt: skip
NOT_UTF8 = b"caf\xe9/\xff\xfe.jpg".decode("utf-8", "surrogateescape")
few = settings(max_examples=60, deadline=None)


class Archive:
    """An archive in memory, as a source that counts its reads."""

    def __init__(self, data: bytes) -> None:
        self.url, self.size, self.data, self.reads = "memory", len(data), data, 0

    def pread(self, offset: int, length: int) -> bytes:
        self.reads += 1
        return self.data[offset : offset + length]

    def close(self) -> None:
        pass


def scan(data: bytes) -> TarScan:
    """Scan with a window of one header and of a megabyte, at once and one by one: the result is the same."""
    found = scan_tar(Archive(data), window_bytes=BLOCK)
    for again in (
        scan_tar(Archive(data), window_bytes=1 << 20),
        _Scanner(Archive(data), BLOCK, most=0).scan(),
        _Scanner(Archive(data), 3 * BLOCK, least=1, most=3).scan(),
        _Scanner(Archive(data), 3 * BLOCK, least=1).scan(),
    ):
        assert list(found.members) == list(again.members)
        assert len(again.members) == len(again.members.names)
        assert (found.problems, found.damage) == (again.problems, again.damage)
    assert len(found.members) == len(found.members.names)
    return found


def kinds(found: TarScan) -> list[str]:
    return [p.kind for p in found.problems]


def names(found: TarScan) -> list[str]:
    return [m.name for m in found.members]


def header(name: bytes = b"a.txt", size: int | bytes = 0, type_: bytes = b"0", **fields: bytes) -> bytes:
    """Return a header block; `fields` are prefix, magic (8 bytes), link, checksum or tail (from byte 345)."""
    size_field = size if isinstance(size, bytes) else b"%011o\0" % size
    block = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size_field + b"00000000000\0" + b" " * 8
    block += type_ + fields.get("link", b"").ljust(100, b"\0") + fields.get("magic", b"ustar\x0000")
    block = (block.ljust(345, b"\0") + fields.get("tail", fields.get("prefix", b""))).ljust(BLOCK, b"\0")
    assert len(block) == BLOCK
    return block[:148] + fields.get("checksum", b"%06o\0 " % sum(block)) + block[156:]


def member(name: bytes, data: bytes = b"data", type_: bytes = b"0", **fields: bytes) -> bytes:
    return header(name, len(data), type_, **fields) + data + padding(len(data))


def pax(type_: bytes = b"x", /, **records: bytes) -> bytes:
    """Return a PAX extension header; ``__`` in a key stands for a dot."""
    data = b""
    for key, value in records.items():
        body = b" %b=%b\n" % (key.replace("__", ".").encode(), value)
        length = next(n for n in range(len(body), len(body) + 9) if n == len(body) + len(b"%d" % n))
        data += b"%d%b" % (length, body)
    return member(b"PaxHeader", data, type_)


def build(entries: Sequence[tuple[str, bytes, bytes]], format_: int) -> bytes:
    """Write (name, type, data) entries with tarfile, leaving out names that the format cannot hold."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format_, encoding="utf-8", errors="surrogateescape") as tar:
        for name, type_, data in entries:
            info = tarfile.TarInfo(name)
            info.type = type_
            if type_ in (tarfile.LNKTYPE, tarfile.SYMTYPE):
                info.linkname = name[::-1]
            if type_ == tarfile.REGTYPE:
                info.size = len(data)
            # ustar cannot hold every long name.
            with contextlib.suppress(ValueError):
                tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def listed(data: bytes) -> tuple[list[Member], list[tuple[int, str]]]:
    """Return the regular members and the other ones (offset, kind) as tarfile lists them."""
    stream = io.BytesIO(data)
    with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        infos = tar.getmembers()
    regular = [
        Member(i.name, i.offset, i.offset_data, i.size, min(len(data), i.offset_data + i.size + -i.size % BLOCK))
        for i in infos
        if i.isreg() and not i.issparse()
    ]
    return regular, [(i.offset, KINDS[i.type]) for i in infos if not i.isreg()]


def assert_agrees_with_tarfile(data: bytes) -> TarScan:
    found = scan(data)
    regular, others = listed(data)
    assert list(found.members) == regular
    assert [(p.offset, p.kind) for p in found.problems] == others
    assert found.damage is None
    return found


ENTRIES = [
    ("a.jpg", tarfile.REGTYPE, b"x" * 1000),
    ("empty.txt", tarfile.REGTYPE, b""),
    ("exact.bin", tarfile.REGTYPE, bytes(2 * BLOCK)),
    ("folder", tarfile.DIRTYPE, b""),
    ("folder/b.jpg", tarfile.REGTYPE, b"y" * 511),
    ("hard", tarfile.LNKTYPE, b""),
    ("symbolic", tarfile.SYMTYPE, b""),
    ("fifo", tarfile.FIFOTYPE, b""),
    ("device", tarfile.CHRTYPE, b""),
    ("block", tarfile.BLKTYPE, b""),
    ("n" * 100, tarfile.REGTYPE, b"z"),
    ("m" * 101, tarfile.REGTYPE, b"z"),
    ("p" * 120 + "/" + "q" * 90 + ".jpg", tarfile.REGTYPE, b"z" * 513),
    ("long/" * 60 + "r.txt", tarfile.REGTYPE, b"z"),
    ("s" * 300 + ".txt", tarfile.SYMTYPE, b""),
    ("unicode/ü漢字🎈.jpg", tarfile.REGTYPE, b"z"),
    ("漢" * 90 + ".jpg", tarfile.REGTYPE, b"z"),
    (NOT_UTF8, tarfile.REGTYPE, b"z"),
    ("line\nbreak=1.jpg", tarfile.REGTYPE, b"z"),
    ("last.txt", tarfile.REGTYPE, b"z" * 512),
]


@pytest.mark.parametrize("format_", FORMATS)
def test_scan_tar_agrees_with_tarfile(format_: str) -> None:
    found = assert_agrees_with_tarfile(build(ENTRIES, FORMATS[format_]))
    assert NOT_UTF8 in names(found)
    assert len(found.members) == (10 if format_ == "ustar" else 13)


@few
@given(
    entries=st.lists(
        st.tuples(
            st.text(st.sampled_from("ab./_ü漢\udcff\n "), min_size=1, max_size=30).flatmap(
                lambda part: st.integers(1, 40).map(lambda n: (part * n)[:300])
            ).filter(lambda name: not name.endswith("/")),
            st.sampled_from([tarfile.REGTYPE] * 6 + list(KINDS)),
            st.integers(0, 1600).map(bytes),
        ),
        max_size=12,
    ),
    format_=st.sampled_from(sorted(FORMATS)),
)  # fmt: skip
def test_scan_tar_agrees_with_tarfile_on_any_archive(entries: list[tuple[str, bytes, bytes]], format_: str) -> None:
    assert_agrees_with_tarfile(build(entries, FORMATS[format_]))


def test_scan_tar_of_many_members_with_odd_ones_between() -> None:
    entries = [(f"{i:05d}.jpg", tarfile.REGTYPE, bytes(i % 1500)) for i in range(5000)]
    for i in (0, 1, 777, 2500, 4999):
        entries[i] = (f"{i}/" + "x" * 200, tarfile.REGTYPE, b"y")
    entries[2501] = ("folder", tarfile.DIRTYPE, b"")
    found = assert_agrees_with_tarfile(build(entries, tarfile.GNU_FORMAT))
    assert len(found.members) == 4999


@pytest.mark.parametrize("size", [0, 1, 512, 8**11 - 1, 8**11, 8**13 + 7])
@pytest.mark.parametrize("name", ["a.jpg", "n" * 100, "n" * 101, "d/" * 200 + "ü.jpg", "漢" * 34, NOT_UTF8])
def test_tar_header_is_read_back_by_tarfile(name: str, size: int) -> None:
    template = tarfile.TarInfo("old.jpg")
    template.mtime, template.mode, template.uid, template.gid = 1_700_000_000, 0o640, 1234, 567
    template.uname, template.gname = "somebody", "group"
    raw = tar_header(name, size, template.tobuf(tarfile.USTAR_FORMAT))
    assert len(raw) % BLOCK == 0
    with tarfile.open(fileobj=io.BytesIO(raw), encoding="utf-8", errors="surrogateescape") as tar:
        info = tar.firstmember
    assert info is not None
    assert (info.name, info.size, info.type, info.offset_data) == (name, size, tarfile.REGTYPE, len(raw))
    assert (info.mtime, info.mode, info.uid, info.gid) == (1_700_000_000, 0o640, 1234, 567)
    assert (info.uname, info.gname) == ("somebody", "group")


@pytest.mark.parametrize("name", ["a.jpg", "d/" * 200 + "ü.jpg", NOT_UTF8])
def test_tar_header_and_end_of_archive_make_an_archive(name: str) -> None:
    body = tar_header(name, 5, header()) + b"12345" + padding(5)
    archive = body + end_of_archive(len(body))
    assert len(archive) % 10_240 == 0
    assert archive.endswith(END)
    assert names(assert_agrees_with_tarfile(archive)) == [name]


@pytest.mark.parametrize(
    "size",
    [
        b"\x80" + (1000).to_bytes(11, "big"),
        b"       1750 ",
        b"1750\0\0\0\0\0\0\0\0",
        b"1750 \0trash\0",
        b"000000001750",
    ],
)
def test_scan_tar_reads_sizes_as_tarfile_does(size: bytes) -> None:
    archive = header(b"a.bin", size) + bytes(1024) + member(b"b.txt") + END
    found = assert_agrees_with_tarfile(archive)
    assert [m.size for m in found.members] == [1000, 4]


def test_scan_tar_pax_overrides_path_and_size() -> None:
    archive = pax(path="ü.jpg".encode(), size=b"600") + header(b"short", 0) + bytes(1024) + member(b"b.txt") + END
    found = assert_agrees_with_tarfile(archive)
    assert next(iter(found.members)) == Member("ü.jpg", 0, 1536, 600, 2560)


def test_scan_tar_a_nul_ends_a_name() -> None:
    found = scan(pax(path=b"a.jpg\0b") + member(b"x") + member(b"c.jpg\0garbage") + END)
    assert names(found) == ["a.jpg", "c.jpg"]


def test_scan_tar_leaves_the_trailing_slash_convention_to_old_archives() -> None:
    old = header(b"old/", 700, b"\0") + member(b"a.txt") + END
    assert assert_agrees_with_tarfile(old).problems[0].kind == "directory"
    new = member(b"new/", b"data") + member(b"a.txt") + END
    found = scan(new)
    assert (names(found), kinds(found), found.damage) == (["a.txt"], ["directory"], None)


def test_scan_tar_takes_the_prefix_of_ustar_headers_alone() -> None:
    assert names(scan(member(b"a.jpg", prefix=b"some/folder") + END)) == ["some/folder/a.jpg"]
    # GNU tar keeps times where ustar has its prefix.
    assert names(scan(member(b"a.jpg", magic=b"ustar  \0", tail=b"14600000000\0" * 2) + END)) == ["a.jpg"]


def test_scan_tar_gnu_sparse_files_with_extension_blocks_are_skipped() -> None:
    tail = bytes(482 - 345) + b"\x01" + b"00000100000\0"
    archive = header(b"sparse.bin", 700, b"S", magic=b"ustar  \0", tail=tail)
    archive += bytes(504) + b"\x01" + bytes(7) + bytes(BLOCK) + b"d" * 700 + padding(700) + member(b"a.txt") + END
    found = scan(archive)
    assert list(found.members) == listed(archive)[0]
    assert (names(found), kinds(found)) == (["a.txt"], ["sparse file"])
    cut = scan(archive[: 2 * BLOCK])
    assert cut.damage is not None
    assert "the map of a sparse file is cut" in cut.damage.reason


@pytest.mark.parametrize(
    ("records", "data"),
    [
        ({"GNU__sparse__size": b"4096", "GNU__sparse__numblocks": b"1", "GNU__sparse__offset": b"0",
          "GNU__sparse__numbytes": b"9"}, b"some data"),
        ({"GNU__sparse__size": b"4096", "GNU__sparse__numblocks": b"1", "GNU__sparse__map": b"0,9"}, b"some data"),
        ({"GNU__sparse__major": b"1", "GNU__sparse__minor": b"0", "GNU__sparse__name": b"real.jpg",
          "GNU__sparse__realsize": b"4096"}, b"1\n0\n9\n".ljust(BLOCK, b"\0") + b"some data"),
    ],
    ids=["0.0", "0.1", "1.0"],
)  # fmt: skip
def test_scan_tar_pax_sparse_files_are_skipped(records: dict[str, bytes], data: bytes) -> None:
    archive = pax(**records) + member(b"GNUSparseFile.1/real.jpg", data) + member(b"a.txt") + END
    found = scan(archive)
    assert list(found.members) == listed(archive)[0]
    assert (names(found), kinds(found)) == (["a.txt"], ["sparse file"])


def test_scan_tar_global_headers_belong_to_no_member() -> None:
    archive = pax(b"g", comment=b"c") + member(b"a.jpg") + pax(b"g", mtime=b"1") + pax(path=b"b.jpg") + member(b"b")
    found = assert_agrees_with_tarfile(archive + END)
    assert [(m.name, m.header_offset) for m in found.members] == [("a.jpg", 1024), ("b.jpg", 3072)]


def test_scan_tar_a_global_header_does_not_part_a_member_from_its_own() -> None:
    found = scan(member(b"a") + pax(path=b"b.jpg") + pax(b"g", comment=b"c") + member(b"b") + END)
    assert [(m.name, m.header_offset) for m in found.members] == [("a", 0), ("b.jpg", 1024)]


def test_scan_tar_without_end_mark_or_last_padding() -> None:
    found = scan(member(b"a.jpg") + member(b"b.jpg"))
    assert (names(found), kinds(found), found.damage) == (["a.jpg", "b.jpg"], ["no end mark"], None)
    unpadded = scan(member(b"a.jpg") + header(b"b.jpg", 5) + b"12345")
    assert (list(unpadded.members)[1].end, kinds(unpadded), unpadded.damage) == (1541, ["no end mark"], None)
    assert kinds(scan(member(b"a.jpg") + bytes(BLOCK))) == []
    assert kinds(scan(member(b"a.jpg") + bytes(100))) == []


def test_scan_tar_of_concatenated_archives() -> None:
    one = build(ENTRIES[:5], tarfile.USTAR_FORMAT)
    two = build(ENTRIES[10:], tarfile.PAX_FORMAT)
    found = scan(one + two + one)
    moved = [(m.name, m.header_offset + base) for archive, base in ((one, 0), (two, len(one)), (one, len(one + two)))
             for m in scan(archive).members]  # fmt: skip
    assert [(m.name, m.header_offset) for m in found.members] == moved
    concatenated = [p.offset for p in found.problems if p.kind == "concatenated"]
    assert concatenated == [len(one), len(one + two)]


def test_scan_tar_zeros_then_garbage() -> None:
    start = member(b"a.jpg") + bytes(3 * 1024 * 1024 + BLOCK)
    found = scan(start + b"garbage" * 200)
    assert names(found) == ["a.jpg"]
    assert found.damage is not None
    assert (found.damage.offset, found.damage.name) == (len(start), "")
    assert "data after the end mark that is no tar header" in found.damage.reason


def test_scan_tar_stops_at_a_bad_checksum() -> None:
    good = member(b"a.jpg")
    bad = bytearray(member(b"b.jpg"))
    bad[0] ^= 1
    found = scan(good + bytes(bad) + member(b"c.jpg") + END)
    assert names(found) == ["a.jpg"]
    assert found.damage is not None
    assert (found.damage.offset, found.damage.reason) == (1024, "no valid tar header at byte 1024")


@pytest.mark.parametrize("checksum", [b"%6o\0 ", b"%06o \0", b"%07o\0", b" %06o\0", b"%08o"])
def test_scan_tar_takes_checksums_as_any_tar_writes_them(checksum: bytes) -> None:
    raw = header(b"a.jpg", 0)
    total = sum(raw[:148]) + sum(raw[156:]) + 8 * 32
    odd = raw[:148] + checksum % total + raw[156:]
    assert names(assert_agrees_with_tarfile(odd * 20 + END)) == ["a.jpg"] * 20


def test_scan_tar_takes_octal_digits_alone_in_checksums() -> None:
    raw = header(b"a.jpg", 0)
    total = sum(raw[:148]) + sum(raw[156:]) + 8 * 32
    raw = header(b"a.jpg", 0, link=bytes([1] * (-total % 8)))
    total += -total % 8
    assert names(scan(raw + END)) == ["a.jpg"]
    found = scan(raw[:148] + b"%05o8\0 " % (total // 8 - 1) + raw[156:] + END)
    assert found.damage is not None
    assert "no valid tar header" in found.damage.reason


def test_scan_tar_takes_the_sum_of_signed_bytes() -> None:
    raw = header("ü.jpg".encode(), 0)
    signed = sum(b - 256 * (b > 127) for b in raw[:148] + raw[156:]) + 8 * 32
    archive = raw[:148] + b"%06o\0 " % signed + raw[156:] + END
    assert names(assert_agrees_with_tarfile(archive)) == ["ü.jpg"]


def test_scan_tar_takes_sums_of_more_than_65535() -> None:
    raw = header(b"\xff" * 100, 0, prefix=b"\xff" * 155, link=b"\xff" * 100)
    assert sum(raw) > 65_536
    assert len(scan(raw + END).members) == 1


SMALL = (
    pax(path=b"long/" * 30 + b"a.jpg") + member(b"a", b"x" * 700)
    + member(b"folder/", b"", b"5") + member(b"b.txt", b"y" * 30) + member(b"c.json", b"") + END
)  # fmt: skip


def test_scan_tar_cut_at_every_byte() -> None:
    whole = scan(SMALL)
    assert len(whole.members) == 3
    first, second, third = whole.members
    folder = first.end
    borders = {
        *range(first.data_offset + first.size, first.end + 1),
        folder + BLOCK,
        *range(second.data_offset + second.size, second.end + 1),
        *range(third.end, len(SMALL) + 1),
    }
    for cut in range(len(SMALL)):
        found = scan(SMALL[:cut])
        there = [m for m in whole.members if m.data_offset + m.size <= cut]
        assert [m[:4] for m in found.members] == [m[:4] for m in there]
        assert all(m.end <= cut for m in found.members)
        assert (found.damage is None) == (cut in borders), cut
        assert kinds(found).count("no end mark") == (cut in borders and cut <= third.end)
        if found.damage is not None:
            assert found.damage.offset in {0, *(m.header_offset for m in whole.members), folder, 512, 1024} | {cut}
            assert "truncated" in found.damage.reason or cut == 0
            started = [m for m in whole.members if m.data_offset <= cut < m.data_offset + m.size]
            assert found.damage.name == (started[0].name if started else "")


@pytest.mark.parametrize(
    "size",
    [b"\xff" * 12, b"\x80" + b"\xff" * 11, b"\x80" + (2**63).to_bytes(11, "big"), b"77777777777\0", b"-0000000512\0",
     b"-0000001024\0", b"not a size!\0", b"0000000 001\0", b"\x81" + bytes(11)],
)  # fmt: skip
@pytest.mark.parametrize("type_", [b"0", b"L", b"K", b"x", b"g", b"S", b"?"])
def test_scan_tar_survives_impossible_sizes(size: bytes, type_: bytes) -> None:
    found = scan(member(b"a.jpg") + header(b"b.jpg", size, type_) + member(b"c.jpg") + END)
    assert names(found)[0] == "a.jpg"
    assert "b.jpg" not in names(found)
    assert found.damage is not None
    assert 1024 <= found.damage.offset <= 1536


@pytest.mark.parametrize("size", [b"-1", b"x", b"9" * 5000, b"99999999999999999999"])
def test_scan_tar_survives_impossible_pax_sizes(size: bytes) -> None:
    found = scan(member(b"a.jpg") + pax(size=size) + member(b"b.jpg") + END)
    assert names(found) == ["a.jpg"]
    assert found.damage is not None


@pytest.mark.parametrize(
    "records", [b"5 a=b", b"99 a=b\n", b"0 a=b\n", b"x a=b\n", b"6 ab\n", b"-6 a=b\n", b"6 a=bc\n", b"7"]
)
def test_scan_tar_stops_at_damaged_pax_records(records: bytes) -> None:
    found = scan(member(b"a.jpg") + member(b"PaxHeader", records, b"x") + member(b"b.jpg") + END)
    assert names(found) == ["a.jpg"]
    assert found.damage is not None
    assert "a PAX header that is damaged at byte 1536" in found.damage.reason


@pytest.mark.parametrize("type_", [b"L", b"x", b"X", b"g"])
def test_scan_tar_refuses_extension_headers_over_the_limit(type_: bytes) -> None:
    found = scan(member(b"a.jpg") + member(b"x", b" " * (1024 * 1024 + 1), type_) + member(b"b.jpg") + END)
    assert names(found) == ["a.jpg"]
    assert found.damage is not None
    assert "over the limit of 1,048,576" in found.damage.reason


@pytest.mark.parametrize("rest", [b"", END, END + member(b"b.jpg") + END], ids=["nothing", "end", "archive"])
def test_scan_tar_an_extension_header_needs_its_member(rest: bytes) -> None:
    found = scan(member(b"a.jpg") + pax(path=b"c.jpg") + rest)
    assert names(found) == ["a.jpg"]
    assert found.damage is not None
    assert (found.damage.offset, "without its member" in found.damage.reason) == (1024, True)


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("a.jpg", b"x" * 1000)
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file (0 bytes)"),
        (zipped(), "a zip archive, not a tar at byte 0"),
        (b"<!DOCTYPE html>\n<html>404</html>", "not a tar file: truncated tar: 32 of 512 header bytes at byte 0"),
        (b"<!DOCTYPE html>\n<html>404</html>" * 40, "not a tar file: no valid tar header at byte 0"),
    ],
    ids=["empty", "zip", "short html", "html"],
)
def test_scan_tar_says_what_is_no_tar(data: bytes, reason: str) -> None:
    found = scan(data)
    assert (list(found.members), found.problems) == ([], [])
    assert found.damage is not None
    assert (found.damage.offset, found.damage.reason, found.damage.name) == (0, reason, "")


def assert_sane(data: bytes) -> None:
    """Members lie within the file one after the other, and no block is read again and again."""
    found = scan(data)
    for scanner in (_Scanner(source := Archive(data), BLOCK), _Scanner(source, BLOCK, least=1)):
        source.reads = 0
        scanner.scan()
        assert source.reads <= 3 * (len(data) // BLOCK + 2)
    stop = 0
    for m in found.members:
        assert stop <= m.header_offset < m.data_offset <= m.data_offset + m.size <= m.end <= len(data)
        stop = m.end
    for problem in found.problems:
        problem.detail.encode()


@few
@given(st.binary(max_size=4000))
def test_scan_tar_takes_any_bytes(data: bytes) -> None:
    assert_sane(data)


@few
@given(data=st.data())
def test_scan_tar_takes_any_headers(data: st.DataObject) -> None:
    # Headers whose checksum is right, whatever else they say, lead deep into the scanner.
    archive = b""
    for _ in range(data.draw(st.integers(1, 8))):
        content = data.draw(st.binary(max_size=1100) | st.just(SMALL[512:700]))
        archive += header(
            data.draw(st.binary(max_size=100)),
            data.draw(st.just(len(content)) | st.integers(0, 8**11 - 1) | st.binary(min_size=12, max_size=12)),
            data.draw(st.sampled_from([b"0", b"\0", b"1", b"5", b"7", b"L", b"K", b"x", b"g", b"S", b"\xff"])),
            magic=data.draw(st.sampled_from([b"ustar\x0000", b"ustar  \0", bytes(8)])),
            tail=data.draw(st.binary(max_size=167)),
        )
        archive += content + padding(len(content))
    assert_sane(archive + data.draw(st.sampled_from([b"", END, b"x"])))


@few
@given(at=st.integers(0, len(SMALL) - 1), value=st.binary(min_size=1, max_size=600))
def test_scan_tar_takes_any_damage(at: int, value: bytes) -> None:
    assert_sane(SMALL[:at] + value + SMALL[at + len(value) :])


@pytest.mark.parametrize("left", [0, 100, 512, 1024, 1100, 3072])
def test_scan_tar_of_a_file_that_shrinks(left: int, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(member(b"a.jpg") * 10 + END)
    source = open_source(str(path))
    os.truncate(path, left)
    found = scan_tar(source, window_bytes=BLOCK)
    source.close()
    assert found.damage is not None
    assert len(found.members) <= 10


class Rewritten(Archive):
    """An archive whose zeros are others' bytes by the time that more than a header is read."""

    def pread(self, offset: int, length: int) -> bytes:
        data = super().pread(offset, length)
        assert self.reads < 200, "the same block is read again and again"
        return data if length <= BLOCK else b"x" * len(data)


def test_scan_tar_of_a_file_that_changes_while_it_is_read() -> None:
    found = scan_tar(Rewritten(member(b"a.jpg") + bytes(20 * BLOCK)), window_bytes=BLOCK)
    assert (names(found), found.damage) == (["a.jpg"], None)


@pytest.mark.parametrize("make", [lambda n: member(n), lambda n: header(n, 0)], ids=["data", "empty"])
def test_scan_tar_keeps_hostile_names_as_text(make: Callable[[bytes], bytes]) -> None:
    hostile = [b"/etc/passwd", b"../../up.jpg", b"", b"a\\b.jpg", b"\x1b[31m.jpg", b"C:evil.jpg", b" "]
    found = assert_agrees_with_tarfile(b"".join(make(n) for n in hostile) + END)
    assert [n.encode() for n in names(found)] == hostile
