"""Runs as files that other tools read, read by these tools."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client
from typer.testing import CliRunner

from imgcurate import Pipeline, dedup_embeddings, export_run
from imgcurate.catalog import Catalog, read_parquet, write_parquet
from imgcurate.cli import app
from imgcurate.errors import ConfigError, InputError
from imgcurate.results import Result
from imgcurate.stages import (
    FilePartitioningStage,
    ImageEmbeddingStage,
    ImageQualityFilterStage,
    ImageReaderStage,
    ImageWriterStage,
    SemanticDedupStage,
)
from imgcurate.storage import StorageError, exclusive

ALL = ("kept", "removed", "npy", "clip-retrieval")


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory, client: Client) -> Result:
    stages = [
        FilePartitioningStage(str(shards), 1), ImageReaderStage(), ImageEmbeddingStage(model="tiny-image"),
        SemanticDedupStage(eps=0.05), ImageWriterStage(images_per_tar=25),
    ]  # fmt: skip
    return Pipeline(stages).run(str(tmp_path_factory.mktemp("exchange") / "OUT"), client=client)


def test_command_says_that_nothing_was_kept_and_prints_json(tmp_path: Path, client: Client, shards: Path) -> None:
    stages = [
        FilePartitioningStage(str(shards), 1), ImageReaderStage(), ImageQualityFilterStage({"width": (10**6, None)}),
        ImageEmbeddingStage(model="tiny-image"),
    ]  # fmt: skip
    Pipeline(stages).run(str(tmp_path / "OUT"), client=client)
    formats = [part for name in ALL for part in ("--format", name)]
    done = CliRunner().invoke(app, ["export", str(tmp_path / "OUT"), "-o", str(tmp_path / "T"), *formats])
    assert done.output.splitlines() == [
        "kept: 0 rows (nothing was kept)", "removed: 72 rows", "npy: 0 rows (nothing was kept)",
        "clip-retrieval: 0 rows (nothing was kept)",
    ]  # fmt: skip
    done = CliRunner().invoke(app, ["export", str(tmp_path / "OUT"), "-o", str(tmp_path / "T2"), "--json"])
    assert json.loads(done.output)["rows"] == {"kept": 0, "removed": 72}


def test_every_sample_is_in_one_table_and_embeddings_go_with_their_rows(run: Result, tmp_path: Path) -> None:
    written = export_run(run.output_dir, str(tmp_path / "T"), ALL)
    catalog = run.catalog.compute().set_index("uid")
    kept = pq.read_table(tmp_path / "T" / "kept.parquet").to_pandas()
    with (tmp_path / "T" / "removed.csv").open(newline="") as file:
        removed = list(csv.DictReader(file))
    assert written == {"kept": run.kept, "removed": run.samples - run.kept, "npy": run.kept, "clip-retrieval": run.kept}
    assert kept.uid.tolist() == catalog.index[catalog.status == "ok"].tolist()
    assert {int(r["uid"]) for r in removed} == set(catalog.index[catalog.status != "ok"])
    for row in removed:
        assert row["reason"] == catalog.reason[int(row["uid"])] != ""
        assert int(row["duplicate_of"]) == catalog.duplicate_of[int(row["uid"])]
    x = np.load(tmp_path / "T" / "embeddings.npy")
    assert x.dtype == np.float32
    assert np.array_equal(x, np.stack(catalog.embedding[kept.uid]))


def test_what_left_is_told_with_all_columns(run: Result, tmp_path: Path) -> None:
    export_run(run.output_dir, str(tmp_path / "T"))
    removed, table = (pd.read_csv(tmp_path / "T/removed.csv"), pd.read_parquet(tmp_path / "T/removed.parquet"))
    catalog = run.catalog.compute()
    assert set(catalog.columns) - set(table.columns) == {"spans", "files", "offset", "phase", "embedding"} & set(
        catalog.columns
    )
    assert list(removed.uid) == list(table.uid)
    left = catalog[catalog.status != "ok"].set_index("uid").loc[table.uid]
    assert list(table.reason) == list(left.reason)
    assert "path" not in table.columns


def test_images_that_are_files_have_their_path(tmp_path: Path, client: Client, photos, encode) -> None:
    for name in ("a/one.jpg", "b/two #%41.jpg", "b/bad.jpg"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(photos[len(name)]) if "bad" not in name else b"no image")
    (tmp_path / "in" / "metadata.csv").write_text("file_name,path\na/one.jpg,mine\n")
    stages = [FilePartitioningStage(str(tmp_path / "in")), ImageReaderStage(), ImageEmbeddingStage("tiny-image")]
    done = Pipeline(stages).run(str(tmp_path / "OUT"), client=client)
    export_run(done.output_dir, str(tmp_path / "T"), ALL)
    kept, removed = (pd.read_parquet(tmp_path / "T" / f"{name}.parquet") for name in ("kept", "removed"))
    assert sorted(kept.source_path) == [str(tmp_path / "in/a/one.jpg"), str(tmp_path / "in/b/two #%41.jpg")]
    assert kept.path.dropna().tolist() == ["mine"]
    assert removed.source_path.tolist() == [str(tmp_path / "in/b/bad.jpg")]
    assert pd.read_csv(tmp_path / "T/removed.csv").source_path.tolist() == removed.source_path.tolist()
    assert all(Path(path).is_file() for path in kept.source_path)


def test_pandas_and_dask_read_whole_numbers_without_loss(run: Result, tmp_path: Path) -> None:
    export_run(run.output_dir, str(tmp_path / "T"))
    exact = {c: pq.read_table(f"{run.output_dir}/catalog")[c].to_pylist() for c in ("uid", "duplicate_of", "width")}
    assert any(n is None for n in exact["duplicate_of"])
    frame = pd.read_parquet(f"{run.output_dir}/catalog")
    lazy = dd.read_parquet(f"{run.output_dir}/catalog", columns=["uid", "duplicate_of"])
    assert lazy.dtypes["duplicate_of"] == lazy.partitions[0].compute().dtypes["duplicate_of"] == "Int64"
    assert {str(d) for d in frame.dtypes[["uid", "width"]]} == {"int64", "int32"}
    for name, values in exact.items():
        assert [None if v is pd.NA else v for v in frame[name].tolist()] == values
    sidecars = [pd.read_parquet(p) for p in sorted(Path(run.output_dir).glob("shards/*.parquet"))]
    kept = pd.read_parquet(tmp_path / "T" / "kept.parquet")
    assert {str(t.dtypes["cluster"]) for t in (frame, kept, *sidecars)} == {"Int32"}


def test_hashes_beside_nulls_keep_their_bits(tmp_path: Path) -> None:
    table = pa.table({"phash": pa.array([2**62 + 1, None]), "flag": [None, True], "embedding": [[1.0], None]})
    write_parquet(str(tmp_path / "a.parquet"), table)
    frame = pd.read_parquet(tmp_path / "a.parquet")
    assert frame["phash"].tolist() == [2**62 + 1, pd.NA]
    assert frame["flag"].tolist() == [pd.NA, True]
    assert read_parquet(str(tmp_path / "a.parquet")).schema.metadata is None


def test_clip_retrieval_folders_are_those_that_it_writes(run: Result, tmp_path: Path, client: Client) -> None:
    folder = tmp_path / "T"
    export_run(run.output_dir, str(folder), ["clip-retrieval"])
    names = sorted(p.name for p in (folder / "img_emb").iterdir())
    assert names == [f"img_emb_{i}.npy" for i in range(4)]
    arrays = [np.load(folder / "img_emb" / name) for name in names]
    tables = [pq.read_table(folder / "metadata" / f"metadata_{i}.parquet") for i in range(4)]
    assert all(a.dtype == np.float16 and len(a) == len(t) for a, t in zip(arrays, tables, strict=True))
    assert all("image_path" in t.column_names for t in tables)
    again = dedup_embeddings(str(folder), str(tmp_path / "D"), id_field="image_path", eps=0.001, client=client)
    assert (again.rows, again.kept) == (run.kept, run.kept)


def test_no_key_is_a_formula(tmp_path: Path, client: Client, write_tar: Callable[..., Path]) -> None:
    keys = ["=1+1", "+2", "-3", "@x", "plain=4"]
    write_tar(tmp_path / "0.tar", [(key, {"txt": b"no image"}) for key in keys])
    stages = [FilePartitioningStage(str(tmp_path / "0.tar")), ImageReaderStage(), ImageWriterStage()]
    out = str(tmp_path / "OUT")
    Pipeline(stages).run(out, client=client)
    export_run(out, str(tmp_path / "T"), ["removed"])
    with (tmp_path / "T" / "removed.csv").open(newline="") as file:
        assert [row["key"] for row in csv.DictReader(file)] == ["'=1+1", "'+2", "'-3", "'@x", "plain=4"]


def test_two_exports_do_not_write_to_one_folder(run: Result, tmp_path: Path) -> None:
    (tmp_path / "T").mkdir()
    with exclusive(str(tmp_path / "T")), pytest.raises(StorageError, match="is writing to"):
        export_run(run.output_dir, str(tmp_path / "T"))
    assert export_run(run.output_dir, str(tmp_path / "T"))["kept"] > 0


def test_no_file_is_replaced(run: Result, tmp_path: Path) -> None:
    export_run(run.output_dir, str(tmp_path), ["kept", "clip-retrieval"])
    before = (tmp_path / "kept.parquet").read_bytes()
    for name in ("kept", "clip-retrieval"):
        with pytest.raises(ConfigError, match="is there already"):
            export_run(run.output_dir, str(tmp_path), ["removed", name])
    assert (tmp_path / "kept.parquet").read_bytes() == before
    assert not (tmp_path / "removed.csv").exists()


def test_what_cannot_be_exported_is_told(run: Result, tmp_path: Path, shards: Path, client: Client) -> None:
    with pytest.raises(ConfigError, match="did you mean 'clip-retrieval'"):
        export_run(run.output_dir, str(tmp_path / "T"), ["clip_retrieval"])
    with pytest.raises(InputError, match="not the output folder of a finished run"):
        export_run(str(tmp_path), str(tmp_path / "T"))
    stages = [FilePartitioningStage(str(shards)), ImageReaderStage(), ImageWriterStage()]
    Pipeline(stages).run(str(tmp_path / "OUT"), client=client)
    with pytest.raises(ConfigError, match="has no embeddings"):
        export_run(str(tmp_path / "OUT"), str(tmp_path / "T"), ["npy"])
    assert export_run(str(tmp_path / "OUT"), str(tmp_path / "T")) == {"kept": 72, "removed": 0}
    assert (tmp_path / "T" / "removed.csv").read_text().count("\n") == 1


def test_a_failure_leaves_no_file(run: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Catalog.read

    def read(self: Catalog, number: int, columns: list[str] | None = None) -> object:
        if number == 2:
            raise OSError(28, "No space left on device")
        return real(self, number, columns)

    monkeypatch.setattr(Catalog, "read", read)
    for name in ALL:
        with pytest.raises(Exception, match="No space left"):
            export_run(run.output_dir, str(tmp_path / name), [name])
        assert [p for p in (tmp_path / name).rglob("*") if p.is_file()] == []


def test_an_export_that_was_killed_is_no_data_set_and_goes_on(run: Result, tmp_path: Path, monkeypatch) -> None:
    real = Catalog.read

    def read(self: Catalog, number: int, columns: list[str] | None = None) -> object:
        if number == 2:
            os._exit(9)
        return real(self, number, columns)

    out = str(tmp_path / "T")
    if (pid := os.fork()) == 0:
        Catalog.read = read  # type: ignore[method-assign]
        try:
            export_run(run.output_dir, out, ["clip-retrieval"])
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert len(list((tmp_path / "T" / "img_emb").iterdir())) in (1, 2)
    with pytest.raises(InputError, match="is not whole"):
        dedup_embeddings(out, str(tmp_path / "D"), id_field="image_path")
    assert export_run(run.output_dir, out, ["clip-retrieval"]) == {"clip-retrieval": run.kept}
    export_run(run.output_dir, str(tmp_path / "U"), ["clip-retrieval"])
    whole = {p.relative_to(tmp_path / "U"): p.read_bytes() for p in (tmp_path / "U").rglob("*") if p.is_file()}
    assert {p.relative_to(tmp_path / "T"): p.read_bytes() for p in (tmp_path / "T").rglob("*") if p.is_file()} == whole


def test_command_names_what_it_wrote(run: Result, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["export", run.output_dir, "-o", str(tmp_path / "T")])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines() == [f"kept: {run.kept} rows", f"removed: {run.samples - run.kept} rows"]


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_datasets_load_the_shards(run: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(
        "webdataset", data_files={"train": run.shards}, split="train", streaming=True, cache_dir=str(tmp_path / "cache")
    )
    keys = [(sample["__key__"], sample["jpg"].size) for sample in loaded]
    catalog = run.catalog.compute()
    ok = catalog[catalog.status == "ok"]
    assert keys == [(k, (w, h)) for k, w, h in zip(ok.key, ok.width, ok.height, strict=True)]
