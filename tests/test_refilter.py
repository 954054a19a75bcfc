"""Runs decided anew from their catalog, compared with runs that had the new parameters from the beginning."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from imgcurate import ImageBatch, Pipeline, PixelView, ProcessingStage, Rule, refilter, verify_run
from imgcurate.cluster import open_client
from imgcurate.demo import make_demo_shards
from imgcurate.errors import ConfigError, InputError
from imgcurate.results import Result
from imgcurate.stages import (
    ExactDedupStage,
    FilePartitioningStage,
    ImageEmbeddingStage,
    ImageQualityFilterStage,
    ImageReaderStage,
    ImageWriterStage,
    PerceptualDedupStage,
    SemanticDedupStage,
)

RUN: dict[str, Any] = {"sharpness": 20, "eps": 0.05, "distance": 2, "images_per_tar": 60}


class Warm(ProcessingStage):
    """A stage of one's own that decides by a rule."""

    name = "cold"
    needs = ("image",)
    adds = {"red": "float32"}
    views = (PixelView(8, 8),)
    rules = (Rule("red", ">=", 40, "cold"),)

    def process(self, batch: ImageBatch) -> ImageBatch:
        batch["red"] = batch.pixels(self.views[0])[..., 0].float().mean(dim=(1, 2))
        return batch


class Odd(ProcessingStage):
    """A stage of one's own that decides by itself."""

    name = "odd"
    needs = ("image",)
    views = (PixelView(8, 8),)

    def process(self, batch: ImageBatch) -> ImageBatch:
        batch.drop(batch.pixels(self.views[0]).float().mean(dim=(1, 2, 3)) > 100, "bright")
        return batch


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with open_client(device="cpu", n_workers=1, dashboard_address=None) as client:
        yield client


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tars")
    make_demo_shards(folder)
    shutil.copy(folder / "00000.tar", folder / "copy-of-00000.tar")
    return folder


def curate(tars: Path, out: Path, client: Client, *more: ProcessingStage, **changes: Any) -> Result:
    p = {**RUN, **changes}
    return Pipeline([
        FilePartitioningStage(str(tars / "*.tar"), 2),
        ImageReaderStage(),
        ImageQualityFilterStage({"sharpness": (p["sharpness"], None)}, columns=["phash", "content_hash"]),
        *more,
        ImageEmbeddingStage(model="tiny-image"),
        PerceptualDedupStage(p["distance"]),
        *([SemanticDedupStage(eps=p["eps"])] if p["eps"] is not None else []),
        ImageWriterStage(images_per_tar=p["images_per_tar"]),
    ]).run(str(out), client=client)  # fmt: skip


def bytes_of(result: Result) -> dict[str, bytes]:
    return {Path(s).name: Path(s).read_bytes() for s in result.shards}


@pytest.fixture(scope="module")
def run(tars: Path, tmp_path_factory: pytest.TempPathFactory, client: Client) -> Result:
    return curate(tars, tmp_path_factory.mktemp("run") / "OUT", client, Warm())


def break_decoder_and_models() -> None:
    """Make whatever decodes or embeds an image fail in this process."""
    from imgcurate import decode
    from imgcurate.models import encoders
    from imgcurate.stages import embedding, reading

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an image was decoded or a model loaded")

    for module, name in ((decode, "Decoder"), (reading, "borrow_decoder"), (encoders, "load_encoder")):
        setattr(module, name, refuse)
    embedding.load_encoder = refuse


@pytest.mark.parametrize(
    ("changes", "direct"),
    [
        ({"ImageQualityFilterStage": {"ranges": {"sharpness": [0, None]}}}, {"sharpness": 0}),
        (
            {"SemanticDedupStage": {"eps": 0.2}, "PerceptualDedupStage": {"max_distance": 0}},
            {"eps": 0.2, "distance": 0},
        ),
        ({"SemanticDedupStage": None, "ImageWriterStage": {"images_per_tar": 7}}, {"eps": None, "images_per_tar": 7}),
        ({}, {}),
    ],
)
def test_it_is_as_if_the_run_had_been_so(tars, run, tmp_path, client, changes, direct) -> None:
    expected = curate(tars, tmp_path / "DIRECT", client, Warm(), **direct)
    with open_client(device="cpu", n_workers=1, dashboard_address=None) as broken:
        broken.run(break_decoder_and_models)
        result = refilter(run.output_dir, str(tmp_path / "OUT2"), changes, client=broken)
    assert result.counts == expected.counts
    assert bytes_of(result) == bytes_of(expected)
    mine, theirs = result.catalog.compute(), expected.catalog.compute()
    for column in ("uid", "status", "reason", "duplicate_of", "phase", "red"):
        assert mine[column].equals(theirs[column]), column
    assert verify_run(result.output_dir).lines(5)[-1].endswith("all as in their sources")
    assert (result.counts == run.counts) == (not changes or list(changes) == ["ImageWriterStage"])


def test_the_run_is_left_as_it_was_and_the_new_one_is_a_run(run, tmp_path, client) -> None:
    before = {p: p.read_bytes() for p in Path(run.output_dir).rglob("*") if p.is_file()}
    changes = {"SemanticDedupStage": {"eps": 0.1}}
    first = refilter(run.output_dir, str(tmp_path / "A"), changes, client=client)
    assert {p: p.read_bytes() for p in Path(run.output_dir).rglob("*") if p.is_file()} == before
    steps: list[str] = []
    again = refilter(
        run.output_dir, str(tmp_path / "A"), changes, client=client, progress=lambda phase, *_: steps.append(phase)
    )
    assert (again, steps) == (first, [])
    # One decided anew can be decided anew itself.
    back = refilter(str(tmp_path / "A"), str(tmp_path / "B"), {"SemanticDedupStage": {"eps": 0.05}}, client=client)
    assert bytes_of(back) == bytes_of(run)
    with pytest.raises(ConfigError, match="holds another run"):
        refilter(run.output_dir, str(tmp_path / "A"), {"SemanticDedupStage": {"eps": 0.3}}, client=client)


def test_a_deduplication_can_be_added_and_one_left_out(tars, run, tmp_path, client) -> None:
    changes = {"SemanticDedupStage": None, "PerceptualDedupStage": None, "ExactDedupStage": {}}
    result = refilter(run.output_dir, str(tmp_path / "OUT2"), changes, client=client)
    catalog = result.catalog.compute()
    assert set(catalog.duplicate_by.dropna()) == {"content"}
    kept = catalog[catalog.status == "ok"].content_hash
    assert kept.is_unique


def test_ranges_of_columns_that_are_there_can_be_added(tars, tmp_path, client) -> None:
    stages = [FilePartitioningStage(str(tars / "*.tar")), ImageReaderStage(), ImageEmbeddingStage(model="tiny-image")]
    Pipeline([*stages, ImageWriterStage()]).run(str(tmp_path / "RUN"), client=client)
    changes = {"ImageQualityFilterStage": {"ranges": {"width": (400, None)}}}
    result = refilter(str(tmp_path / "RUN"), str(tmp_path / "OUT"), changes, client=client)
    quality = ImageQualityFilterStage({"width": (400, None)})
    direct = Pipeline([*stages[:2], quality, stages[2], ImageWriterStage()]).run(str(tmp_path / "D"), client=client)
    assert result.counts == direct.counts
    assert 0 < result.counts["quality"] < result.samples
    assert [Path(s).read_bytes() for s in result.shards] == [Path(s).read_bytes() for s in direct.shards]
    with pytest.raises(ConfigError, match="needs the column 'sharpness', which .* does not have"):
        changes["ImageQualityFilterStage"] = {"ranges": {"sharpness": (1, None)}}
        refilter(str(tmp_path / "RUN"), str(tmp_path / "OUT2"), changes, client=client)


def test_a_run_that_is_stopped_goes_on(run, tmp_path, client) -> None:
    def stop(phase: str, *_: Any) -> None:
        if phase == "write":
            raise KeyboardInterrupt

    changes = {"SemanticDedupStage": {"eps": 0.1}}
    with pytest.raises(KeyboardInterrupt):
        refilter(run.output_dir, str(tmp_path / "OUT2"), changes, client=client, progress=stop)
    resumed = refilter(run.output_dir, str(tmp_path / "OUT2"), changes, client=client, resume=True)
    whole = refilter(run.output_dir, str(tmp_path / "OUT3"), changes, client=client)
    assert bytes_of(resumed) == bytes_of(whole)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"ImageEmbeddingStage": {"model": "ViT-B-32"}}, "ImageEmbeddingStage: 'model' cannot change without decoding"),
        ({"ImageReaderStage": {"min_size": 9}}, "ImageReaderStage: its parameters decide what is decoded"),
        ({"tests.Nothing": {}}, "cannot import tests.Nothing"),
        ({"SemanticDedup": {"eps": 0.1}}, "unknown stage 'SemanticDedup'; did you mean"),
        ({"SemanticDedupStage": {"epps": 0.1}}, "no parameter 'epps'; did you mean"),
        ({"SemanticDedupStage": {"eps": 3}}, r"eps=3 should be a number in \[0, 1\]"),
        (
            {"ImageAestheticFilterStage": {"score_threshold": 0.5}},
            "ViT-L-14/openai",
        ),
        ({"ImageQualityFilterStage": {"ranges": {"entropy": [1, None]}}}, "needs the column 'entropy', which"),
        ({"SemanticDedupStage": {"keep_by": ["-aesthetic_score"]}}, "needs the column 'aesthetic_score', which"),
    ],
)
def test_what_cannot_be_decided_is_refused(run, tmp_path, client, changes, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        refilter(run.output_dir, str(tmp_path / "OUT2"), changes, client=client)
    assert not (tmp_path / "OUT2").exists()


class OddAndWarm(ProcessingStage):
    """A stage of one's own that decides by itself and by a rule, and says the same of both."""

    name = "odd"
    needs = ("image",)
    adds = {"red": "float32"}
    views = (PixelView(8, 8),)
    rules = (Rule("red", ">=", 60, "odd"),)

    def process(self, batch: ImageBatch) -> ImageBatch:
        pixels = batch.pixels(self.views[0]).float()
        batch["red"] = pixels[..., 0].mean(dim=(1, 2))
        batch.drop(pixels.mean(dim=(1, 2, 3)) > 140, "bright")
        return batch


@pytest.mark.parametrize("own", [Odd, OddAndWarm])
def test_what_code_dropped_stays_dropped_where_thresholds_do(tars, tmp_path, client, own) -> None:
    first = curate(tars, tmp_path / "OUT", client, own())
    assert first.counts["odd"] > 1
    again = refilter(first.output_dir, str(tmp_path / "SAME"), client=client)
    assert (again.counts, bytes_of(again)) == (first.counts, bytes_of(first))
    changes = {"SemanticDedupStage": {"eps": 0.2}, "ImageWriterStage": {"images_per_tar": 7}}
    anew = refilter(again.output_dir, str(tmp_path / "ANEW"), changes, client=client)
    expected = curate(tars, tmp_path / "DIRECT", client, own(), eps=0.2, images_per_tar=7)
    assert (anew.counts, bytes_of(anew)) == (expected.counts, bytes_of(expected))
    mine, theirs = anew.catalog.compute(), expected.catalog.compute()
    for column in ("uid", "status", "reason", "duplicate_of", "phase"):
        assert mine[column].equals(theirs[column]), column
    assert verify_run(anew.output_dir).ok


@pytest.mark.parametrize("own", [Odd, OddAndWarm])
def test_what_code_dropped_cannot_be_decided_by_other_thresholds(tars, tmp_path, client, own) -> None:
    first = curate(tars, tmp_path / "OUT", client, own(), eps=None)
    gone = f"{own.__module__}.{own.__qualname__}"
    for changes in (
        {"ImageQualityFilterStage": {"ranges": {}}}, {"ImageQualityFilterStage": None}, {gone: None},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=r"dropped as 'odd' by the code of a stage.*no threshold"):
            refilter(first.output_dir, str(tmp_path / "OUT2"), changes, client=client)
    # What code drops after a deduplication depends on what that left.
    stages = [
        FilePartitioningStage(str(tars / "*.tar")), ImageReaderStage(), ImageEmbeddingStage(model="tiny-image"),
        SemanticDedupStage(eps=0.05), Late(), ImageWriterStage(),
    ]  # fmt: skip
    late = Pipeline(stages).run(str(tmp_path / "LATE"), client=client)
    assert late.counts["odd"] > 1
    with pytest.raises(ConfigError, match="dropped as 'odd' by the code of a stage"):
        refilter(late.output_dir, str(tmp_path / "OUT3"), {"SemanticDedupStage": {"eps": 0.01}}, client=client)


class Late(ProcessingStage):
    """A stage of one's own that decides by itself, of what is known without images; its rule says the same."""

    name = "odd"
    needs = ("embedding",)
    rules = (Rule("width", ">=", 1, "odd"),)

    def process(self, batch: ImageBatch) -> ImageBatch:
        batch.drop(batch["embedding"][:, 0] > 0, "positive")
        return batch


def test_folders_that_are_no_finished_run_are_refused(run, tmp_path, client) -> None:
    with pytest.raises(InputError, match="is not the output folder of a finished run"):
        refilter(str(tmp_path / "nothing"), str(tmp_path / "OUT2"), client=client)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run.output_dir, unfinished)
    manifest = json.loads((unfinished / "manifest.json").read_text())
    (unfinished / "manifest.json").write_text(json.dumps({**manifest, "state": "running"}))
    with pytest.raises(InputError, match="is not finished: give its command again"):
        refilter(str(unfinished), str(tmp_path / "OUT2"), client=client)
    for other in (run.output_dir, f"{run.output_dir}/x", str(Path(run.output_dir).parent)):
        with pytest.raises(ConfigError, match="one in the other|is the run itself"):
            refilter(run.output_dir, other, client=client, overwrite=True)


def test_inputs_that_changed_or_are_gone_are_told(tars, tmp_path, client) -> None:
    shutil.copytree(tars, tmp_path / "in")
    curate(tmp_path / "in", tmp_path / "OUT", client, eps=None)
    tar = sorted((tmp_path / "in").glob("*.tar"))[1]
    data = tar.read_bytes()
    tar.write_bytes(data)
    with pytest.raises(InputError, match=f"{tar.name} is gone or has changed since"):
        refilter(str(tmp_path / "OUT"), str(tmp_path / "OUT2"), client=client)
    tar.unlink()
    with pytest.raises(InputError, match=f"{tar.name} is gone or has changed since"):
        refilter(str(tmp_path / "OUT"), str(tmp_path / "OUT2"), client=client)


def test_folders_of_images_are_found_again(tmp_path, client) -> None:
    make_demo_shards(tmp_path / "tars")
    folder = tmp_path / "photos"
    folder.mkdir()
    with tarfile.open(min((tmp_path / "tars").glob("*.tar"))) as tar:
        tar.extractall(folder, filter="data")
    stages = [
        FilePartitioningStage(str(folder)), ImageReaderStage(),
        ImageQualityFilterStage(columns=["content_hash"]), ExactDedupStage(), ImageWriterStage(),
    ]  # fmt: skip
    first = Pipeline(stages).run(str(tmp_path / "OUT"), client=client)
    second = refilter(
        str(tmp_path / "OUT"), str(tmp_path / "OUT2"),
        {"ImageQualityFilterStage": {"ranges": {"width": [10_000, None]}}}, client=client,
    )  # fmt: skip
    assert first.kept > 0
    assert second.kept == 0
    assert second.counts["quality"] >= first.kept
