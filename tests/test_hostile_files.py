"""What a hostile tester did to files, frames and stages, and what has to come of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from distributed import Client
from typer.testing import CliRunner

import imgcurate as ic
from imgcurate import sidecars
from imgcurate.cli import app
from imgcurate.errors import ConfigError, ImgcurateError
from imgcurate.members import MemberColumns
from imgcurate.storage import StorageError, exclusive


def run(source: Path, out: Path, client: Client, *stages: Any) -> Any:
    return ic.Pipeline([ic.FilePartitioningStage(str(source)), ic.ImageReaderStage(), *stages]).run(
        str(out), client=client
    )


@pytest.mark.parametrize("depth", [900, 20_000])
def test_metadata_that_nests_without_end_is_a_warning(
    depth: int, tmp_path: Path, client: Client, photos, encode, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in").mkdir()
    for i in range(2):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(encode(photos[i]))
    nested = '{"file_name":"0.jpg","s":' + "[" * depth + "]" * depth + "}"
    (tmp_path / "in" / "metadata.jsonl").write_text(nested + '\n{"file_name":"1.jpg","s":[]}\n')
    result = run(tmp_path / "in", tmp_path / "OUT", client, ic.ImageEmbeddingStage("tiny-image"))
    assert result.counts == {"ok": 2}
    assert f"nests {depth + 1:,} brackets, more than 200" in caplog.text


def test_brackets_are_counted_within_a_line() -> None:
    assert sidecars._depth(b'{"a":[[1],[2]]}\n' * 3) == 3
    assert sidecars._depth(b'{"a":":[ :["}\n' * 1000) <= 3
    assert sidecars._depth(b"") == 0


class Low(ic.ProcessingStage):
    """A stage of one's own with a strict rule on a number that no float64 is."""

    name = "low"
    needs = ("key",)
    adds = {"f32": "float32", "big": "int64"}
    rules = (ic.Rule("f32", "<", 0.7, "low"), ic.Rule("big", ">=", 2**53 + 1, "big"))

    def process(self, batch: ic.ImageBatch) -> ic.ImageBatch:
        n = np.arange(len(batch))
        batch["f32"] = np.where(n % 3 == 0, 0.7, 0.1).astype(np.float32)
        batch["big"] = 2**53 + n % 2
        return batch


def test_rules_are_undone_in_the_arithmetic_that_they_decided_in(shards: Path, tmp_path: Path, client: Client) -> None:
    result = run(shards, tmp_path / "OUT", client, Low(), ic.ColumnFilterStage({"nbytes": (0, None)}))
    assert set(result.counts) == {"ok", "low", "big"}
    changes = {"ColumnFilterStage": {"ranges": {"f32": (None, 0.05)}}}
    anew = ic.refilter(result.output_dir, str(tmp_path / "ANEW"), changes, client=client)
    assert anew.counts == {
        "low": result.counts["low"], "big": result.counts["big"], "column": result.counts["ok"],
    }  # fmt: skip


class Shrinks(ic.ProcessingStage):
    """A stage of one's own that changes the frame of its batch in place."""

    needs = ("key",)
    adds = {"bytes": "int64"}
    how = "drop"

    def process(self, batch: ic.ImageBatch) -> ic.ImageBatch:
        if self.how == "drop":
            batch.rows.drop(batch.rows.index[:1], inplace=True)
        else:
            batch.rows.sort_values("nbytes", inplace=True)
        batch["bytes"] = batch.rows["nbytes"].to_numpy()
        return batch


@pytest.mark.parametrize(
    ("how", "words"), [("drop", "with all its rows"), ("sort", "rows of the batch in their order")]
)
def test_rows_that_a_stage_changes_in_place_are_refused(how: str, words: str, shards, tmp_path, client) -> None:
    stage = Shrinks()
    stage.how = how
    with pytest.raises(ImgcurateError, match=words):
        run(shards, tmp_path / "OUT", client, stage)


def test_samples_do_not_leave_without_a_reason() -> None:
    batch = ic.ImageBatch(pd.DataFrame({"key": ["a", "b"]}))
    for reason in ("", " ", None, 5):
        with pytest.raises(ConfigError, match="reason"):
            batch.drop([True, False], reason)


def test_shards_are_written_to_a_folder_by_one_at_a_time(shards: Path, tmp_path: Path) -> None:
    ddf = ic.read_webdataset(str(shards))
    (tmp_path / "W").mkdir()
    with exclusive(str(tmp_path / "W")), pytest.raises(StorageError, match="is writing to"):
        ic.write_webdataset(ddf, str(tmp_path / "W"))
    assert not list((tmp_path / "W").glob("*.tar"))
    ic.write_webdataset(ddf, str(tmp_path / "W"))
    with pytest.raises(ConfigError, match="holds shards already"):
        ic.write_webdataset(ddf, str(tmp_path / "W"))


def test_nothing_is_written_over_what_is_no_page_or_log(shards: Path, tmp_path: Path, client: Client) -> None:
    done = run(shards, tmp_path / "OUT", client, ic.ImageEmbeddingStage("tiny-image"), ic.ImageWriterStage())
    out, image = Path(done.output_dir), tmp_path / "x.jpg"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    image.write_bytes(b"")
    victims = [out / "manifest.json", out / "catalog/part-00000.parquet", next((out / "shards").glob("*.tar"))]
    commands = [["report", str(out), "-o", str(victim)] for victim in victims]
    model = ["--encoder", "tiny-image", "--workers", "1"]
    commands += [["curate", str(shards), "-o", str(tmp_path / "X"), *model, "--performance-report", str(victims[2])]]
    commands += [["curate", str(shards), "-o", str(tmp_path / "X"), *model, "--log-json", str(victims[2])]]
    commands += [["export", str(out), "-o", str(out / folder)] for folder in ("catalog", "shards", "dedup/x")]
    for command in commands:
        failed = CliRunner().invoke(app, command)
        assert failed.exit_code, command
        assert isinstance(failed.exception, ConfigError), command
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "X").exists()
    page = tmp_path / "page.html"
    for _ in range(2):
        assert Path(ic.make_report(str(out), str(page))).is_file()


@pytest.mark.parametrize("change", [lambda uid: uid + 2**62, lambda uid: -uid - 1, lambda uid: uid + 2**56])
def test_uids_that_are_none_are_refused(change: Any, shards: Path, tmp_path: Path) -> None:
    ddf = ic.embed(ic.read_webdataset(str(shards)), model="tiny-image")
    with pytest.raises(ConfigError, match=r"uid -?\d+ is not one: expected 0 to 2\^56 - 1"):
        ic.semantic_dedup(ddf.assign(uid=change(ddf.uid)), scratch_dir=str(tmp_path / "S"))


def test_a_short_override_does_not_hide_what_is_wrong(shards: Path, tmp_path: Path) -> None:
    stages = "- SemanticDedupStage: {eps: 'much'}\n"
    (tmp_path / "p.yaml").write_text(
        f"inputs: {shards}\nstages:\n- ImageEmbeddingStage: {{model: tiny-image}}\n{stages}"
    )
    failed = CliRunner().invoke(
        app, ["run", str(tmp_path / "p.yaml"), "-o", str(tmp_path / "X"), "--set", "workers=null"]
    )
    assert isinstance(failed.exception, ConfigError)
    assert "eps" in str(failed.exception)


@pytest.mark.parametrize("shape", [(), (0,)])
def test_embeddings_of_no_shape_are_refused(
    shape: tuple[int, ...], shards: Path, tmp_path: Path, client: Client
) -> None:
    class Flat(ic.ImageEmbeddingStage):
        def process(self, batch: ic.ImageBatch) -> ic.ImageBatch:
            batch["embedding"] = np.zeros((len(batch), *shape), np.float32)
            batch["encoder"] = ["mine"] * len(batch)
            return batch

    with pytest.raises(ImgcurateError, match="was given values of shape"):
        run(shards, tmp_path / "OUT", client, Flat("tiny-image"))


def test_json_with_a_byte_order_mark_is_json() -> None:
    found = MemberColumns.of((), {"k": "number"}).arrays({"json": ["\ufeff" + json.dumps({"k": 2})]})
    assert found["k"].to_pylist() == [2.0]
