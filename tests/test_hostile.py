"""Archives from strangers: the index, `inspect` and whole runs on what was made to do harm."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import webdataset
from distributed import Client
from test_cli import run  # noqa: F401 - a fixture
from test_pipeline import tiny_pipeline
from test_tar import END, header, member, pax

from imgcurate import SemanticDedupStage, schema
from imgcurate.errors import InputError
from imgcurate.patterns import expand_urls
from imgcurate.shards import ShardIndex, index_shard
from imgcurate.tar import BLOCK, end_of_archive, padding

Run = Callable[..., tuple[int, list[str], str]]
ESCAPE = "\x1b[2J\x1b]0;owned\x07"


def index(path: Path, data: bytes | Iterable[bytes], **options: Any) -> ShardIndex:
    with path.open("wb") as file:
        file.writelines([data] if isinstance(data, bytes) else data)
    found = index_shard(str(path), 0, **options)
    found.table.validate(full=True)
    return found


def column(found: ShardIndex, name: str) -> list[Any]:
    return found.table[name].to_pylist()


def kinds(found: ShardIndex) -> set[str]:
    return {p.kind for p in found.problems}


def everything_in(folder: Path) -> set[tuple[str, int]]:
    return {(str(p), p.lstat().st_mtime_ns) for p in folder.rglob("*")}


def keys_in(path: Path) -> list[str]:
    """Return the keys of a tar in order, as tarfile reads them, bytes that are not UTF-8 as the catalog shows them."""
    with tarfile.open(path, encoding="utf-8", errors="surrogateescape") as tar:
        names = [m.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for m in tar]
    stems = [n[: n.find(".", n.rfind("/") + 1)] for n in names]
    return [k for k, _ in itertools.groupby(stems)]


HOSTILE_NAMES = [
    "../../etc/x.jpg", "/abs.jpg", "/etc/passwd.jpg", "..jpg", "../.jpg", "a\nb.jpg", f"{ESCAPE}.jpg", "a=b.jpg",
    "'q'\"q.jpg", "{0}{x}.jpg", "%s%n%d.jpg", "$(touch x).jpg", "`touch y`.jpg", "a;rm -rf b.jpg", "C:\\x.jpg",
    "long/" * 800 + "a.jpg", "n" * 4000 + ".jpg", "ext." + "e" * 4000 + ".jpg", "caf\udce9.jpg", "\udcff\udcfe/x.jpg",
    "\u202egpj.exe.jpg", "漢字.jpg", " .jpg", "a\tb.jpg", "=1+1.jpg", "-rf.jpg", "[bold red]x.jpg", "con.jpg", "|x.jpg",
]  # fmt: skip


@pytest.fixture(scope="module")
def outcome(
    tmp_path_factory: pytest.TempPathFactory, client: Client, photos: list[Any], encode: Callable[..., bytes]
) -> tuple[Path, Any, dict[str, bytes]]:
    """Return the folder, the result and the members of a run on a shard of hostile names, copied and out again."""
    folder = tmp_path_factory.mktemp("hostile")
    members = {name: encode(photos[i]) for i, name in enumerate(HOSTILE_NAMES)}
    with tarfile.open(
        folder / "in.tar", "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape"
    ) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for type_, name, target in (
            (tarfile.SYMTYPE, "link.jpg", "/etc/passwd"), (tarfile.LNKTYPE, "hard.jpg", "../../etc/passwd"),
            (tarfile.DIRTYPE, "../dir.jpg", ""), (tarfile.CHRTYPE, "dev.jpg", ""),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = type_, target
            tar.addfile(info)
        buffer = (folder / "in.tar").read_bytes()
        info = tarfile.TarInfo("inner.jpg")
        info.size = len(buffer)
        tar.addfile(info, io.BytesIO(buffer))
    before = everything_in(folder.parent)
    result = tiny_pipeline(str(folder / "in.tar")).run(str(folder / "OUT"), client=client)
    new = {p for p, _ in everything_in(folder.parent) - before}
    assert {p for p in new if not p.startswith(str(folder / "OUT"))} <= {str(folder), str(folder.parent)}
    return folder, result, members


def test_hostile_names_become_no_paths_and_come_out_as_they_went_in(outcome: Any) -> None:
    folder, result, members = outcome
    assert sorted(p.name for p in (folder / "OUT").rglob("*") if p.is_file()) == [
        "00000.parquet", "00000.tar", "00001.parquet", "00001.tar", "_SUCCESS", "manifest.json",
        "part-00000.parquet", "pipeline.yaml",
    ]  # fmt: skip
    catalog = result.catalog.compute()
    hidden = {"..jpg", "../.jpg"}
    assert result.counts == {"decode_error": 1, "ok": len(members) - len(hidden)}
    assert catalog.reason[catalog.key == "inner"].str.startswith("not an image").all()
    found: dict[str, bytes] = {}
    for shard in result.shards:
        with tarfile.open(shard, encoding="utf-8", errors="surrogateescape") as tar:
            found |= {m.name: tar.extractfile(m).read() for m in tar}
    assert found == {name: data for name, data in members.items() if name not in hidden}


def test_hostile_keys_are_the_same_in_catalog_sidecar_and_tar(outcome: Any) -> None:
    _, result, _ = outcome
    catalog = result.catalog.compute()
    keys = list(catalog.key[catalog.status == "ok"])
    assert [k for shard in result.shards for k in keys_in(Path(shard))] == keys
    sidecars = [pq.read_table(Path(s).with_suffix(".parquet")) for s in result.shards]
    assert [k for t in sidecars for k in t["key"].to_pylist()] == keys
    assert all(k.encode() for k in keys)
    for table in sidecars:
        table.validate(full=True)
    read = list(webdataset.WebDataset(result.shards, shardshuffle=False))
    assert [s["__key__"].encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for s in read] == keys


def test_hostile_names_do_not_reach_the_terminal(outcome: Any, run: Run, tmp_path: Path) -> None:  # noqa: F811
    folder, result, _ = outcome
    catalog = result.catalog.compute()
    assert catalog.reason.map(str.isprintable).all()
    (tmp_path / f"x{ESCAPE}[red].tar").write_bytes(
        member(f"a.{ESCAPE}".encode()) + member(f"{ESCAPE}".encode()) + member(f"b{ESCAPE}.jpg".encode() + b"\xff")
        + member(f"l{ESCAPE}".encode(), b"", b"2", link=ESCAPE.encode()) + header(f"cut{ESCAPE}.jpg".encode(), 900)
    )  # fmt: skip
    for inputs in ([folder / "in.tar"], [tmp_path / "*.tar"], [tmp_path / f"none{ESCAPE}"]):
        _, lines, err = run("inspect", *inputs)
        shown = "\n".join(lines) + err
        assert all(c.isprintable() or c == "\n" for c in shown), [c for c in shown if not c.isprintable()]
    _, lines, _ = run("inspect", "--json", tmp_path / "*.tar")
    report = json.loads("\n".join(lines))
    assert report["problems"].keys() >= {"no extension", "link", "not UTF-8", "damaged"}


def test_reasons_tell_shards_of_one_name_apart(tmp_path: Path, client: Client, photos, encode, write_tar) -> None:
    jpegs = [encode(photos[i], quality=q) for i, q in ((0, 90), (0, 40), (1, 90), (1, 40))]
    write_tar(tmp_path / "a" / "x.tar", [("one", {"jpg": jpegs[0]})])
    write_tar(tmp_path / "b" / "x.tar", [(f"one{ESCAPE}", {"jpg": jpegs[1]}), ("two", {"jpg": jpegs[3]})])
    write_tar(tmp_path / "b" / "y.tar", [("two", {"jpg": jpegs[2]})])
    dedup = SemanticDedupStage(eps=0.05, n_clusters=1, keep_by=["nbytes"])
    result = tiny_pipeline(str(tmp_path / "*" / "*.tar"), dedup).run(str(tmp_path / "OUT"), client=client)
    reasons = {r.split(",")[0] for r in result.catalog.compute().reason if r}
    assert reasons == {"duplicate of b/x/one\\x1b[2J\\x1b]0;owned\\x07", "duplicate of b/x/two"}


@pytest.mark.parametrize("same", [1000, 2000])
def test_a_key_many_times_is_many_samples_with_keys_of_their_own(
    same: int, tmp_path: Path, client: Client, encode, photos
) -> None:
    jpeg = encode(photos[0].resize((16, 16)))
    entries = [member(b"../same.jpg", jpeg) + member(b"../same.txt", b"%d" % i) for i in range(same)]
    (tmp_path / "in.tar").write_bytes(b"".join(entries) + END)
    pipeline = tiny_pipeline(str(tmp_path / "in.tar"), images_per_tar=5000)
    result = pipeline.run(str(tmp_path / "OUT"), client=client)
    assert result.counts == {"ok": same}
    (shard,) = result.shards
    keys = keys_in(Path(shard))
    sidecar = pq.read_table(Path(shard).with_suffix(".parquet"))
    assert keys == sidecar["key"].to_pylist() == ["../same", *(f"../same_{i}" for i in range(1, same))]
    assert set(sidecar["source_key"].to_pylist()) == {"../same"}
    read = list(webdataset.WebDataset([shard], shardshuffle=False))
    assert [s["txt"] for s in read] == [b"%d" % i for i in range(same)]
    assert all(s["jpg"] == jpeg for s in read)


CLAIMS = {
    "base-256 of 8 EiB": header(b"b.jpg", b"\x80" + (2**63).to_bytes(11, "big")),
    "base-256 of 2^64": header(b"b.jpg", b"\x80" + (2**64).to_bytes(11, "big")),
    "base-256 of all bits": header(b"b.jpg", b"\x80" + b"\xff" * 11),
    "base-256, negative": header(b"b.jpg", b"\xff" * 12),
    "octal, negative": header(b"b.jpg", b"-0000000512\0"),
    "PAX of 8 EiB": pax(size=b"%d" % 2**63) + header(b"b.jpg"),
    "PAX of 2^64": pax(size=b"%d" % 2**64) + header(b"b.jpg"),
    "PAX of 4,299 digits": pax(size=b"9" * 4299) + header(b"b.jpg"),
    "PAX, negative": pax(size=b"-512") + header(b"b.jpg"),
    "PAX header of 1 GB": header(b"x", 10**9, b"x"),
    "long name of 1 GB": header(b"x", 10**9, b"L"),
    "long link of 8 EiB": header(b"x", b"\x80" + (2**63).to_bytes(11, "big"), b"K"),
    "global header of 8 EiB": header(b"x", b"\x80" + (2**63).to_bytes(11, "big"), b"g"),
    "unknown type of 8 EiB": header(b"x", b"\x80" + (2**63).to_bytes(11, "big"), b"Z"),
    "sparse of 8 EiB": header(b"x", b"\x80" + (2**63).to_bytes(11, "big"), b"S"),
    "100,000 PAX records": member(b"x", b"11 abc=de=\n" * 100_000, b"x") + member(b"b.jpg"),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_that_cannot_hold_is_one_row(claim: str, tmp_path: Path) -> None:
    found = index(tmp_path / "a.tar", member(b"a.jpg", b"1") + CLAIMS[claim] + END)
    assert column(found, schema.STATUS) == ["ok", "tar_error"]
    assert column(found, schema.KEY)[0] == "a"
    assert 0 < len(column(found, schema.REASON)[1]) < 10_000
    assert column(found, schema.SPANS) == [[0, 1024], []]


def test_sparse_files_that_claim_terabytes_are_left_out(tmp_path: Path) -> None:
    new = pax(GNU__sparse__major=b"1", GNU__sparse__minor=b"0", GNU__sparse__name=b"s.jpg",
              GNU__sparse__realsize=b"%d" % 2**45) + member(b"s.jpg", b"1\n0\n9\n".ljust(BLOCK, b"\0"))  # fmt: skip
    old = header(b"t.jpg", 0, b"S", magic=b"ustar  \0", tail=bytes(138) + b"77777777777\0")
    found = index(tmp_path / "a.tar", new + old + member(b"a.jpg", b"1") + END)
    assert column(found, schema.KEY) == ["a"]
    assert [p.kind for p in found.problems] == ["sparse file"] * 2


def test_a_size_that_covers_other_members_hides_them_and_overlaps_nothing(tmp_path: Path) -> None:
    inner = member(b"b.jpg", b"2") + member(b"c.jpg", b"3")
    found = index(tmp_path / "a.tar", pax(size=b"%d" % len(inner)) + header(b"a.jpg") + inner + member(b"d.jpg") + END)
    assert column(found, schema.KEY) == ["a", "d"]
    assert column(found, schema.NBYTES) == [len(inner), 4]


def test_a_global_header_cannot_rename_what_is_copied_after_it(tmp_path: Path) -> None:
    inside = pax(path=b"a.jpg") + pax(b"g", path=b"evil.jpg") + member(b"x", b"1")
    found = index(tmp_path / "a.tar", member(b"0.jpg", b"0") + inside + member(b"b.jpg", b"2") + END)
    assert column(found, schema.KEY) == ["0", ""]
    assert "a global header that names the path or size of a member" in column(found, schema.REASON)[1]
    # Before a member it is not part of it, and is not copied.
    found = index(tmp_path / "a.tar", pax(b"g", path=b"evil.jpg") + member(b"b.jpg", b"2") + END)
    assert column(found, schema.SPANS) == [[1024, 1024]]


@pytest.mark.parametrize("first", [pax(path=b"a.jpg"), member(b"L", b"a.jpg\0", b"L")], ids=["PAX", "GNU"])
@pytest.mark.parametrize("second", [pax(path=b"b.jpg"), member(b"L", b"b.jpg\0", b"L")], ids=["PAX", "GNU"])
def test_of_several_names_that_holds_which_webdataset_reads(first: bytes, second: bytes, tmp_path: Path) -> None:
    found = index(tmp_path / "a.tar", first + second + member(b"c.jpg", b"1") + END)
    (sample,) = webdataset.WebDataset([str(tmp_path / "a.tar")], shardshuffle=False)
    assert column(found, schema.KEY) == [sample["__key__"]] == ["a"]


def test_a_nul_in_a_name_ends_it(tmp_path: Path) -> None:
    data = pax(path=b"a\0b.jpg") + member(b"x", b"1") + pax(path=b"c.jpg\0/../../d") + member(b"y", b"2") + END
    found = index(tmp_path / "a.tar", data)
    assert column(found, schema.KEY) == ["c"]
    assert kinds(found) == {"no extension"}


def test_one_key_with_100_000_extensions_is_one_sample(tmp_path: Path) -> None:
    found = index(tmp_path / "a.tar", (header(b"a.%d" % i) for i in range(100_000)))
    assert column(found, schema.MEMBERS) == [[str(i) for i in range(100_000)]]
    assert column(found, schema.REASON) == ["no image among its members: 0, 1, 2, 3, 4, 5, 6, 7 and 99992 more"]


BOMBS = {
    "empty files": "b''.join(header(b'%07d.jpg' % i) for i in range(k, k + 1000))",
    "directories": "b''.join(header(b'%07d/' % i, 0, b'5') for i in range(k, k + 1000))",
    "links": "b''.join(header(b'%07d.jpg' % i, 0, b'2', link=b'/etc/passwd') for i in range(k, k + 1000))",
    "one key": "header(b'a.jpg') * 1000",
}
MEASURE = """
import resource, sys, time
sys.path.insert(0, {tests!r})
from test_tar import header
from imgcurate.shards import index_shard
with open({path!r}, "wb") as file:
    for k in range(0, {n}, 1000):
        file.write({block})
index_shard({small!r}, 0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
index = index_shard({path!r}, 0)
print(len(index.table), len(index.problems), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_of_empty_members_takes_no_more_memory_than_its_bytes(bomb: str, tmp_path: Path, shards: Path) -> None:
    n = 100_000
    script = MEASURE.format(tests=str(Path(__file__).parent), path=str(tmp_path / "a.tar"), n=n, block=BOMBS[bomb],
                            small=str(shards / "00000.tar"))  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    rows, problems, rss = map(int, done.stdout.split())
    assert (rows, problems) == {
        "empty files": (n, 1), "directories": (0, n + 1), "links": (0, n + 1), "one key": (n, n),
    }[bomb]  # fmt: skip
    assert rss < 2 * n * BLOCK


@pytest.fixture
def odd_shard(tmp_path: Path) -> Path:
    """Return a shard that has one of each irregularity that `inspect` counts."""
    first = b"".join((
        member(b"a.jpg"), member(b"b.jpg"), member(b"a.txt"), member(b"b.jpg"), member(b"caf\xe9.jpg"),
        header(b"dir/", 0, b"5"), member(b"._a.jpg"), header(b"l.jpg", 0, b"2", link=b"/etc/passwd"),
        header(b"h.jpg", 0, b"1", link=b"a.jpg"), header(b"p", 0, b"6"), header(b"s.jpg", 0, b"S", magic=b"ustar  \0"),
        header(b"z", 0, b"Z"), member(b"readme"), member(b"__meta__"), END,
    ))  # fmt: skip
    path = tmp_path / "odd.tar"
    path.write_bytes(first + member(b"c.jpg") + header(b"d.jpg", 900))
    return path


ODD = {
    "scattered members": 1, "duplicate key": 1, "not UTF-8": 1, "directory": 1, "hidden file": 1, "link": 2,
    "special file": 1, "sparse file": 1, "unknown type": 1, "no extension": 1, "metadata": 1, "concatenated": 1,
    "damaged": 1,
}  # fmt: skip


def test_inspect_reports_each_irregularity(run: Run, odd_shard: Path, tmp_path: Path) -> None:  # noqa: F811
    _, lines, _ = run("inspect", "--json", odd_shard)
    report = json.loads("\n".join(lines))
    assert report["problems"] == report["shards"][0]["problems"] == ODD
    assert len(report["shards"][0]["details"]) == sum(ODD.values())
    (tmp_path / "open.tar").write_bytes(member(b"a.jpg"))
    code, lines, _ = run("inspect", odd_shard, tmp_path / "open.tar")
    assert code == 0
    text = " ".join(re.sub(r"[│┃|]", " ", "\n".join(lines)).split())
    for kind in (*ODD, "no end mark"):
        assert f": {kind}: " in text
    assert lines[-1].endswith("15 problems")


@pytest.mark.parametrize(
    ("make", "code", "words"),
    [
        (lambda p: p.write_bytes(b""), 0, "empty file (0 bytes)"),
        (
            lambda p: p.write_bytes(end_of_archive(0)),
            0,
            "0 samples (0 with an image), 0 members, 10,240 bytes, 0 problems",
        ),
        (os.mkfifo, 2, "no regular file"),
        (lambda p: p.symlink_to(p), 2, "cannot read"),
        (lambda p: p.symlink_to("/dev/zero"), 2, "no regular file"),
        (lambda p: None, 2, "no such input"),
    ],
    ids=["empty", "no members", "fifo", "loop", "device", "missing"],
)
def test_inspect_says_in_a_line_what_an_input_is(
    make: Callable[[Path], Any],
    code: int,
    words: str,
    tmp_path: Path,
    run: Run,  # noqa: F811
) -> None:
    path = tmp_path / "a.tar"
    make(path)
    found, lines, err = run("inspect", path)
    assert found == code
    assert words in " ".join("\n".join([*lines, err]).split())
    assert "Traceback" not in err
    assert err.count("\n") == (code > 0)


@pytest.mark.parametrize("name", ["n" * 5000, "a\0b.tar", "d/" * 3000 + "a.tar", "x/" + "y" * 300])
def test_names_that_no_file_can_have_are_no_inputs(name: str, run: Run, tmp_path: Path) -> None:  # noqa: F811
    code, lines, err = run("inspect", f"{tmp_path}/{name}")
    assert (code, lines) == (2, [])
    assert re.match("imgcurate: wrong usage: (no such input|cannot read)", err)
    assert err.count("\n") == 1


def test_a_file_whose_name_is_not_utf8_is_refused_in_a_line(run: Run, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / os.fsdecode(b"caf\xe9.tar")
    path.write_bytes(member(b"a.jpg") + END)
    for inputs in (str(path), str(tmp_path / "*.tar")):
        with pytest.raises(InputError, match=r"udce9.tar' is not UTF-8"):
            expand_urls(inputs)
        code, _, err = run("inspect", inputs)
        assert code == 2
        assert err.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_inspect_of_a_file_without_permission(run: Run, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "a.tar"
    path.write_bytes(member(b"a.jpg") + END)
    path.chmod(0)
    code, _, err = run("inspect", path)
    assert code == 1
    assert re.fullmatch(r"imgcurate: failed: cannot read .*: Permission denied\n", err)


def test_a_tar_in_a_tar_is_a_member(tmp_path: Path) -> None:
    inner = member(b"b.jpg") + END
    found = index(tmp_path / "a.tar", member(b"a.tar", inner) + padding(0) + END)
    assert column(found, schema.KEY) == ["a"]
    assert column(found, schema.STATUS) == ["no_image"]
