"""Runs whose files are exchanged or cannot be deleted, and parameters of kinds that people do give."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from distributed import Client
from test_pipeline import checksums, tiny_pipeline

from imgcurate import (
    PixelView,
    ProcessingStage,
    Rule,
    SemanticDedupStage,
    dedup_embeddings,
    read_webdataset,
)
from imgcurate.batches import ImageBatch
from imgcurate.catalog import Manifest
from imgcurate.dedup import dedup_arrays
from imgcurate.errors import ConfigError, ImgcurateError
from imgcurate.shards import Shard
from imgcurate.sidecars import find_sidecars
from imgcurate.storage import StorageError, clear_away, remove_tree
from imgcurate.verification import verify_run


class Exchange:
    """A hook of progress that puts another file in the place of an input after the first partition."""

    def __init__(self, of: Path, by: Path) -> None:
        self.of, self.by, self.done = of, by, False

    def __call__(self, phase: str, done: int, total: int, result: object) -> None:
        if not self.done:
            self.done = True
            shutil.copy2(self.by, self.of)


@pytest.fixture
def own_shards(shards: Path, tmp_path: Path) -> list[Path]:
    folder = tmp_path / "in"
    folder.mkdir()
    for tar in sorted(shards.glob("*.tar")):
        shutil.copy2(tar, folder)
    return sorted(folder.glob("*.tar"))


def test_a_file_that_was_exchanged_for_a_while_leaves_nothing_behind(
    own_shards: list[Path], tmp_path: Path, client: Client
) -> None:
    first, last, kept = own_shards[0], own_shards[-1], tmp_path / "kept"
    source = str(own_shards[0].parent / "*.tar")
    expected = tiny_pipeline(source).run(str(tmp_path / "expected"), client=client)
    shutil.copy2(last, kept)
    pipeline = tiny_pipeline(source)
    exchanged = Exchange(of=last, by=first)
    with pytest.raises(ImgcurateError, match=f"{last.name} .*changed"):
        pipeline.run(str(tmp_path / "OUT"), client=client, progress=exchanged)
    assert exchanged.done
    shutil.copy2(kept, last)
    again = tiny_pipeline(source).run(str(tmp_path / "OUT"), client=client)
    pd.testing.assert_frame_equal(again.catalog.compute(), expected.catalog.compute())
    assert checksums(tmp_path / "OUT") == checksums(tmp_path / "expected")


@pytest.mark.parametrize("same_size", [True, False])
def test_parts_that_were_made_of_another_file_are_not_taken_up(
    same_size: bool, own_shards: list[Path], tmp_path: Path, client: Client
) -> None:
    """The file is exchanged when all is read already, and is as it was when the run goes on."""
    source, last, kept = str(own_shards[0].parent / "*.tar"), own_shards[-1], tmp_path / "kept"
    shutil.copy2(last, kept)
    exchanged: list[int] = []

    def exchange(phase: str, done: int, total: int, result: object) -> None:
        if done == total and not exchanged:
            exchanged.append(1)
            last.write_bytes(b"x" * last.stat().st_size) if same_size else shutil.copy2(own_shards[0], last)

    with pytest.raises(ImgcurateError, match="changed"):
        tiny_pipeline(source).run(str(tmp_path / "OUT"), client=client, progress=exchange)
    assert Manifest.load(str(tmp_path / "OUT")).state == "growing"
    shutil.copy2(kept, last)
    parts = {p: p.stat().st_mtime_ns for p in (tmp_path / "OUT" / "catalog").glob("*.parquet")}
    again = tiny_pipeline(source).run(str(tmp_path / "OUT"), client=client)
    expected = tiny_pipeline(source).run(str(tmp_path / "expected"), client=client)
    pd.testing.assert_frame_equal(again.catalog.compute(), expected.catalog.compute())
    assert checksums(tmp_path / "OUT") == checksums(tmp_path / "expected")
    # What was made of the others was there still.
    assert len(parts) == len(own_shards) - 1


def test_a_folder_that_cannot_be_deleted_is_an_error(tmp_path: Path, monkeypatch, caplog) -> None:
    folder = tmp_path / "a"
    (folder / "b").mkdir(parents=True)
    remove_tree(str(tmp_path / "nothing"))
    real = shutil.rmtree

    def refuse(path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(13, "Permission denied", str(folder / "b"))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(StorageError, match=r"cannot delete .*a/b: Permission denied"):
        remove_tree(str(folder))
    clear_away(str(folder))
    assert "is not needed any more" in caplog.text
    monkeypatch.setattr(shutil, "rmtree", real)
    remove_tree(str(folder))
    assert not folder.exists()


def test_a_run_does_not_go_on_over_what_it_could_not_delete(
    own_shards: list[Path], tmp_path: Path, client: Client, monkeypatch
) -> None:
    out = tmp_path / "OUT"
    tiny_pipeline(str(own_shards[0])).run(str(out), client=client)
    real = shutil.rmtree
    kept = str(out / "shards")

    def failing(path, ignore_errors: bool = False) -> None:
        if str(path) == kept:
            if not ignore_errors:
                raise PermissionError(13, "Permission denied", kept)
            return
        real(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", failing)
    with pytest.raises(StorageError, match="cannot delete"):
        tiny_pipeline(str(own_shards[1])).run(str(out), client=client, overwrite=True)
    assert not (out / "_SUCCESS").exists()
    monkeypatch.setattr(shutil, "rmtree", real)
    # What it was is said to the next one.
    result = tiny_pipeline(str(own_shards[1])).run(str(out), client=client)
    assert set(result.catalog.compute().shard) == {str(own_shards[1])}


@pytest.mark.parametrize("type_", ["int8", "uint8", "int16", "uint16", "int32", "int64"])
def test_embeddings_of_whole_numbers(type_: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    # Large enough that squares leave the type.
    x = rng.integers(0 if type_[0] == "u" else -100, 100, (300, 16))
    x[200:] = x[:100]
    x[7] = x[207] = 0
    table = pa.table({"id": range(300), "embedding": pa.array(x.tolist(), pa.list_(pa.type_for_alias(type_)))})
    pq.write_table(table, tmp_path / "e.parquet")
    result = dedup_embeddings(str(tmp_path / "e.parquet"), str(tmp_path / "OUT"), eps=np.float32(0.01))
    removed = pq.read_table(tmp_path / "OUT" / "removed.parquet").to_pandas()
    assert result.removed == len(removed) == 99
    assert ((removed.id - removed.duplicate_of).abs() == 200).all()


def test_parameters_may_be_scalars_of_numpy(own_shards: list[Path], tmp_path: Path, client: Client) -> None:
    dedup = SemanticDedupStage(eps=np.float32(0.05), n_clusters=np.int64(3), eps_list=(np.float64(0.01),))
    result = tiny_pipeline(str(own_shards[0]), dedup).run(str(tmp_path / "OUT"), client=client)
    again = tiny_pipeline(str(own_shards[0]), dedup).run(str(tmp_path / "OUT"), client=client)
    assert again.counts == result.counts


class Half(ProcessingStage):
    name = "half"
    needs = ("image",)
    adds = {"brightness": "float32"}
    views = (PixelView(8, 8, resize="squash"),)

    def process(self, batch: ImageBatch) -> ImageBatch:
        batch["brightness"] = batch.pixels(self.views[0]).float().mean(dim=(1, 2, 3)).to(torch.bfloat16)
        return batch


def test_a_stage_may_set_values_of_bfloat16(own_shards: list[Path], tmp_path: Path, client: Client) -> None:
    catalog = tiny_pipeline(str(own_shards[0]), Half()).run(str(tmp_path / "OUT"), client=client).catalog.compute()
    assert catalog.brightness.dtype == np.float32
    assert catalog.brightness.between(1, 255).any()


def test_sidecars_of_types_that_do_not_go_together(own_shards: list[Path], caplog) -> None:
    for tar, value in zip(own_shards[:3], (1, "a", 2.5), strict=True):
        keys = read_webdataset(str(tar)).compute().key.tolist()
        pq.write_table(pa.table({"key": keys, "n": [value] * len(keys), "m": keys}), tar.with_suffix(".parquet"))
    found = find_sidecars([Shard(str(tar)) for tar in own_shards[:3]], "auto")
    assert {name: str(type_) for name, type_ in found.types.items()} == {"n": "double", "m": "string"}
    assert "'n' is string, and int64 in other shards" in caplog.text
    frame = read_webdataset([str(tar) for tar in own_shards[:3]]).compute()
    assert frame.groupby("shard").n.count().gt(0).tolist() == [True, False, True]


def test_more_inputs_are_not_what_makes_it_another_run(own_shards: list[Path], tmp_path: Path, client: Client) -> None:
    for i, tar in enumerate(own_shards[:3]):
        keys = read_webdataset(str(tar), sidecar_columns=()).compute().key.tolist()
        columns = {"key": keys, "n": [1] * len(keys)} | ({"extra": keys} if i == 2 else {})
        pq.write_table(pa.table(columns), tar.with_suffix(".parquet"))
    out = str(tmp_path / "OUT")
    tiny_pipeline([str(t) for t in own_shards[:2]]).run(out, client=client)
    with pytest.raises(ConfigError, match=r"holds another run \(sidecars: "):
        tiny_pipeline([str(t) for t in own_shards[:3]]).run(out, client=client)


def test_a_script_on_standard_input_is_told_why(tmp_path: Path) -> None:
    code = "from imgcurate.cluster import open_client\nwith open_client(device='cpu', n_workers=1): pass\n"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-"], input=code, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path
    )
    assert done.returncode == 1
    assert "cannot from standard input" in done.stderr


@pytest.mark.parametrize("eps", [0, 1e-9, 1e-8, 1e-6])
def test_equal_vectors_are_duplicates_at_any_eps(eps: float) -> None:
    base = np.random.default_rng(0).normal(size=(500, 64)).astype(np.float32)
    found = dedup_arrays(np.concatenate([base, base * np.float32(2)]), eps=eps)
    assert (found.duplicate_of >= 0).sum() == 500
    assert np.nanmin(found.similarity) == 1.0


def test_statuses_of_imgcurate_are_not_those_of_ones_own_stages(own_shards: list[Path], tmp_path: Path) -> None:
    for name, rules in (("ok", ()), ("duplicate", ()), ("mine", (Rule("brightness", ">=", 2, "decode_error"),))):
        stage = type("Own", (Half,), {"name": name, "rules": rules})()
        with pytest.raises(ConfigError, match="choose another"):
            tiny_pipeline(str(own_shards[0]), stage).run(str(tmp_path / name))


def test_masks_may_be_lists() -> None:
    batch = ImageBatch(pd.DataFrame({"key": ["a", "b"]}))
    batch.drop([True, False], "short")
    assert batch.drops[0][0].tolist() == [True, False]
    with pytest.raises(ConfigError, match="says something else"):
        batch.drop([True, False], "short", status="duplicate")


class Captions(ProcessingStage):
    name = "captions"
    needs = ("txt",)
    adds = {"caption_len": "int32"}

    def process(self, batch: ImageBatch) -> ImageBatch:
        batch["caption_len"] = batch["txt"].str.len().to_numpy(np.int32)
        return batch


def test_a_stage_after_dedup_and_texts_are_verified(tmp_path: Path, client: Client, photos, encode, write_tar) -> None:
    samples = [(f"{i}", {"jpg": encode(p), "txt": b"caption"}) for i, p in enumerate(photos[:8])]
    write_tar(tmp_path / "in" / "0.tar", samples)
    pipeline = tiny_pipeline(
        str(tmp_path / "in" / "0.tar"), SemanticDedupStage(eps=0.02), Captions(), text_columns=("txt",)
    )
    pipeline.run(str(tmp_path / "OUT"), client=client)
    assert not verify_run(str(tmp_path / "OUT"), client=client).problems


@pytest.mark.parametrize(("own", "other"), [("string", "large_string"), ("int32", "int64"), ("int64", "uint8")])
def test_ids_of_a_reference_may_be_of_another_width(own: str, other: str, tmp_path: Path, client: Client) -> None:
    x = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    for name, type_, ids in (("a", own, range(20)), ("b", other, range(100, 120))):
        values = [str(i) for i in ids] if "string" in type_ else list(ids)
        table = pa.table({"id": pa.array(values, type_), "embedding": x.tolist()})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    result = dedup_embeddings(
        str(tmp_path / "a.parquet"),
        str(tmp_path / "OUT"),
        reference=[str(tmp_path / "b.parquet")],
        eps=0.01,
        client=client,
    )
    removed = pq.read_table(tmp_path / "OUT" / "removed.parquet").to_pandas()
    assert result.removed == 20
    assert (removed.duplicate_of.astype(int) - removed.id.astype(int) == 100).all()
