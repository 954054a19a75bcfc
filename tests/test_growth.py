"""Inputs that grow: only new shards are decoded, and all is decided as if they had been there from the beginning."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from distributed import Client

from imgcurate import Pipeline
from imgcurate.catalog import Catalog, Manifest
from imgcurate.cluster import open_client
from imgcurate.demo import make_demo_shards
from imgcurate.errors import ConfigError
from imgcurate.execution import Progress
from imgcurate.results import Result
from imgcurate.stages import (
    FilePartitioningStage,
    ImageEmbeddingStage,
    ImageQualityFilterStage,
    ImageReaderStage,
    ImageWriterStage,
    PerceptualDedupStage,
    SemanticDedupStage,
)
from imgcurate.success import Success, file_digest


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with open_client(device="cpu", n_workers=1, dashboard_address=None) as client:
        yield client


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("tars")
    make_demo_shards(folder)
    return sorted(folder.glob("*.tar"))


def pipeline(
    folder: Path, files_per_partition: int = 2, *, eps: float = 0.05, per_tar: int = 100, sharpness: float = 20
) -> Pipeline:
    return Pipeline([
        FilePartitioningStage(str(folder / "*.tar"), files_per_partition=files_per_partition),
        ImageReaderStage(),
        ImageQualityFilterStage({"sharpness": (sharpness, None)}, columns=["phash"]),
        ImageEmbeddingStage(model="tiny-image"),
        PerceptualDedupStage(2),
        SemanticDedupStage(eps=eps),
        ImageWriterStage(images_per_tar=per_tar),
    ])  # fmt: skip


def run(folder: Path, out: Path, client: Client, *, files_per_partition: int = 2, **options: Any) -> Result:
    return pipeline(folder, files_per_partition).run(str(out), client=client, **options)


def stop_in(name: str) -> Progress:
    """Return a callback that stops a run as the first task of a phase ends."""

    def stop(phase: str, done: int, total: int, result: object) -> None:
        del done, total, result
        if phase.startswith(name):
            raise KeyboardInterrupt

    return stop


def bytes_of(out: Path) -> dict[str, bytes]:
    files = [p for folder in ("shards", "catalog") for p in (out / folder).iterdir()]
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


def add(tars: list[Path], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for tar in tars:
        shutil.copy2(tar, folder)


@pytest.fixture(scope="module")
def whole(tars: list[Path], tmp_path_factory: pytest.TempPathFactory, client: Client) -> dict[str, bytes]:
    """Return the output over all shards from one run; its inputs lie where the grown ones do not."""
    folder = tmp_path_factory.mktemp("whole")
    add(tars, folder / "in")
    run(folder / "in", folder / "OUT", client)
    return bytes_of(folder / "OUT")


def tars_of(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.endswith(".tar")}


def test_a_grown_run_ends_in_the_shards_of_one_over_all_inputs(tars, whole, tmp_path, client) -> None:
    add(tars[:2], tmp_path / "in")
    first = run(tmp_path / "in", tmp_path / "OUT", client)
    before = bytes_of(tmp_path / "OUT")
    assert first.counts["duplicate"] > 0
    add(tars[2:], tmp_path / "in")
    steps: list[tuple[str, int]] = []
    note: Progress = lambda phase, done, total, _: steps.append((phase, total))  # noqa: E731
    grown = run(tmp_path / "in", tmp_path / "OUT", client, progress=note)
    assert ("read", 1) in steps, "only the new partition is read"
    assert grown.samples > first.samples
    assert tars_of(bytes_of(tmp_path / "OUT")) == tars_of(whole) != tars_of(before)
    assert not (tmp_path / "OUT" / "checkpoint").exists()
    manifest = Manifest.load(str(tmp_path / "OUT"))
    assert manifest is not None
    assert manifest.increments == [2, 4]
    steps.clear()
    assert run(tmp_path / "in", tmp_path / "OUT", client, progress=note).counts == grown.counts
    assert not steps, "the same command again finds all done"


def test_the_catalog_of_a_grown_run_is_that_of_one_over_all_inputs(tars, tmp_path, client) -> None:
    add(tars[:1], tmp_path / "in")
    run(tmp_path / "in", tmp_path / "OUT", client, files_per_partition=1)
    add(tars[1:], tmp_path / "in")
    run(tmp_path / "in", tmp_path / "OUT", client, files_per_partition=1)
    run(tmp_path / "in", tmp_path / "OUT2", client, files_per_partition=1)
    assert bytes_of(tmp_path / "OUT") == bytes_of(tmp_path / "OUT2")
    mine, other = (json.loads((tmp_path / o / "_SUCCESS").read_text()) for o in ("OUT", "OUT2"))
    assert mine["fingerprint"] == other["fingerprint"]
    same = {k: v for k, v in mine["files"].items() if k.startswith(("shards/", "catalog/"))}
    assert same == {k: v for k, v in other["files"].items() if k in same}


def test_shards_that_sort_before_the_old_ones_get_numbers_after_them(tars, tmp_path, client) -> None:
    add(tars[2:], tmp_path / "in")
    first = run(tmp_path / "in", tmp_path / "OUT", client)
    uids = set(first.catalog.uid.compute())
    add(tars[:2], tmp_path / "in")
    grown = run(tmp_path / "in", tmp_path / "OUT", client)
    catalog = grown.catalog.compute()
    assert catalog.uid.is_unique
    assert catalog.uid.is_monotonic_increasing
    old = catalog[catalog.uid.isin(uids)]
    assert {Path(s).name for s in old.shard} == {t.name for t in tars[2:]}
    assert set(catalog.uid) > uids
    # The same command again finds the run finished, whatever order the names sort in.
    assert run(tmp_path / "in", tmp_path / "OUT", client).counts == grown.counts


@pytest.mark.parametrize("phase", ["take back", "dedup", "write"])
def test_growth_that_is_stopped_goes_on(tars, whole, tmp_path, client, phase: str) -> None:
    add(tars[:2], tmp_path / "in")
    run(tmp_path / "in", tmp_path / "OUT", client)
    add(tars[2:], tmp_path / "in")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "in", tmp_path / "OUT", client, progress=stop_in(phase))
    assert Success.load(str(tmp_path / "OUT")) is None
    run(tmp_path / "in", tmp_path / "OUT", client, resume=True)
    assert tars_of(bytes_of(tmp_path / "OUT")) == tars_of(whole)


@pytest.mark.parametrize("phase", ["write"])
def test_a_run_that_was_stopped_may_grow(tars, whole, tmp_path, client, phase: str) -> None:
    add(tars[:2], tmp_path / "in")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "in", tmp_path / "OUT", client, progress=stop_in(phase))
    add(tars[2:], tmp_path / "in")
    run(tmp_path / "in", tmp_path / "OUT", client)
    assert tars_of(bytes_of(tmp_path / "OUT")) == tars_of(whole)


def test_inputs_that_changed_or_went_are_another_run(tars, tmp_path, client) -> None:
    add(tars, tmp_path / "in")
    run(tmp_path / "in", tmp_path / "OUT", client)
    shutil.copy(tars[0], tmp_path / "in" / tars[1].name)
    with pytest.raises(ConfigError, match=rf"{tars[1].name} has changed: (modified|nbytes): .*--overwrite"):
        run(tmp_path / "in", tmp_path / "OUT", client)
    (tmp_path / "in" / tars[1].name).unlink()
    with pytest.raises(ConfigError, match=rf"4 there, 3 asked for; \S+{tars[1].name} is not among them any more"):
        run(tmp_path / "in", tmp_path / "OUT", client)


def test_what_a_run_left_that_was_killed_at_its_very_end_is_removed(tars, tmp_path, client) -> None:
    add(tars[:1], tmp_path / "in")
    first = run(tmp_path / "in", tmp_path / "OUT", client)
    (tmp_path / "OUT" / "checkpoint" / "attempts").mkdir(parents=True)
    assert run(tmp_path / "in", tmp_path / "OUT", client) == first
    assert not (tmp_path / "OUT" / "checkpoint").exists()


def test_resume_needs_the_run(tars, tmp_path, client) -> None:
    add(tars[:1], tmp_path / "in")
    with pytest.raises(ConfigError, match="holds no run to go on with"):
        run(tmp_path / "in", tmp_path / "OUT", client, resume=True)
    run(tmp_path / "in", tmp_path / "OUT", client)
    assert run(tmp_path / "in", tmp_path / "OUT", client, resume=True).samples > 0


def test_the_mark_names_every_file_with_its_checksum(tars, tmp_path, client) -> None:
    add(tars[:2], tmp_path / "in")
    result = run(tmp_path / "in", tmp_path / "OUT", client)
    mark = Success.load(str(tmp_path / "OUT"))
    assert mark is not None
    assert (mark.samples, mark.counts) == (result.samples, result.counts)
    out = tmp_path / "OUT"
    there = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} - {
        "_SUCCESS",
        "manifest.json",
        "pipeline.yaml",
    }
    assert set(mark.files) == there
    assert all(file_digest(str(out / name)) == digest for name, digest in mark.files.items())


def test_the_phase_in_which_a_sample_left_is_noted_and_can_be_taken_back(tars, tmp_path, client) -> None:
    add(tars[:2], tmp_path / "in")
    run(tmp_path / "in", tmp_path / "OUT", client)
    catalog = Catalog(str(tmp_path / "OUT"), 1)
    rows = catalog.read(0).to_pandas()
    assert rows.phase[rows.status == "ok"].isna().all()
    assert (rows.phase[rows.status.isin(["decode_error", "quality"])] == 0).all()
    by = rows[rows.status == "duplicate"].groupby("duplicate_by").phase.unique()
    assert by["phash"].tolist() == [1]
    # A sample that went for one which goes later is a duplicate by the looser of the two steps.
    assert sorted(by["embedding"]) == [1, 2]
    columns = [c for c in catalog.schema.names if c not in ("cluster", "phase", "similarity") and "duplicate" not in c]
    catalog.reset(0, columns)
    back = pq.read_table(catalog.part_url(0)).to_pandas()
    assert back.status.value_counts().to_dict() == {
        **rows.status[~rows.status.isin(["ok", "duplicate"])].value_counts().to_dict(),
        "ok": int(rows.status.isin(["ok", "duplicate"]).sum()),
    }
    assert (back.reason[back.status == "ok"] == "").all()


@pytest.mark.parametrize("phase", ["read", "SemanticDedupStage", "write", "finish"])
def test_a_run_that_was_stopped_may_decide_otherwise_without_decoding_again(
    phase: str, tars: list[Path], tmp_path: Path, client: Client
) -> None:
    add(tars, tmp_path / "in")
    out = tmp_path / "OUT"
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "in", out, client, progress=stop_in(phase))
    there = {p.name for p in out.glob("catalog/*.parquet")}
    assert there
    with pytest.raises(ConfigError, match=r"holds another run \(ImageQualityFilterStage"):
        pipeline(tmp_path / "in", sharpness=30).run(str(out), client=client)
    other = pipeline(tmp_path / "in", eps=0.15, per_tar=40)
    with pytest.raises(ConfigError, match="holds another run"):
        other.run(str(out), client=client, resume=True)
    seen: list[str] = []
    result = other.run(str(out), client=client, progress=lambda phase, *_: seen.append(phase))
    # What was in flight when it was stopped may have ended since.
    assert seen.count("read") <= 2 - len(there)
    assert result.dedup[-1]["eps"] == 0.15
    fresh = other.run(str(tmp_path / "FRESH"), client=client)
    assert bytes_of(out) == bytes_of(tmp_path / "FRESH")
    assert result.counts == fresh.counts
    # One that is done is another run.
    with pytest.raises(ConfigError, match="holds another run"):
        run(tmp_path / "in", out, client)
