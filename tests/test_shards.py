"""Samples of shards, against the rules written out member by member, tarfile and webdataset."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset import TarWriter
from webdataset.tariterators import group_by_keys, tar_file_expander

from imgcurate import schema
from imgcurate.extensions import IMAGE_EXTENSIONS
from imgcurate.members import MemberColumns
from imgcurate.samples import split_key
from imgcurate.shards import ShardIndex, index_shard
from imgcurate.storage import atomic_write
from imgcurate.tar import BLOCK, end_of_archive

Entries = Sequence[tuple[str, bytes]]
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
NOT_UTF8 = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
ROOT = tarfile.TarInfo("./")
ROOT.type = tarfile.DIRTYPE


def shown_name(name: str) -> str:
    return "".join(f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else c for c in name)


def write(
    path: Path, entries: Entries, format_: int = tarfile.USTAR_FORMAT, first: tarfile.TarInfo | None = None
) -> Path:
    with tarfile.open(path, "w", format=format_, encoding="utf-8", errors="surrogateescape") as tar:
        if first is not None:
            tar.addfile(first)
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def listed(path: Path) -> list[tuple[str, int, int, int, int]]:
    """Return (name, header offset, data offset, size, end) of the regular members, as tarfile sees them."""
    with tarfile.open(path, encoding="utf-8", errors="surrogateescape") as tar:
        return [
            (m.name, m.offset, m.offset_data, m.size, m.offset_data + m.size + -m.size % BLOCK)
            for m in tar
            if m.isreg()
        ]


def left_out(name: str) -> str | None:
    base = name.rsplit("/", 1)[-1]
    if base.startswith(".") or not base:
        return "hidden file"
    if re.match(r"__[^/]*__(/|$)", name):
        return "metadata"
    return None if base.partition(".")[2] else "no extension"


def by_hand(path: Path) -> tuple[list[dict[str, Any]], list[tuple[int, str]]]:
    """Return the rows and the problems (offset, kind) of a sound shard, by the rules, one member at a time."""
    samples: list[tuple[str, dict[str, tuple[int, int, int, int]]]] = []
    problems: list[tuple[int, str]] = []
    latest: dict[str, int] = {}
    for name, *where in listed(path):
        if (kind := left_out(name)) is not None:
            problems.append((where[0], kind))
            continue
        if shown_name(name) != name:
            problems.append((where[0], "not UTF-8"))
        folder, slash, base = name.rpartition("/")
        first, _, ext = base.partition(".")
        key, ext = folder + slash + first, ext.lower()
        at = latest.get(key)
        if at is not None and ext not in samples[at][1]:
            if at != len(samples) - 1:
                problems.append((where[0], "scattered members"))
            samples[at][1][ext] = tuple(where)
            continue
        if at is not None:
            problems.append((where[0], "duplicate key"))
        latest[key] = len(samples)
        samples.append((key, {ext: tuple(where)}))
    return [row_by_hand(key, members) for key, members in samples], problems


def row_by_hand(key: str, members: Mapping[str, tuple[int, int, int, int]]) -> dict[str, Any]:
    image = next((e for e in members if e in IMAGE_EXTENSIONS), None)
    image = image or next((e for e in members if e.split(".")[-1] in IMAGE_EXTENSIONS), None)
    spans: list[int] = []
    for header_offset, _, _, end in members.values():
        if spans and sum(spans[-2:]) == header_offset:
            spans[-1] += end - header_offset
        else:
            spans += [header_offset, end - header_offset]
    shown = [shown_name(e) for e in members]
    names = ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
    return {
        schema.KEY: shown_name(key),
        schema.EXT: shown_name(image) if image else "",
        schema.MEMBERS: shown,
        schema.FILES: None,
        schema.SPANS: spans,
        schema.OFFSET: members[image][1] if image else -1,
        schema.NBYTES: members[image][2] if image else 0,
        schema.WIDTH: 0,
        schema.HEIGHT: 0,
        schema.STATUS: "ok" if image else "no_image",
        schema.REASON: "" if image else f"no image among its members: {names}",
    }


def assert_by_hand(path: Path) -> ShardIndex:
    index = index_shard(str(path), 7)
    rows, problems = by_hand(path)
    common = [{schema.UID: (7 << 32) + i, schema.SHARD: str(path)} for i in range(len(rows))]
    assert index.table.to_pylist() == [c | r for c, r in zip(common, rows, strict=True)]
    assert index.table.schema == schema.arrow_schema(schema.INDEX_COLUMNS)
    found = [(p.offset, p.kind) for p in index.problems if p.kind not in ("no end mark", "directory")]
    assert sorted(found) == sorted(problems)
    assert index.nbytes == path.stat().st_size
    assert index.problems == sorted(index.problems)
    index.table.validate(full=True)
    return index


def column(index: ShardIndex, name: str) -> list[Any]:
    return index.table[name].to_pylist()


def kinds(index: ShardIndex) -> list[str]:
    return [p.kind for p in index.problems]


@pytest.mark.parametrize(
    ("name", "key", "ext"),
    [
        ("000.jpg", "000", "jpg"),
        ("train/000.seg.PNG", "train/000", "seg.png"),
        ("v1.2/readme", "v1.2/readme", ""),
        ("v1.2/a.JPG", "v1.2/a", "jpg"),
        ("./a.jpg", "./a", "jpg"),
        ("a.", "a", ""),
        ("a..jpg", "a", ".jpg"),
        (".hidden.jpg", "", "hidden.jpg"),
        ("a/._b.jpg", "a/", "_b.jpg"),
        ("", "", ""),
        ("ü.É", "ü", "é"),
    ],
)
def test_split_key(name: str, key: str, ext: str) -> None:
    assert split_key(name) == (key, ext)


CASES: dict[str, Entries] = {
    "nothing": [],
    "one": [("a.jpg", b"1")],
    "plain": [(f"{i:03d}.{e}", b"x" * (i * 37 % 1500)) for i in range(50) for e in ("jpg", "txt", "json")],
    "scattered": [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"3"), ("b.txt", b"4"), ("a.json", b"5")],
    "duplicates": [("a.jpg", b"1"), ("a.jpg", b"2"), ("a.txt", b"3"), ("b.jpg", b"4"), ("a.jpg", b"5"), ("a.txt", b"")],
    "dots": [("a.seg.png", b"1"), ("a.v2.jpg", b"2"), ("a.jpg", b"3"), ("v1.0/a.jpg", b"4"), ("v1.0/a.jpg.txt", b"5")],
    "upper case": [("a.JPG", b"1"), ("a.jpg", b"2"), ("A.jpg", b"3"), ("A.Txt", b"4")],
    "folders": [("./a.jpg", b"1"), ("a.jpg", b"2"), ("./a.txt", b"3"), ("x/a.jpg", b"4"), ("/a.jpg", b"5")],
    "hidden": [("._a.jpg", b"1"), ("a.jpg", b"2"), ("x/._a.jpg", b"3"), (".DS_Store", b"4"), ("a.txt", b"5")],
    "metadata": [("__meta__", b"1"), ("__x__/a.jpg", b"2"), ("__a.jpg", b"3"), ("__a__.jpg", b"4"), ("__a_b.txt", b"")],
    "no extension": [("a", b"1"), ("a.jpg", b"2"), ("x.y/readme", b"3"), ("a.", b"4"), ("a.txt", b"5")],
    "no image": [("a.txt", b"1"), ("b.json", b"2"), ("b.jpg.gz", b"3"), ("c.jpg", b"4"), ("d.jpgx", b"5")],
    "many without an image": [(f"a.{i}", b"1") for i in range(12)],
    "two images": [("a.png", b"1"), ("a.jpg", b"22"), ("b.v2.jpg", b"1"), ("b.png", b"22"), ("c.x.gif", b""),
                   ("c.y.gif", b"")],
    "every extension": [(f"{e}.{e}", b"1") for e in sorted(IMAGE_EXTENSIONS)],
    "not UTF-8": [(NOT_UTF8, b"1"), ("caf\\xe9.jpg", b"2"), ("b.\udcff", b"3"), ("b.jpg", b"4"), ("\udcff/a.jpg", b"")],
    "unicode": [("漢字.jpg", b"1"), ("漢字.txt", b"2"), ("ü.É", b"3"), ("ü.é", b"4"), ("ü.İ", b"5")],
    "long": [("d/" * 60 + "a.jpg", b"1"), ("d/" * 60 + "a.txt", b"2"), ("b.jpg", b"3"), ("d/" * 60 + "a.json", b"4")],
    "very long": [("n" * 240 + ".jpg", b"1"), ("n" * 240 + ".txt", b"2"), ("n" * 240 + "m.jpg", b"")],
    "separators": [("a\nb.jpg", b"1"), ("a b.jpg", b"2"), ("a\tb.jpg", b"3"), (" .jpg", b"4"), ("\x01.jpg", b"5")],
    "prefixes of keys": [("a.jpg", b"1"), ("ab.jpg", b"2"), ("a.txt", b"3"), ("aa.jpg", b"4"), ("aa/a.jpg", b"5")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "format_"),
    # ustar cannot hold the names of one case.
    [(c, f) for c in CASES for f in FORMATS if (c, f) != ("very long", tarfile.USTAR_FORMAT)],
)
def test_index_shard_follows_the_rules(case: str, format_: int, tmp_path: Path) -> None:
    assert_by_hand(write(tmp_path / "a.tar", CASES[case], format_))
    assert_by_hand(write(tmp_path / "b.tar", CASES[case], format_, first=ROOT))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any")


@settings(max_examples=60, deadline=None)
@given(
    entries=st.lists(
        st.tuples(
            st.builds(
                "".join,
                st.tuples(
                    st.sampled_from(["", "", "", "./", "d/", "d.e/", "__x__/", "p" * 120 + "/"]),
                    st.sampled_from(["a", "b", "ab", "ü", "caf\udce9", ".", "__m__", ""]),
                    st.sampled_from(["", ".", ".jpg", ".JPG", ".txt", ".json", ".x.png", ".É", "..webp"]),
                ),
            ).filter(lambda n: n and not n.endswith("/")),
            st.integers(0, 1100).map(bytes),
        ),
        max_size=14,
    ),
    format_=st.sampled_from(FORMATS),
)  # fmt: skip
def test_index_shard_follows_the_rules_on_any_shard(folder: Path, entries: Entries, format_: int) -> None:
    path = write(folder / "any.tar", entries, format_)
    assert_by_hand(path)
    assert_spans_hold_the_members(path)


def test_index_shard_of_thousands_of_samples_with_odd_ones_between(tmp_path: Path) -> None:
    entries = [(f"{i:06d}.{e}", bytes(i % 700)) for i in range(2500) for e in ("jpg", "txt")]
    assert kinds(assert_by_hand(write(tmp_path / "plain.tar", entries))) == []
    entries[3000] = ("d/" * 80 + "x.jpg", b"1")
    entries[3001] = ("._x", b"2")
    entries += [("000001.json", b"3"), ("000002.jpg", b"4")]
    index = assert_by_hand(write(tmp_path / "odd.tar", entries, tarfile.GNU_FORMAT))
    assert sorted(kinds(index)) == ["duplicate key", "hidden file", "scattered members"]


def assert_spans_hold_the_members(path: Path) -> None:
    """The spans of a sample and an end mark are an archive of just its members."""
    rows, _ = by_hand(path)
    with tarfile.open(path, encoding="utf-8", errors="surrogateescape") as tar:
        at = {m.offset: (m.name, tar.extractfile(m).read()) for m in tar if m.isreg()}
    data = path.read_bytes()
    index = index_shard(str(path), 0)
    assert len(index.table) == len(rows)
    for spans, members in zip(column(index, schema.SPANS), column(index, schema.MEMBERS), strict=True):
        pieces = [data[start : start + n] for start, n in zip(spans[::2], spans[1::2], strict=True)]
        archive = b"".join(pieces)
        archive += end_of_archive(len(archive))
        with tarfile.open(fileobj=io.BytesIO(archive), encoding="utf-8", errors="surrogateescape") as tar:
            found = [(m.name, tar.extractfile(m).read()) for m in tar]
        inside = [o for s, n in zip(spans[::2], spans[1::2], strict=True) for o in at if s <= o < s + n]
        assert found == [at[o] for o in inside]
        assert [shown_name(split_key(name)[1]) for name, _ in found] == members


@pytest.mark.parametrize("format_", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_spans_hold_extension_headers(format_: int, tmp_path: Path) -> None:
    entries = CASES["very long"] + CASES["scattered"] + CASES["not UTF-8"] + CASES["hidden"]
    assert_spans_hold_the_members(write(tmp_path / "a.tar", entries, format_))


def read_with_webdataset(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as stream:
        yield from group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}]))


def test_index_shard_groups_as_webdataset_does(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with TarWriter(str(path), encoder=False) as writer:
        for i in range(40):
            sample = {
                "__key__": f"{'x/' * (i % 3)}{i:04d}",
                "jpg": b"j" * (1 + 97 * i),
                "seg.png": b"p",
                "txt": b"t%d" % i,
            }
            writer.write({k: v for k, v in sample.items() if i % 4 or k != "seg.png"})
    expected = list(read_with_webdataset(path))
    index = index_shard(str(path), 0, columns=MemberColumns(("txt",)))
    assert column(index, schema.KEY) == [s["__key__"] for s in expected]
    assert column(index, schema.MEMBERS) == [[e for e in s if not e.startswith("__")] for s in expected]
    assert column(index, "txt") == [s["txt"].decode() for s in expected]
    data = path.read_bytes()
    images = [data[o : o + n] for o, n in zip(column(index, schema.OFFSET), column(index, schema.NBYTES), strict=True)]
    assert images == [s["jpg"] for s in expected]
    assert index.problems == []


SAMPLES = [(f"{i}.{e}", b"x" * (600 * i + 10)) for i in range(3) for e in ("jpg", "txt")]


def test_index_shard_cut_at_every_block(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.tar", SAMPLES)
    members = listed(whole)
    data = whole.read_bytes()
    path = tmp_path / "cut.tar"
    for cut in sorted({c + d for c in range(0, members[-1][-1] + 1, BLOCK) for d in (-1, 0, 1, 200)} - {-1}):
        path.write_bytes(data[:cut])
        index = index_shard(str(path), 3)
        there = [name for name, _, offset, size, _ in members if offset + size <= cut]
        status = column(index, schema.STATUS)
        assert column(index, schema.UID) == [(3 << 32) + i for i in range(len(status))]
        assert status.count("tar_error") == kinds(index).count("damaged") <= 1
        named = [
            f"{k}.{e}"
            for k, exts in zip(column(index, schema.KEY), column(index, schema.MEMBERS), strict=True)
            for e in exts
        ]
        assert named == there
        if "tar_error" in status:
            at = status.index("tar_error")
            assert at == len(status) - 1
            started = [name for name, _, offset, size, _ in members if offset <= cut < offset + size]
            assert column(index, schema.KEY)[at] == (split_key(started[0])[0] if started else "")
            assert ("truncated" in column(index, schema.REASON)[at]) == (cut > 0)


def cut_in(path: Path, entries: Entries) -> ShardIndex:
    """Index the entries with the data of the last one cut."""
    write(path, [*entries[:-1], (entries[-1][0], bytes(2000))])
    os.truncate(path, listed(path)[-1][2] + 1000)
    return index_shard(str(path), 0)


def test_damage_marks_the_sample_whose_member_is_cut(tmp_path: Path) -> None:
    index = cut_in(tmp_path / "a.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("b.txt", b"3")])
    assert column(index, schema.STATUS) == ["ok", "tar_error"]
    assert column(index, schema.MEMBERS) == [["jpg"], ["jpg"]]
    assert (
        column(index, schema.REASON)[1]
        == "truncated tar: member 'b.txt' needs 2,000 bytes, 1,000 are there at byte 2048"
    )


def test_damage_of_a_scattered_member_marks_its_sample(tmp_path: Path) -> None:
    index = cut_in(tmp_path / "a.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"3")])
    assert column(index, schema.STATUS) == ["tar_error", "ok"]


def test_damage_of_a_new_sample_is_a_row_with_its_key(tmp_path: Path) -> None:
    index = cut_in(tmp_path / "a.tar", [("a.jpg", b"1"), ("b\udcff.jpg", b"2")])
    assert column(index, schema.KEY) == ["a", "b\\xff"]
    assert column(index, schema.STATUS) == ["ok", "tar_error"]
    assert index.table.to_pylist()[1] | {schema.UID: 0, schema.SHARD: "", schema.REASON: ""} == {
        schema.UID: 0, schema.SHARD: "", schema.KEY: "b\\xff", schema.EXT: "", schema.MEMBERS: [], schema.SPANS: [],
        schema.FILES: None, schema.OFFSET: -1, schema.NBYTES: 0, schema.WIDTH: 0, schema.HEIGHT: 0,
        schema.STATUS: "tar_error", schema.REASON: "",
    }  # fmt: skip


def test_damage_goes_by_the_latest_sample_of_a_key(tmp_path: Path) -> None:
    entries = [("a.jpg", b"1"), ("a.jpg", b"2"), ("a.txt", b"3"), ("a.txt", b"4")]
    index = cut_in(tmp_path / "a.tar", entries)
    assert column(index, schema.STATUS) == ["ok", "ok", "tar_error"]
    assert column(index, schema.MEMBERS) == [["jpg"], ["jpg", "txt"], []]


@pytest.mark.parametrize("name", ["._a.jpg", "readme", "__meta__", "__x__/a.jpg"])
def test_damage_of_what_is_no_sample_is_a_row_without_a_key(name: str, tmp_path: Path) -> None:
    index = cut_in(tmp_path / "a.tar", [("a.jpg", b"1"), (name, b"2")])
    assert column(index, schema.KEY) == ["a", ""]
    assert column(index, schema.STATUS) == ["ok", "tar_error"]


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", b"\x1f\x8b" + bytes(600)])
def test_index_shard_of_what_is_no_tar_is_one_row(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    index = index_shard(str(path), 2)
    assert column(index, schema.UID) == [2 << 32]
    assert column(index, schema.STATUS) == ["tar_error"]
    assert kinds(index) == ["damaged"]


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from(sorted(CASES)),
    at=st.integers(0, 12_000),
    value=st.binary(min_size=1, max_size=700),
    cut=st.booleans(),
)
def test_index_shard_takes_any_damage(folder: Path, case: str, at: int, value: bytes, cut: bool) -> None:
    path = write(folder / "damaged.tar", CASES[case], tarfile.GNU_FORMAT)
    data = path.read_bytes()
    at %= len(data)
    path.write_bytes(data[:at] + value + (b"" if cut else data[at + len(value) :]))
    index = index_shard(str(path), 5, columns=MemberColumns(("txt", "json")))
    index.table.validate(full=True)
    assert column(index, schema.UID) == [(5 << 32) + i for i in range(len(index.table))]
    assert column(index, schema.STATUS).count("tar_error") == kinds(index).count("damaged") <= 1
    for start, nbytes in zip(column(index, schema.OFFSET), column(index, schema.NBYTES), strict=True):
        assert start + nbytes <= index.nbytes


def test_members_parted_by_zeros_or_links_have_spans_of_their_own(tmp_path: Path) -> None:
    one, two = (write(tmp_path / f"{e}.tar", [(f"a.{e}", b"1")]).read_bytes() for e in ("jpg", "txt"))
    path = tmp_path / "a.tar"
    path.write_bytes(one + two)
    index = index_shard(str(path), 0)
    assert column(index, schema.MEMBERS) == [["jpg", "txt"]]
    assert column(index, schema.SPANS) == [[0, 1024, len(one), 1024]]
    assert kinds(index) == ["concatenated"]


def test_texts_missing_invalid_and_empty(tmp_path: Path) -> None:
    entries = [("a.jpg", b"1"), ("a.txt", "ü漢\n".encode()), ("b.jpg", b"2"), ("c.txt", b"caf\xe9"), ("c.jpg", b"3"),
               ("d.txt", b""), ("d.TXT", b"second"), ("a.json", b"{}"), ("e.jpg", b"\0")]  # fmt: skip
    path = write(tmp_path / "a.tar", entries)
    index = index_shard(str(path), 0, columns=MemberColumns(("txt", "json", "nothing")))
    assert column(index, schema.KEY) == ["a", "b", "c", "d", "d", "e"]
    assert column(index, "txt") == ["ü漢\n", None, "caf\ufffd", "", "second", None]
    assert column(index, "json") == ["{}", None, None, None, None, None]
    assert column(index, "nothing") == [None] * 6
    assert index.table.schema.names == [*schema.INDEX_COLUMNS, "txt", "json", "nothing"]
    assert index.table.schema.field("nothing").type == pa.string()


def test_texts_that_are_too_long_are_reported(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", [("a.jpg", b"1"), ("a.txt", b"short"), ("b.jpg", b"2"), ("b.txt", b"")])
    data = bytearray(path.read_bytes())
    size = 16 * 1024 * 1024 + 1
    start = listed(path)[-1][1]
    info = tarfile.TarInfo("b.txt")
    info.size = size
    path.write_bytes(data[:start] + info.tobuf(tarfile.USTAR_FORMAT))
    os.truncate(path, start + BLOCK + size)
    index = index_shard(str(path), 0, columns=MemberColumns(("txt",)))
    assert column(index, "txt") == ["short", None]
    assert column(index, schema.STATUS) == ["ok", "ok"]
    assert [(p.offset, p.kind) for p in index.problems if p.kind != "no end mark"] == [(start, "text too long")]


@pytest.mark.parametrize("case", ["plain", "scattered", "not UTF-8", "very long", "hidden"])
def test_index_shard_of_a_remote_shard_is_that_of_a_local_one(case: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", CASES[case], tarfile.PAX_FORMAT)
    url = "memory://shards-test/a.tar"
    with atomic_write(url) as out:
        out.write(path.read_bytes())
    local, remote = (index_shard(u, 1, columns=MemberColumns(("txt",))) for u in (str(path), url))
    assert remote.table.drop([schema.SHARD]).equals(local.table.drop([schema.SHARD]))
    assert remote.problems == local.problems
    assert set(column(remote, schema.SHARD)) == {url}


def test_a_format_that_is_not_decoded_is_the_image_of_last_resort(tmp_path: Path, write_tar) -> None:
    samples = [("a", {"svg": b"1", "txt": b"", "png": b"22"}), ("b", {"txt": b"", "x.exr": b"1", "exr": b"333"}),
               ("c", {"hdr": b"1", "v2.tga": b"4444"}), ("d", {"txt": b""})]  # fmt: skip
    table = index_shard(str(write_tar(tmp_path / "0.tar", samples)), 0).table
    assert table["ext"].to_pylist() == ["png", "exr", "v2.tga", ""]
    assert table["status"].to_pylist() == ["ok", "ok", "ok", "no_image"]
