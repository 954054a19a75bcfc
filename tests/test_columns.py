"""Filters on columns: values, lists of values, keys of JSON members."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client
from PIL import Image
from typer.testing import CliRunner

import imgcurate as ic
from imgcurate import value_lists
from imgcurate.cli import app
from imgcurate.errors import ConfigError, InputError
from imgcurate.members import MemberColumns, json_value
from imgcurate.options import column_options, json_columns
from imgcurate.stages.rules import rule_of
from imgcurate.value_lists import ValueList, as_texts, value_list

LICENSES = ["cc0", "cc-by", None, "nc", "cc0", "no"]
QUICK = ["--workers", "1", "--no-report"]
MARK = ["--json-column", "pwatermark"]
JSON_COLUMNS = {"meta.license": "text", "pwatermark": "number", "width": "integer", "sfw": "boolean", "uid": "text"}


@pytest.fixture
def shards(tmp_path: Path, photos, encode, write_tar) -> Path:
    """Return a folder of two tars of six photos each, with JSON members of several kinds."""
    (tmp_path / "in").mkdir()
    for shard in range(2):
        samples = []
        for i, license_ in enumerate(LICENSES):
            record = {
                "meta": {"license": license_} if license_ else {}, "pwatermark": [0.1, 0.9, "0.2", "x", None, True][i],
                "width": 100 + i, "sfw": [True, False, None, 1, True, False][i], "uid": f"u{shard}{i}",
            }  # fmt: skip
            data = json.dumps(record).encode() if i != 5 else b"{not json"
            samples.append((f"{shard}{i}", {"jpg": encode(photos[6 * shard + i]), "json": data}))
        write_tar(tmp_path / "in" / f"{shard:05d}.tar", samples)
    return tmp_path / "in"


def run(shards: Path, out: Path, client: Client, *stages: Any) -> Any:
    source, reader = ic.FilePartitioningStage(str(shards)), ic.ImageReaderStage(json_columns=JSON_COLUMNS)
    return ic.Pipeline([source, reader, *stages, ic.ImageWriterStage()]).run(str(out), client=client)


def rows_of(result: Any) -> pd.DataFrame:
    return result.catalog.compute().sort_values("uid").reset_index(drop=True)


def test_keys_of_json_members_are_columns(shards: Path) -> None:
    ddf = ic.read_webdataset(str(shards), json_columns=JSON_COLUMNS)
    frame = ddf.compute(scheduler="sync")
    assert list(frame.columns[-5:]) == ["meta.license", "pwatermark", "source_width", "sfw", "source_uid"]
    assert frame.dtypes.to_dict() == ddf.dtypes.to_dict()
    assert frame["meta.license"].fillna("-").tolist() == ["cc0", "cc-by", "-", "nc", "cc0", "-"] * 2
    assert frame.pwatermark.fillna(-1).tolist() == [0.1, 0.9, 0.2, -1, -1, -1] * 2
    assert frame.source_width.fillna(-1).tolist() == [100, 101, 102, 103, 104, -1] * 2
    assert frame.sfw.astype(object).where(frame.sfw.notna(), None).tolist() == [True, False, None, None, True, None] * 2
    assert frame.source_uid.dropna().tolist() == [f"u{s}{i}" for s in range(2) for i in range(5)]


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("number", "3e5", 3e5), ("number", 10**400, None), ("number", float("nan"), None), ("number", [1], None),
        ("integer", 2**63 - 1, 2**63 - 1), ("integer", 2**63, None), ("integer", "-12", -12), ("integer", "3.0", 3),
        ("integer", 3.5, None), ("integer", True, None), ("text", 12, "12"), ("text", {"a": ["é"]}, '{"a": ["é"]}'),
        ("text", "\ud800x", "?x"), ("text", "", ""), ("boolean", "true", None),
    ],
)  # fmt: skip
def test_values_of_json_become_what_was_asked_for(kind: str, value: Any, expected: Any) -> None:
    members = MemberColumns.of((), {"k": kind})
    assert members.arrays({"json": [json.dumps({"k": value}), None, "[1]"]})["k"].to_pylist() == [expected, None, None]


def test_a_key_with_dots_may_be_a_key_or_a_path() -> None:
    assert json_value('{"a.b": 1, "a": {"b": 2}}', "a.b") == 1
    assert json_value('{"a": {"b": 2}}', "a.b") == 2
    assert json_value("[" * 100_000, "a") is None
    both = MemberColumns.of(("json", "json"), {"k": "number"})
    assert list(both.arrays({"json": ['{"k": 1}']})) == ["json", "k"]


def test_values_decide_and_are_decided_anew(shards: Path, client: Client, tmp_path: Path) -> None:
    wanted = ic.ColumnFilterStage(
        is_in={"meta.license": ["cc0", "nc", "no"]}, is_not_in={"sfw": [False], "key": ["10"]}
    )
    result = run(shards, tmp_path / "OUT", client, wanted)
    rows = rows_of(result)
    assert list(rows.key[rows.status == "ok"]) == ["00", "03", "04", "13", "14"]
    assert dict(zip(rows.key, rows.reason, strict=True)) == {
        "00": "", "03": "", "04": "", "13": "", "14": "",
        "01": "meta.license 'cc-by' is not in 'cc0', 'nc', 'no'",
        "11": "meta.license 'cc-by' is not in 'cc0', 'nc', 'no'",
        "02": "meta.license is missing", "12": "meta.license is missing", "10": "key '10' is in '10'",
        "05": "meta.license is missing", "15": "meta.license is missing",
    }  # fmt: skip
    assert not ic.verify_run(str(tmp_path / "OUT"), n_workers=1).problems
    changes = {
        "ColumnFilterStage": {"is_in": {}, "is_not_in": {"sfw": [False]}, "ranges": {"source_width": (None, 102)}}
    }
    anew = ic.refilter(result.output_dir, str(tmp_path / "ANEW"), changes, client=client)
    direct = run(shards, tmp_path / "DIRECT", client, ic.ColumnFilterStage(**changes["ColumnFilterStage"]))
    pd.testing.assert_frame_equal(rows_of(anew), rows_of(direct))
    assert anew.counts == {"ok": 4, "column": 8}


@pytest.mark.parametrize("kind", ["txt", "parquet", "csv"])
def test_lists_decide(kind: str, shards: Path, client: Client, tmp_path: Path) -> None:
    path, wanted = tmp_path / f"list.{kind}", ["u01", "u13", "u99", "u01"]
    if kind == "txt":
        path.write_bytes("\ufeff".encode() + "\r\n".join([*wanted, "", ""]).encode())
    elif kind == "csv":
        pd.DataFrame({"n": range(4), "source_uid": wanted}).to_csv(path, index=False)
    else:
        pq.write_table(pa.table({"other": pa.array(wanted).dictionary_encode()}), path)
    result = run(shards, tmp_path / "OUT", client, ic.ColumnFilterStage(is_in={"source_uid": str(path)}))
    rows = rows_of(result)
    assert list(rows.key[rows.status == "ok"]) == ["01", "13"]
    assert rows.reason[0] == f"source_uid 'u00' is not in list.{kind}"
    # The list has changed: what is decided anew goes by what it is now, and the run does not go on with another.
    path.write_text("source_uid\nu02\n") if kind != "parquet" else pq.write_table(
        pa.table({"source_uid": ["u02"]}), path
    )
    anew = ic.refilter(result.output_dir, str(tmp_path / "ANEW"), client=client)
    assert list(rows_of(anew).key[rows_of(anew).status == "ok"]) == ["02"]
    with pytest.raises(ConfigError, match="lists_sha256"):
        run(shards, tmp_path / "OUT", client, ic.ColumnFilterStage(is_in={"source_uid": str(path)}))
    path.unlink()
    with pytest.raises(InputError, match="there is no list"):
        ic.refilter(result.output_dir, str(tmp_path / "ANEW2"), client=client)
    others = {"ColumnFilterStage": {"is_in": {}, "is_not_in": {"source_uid": ["u05"]}}}
    assert ic.refilter(result.output_dir, str(tmp_path / "ANEW3"), others, client=client).counts == {"ok": 12}


def test_a_list_that_changes_while_a_run_reads_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("a\nb")
    stage = ic.ColumnFilterStage(is_not_in={"key": str(path)})
    stage.fingerprint()
    rule = stage.rules[0]
    assert list(rule.keeps(np.array(["a", "c"], object))) == [False, True]
    path.write_text("a\nb\nc")
    with pytest.raises(InputError, match="has changed since the run began"):
        rule.keeps(np.array(["a", "c"], object))


def test_a_list_contains_what_a_set_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    known = [f"http://a.example/{i}" for i in rng.integers(0, 10**6, 5000)]
    asked = np.array([f"http://a.example/{i}" for i in rng.integers(0, 10**6, 20_000)], object)
    (tmp_path / "list.txt").write_text("\n".join(known))
    expected = [text in set(known) for text in asked]
    assert sum(expected) > 50
    for block in (16 * 1024**2, 1000, 7):
        monkeypatch.setattr(value_lists, "_BLOCK_BYTES", block)
        value_lists._value_list.cache_clear()
        found = value_list(str(tmp_path / "list.txt"), "url")
        assert len(found) == len(set(known))
        assert list(found.contains(asked)) == expected
    # Hashes that share their first half.
    hashes = np.array([[5, 1], [5, 2], [5, 9], [7, 1], [5, 2]], np.uint64)
    few = ValueList(hashes)
    monkeypatch.setattr(value_lists, "_hashes", lambda texts: np.array([[5, int(t)] for t in texts], np.uint64))
    assert list(few.contains(np.array(["1", "2", "3", "9", "10"], object))) == [True, True, False, True, False]
    empty = ValueList(np.empty((0, 2), np.uint64))
    assert list(empty.contains(np.array(["1"], object))) == [False]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("list.parquet", b"PAR1 no", "cannot read the list"),
        ("list.csv", b"a,b\n1,2\n", "has no column 'key': a, b"),
        ("list.csv", b"", "has no column 'key': it has none at all"),
        ("list.txt", b"\xff\xfe\x00", "is no text in UTF-8"),
        ("list.bin", b"x" * 2_000_000, "a line of more than"),
    ],
)
def test_lists_that_are_none_are_refused(name: str, content: bytes, words: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(value_lists, "_BLOCK_BYTES", 1024**2)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        value_list(str(tmp_path / name), "key")
    pq.write_table(pa.table({"key": [0.5]}), tmp_path / "list.parquet")
    with pytest.raises(InputError, match="'key' is double: it should hold text or whole numbers"):
        value_list(str(tmp_path / "list.parquet"), "key")
    with pytest.raises(InputError, match="no such input"):
        value_list(str(tmp_path / "nothing.txt"), "key")


def test_values_are_compared_as_text() -> None:
    assert as_texts(np.array([True, False])).tolist() == ["true", "false"]
    assert as_texts(np.array([1, 2**63 - 1])).tolist() == ["1", str(2**63 - 1)]
    rule = ic.ValueRule("n", [1, "2"], "x")
    assert list(rule.keeps(np.array([1, 2, 3]))) == [True, True, False]
    assert rule_of({"column": "n", "values": [1, "2"], "status": "x", "among": True, "sha256": None}) == rule
    assert rule.reason(3) == "n 3 is not in 1, '2'"
    assert ic.ValueRule("n", list("abcdefg"), "x").words == "n in 'a', 'b', 'c', 'd' and 3 more"
    rule.check_type(pa.int32())
    for values, type_, words in (
        ([False], pa.string(), "never False: if text such as 'no' was meant"),
        (["a"], pa.float32(), "should hold text, whole numbers or booleans, not float"),
    ):
        with pytest.raises(ConfigError, match=words):
            ic.ValueRule("n", values, "x").check_type(type_)


class Letters(ic.ProcessingStage):
    """A stage of one's own with a column of text, and a rule on it."""

    name = "letters"
    needs = ("key",)
    adds = {"letter": "string", "even": "bool"}
    rules = (ic.ValueRule("letter", ("a", "b"), "letters"), ic.ValueRule("even", (True,), "odd", among=False))

    def process(self, batch: ic.ImageBatch) -> ic.ImageBatch:
        numbers = [int(key[-1]) for key in batch["key"]]
        batch["letter"] = [None if n == 5 else "abc"[n % 3] for n in numbers]
        batch["even"] = np.array(numbers) % 2 == 0
        return batch


def test_stages_of_ones_own_have_rules_on_values(shards: Path, client: Client, tmp_path: Path) -> None:
    result = run(shards, tmp_path / "OUT", client, Letters())
    rows = rows_of(result)
    assert list(rows.status) == ["odd", "ok", "letters", "ok", "odd", "letters"] * 2
    assert rows.reason[0] == "even true is in true"
    assert list(rows.reason[[2, 5]]) == ["letter 'c' is not in 'a', 'b'", "letter is missing"]
    anew = ic.refilter(result.output_dir, str(tmp_path / "ANEW"), {"ColumnFilterStage": {"is_in": {"key": ["03"]}}})
    assert anew.counts == {"ok": 1, "odd": 4, "letters": 4, "column": 3}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ic.ColumnFilterStage(is_in={"a": []}), "a should be some values"),
        (lambda: ic.ColumnFilterStage(is_in={"a": 5}), "a should be some values"),
        (lambda: ic.ColumnFilterStage(is_in={"a": [0.5]}), "0.5 should be text, a whole number"),
        (lambda: ic.ColumnFilterStage(is_not_in=["a"]), "is_not_in=.* should be a mapping"),
        (lambda: ic.ImageReaderStage(json_columns=["a"]), "json_columns=.* should be a mapping"),
        (lambda: ic.ImageReaderStage(json_columns={"a": "nubmer"}), "'nubmer', not number.*did you mean 'number'"),
        (lambda: ic.ImageReaderStage(json_columns={"a": None}), "a is said to hold None"),
        (lambda: column_options(None, ["a"], None), "--is-in a should be COLUMN=VALUE"),
        (lambda: column_options(None, None, ["a=@"]), "--is-not-in a=@ should be"),
        (lambda: column_options(None, ["a=1", "a=@f"], None), "takes one file, or values"),
        (lambda: json_columns(["a:txt"]), "--json-column a:txt should be KEY"),
        (lambda: json_columns(["a", "a:text"]), "given twice"),
    ],
)
def test_parameters_that_cannot_work_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_values_from_the_command_line(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "out.txt").write_text("u04\n")
    options = ["--json-column", "uid:text", "--json-column", "meta.license:text", "--is-in", "meta.license=cc0"]
    options += [
        "--is-in",
        "meta.license=nc",
        "--is-not-in",
        f"source_uid=@{tmp_path / 'out.txt'}",
        "--json-column",
        "pwatermark",
    ]
    model, out = ["--encoder", "none", *QUICK], str(tmp_path / "OUT")
    done = CliRunner().invoke(app, ["curate", str(shards), "-o", out, *model, *options, "--json"])
    assert done.exit_code == 0, done.output
    kept = pd.concat(pd.read_parquet(p) for p in sorted((tmp_path / "OUT/shards").glob("*.parquet")))
    assert sorted(kept.key) == ["00", "03", "10", "13", "14"]
    again = [
        "refilter",
        out,
        "-o",
        str(tmp_path / "ANEW"),
        "--where",
        "pwatermark=:0.5",
        "--workers",
        "1",
        "--no-report",
    ]
    done = CliRunner().invoke(app, again)
    assert done.exit_code == 0, done.output
    kept = pd.read_parquet(tmp_path / "ANEW/shards/00000.parquet")
    assert sorted(kept.key) == ["00", "10"]


def test_a_column_that_is_misspelt_is_told_with_those_of_sidecars(shards: Path, tmp_path: Path) -> None:
    pd.DataFrame({"key": ["00"], "pwatermark": [0.1]}).to_parquet(shards / "00000.parquet")
    stages = [ic.FilePartitioningStage(str(shards)), ic.ImageReaderStage()]
    with pytest.raises(ConfigError, match=r"did you mean 'pwatermark'.*--json-column"):
        ic.Pipeline([*stages, ic.ColumnFilterStage({"pwatermrk": (None, 0.5)})]).plan()


class Counting(ic.ProcessingStage):
    """A stage of one's own that dropped samples do not come to, and that says how many came at once."""

    name = "counting"
    needs = ("image", "key")
    views = (ic.PixelView(8, 8),)
    adds = {"of_batch": "int32", "mean": "float32"}
    skip_dropped = True

    def process(self, batch: ic.ImageBatch) -> ic.ImageBatch:
        batch["of_batch"] = np.full(len(batch), len(batch))
        batch["mean"] = batch.pixels(self.views[0]).float().mean(dim=(1, 2, 3))
        return batch


class Odd(ic.ProcessingStage):
    """Drops by its code, and makes a column of its own."""

    name = "odd"
    needs = ("key",)
    adds = {"last": "int8"}

    def process(self, batch: ic.ImageBatch) -> ic.ImageBatch:
        batch["last"] = [int(key[-1]) for key in batch["key"]]
        batch.drop([key.endswith("1") for key in batch["key"]], "ends so")
        return batch


def test_what_was_dropped_is_not_computed_on(shards: Path, client: Client, tmp_path: Path) -> None:
    where = ic.ColumnFilterStage({"source_width": (101, None)}, is_not_in={"meta.license": ["nc"]})
    rules = [ic.ImageQualityFilterStage({"brightness": (0.5, None)}), where, Odd()]

    def make(out: str, *stages: Any) -> pd.DataFrame:
        source = ic.FilePartitioningStage(str(shards), 2)
        reader = ic.ImageReaderStage(dali_batch_size=3, json_columns=JSON_COLUMNS)
        done = ic.Pipeline([source, reader, *stages, ic.SemanticDedupStage(), ic.ImageWriterStage()]).run(
            str(tmp_path / out), client=client
        )
        return rows_of(done)

    class All(Counting):
        skip_dropped = False

    tiny = ic.ImageEmbeddingStage("tiny-image")
    spared, whole = make("A", *rules, Counting(), tiny), make("B", *rules, All(), tiny)
    assert list(spared.status) == list(whole.status)
    assert list(spared.reason) == list(whole.reason)
    kept = np.array(spared.status == "ok")
    assert list(spared.key[kept]) == ["02", "04", "12", "14"]
    assert whole.embedding.notna().all()
    assert list(spared.embedding.notna()) == list(kept)
    assert list(spared["mean"].notna()) == list(kept)
    assert spared["last"].notna().all()
    assert spared.brightness.tolist() == whole.brightness.tolist()
    np.testing.assert_array_equal(spared["mean"][kept], whole["mean"][kept])
    for ours, theirs in zip(spared.embedding[kept], whole.embedding[kept], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    # Four are left of four batches of three: one whole batch, and the rest.
    assert spared.of_batch[kept].tolist() == [3, 3, 3, 1]


def test_what_was_spared_is_not_brought_back(shards: Path, client: Client, tmp_path: Path) -> None:
    embed = ic.ImageEmbeddingStage("tiny-image", skip_dropped=True)
    result = run(shards, tmp_path / "OUT", client, ic.ColumnFilterStage({"pwatermark": (None, 0.5)}), embed)
    assert result.counts == {"ok": 4, "column": 8}
    for change in (None, {"ranges": {"pwatermark": (None, 0.9)}}, {"ranges": {}}):
        with pytest.raises(ConfigError, match=r"did not embed what pwatermark <= 0.5 did not keep \(skip_dropped\)"):
            ic.refilter(result.output_dir, str(tmp_path / "ANEW"), {"ColumnFilterStage": change}, client=client)
    stricter = {"ColumnFilterStage": {"ranges": {"pwatermark": (None, 0.5)}, "is_in": {"key": ["00", "02"]}}}
    anew = ic.refilter(result.output_dir, str(tmp_path / "ANEW"), stricter, client=client)
    assert anew.counts == {"ok": 2, "column": 10}
    with pytest.raises(ConfigError, match="skip_dropped=1 should be true or false"):
        ic.ImageEmbeddingStage("tiny-image", skip_dropped=1)


def test_the_command_puts_filters_before_an_encoder_that_skips(shards: Path, tmp_path: Path) -> None:
    options = ["--encoder", "tiny-image", "--skip-dropped", *MARK, "--where", "pwatermark=:0.5", *QUICK]
    done = CliRunner().invoke(app, ["curate", str(shards), "-o", str(tmp_path / "OUT"), *options])
    assert done.exit_code == 0, done.output
    rows = pd.concat(pd.read_parquet(p) for p in sorted((tmp_path / "OUT/catalog").glob("*.parquet")))
    assert rows.embedding.notna().sum() == 4
    fails = ["curate", str(shards), "-o", str(tmp_path / "X"), "--encoder", "none", "--skip-dropped"]
    assert "it needs an --encoder" in str(CliRunner().invoke(app, fails).exception)


class Files(ic.ProcessingStage):
    """A stage of one's own that looks at the files."""

    name = "files"
    needs = ("image",)
    encoded = True
    adds = {"digest": "string", "pixels": "int64"}

    def process(self, batch: ic.ImageBatch) -> ic.ImageBatch:
        assert isinstance(batch.encoded, (list, tuple))
        batch["digest"] = [hashlib.sha256(data).hexdigest() for data in batch.encoded]
        sizes = [Image.open(io.BytesIO(data)).size for data in batch.encoded]
        assert [s[0] for s in sizes] == list(batch["width"])
        batch["pixels"] = np.array([w * h for w, h in sizes])
        return batch


@pytest.mark.parametrize("skips", [False, True])
def test_stages_of_ones_own_see_the_files(
    skips: bool, shards: Path, client: Client, tmp_path: Path, photos, encode
) -> None:
    members = {"bad": {"jpg": b"no image"}, "good": {"jpg": encode(Image.new("RGB", (50, 40)))}}
    with tarfile.open(shards / "00002.tar", "w") as tar:
        for key, files in members.items():
            for ext, data in files.items():
                info = tarfile.TarInfo(f"{key}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    class Late(Files):
        skip_dropped = skips

    before = ic.ColumnFilterStage(is_not_in={"key": ["01", "12"]})
    rows = rows_of(run(shards, tmp_path / "OUT", client, before, Late(), ic.ImageEmbeddingStage("tiny-image")))
    stored = {}
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            stored |= {m.name: hashlib.sha256(tar.extractfile(m).read()).hexdigest() for m in tar if ".jpg" in m.name}
    seen = rows.key[rows.digest.notna()]
    assert len(seen) == (11 if skips else 13)
    assert dict(zip(seen, rows.digest.dropna(), strict=True)) == {k: stored[f"{k}.jpg"] for k in seen}
    assert rows.status[rows.key == "bad"].tolist() == ["decode_error"]


def test_files_that_nobody_asked_for_are_not_there() -> None:
    batch = ic.ImageBatch(pd.DataFrame({"key": ["a", "b"]}), encoded=[b"a", b"b"])
    assert list(batch.part(1, 2).encoded) == [b"b"]
    assert list(ic.ImageBatch.concat([batch.take(np.array([1])), batch]).encoded) == [b"b", b"a", b"b"]
    batch.remove_pixels()
    for none in (batch, ic.ImageBatch(pd.DataFrame({"key": ["a"]}))):
        with pytest.raises(ConfigError, match="set 'encoded = True' in the stage"):
            _ = none.encoded


@pytest.mark.parametrize("spared", [True, False])
def test_another_list_is_another_rule(spared: bool, shards: Path, client: Client, tmp_path: Path) -> None:
    """Neither what was not embedded, nor what code may have dropped, comes back by a list that is shorter now."""
    path = tmp_path / "out.txt"
    path.write_text("00\n01\n13\n")
    where = ic.ColumnFilterStage(is_not_in={"key": str(path)})
    after = ic.ImageEmbeddingStage("tiny-image", skip_dropped=True) if spared else Odd()
    result = run(shards, tmp_path / "OUT", client, where, after)
    same = ic.refilter(result.output_dir, str(tmp_path / "SAME"), client=client)
    assert same.counts == result.counts
    path.write_text("00\n")
    words = "did not embed what key not in out.txt" if spared else "were dropped as 'odd' by the code of a stage"
    with pytest.raises(ConfigError, match=words):
        ic.refilter(result.output_dir, str(tmp_path / "ANEW"), client=client)
