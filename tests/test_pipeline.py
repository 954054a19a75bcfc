"""The main job, end to end: tar shards in, curated shards out."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import linecache
import logging
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from distributed import Client, LocalCluster
from PIL import Image

from imgcurate import (
    FilePartitioningStage,
    ImageBatch,
    ImageEmbeddingStage,
    ImageReaderStage,
    ImageWriterStage,
    Pipeline,
    PixelView,
    ProcessingStage,
    Rule,
    SemanticDedupStage,
)
from imgcurate.catalog import Manifest
from imgcurate.errors import ConfigError, ImgcurateError, InputError
from imgcurate.verification import verify_run

OUTPUT = ["_SUCCESS", "catalog", "dedup", "manifest.json", "pipeline.yaml", "shards"]
"""What is in the output folder of a run with deduplication, without a report."""


def tiny_pipeline(source, *middle, files_per_partition: int = 1, images_per_tar: int = 25, **reader) -> Pipeline:
    return Pipeline(
        [
            FilePartitioningStage(source, files_per_partition),
            ImageReaderStage(dali_batch_size=16, **reader),
            ImageEmbeddingStage(model="tiny-image"),
            *middle,
            ImageWriterStage(images_per_tar=images_per_tar),
        ]
    )


def checksums(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((folder / "shards").iterdir())}


def output_members(result, read_tar) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    for shard in result.shards:
        members |= read_tar(Path(shard))
    return members


@pytest.fixture(scope="module")
def curated(shards: Path, client: Client, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("curated") / "OUT"
    pipeline = tiny_pipeline(str(shards / "*.tar"), SemanticDedupStage(eps=0.05, n_clusters=4))
    return pipeline.run(str(out), client=client)


def test_every_copy_is_found_and_no_two_photos_are_merged(curated) -> None:
    catalog = curated.catalog.compute().set_index("uid")
    assert curated.samples == len(catalog) == 72
    assert curated.counts == {"duplicate": 12, "ok": 60}
    assert curated.accounting() == "72 samples in = 60 kept + 12 duplicate"
    removed = catalog[catalog.status == "duplicate"]
    for row in removed.itertuples():
        kept = catalog.loc[row.duplicate_of]
        assert kept.status == "ok"
        assert kept.key.split("/")[1] == row.key.split("/")[1]
        cosine = float(np.dot(row.embedding, kept.embedding))
        assert cosine >= 0.95
        assert row.similarity == pytest.approx(cosine, abs=1e-5)
        shard = Path(kept.shard).stem
        assert row.reason == f"duplicate of {shard}/{kept.key}, cosine {row.similarity:.3f}"
    kept = catalog[catalog.status == "ok"]
    assert (kept.reason == "").all()
    assert kept.duplicate_of.isna().all()


def test_members_come_out_bit_for_bit(curated, shards: Path, read_tar) -> None:
    source: dict[str, bytes] = {}
    for shard in sorted(shards.glob("*.tar")):
        source |= read_tar(shard)
    members = output_members(curated, read_tar)
    assert all(source[name] == data for name, data in members.items())
    kept = curated.catalog[curated.catalog.status == "ok"].key.compute()
    assert {n.split(".")[0] for n in members} == set(kept)
    assert len(members) == sum(name.split(".")[0] in set(kept) for name in source)


def test_webdataset_reads_the_output(curated) -> None:
    samples = list(webdataset.WebDataset(curated.shards, shardshuffle=False))
    assert len(samples) == 60
    assert all(Image.open(io.BytesIO(s["jpg"])).size for s in samples)
    assert sum("txt" in s for s in samples) == 60


def test_output_shards_have_sidecars_in_the_same_order(curated) -> None:
    assert [Path(s).name for s in curated.shards] == ["00000.tar", "00001.tar", "00002.tar"]
    for shard in curated.shards:
        rows = pq.read_table(Path(shard).with_suffix(".parquet"))
        with tarfile.open(shard) as tar:
            keys = list(dict.fromkeys(m.name.split(".")[0] for m in tar))
        assert rows["key"].to_pylist() == keys
        assert rows["uid"].to_pylist() == sorted(rows["uid"].to_pylist())
        assert min(rows["width"].to_pylist()) >= 96
    assert [len(pq.read_table(Path(s).with_suffix(".parquet"))) for s in curated.shards] == [25, 25, 10]


def test_output_folder_is_as_documented(curated) -> None:
    out = Path(curated.output_dir)
    assert sorted(p.name for p in out.iterdir()) == OUTPUT
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["state"] == "done"
    assert manifest["counts"] == {"duplicate": 12, "ok": 60}
    (found,) = curated.dedup
    assert found == {
        "samples": 72, "n_clusters": 4, "eps": 0.05, "curve": [{"eps": 0.05, "removed": 12, "kept": 60}],
    }  # fmt: skip
    columns = pq.read_schema(out / "catalog" / "part-00000.parquet").names
    wanted = "uid shard key ext width height nbytes status reason embedding cluster duplicate_of similarity".split()
    assert set(wanted) <= set(columns)


@pytest.mark.parametrize(("files_per_partition", "n_workers"), [(4, 2), (3, 1), (1, 4)])
def test_output_does_not_depend_on_partitions_or_workers(
    curated, shards: Path, tmp_path: Path, files_per_partition: int, n_workers: int
) -> None:
    pipeline = tiny_pipeline(
        str(shards / "*.tar"), SemanticDedupStage(eps=0.05, n_clusters=4), files_per_partition=files_per_partition
    )
    with (
        LocalCluster(n_workers=n_workers, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        result = pipeline.run(str(tmp_path / "OUT"), client=client)
    assert checksums(Path(result.output_dir)) == checksums(Path(curated.output_dir))


def test_what_an_earlier_run_kept_stays_kept(curated, shards: Path, tmp_path: Path, client: Client) -> None:
    dedup = SemanticDedupStage(eps=0.05, n_clusters=2, reference=[curated.output_dir], eps_list=[0.01, 0.3])
    result = tiny_pipeline(str(shards / "0000[01].tar"), dedup).run(str(tmp_path / "OUT"), client=client)
    catalog = result.catalog.compute()
    # All of the new set is in the old one.
    assert result.counts == {"duplicate": 36}
    assert result.shards == []
    assert (catalog.duplicate_in == curated.output_dir).all()
    old = curated.catalog.compute().set_index("uid")
    assert (old.loc[catalog.duplicate_of].status == "ok").all()
    (found,) = result.dedup
    assert [point["eps"] for point in found["curve"]] == [0.01, 0.05, 0.3]
    assert [point["kept"] for point in found["curve"]][1:] == [0, 0]
    assert found["samples"] == 36
    other = SemanticDedupStage(eps=0.05, n_clusters=2, reference=[str(tmp_path)])
    with pytest.raises(InputError, match="is not the output folder of a finished run"):
        tiny_pipeline(str(shards / "00000.tar"), other).run(str(tmp_path / "OUT2"), client=client)


def test_dirty_shards_give_reasons_and_lose_nothing(
    tmp_path: Path, client: Client, photos, encode, write_tar, read_tar
) -> None:
    jpegs = [encode(p) for p in photos[:12]]
    good = [(f"good{i:02d}", {"jpg": j, "txt": b"words"}) for i, j in enumerate(jpegs)]
    bad = [
        ("cut", {"jpg": jpegs[0][:300]}),
        ("page", {"jpg": b"<!DOCTYPE html><html></html>"}),
        ("nothing", {"png": b""}),
        ("words-only", {"txt": b"no image here"}),
    ]
    write_tar(tmp_path / "in" / "0.tar", [*good[:4], *bad, *good[4:6]])
    write_tar(tmp_path / "in" / "1-empty.tar", [])
    (tmp_path / "in" / "2-zero.tar").write_bytes(b"")
    whole = write_tar(tmp_path / "in" / "3-cut.tar", good[6:]).read_bytes()
    with tarfile.open(tmp_path / "in" / "3-cut.tar") as tar:
        last = next(m for m in tar if m.name == "good11.jpg")
    (tmp_path / "in" / "3-cut.tar").write_bytes(whole[: last.offset_data + last.size // 2])
    (tmp_path / "in" / "4-text.tar").write_bytes(b"this is not a tar file\n" * 100)

    result = tiny_pipeline(str(tmp_path / "in" / "*.tar")).run(str(tmp_path / "OUT"), client=client)

    catalog = result.catalog.compute()
    assert result.counts == {"decode_error": 3, "no_image": 1, "ok": 11, "tar_error": 3}
    assert len(catalog) == catalog.uid.nunique() == 18
    reasons = dict(zip(catalog.key, catalog.reason, strict=True))
    assert reasons["cut"].startswith("truncated JPEG")
    assert reasons["page"] == "not an image: text/html"
    assert reasons["nothing"] == "0 bytes"
    assert "no image" in reasons["words-only"]
    assert "truncated" in reasons["good11"]
    broken = catalog[catalog.status == "tar_error"]
    assert set(broken.key) == {"good11", ""}
    assert all(r for r in broken.reason)
    members = output_members(result, read_tar)
    assert {n for n in members if n.endswith("jpg")} == {f"good{i:02d}.jpg" for i in range(11)}


def test_colliding_keys_are_renamed_and_recorded(tmp_path: Path, client: Client, photos, encode, write_tar) -> None:
    jpegs = [encode(p) for p in photos[:3]]
    for k in range(3):
        write_tar(
            tmp_path / "in" / f"{k}.tar", [("a/same", {"jpg": jpegs[k], "txt": b"%d" % k, "seg.png": b"x" * 700})]
        )
    result = tiny_pipeline(str(tmp_path / "in" / "*.tar")).run(str(tmp_path / "OUT"), client=client)
    (shard,) = result.shards
    samples = list(webdataset.WebDataset(shard, shardshuffle=False))
    assert [s["jpg"] for s in samples] == jpegs
    assert [s["txt"] for s in samples] == [b"0", b"1", b"2"]
    assert all(s["seg.png"] == b"x" * 700 for s in samples)
    rows = pq.read_table(Path(shard).with_suffix(".parquet")).to_pandas()
    assert list(rows.key) == [s["__key__"] for s in samples]
    assert rows.key.nunique() == 3
    assert list(rows.source_key) == ["a/same"] * 3
    assert rows.key[0] == "a/same"


class Dark(ProcessingStage):
    name = "dark"
    needs = ("image",)
    adds = {"brightness": "float32", "side": "int32"}
    views = (PixelView(24, 24, resize="squash"),)
    rules = (Rule("brightness", ">=", 100, "dark"),)

    def process(self, batch: ImageBatch) -> ImageBatch:
        pixels = batch.pixels(self.views[0]).float()
        batch["brightness"] = pixels.mean(dim=(1, 2, 3))
        batch["side"] = np.maximum(batch["width"], 1)
        batch.drop((batch["side"] > 150).to_numpy(), [f"{s} pixels wide" for s in batch["side"]], status="wide")
        return batch


def test_custom_stage_scores_and_drops(shards: Path, tmp_path: Path, client: Client) -> None:
    result = tiny_pipeline(str(shards / "*.tar"), Dark()).run(str(tmp_path / "OUT"), client=client)
    catalog = result.catalog.compute()
    assert catalog.brightness.notna().all()
    wide = catalog.width > 150
    dark = ~wide & (catalog.brightness < 100)
    assert wide.any()
    assert dark.any()
    assert (catalog.status == np.where(wide, "wide", np.where(dark, "dark", "ok"))).all()
    assert (catalog.reason[wide] == "160 pixels wide").all()
    value = catalog.brightness[dark].iloc[0]
    assert catalog.reason[dark].iloc[0].startswith(f"brightness {value:.2f} < 100")


@pytest.mark.parametrize(
    "lost", ["_SUCCESS", "shards/00000.tar", "catalog/part-00001.parquet", "dedup", "part", "mark"]
)
def test_a_finished_run_that_lost_files_is_made_whole(
    shards: Path, tmp_path: Path, client: Client, lost: str, caplog
) -> None:
    out = tmp_path / "OUT"
    tiny_pipeline(str(shards), SemanticDedupStage(eps=0.05)).run(str(out), client=client)
    before = checksums(out)
    if lost == "dedup":
        shutil.rmtree(out / "dedup")
    elif lost == "mark":
        (out / "_SUCCESS").write_bytes((out / "_SUCCESS").read_bytes()[:100])
    elif lost == "part":
        part = next(iter(sorted((out / "catalog").glob("part-*.parquet"))))
        part.write_bytes(part.read_bytes()[:300])
    else:
        (out / lost).unlink()
    result = tiny_pipeline(str(shards), SemanticDedupStage(eps=0.05)).run(str(out), client=client)
    assert "it is made whole again" in caplog.text
    assert result.kept == 60
    assert checksums(out) == before
    assert verify_run(str(out), client=client).ok
    caplog.clear()
    tiny_pipeline(str(shards), SemanticDedupStage(eps=0.05)).run(str(out), client=client)
    told = [r for r in caplog.records if r.name.startswith("imgcurate") and r.levelno >= logging.WARNING]
    assert not told


def test_an_input_or_output_without_a_name_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="an input has no name"):
        tiny_pipeline("").run("OUT")
    with pytest.raises(ConfigError, match="no output folder"):
        tiny_pipeline("x.tar").run("")


def test_images_of_a_partition_are_dealt_out_evenly(shards: Path, tmp_path: Path, client: Client) -> None:
    class Counts(ProcessingStage):
        name = "counts"
        needs = ("image",)
        adds = {"beside": "int32"}
        views = (PixelView(8, 8),)

        def process(self, batch):
            batch["beside"] = np.full(len(batch), len(batch), np.int32)
            return batch

    stages = [FilePartitioningStage(str(shards), 4), ImageReaderStage(dali_batch_size=32), Counts()]
    found = Pipeline(stages).run(str(tmp_path / "OUT"), client=client, device="cpu").catalog.compute()
    assert found.beside.value_counts().to_dict() == {24: 72}


def test_a_stage_that_does_not_set_its_column_is_named(shards: Path, tmp_path: Path, client: Client) -> None:
    class Forgets(ProcessingStage):
        name = "forgets"
        needs = ("image",)
        adds = {"saturation": "float32"}
        views = (PixelView(8, 8),)

        def process(self, batch):
            return batch

    class Raises(Forgets):
        def process(self, batch):
            raise ZeroDivisionError("none")

    class Deep(Forgets):
        def process(self, batch):
            batch["saturation"] = batch.pixels(self.views[0]).float()
            return batch

    class Nothing(Forgets):
        def process(self, batch):
            batch["saturation"] = batch.pixels(self.views[0]).float().mean(dim=(1, 2, 3))

    for kind, words in (
        (Raises, r"stage Raises: ZeroDivisionError: none \(process\(\), line \d+; in "),
        (
            Deep,
            r"'saturation' is declared as float, one for each sample, and was given values of shape \(\d+, 8",
        ),
        (Nothing, "returned None: is 'return batch' missing"),
    ):
        with pytest.raises(ImgcurateError, match=words):
            Pipeline([FilePartitioningStage(str(shards)), ImageReaderStage(), kind()]).run(
                str(tmp_path / kind.__name__), client=client
            )
    stages = [FilePartitioningStage(str(shards)), ImageReaderStage(), Forgets(), ImageWriterStage()]
    with pytest.raises(
        ImgcurateError, match="stage forgets declares the column 'saturation' in 'adds', and does not set"
    ):
        Pipeline(stages).run(str(tmp_path / "OUT"), client=client)


def test_columns_may_be_made_after_dedup(shards: Path, tmp_path: Path, client: Client) -> None:
    class Norm(ProcessingStage):
        name = "norm"
        needs = ("embedding",)
        adds = {"norm": "float32"}
        rules = (Rule("norm", ">", 0.5, "norm"),)

        def process(self, batch: ImageBatch) -> ImageBatch:
            batch["norm"] = batch["embedding"].norm(dim=1)
            return batch

    pipeline = tiny_pipeline(str(shards / "*.tar"), SemanticDedupStage(n_clusters=4), Norm())
    result = pipeline.run(str(tmp_path / "OUT"), client=client)
    catalog = result.catalog.compute()
    assert result.counts == {"duplicate": 12, "ok": 60}
    np.testing.assert_allclose(catalog.norm, 1, atol=1e-5)


def test_captions_become_columns_and_go_to_the_sidecar(shards: Path, tmp_path: Path, client: Client) -> None:
    pipeline = tiny_pipeline(str(shards / "*.tar"), text_columns=("txt", "json"))
    result = pipeline.run(str(tmp_path / "OUT"), client=client)
    rows = pq.read_table(Path(result.shards[0]).with_suffix(".parquet")).to_pandas()
    assert rows.txt[0] == "caption 0"
    assert json.loads(rows.json[1]) == {"i": 4}


def test_a_finished_run_is_not_done_again_and_a_changed_one_is_refused(
    shards: Path, tmp_path: Path, client: Client
) -> None:
    out = tmp_path / "OUT"
    first = tiny_pipeline(str(shards / "*.tar")).run(str(out), client=client)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.*")}
    again = tiny_pipeline(str(shards / "*.tar")).run(str(out), client=client)
    assert again == first
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.*")} == before
    with pytest.raises(ConfigError, match=r"images_per_tar: 25 there, 30 asked for.*--overwrite"):
        tiny_pipeline(str(shards / "*.tar"), images_per_tar=30).run(str(out), client=client)
    result = tiny_pipeline(str(shards / "*.tar"), images_per_tar=30).run(str(out), client=client, overwrite=True)
    assert len(result.shards) == 3


class Flaky(ProcessingStage):
    """Fails as long as a file exists."""

    name = "flaky"
    needs = ("image",)
    adds = {"one": "float32"}
    views = (PixelView(8, 8),)

    def __init__(self, trap: str, shard: str) -> None:
        self._trap, self._shard = trap, shard

    def process(self, batch: ImageBatch) -> ImageBatch:
        if Path(self._trap).exists() and batch["shard"].str.endswith(self._shard).any():
            raise ImgcurateError("the trap is set")
        batch["one"] = np.ones(len(batch))
        return batch


def test_a_run_that_failed_goes_on_with_what_is_missing(shards: Path, tmp_path: Path, client: Client) -> None:
    trap = tmp_path / "trap"
    trap.touch()
    out = tmp_path / "OUT"
    pipeline = tiny_pipeline(str(shards / "*.tar"), Flaky(str(trap), "00002.tar"), SemanticDedupStage(n_clusters=4))
    with pytest.raises(ImgcurateError, match="the trap is set"):
        pipeline.run(str(out), client=client)
    parts = sorted(p.name for p in (out / "catalog").glob("*.parquet"))
    assert "part-00002.parquet" not in parts
    assert Manifest.load(str(out)).state == "running"
    trap.unlink()
    result = pipeline.run(str(out), client=client)
    assert result.counts == {"duplicate": 12, "ok": 60}
    assert not [p for p in out.rglob("*") if p.name.endswith(".tmp")]


def test_an_output_folder_with_other_things_is_refused(shards: Path, tmp_path: Path, client: Client) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        tiny_pipeline(str(shards / "*.tar")).run(str(tmp_path), client=client)
    with pytest.raises(InputError, match="no such input"):
        tiny_pipeline(str(shards / "none.tar")).run(str(tmp_path / "OUT"), client=client)


def test_no_sample_at_all(tmp_path: Path, client: Client, write_tar) -> None:
    write_tar(tmp_path / "in" / "0.tar", [])
    pipeline = tiny_pipeline(str(tmp_path / "in" / "*.tar"), SemanticDedupStage())
    result = pipeline.run(str(tmp_path / "OUT"), client=client)
    assert (result.samples, result.counts, result.shards) == (0, {}, [])
    assert result.accounting() == "0 samples in = 0 kept"


NEXT = ImageEmbeddingStage(model="tiny-image")
NEXT_WITHOUT_PIXELS = ImageEmbeddingStage(model="tiny-image", remove_image_data=True)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([ImageReaderStage()], "begins with FilePartitioningStage"),
        ([FilePartitioningStage("x"), NEXT], "second stage of a pipeline is ImageReaderStage"),
        ([FilePartitioningStage("x"), ImageReaderStage(), SemanticDedupStage()],
         "SemanticDedupStage needs the column 'embedding'"),
        ([FilePartitioningStage("x"), ImageReaderStage(), NEXT_WITHOUT_PIXELS, Dark()],
         "stage dark needs the 'image' data, which is gone after ImageEmbeddingStage"),
        ([FilePartitioningStage("x"), ImageReaderStage(), NEXT, SemanticDedupStage(), Dark()],
         "stage dark needs the 'image' data, which is gone after SemanticDedupStage"),
        ([FilePartitioningStage("x"), ImageReaderStage(), NEXT, NEXT], "adds the column 'embedding', which a stage"),
        ([FilePartitioningStage("x"), ImageReaderStage(), ImageWriterStage(), NEXT], "must be the last stage"),
        ([FilePartitioningStage("x"), ImageReaderStage(), "embed"], "'embed' is not a stage"),
    ],
)  # fmt: skip
def test_a_pipeline_that_cannot_work_fails_before_it_starts(stages: list, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Pipeline(stages).plan()


def test_code_that_is_not_what_a_run_began_with_is_told(
    shards: Path, tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    code = (
        "from imgcurate import ProcessingStage\n\nclass Own(ProcessingStage):\n    needs = ('key',)\n\n"
        "    def process(self, batch):\n        batch.drop([key.endswith('{}') for key in batch['key']], 'ends so')\n"
        "        return batch\n"
    )
    monkeypatch.syspath_prepend(str(folder))

    def run(ending: str, out: str) -> Any:
        (folder / "own_code.py").write_text(code.format(ending))
        linecache.clearcache()
        sys.modules.pop("own_code", None)
        importlib.invalidate_caches()
        own = importlib.import_module("own_code").Own()
        stages = [FilePartitioningStage(str(shards)), ImageReaderStage(), own]
        with caplog.at_level(logging.INFO, logger="imgcurate"):
            caplog.clear()
            return Pipeline(stages).run(str(tmp_path / out), client=client)

    first = run("1", "A")
    assert "was done already" not in caplog.text
    assert first.counts["Own"] > 0
    assert run("1", "A").counts == first.counts
    assert "was done already: nothing was computed" in caplog.text
    assert "the code of" not in caplog.text
    assert run("no", "A").counts == first.counts
    assert "the code of own_code.Own is not what it was when the run in" in caplog.text
