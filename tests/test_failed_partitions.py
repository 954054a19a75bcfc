"""Partitions that fail: by a stage's error, by killing their worker; what is done about them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import dask
import pandas as pd
import pyarrow as pa
import pytest
from distributed import Client

from imgcurate import ImageBatch, Pipeline, PixelView, ProcessingStage, parts
from imgcurate.backend import Backend
from imgcurate.catalog import Catalog
from imgcurate.cluster import open_client
from imgcurate.demo import make_demo_shards
from imgcurate.errors import ClusterError, ConfigError, ImgcurateError
from imgcurate.frame import read_group
from imgcurate.shards import Shard
from imgcurate.stages import (
    FilePartitioningStage,
    ImageEmbeddingStage,
    ImageReaderStage,
    ImageWriterStage,
    SemanticDedupStage,
)
from imgcurate.stages.executor import Program


class Trap(ProcessingStage):
    """Fail on the samples of some shards, as long as a file is there."""

    name = "trap"
    needs = ("image",)
    views = (PixelView(8, 8),)

    def __init__(self, how: str, shards: list[str], armed: str) -> None:
        self.how, self.shards, self.armed = how, shards, armed

    def process(self, batch: ImageBatch) -> ImageBatch:
        if Path(self.armed).exists() and any(s.endswith(tuple(self.shards)) for s in batch.rows["shard"]):
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ZeroDivisionError("a bug")
        return batch


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    # Two workers die of a partition instead of four.
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        open_client(device="cpu", n_workers=2, dashboard_address=None) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tars")
    make_demo_shards(folder)
    return folder


def pipeline(tars: Path, *stages: ProcessingStage, files: int = 1) -> Pipeline:
    return Pipeline([
        FilePartitioningStage(str(tars / "*.tar"), files), ImageReaderStage(), *stages,
        ImageEmbeddingStage(model="tiny-image"), SemanticDedupStage(), ImageWriterStage(images_per_tar=100),
    ])  # fmt: skip


def files_of(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for f in ("shards", "catalog") for p in (out / f).iterdir()}


@pytest.mark.parametrize("how", ["kill", "raise"])
def test_a_partition_that_may_fail_costs_itself_alone(tars, tmp_path, client, how: str) -> None:
    armed = tmp_path / "armed"
    armed.touch()
    trapped = pipeline(tars, Trap(how, ["00001.tar"], str(armed)))
    out = tmp_path / "OUT"
    # Of workers that die, that it is an error is tested in test_failures.py: each death takes seconds.
    if how == "raise":
        with pytest.raises(ImgcurateError, match="stage trap: ZeroDivisionError: a bug"):
            trapped.run(str(out), client=client)
    result = trapped.run(str(out), client=client, max_failed=1)
    catalog = result.catalog.compute()
    failed = catalog[catalog.status == "failed"]
    assert set(failed.shard.map(lambda s: Path(s).name)) == {"00001.tar"}
    assert failed.reason.str.startswith("the partition failed: ").all()
    assert len(catalog) == result.samples
    assert "failed" in result.accounting()
    assert failed.embedding.isna().all()
    # Once the cause is gone the same run can be completed, and is as if nothing had failed.
    assert trapped.run(str(out), client=client).counts == result.counts
    armed.unlink()
    whole = trapped.run(str(out), client=client, retry_failed=True)
    assert "failed" not in whole.counts
    trapped.run(str(tmp_path / "WHOLE"), client=client)
    assert files_of(out) == files_of(tmp_path / "WHOLE")


def test_of_a_partition_that_may_fail_the_healthy_shards_are_kept(tars, tmp_path, client) -> None:
    armed = tmp_path / "armed"
    armed.touch()
    trapped = pipeline(tars, Trap("raise", ["00001.tar"], str(armed)), files=4)
    result = trapped.run(str(tmp_path / "OUT"), client=client, max_failed=1)
    apart = pipeline(tars, Trap("raise", ["00001.tar"], str(armed)))
    expected = apart.run(str(tmp_path / "APART"), client=client, max_failed=1)
    assert result.counts == expected.counts
    columns = ["key", "status", "embedding", "duplicate_of"]
    catalog, other = (r.catalog.compute().sort_values("uid").reset_index(drop=True) for r in (result, expected))
    assert catalog[columns].equals(other[columns])
    failed = catalog[catalog.status == "failed"]
    assert set(failed.shard.map(lambda s: Path(s).name)) == {"00001.tar"}
    assert failed.reason.str.match("the shard failed: stage trap: ZeroDivisionError: a bug").all()
    armed.unlink()
    whole = trapped.run(str(tmp_path / "OUT"), client=client, max_failed=1, retry_failed=True)
    assert "failed" not in whole.counts


def test_a_shard_whose_worker_died_is_not_tried_again(tars, tmp_path) -> None:
    shards = [Shard(str(path)) for path in sorted(tars.glob("*.tar"))]
    table = read_group(tuple(enumerate(shards)))
    program = Program((Trap("raise", [], ""),), ImageReaderStage(), "cpu")
    out = program.output_schema(table.column_names, {f.name: f.type for f in table.schema})
    catalog = Catalog(str(tmp_path), 1)
    catalog.make_folders()
    # So a task leaves it that died while it was at the third shard.
    catalog.attempts.begin(0, 2)
    frame = Backend("cpu").frame_from_arrow(table)
    parts._salvage_part(frame, pd.DataFrame({"number": [0]}), catalog, program, table.schema, out, {0: "it died"})
    rows = catalog.read(0).to_pandas()
    failed = rows[rows.status == "failed"]
    assert len(rows) == len(table)
    assert set(failed.shard) == {shards[2].url}
    assert set(failed.reason) == {"the shard failed: its workers died"}
    assert (rows[rows.shard != shards[2].url].status == "ok").any()


def test_a_lost_device_is_no_reason_of_the_shards_that_it_was_to_decode(tars, tmp_path, monkeypatch) -> None:
    table = read_group(tuple(enumerate(Shard(str(path)) for path in sorted(tars.glob("*.tar")))))
    program = Program((Trap("raise", [], ""),), ImageReaderStage(), "cpu")
    out = program.output_schema(table.column_names, {f.name: f.type for f in table.schema})
    catalog = Catalog(str(tmp_path), 1)
    catalog.make_folders()

    def lose(self: Program, rows: pa.Table, *, isolated: bool) -> pa.Table:
        raise ImgcurateError("the GPU cannot decode any more") from RuntimeError("CUDA error: illegal memory access")

    monkeypatch.setattr(Program, "run", lose)
    frame = Backend("cpu").frame_from_arrow(table)
    with pytest.raises(ImgcurateError, match="cannot decode any more"):
        parts._salvage_part(frame, pd.DataFrame({"number": [0]}), catalog, program, table.schema, out, {0: "it died"})
    assert catalog.missing_parts() == [0]


def test_more_that_fail_than_may_end_the_run(tars, tmp_path, client) -> None:
    armed = tmp_path / "armed"
    armed.touch()
    trapped = pipeline(tars, Trap("raise", ["00001.tar", "00002.tar"], str(armed)))
    with pytest.raises(ClusterError, match="2 of 4 partitions failed"):
        trapped.run(str(tmp_path / "OUT"), client=client, max_failed=1)
    assert trapped.run(str(tmp_path / "OUT"), client=client, max_failed=2).counts["failed"] > 0


def test_max_failed_is_a_count(tars, tmp_path, client) -> None:
    for value in (-1, 0.5, True):
        with pytest.raises(ConfigError, match="max_failed="):
            pipeline(tars).run(str(tmp_path / "OUT"), client=client, max_failed=value)  # type: ignore[arg-type]
