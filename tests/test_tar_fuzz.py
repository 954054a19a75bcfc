"""Fuzzing of the tar index, with Python's tarfile as the oracle.

The tests are short; ``IMGCURATE_FUZZ_EXAMPLES=50000 pytest tests/test_tar_fuzz.py --timeout=0`` is a long run.
Where tarfile and the index differ by intent, :func:`reference` says so.
"""

from __future__ import annotations

import io
import itertools
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_tar import END, FORMATS, Archive, header, member, pax, scan

from imgcurate import schema
from imgcurate.members import MemberColumns
from imgcurate.shards import index_shard
from imgcurate.tar import BLOCK, Member, _Scanner, padding

EXAMPLES = int(os.environ.get("IMGCURATE_FUZZ_EXAMPLES", "60"))
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
REGULAR = (tarfile.REGTYPE, tarfile.CONTTYPE)
OTHERS = (
    tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE,
)  # fmt: skip
SIZES = st.sampled_from([0, 1, 511, 512, 513, 1024, 10_240]) | st.integers(0, 1600)
NAMES = st.builds(
    lambda folder, part, n, ext: (folder + part * n)[:600] + ext,
    st.sampled_from(["", "", "./", "/", "../../", "a.b/", "d/" * 70]),
    st.text(st.sampled_from("ab._ü漢\udcff\n\x1b =%{'\"\\"), min_size=1, max_size=6),
    st.sampled_from([1, 1, 1, 16, 17, 25, 26, 50, 150]),
    st.sampled_from([".jpg", ".txt", ".seg.png", ".", "", ".JPG"]),
)
CONTENT = st.builds(lambda size, fill: bytes([fill]) * size, SIZES, st.integers(0, 255))


@st.composite
def written_by_tarfile(draw: st.DrawFn) -> bytes:
    """Return an archive of tarfile, with or without its end mark."""
    out = io.BytesIO()
    format_ = FORMATS[draw(st.sampled_from(sorted(FORMATS)))]
    common = draw(st.sampled_from([{}, {}, {"comment": "ü" * 300}, {"mtime": "1.5", "uname": "x"}]))
    with tarfile.open(
        fileobj=out, mode="w", format=format_, encoding="utf-8", errors="surrogateescape",
        pax_headers=common if format_ == tarfile.PAX_FORMAT else None,
    ) as tar:  # fmt: skip
        for _ in range(draw(st.integers(int(bool(common)), 8))):
            info, data = tarfile.TarInfo(draw(NAMES)), b""
            info.type = draw(st.sampled_from(REGULAR * 4 + OTHERS))
            info.mtime = draw(st.sampled_from([0, 1_700_000_000, 1_700_000_000.25, 2**40]))
            info.uid = draw(st.sampled_from([0, 1000, 8**7]))
            if info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname = draw(NAMES | st.just("/etc/passwd"))
            if info.type in REGULAR:
                data = draw(CONTENT)
                info.size = len(data)
            if format_ == tarfile.PAX_FORMAT:
                info.pax_headers = draw(
                    st.sampled_from([{}, {}, {"comment": "c"}, {"size": str(info.size)}, {"x.y": "=\n1 a=b\n"}])
                )
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError:
                assert format_ == tarfile.USTAR_FORMAT
        tar.offset = out.tell()
    whole = out.getvalue()
    tail = len(whole) - tar.offset if draw(st.booleans()) else 0
    return whole[: len(whole) - tail] if draw(st.integers(0, 3)) else whole + bytes(draw(st.integers(0, 3)) * BLOCK)


@st.composite
def odd_member(draw: st.DrawFn) -> bytes:
    """Return a member as tarfile does not write it but reads it: V7, base-256, PAX overrides, sparse."""
    name = draw(st.sampled_from([b"a.jpg", b"a.txt", b"d/b.png", b"\xff.jpg", b"n" * 100, b"old/", b" "]))
    data = b"" if name == b"old/" else draw(CONTENT)
    size = len(data)
    body = data + padding(size)
    numbers = [b"%011o\0", b"%011o ", b"%012o", b"%11o ", b"%o"]
    sparse = {
        "GNU__sparse__major": b"1", "GNU__sparse__minor": b"0", "GNU__sparse__name": b"s.jpg",
        "GNU__sparse__realsize": b"9" * 12,
    }  # fmt: skip
    longer = member(b"././@LongLink", b"l/" * 90 + b"n.txt\0", b"L")
    made = {
        "v7": lambda: header(name, size, draw(st.sampled_from([b"0", b"\0"])), magic=bytes(8)) + body,
        "numbers": lambda: header(name, (draw(st.sampled_from(numbers)) % size).ljust(12, b"\0")) + body,
        "no size": lambda: header(name, draw(st.sampled_from([b" " * 12, bytes(12), b" " * 11 + b"\0"]))),
        "base-256": lambda: header(name, b"\x80" + size.to_bytes(11, "big")) + body,
        "prefix": lambda: header(name, size, prefix=b"p" * 155) + body,
        "pax": lambda: pax(path=b"long/" * 30 + b"n.jpg", size=b"%d" % size) + header(name, 0) + body,
        "several": lambda: (
            draw(
                st.sampled_from([pax(path=b"1.jpg"), pax(path=b"2.jpg", size=b"%d" % size), longer, pax(comment=b"c")])
            )
            + draw(st.sampled_from([pax(path=b"3.jpg"), longer, pax(size=b"%d" % size)]))
            + header(name, size)
            + body
        ),
        "global": lambda: pax(b"g", comment=b"c" * 600) + header(name, size) + body,
        "long name": lambda: longer + header(name, size) + body,
        "long link": lambda: (
            member(b"././@LongLink", b"t" * 300 + b"\0", b"K") + header(name, 0, b"2", link=b"t" * 100)
        ),
        "sparse": lambda: pax(**sparse) + member(b"s", b"1\n0\n9\n".ljust(BLOCK, b"\0")),
        "old sparse": lambda: (
            header(name, size, b"S", magic=b"ustar  \0", tail=bytes(41 + 97) + b"77777777777\0") + body
        ),
        "zeros": lambda: bytes(BLOCK) * draw(st.integers(1, 3)),
    }
    return made[draw(st.sampled_from(sorted(made)))]()


made_by_hand = st.builds(
    lambda members, end: b"".join(members) + end,
    st.lists(odd_member(), min_size=1, max_size=5),
    st.sampled_from([b"", END, bytes(BLOCK)]),
)
VALID = st.builds(
    lambda archives, tail: b"".join(archives) + tail,
    st.lists(written_by_tarfile() | made_by_hand, min_size=1, max_size=3),
    st.sampled_from([b"", b"", bytes(100)]),
)


def reference(data: bytes, *, ignore_zeros: bool) -> list[tarfile.TarInfo]:
    """Return the regular members that tarfile lists before it stops, less those that are no files for us.

    tarfile lists a member whose data are cut, and some of its versions one of a negative size; a path
    that ends with a slash is a directory for us in every format; a sparse file is none that could be copied.
    """
    found: list[tarfile.TarInfo] = []
    try:
        stream = io.BytesIO(data)
        options = {"encoding": "utf-8", "errors": "surrogateescape", "ignore_zeros": ignore_zeros}
        with tarfile.open(fileobj=stream, mode="r:", **options) as tar:
            found.extend(itertools.takewhile(lambda i: i.size >= 0, tar))
    except (tarfile.TarError, OSError, ValueError, OverflowError):
        pass
    return [
        i
        for i in found
        if i.isreg() and not i.issparse() and not i.name.endswith("/") and i.offset_data + i.size <= len(data)
    ]


@fuzz
@given(VALID)
def test_any_archive_has_the_members_of_tarfile(data: bytes) -> None:
    found = scan(data)
    assert found.damage is None, found.damage
    assert list(found.members) == [
        Member(i.name, i.offset, i.offset_data, i.size, min(len(data), i.offset_data + i.size + -i.size % BLOCK))
        for i in reference(data, ignore_zeros=True)
    ]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Return a valid archive to which something was done: bits, cuts, splices, blocks moved."""
    data = bytearray(draw(VALID))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        block = at // BLOCK * BLOCK
        what = draw(st.sampled_from("flip cut remove insert double field field swap reseal".split()))
        if what == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "cut":
            del data[at:]
        elif what == "remove":
            del data[at : at + draw(st.integers(1, 1200))]
        elif what == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=700))
        elif what == "double":
            data[block:block] = data[block : block + BLOCK * draw(st.integers(1, 4))]
        elif what == "swap":
            other = draw(st.integers(0, max(0, len(data) - 1))) // BLOCK * BLOCK
            one, two = data[block : block + BLOCK], data[other : other + BLOCK]
            if len(one) == len(two) == BLOCK:
                data[block : block + BLOCK], data[other : other + BLOCK] = two, one
        elif what in ("field", "reseal") and len(data) >= block + BLOCK:
            if what == "field":
                start, length = draw(st.sampled_from([(0, 100), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)]))
                value = draw(st.binary(min_size=length, max_size=length) | st.sampled_from([
                    b"\x80" + b"\xff" * 11, b"\xff" * 12, b"77777777777\0", b"-0000000001\0", b"x", b"L", b"g", b"S",
                ]))  # fmt: skip
                data[block + start : block + start + min(length, len(value))] = value[:length]
            # With a right checksum the damage leads deeper into the scanner.
            data[block + 148 : block + 156] = b" " * 8
            data[block + 148 : block + 156] = b"%06o\0 " % sum(data[block : block + BLOCK])
    return bytes(data)


def differs_by_intent(data: bytes) -> bool:
    """Return whether an archive has what tarfile reads by other rules, so that only sanity is asked for.

    tarfile applies paths and sizes of global records, takes a PAX size that is no number for 0, takes ustar's
    prefix without ustar's magic, keeps what stands behind a NUL in a PAX path, and reads an empty checksum as 0.
    """
    blocks = [data[i : i + BLOCK] for i in range(0, len(data), BLOCK)]
    types = [b[156:157] for b in blocks if len(b) == BLOCK and any(b)]
    return any(t in (b"x", b"X", b"g", b"L", b"K", b"S") for t in types) or any(
        len(b) == BLOCK and b[345] and b[257:263] != b"ustar\0" for b in blocks
    )


@fuzz
@given(mutated())
def test_a_damaged_archive_keeps_what_tarfile_reads_before_the_damage(data: bytes) -> None:
    found = scan(data)
    stop = 0
    for m in found.members:
        assert stop <= m.header_offset < m.data_offset <= m.data_offset + m.size <= m.end <= len(data)
        stop = m.end
    if not differs_by_intent(data):
        ours = {(m.name, m.header_offset, m.data_offset, m.size) for m in found.members}
        missing = [i for i in reference(data, ignore_zeros=False)
                   if (i.name, i.offset, i.offset_data, i.size) not in ours]  # fmt: skip
        assert not missing


@fuzz
@given(mutated() | st.binary(max_size=3000) | VALID)
def test_the_index_of_anything_is_sound(folder: Path, data: bytes) -> None:
    path = folder / "any.tar"
    path.write_bytes(data)
    index = index_shard(str(path), 5, columns=MemberColumns(("txt",)))
    table = index.table
    table.validate(full=True)
    rows = table.to_pylist()
    assert [r[schema.UID] for r in rows] == [(5 << 32) + i for i in range(len(rows))]
    statuses = [r[schema.STATUS] for r in rows]
    assert set(statuses) <= {schema.STATUS_OK, schema.STATUS_NO_IMAGE, schema.STATUS_TAR_ERROR}
    assert statuses.count(schema.STATUS_TAR_ERROR) == [p.kind for p in index.problems].count("damaged") <= 1
    assert all(bool(r[schema.REASON]) == (r[schema.STATUS] != schema.STATUS_OK) for r in rows)
    for row in rows:
        pairs = list(zip(row[schema.SPANS][::2], row[schema.SPANS][1::2], strict=True))
        assert all(0 <= start < start + n <= len(data) for start, n in pairs)
        piece = b"".join(data[start : start + n] for start, n in pairs)
        # A span is an archive of the sample's members alone.
        again = _Scanner(Archive(piece), BLOCK).scan()
        assert again.damage is None or not piece
        assert len(again.members) == len(row[schema.MEMBERS])
        if row[schema.OFFSET] >= 0:
            start, n = row[schema.OFFSET], row[schema.NBYTES]
            assert any(a <= start <= start + n <= a + b for a, b in pairs)
        else:
            assert row[schema.NBYTES] == 0
    assert all(p.detail.isprintable() and 0 <= p.offset <= len(data) for p in index.problems)
    spans = sorted((s, n) for r in rows for s, n in zip(r[schema.SPANS][::2], r[schema.SPANS][1::2], strict=True))
    assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(spans))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")
