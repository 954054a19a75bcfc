"""Failures of the machine end in words that say what to do."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from imgcurate import Pipeline
from imgcurate.cluster import open_client
from imgcurate.errors import ClusterError, ImgcurateError, PartitionsError
from imgcurate.stages import FilePartitioningStage, ImageReaderStage, ImageWriterStage


def test_a_worker_that_dies_while_the_cluster_starts_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """A nanny whose process is killed as it starts: a real one, at the moment that Dask asks for it."""
    from distributed.nanny import WorkerProcess

    begin = WorkerProcess.start

    async def start(self: WorkerProcess) -> object:
        async def kill() -> None:
            while self.process is None or self.process.pid is None:
                await asyncio.sleep(0.01)
            os.kill(self.process.pid, signal.SIGKILL)

        killing = asyncio.ensure_future(kill())
        try:
            return await begin(self)
        finally:
            killing.cancel()

    monkeypatch.setattr(WorkerProcess, "start", start)
    with (
        pytest.raises(ClusterError, match=r"workers of this machine could not be started .*run the same command again"),
        open_client(device="cpu", n_workers=1, dashboard_address=None),
    ):
        pass


def test_a_full_disk_is_no_reason_to_go_on_without() -> None:
    reason = "cannot write /OUT/catalog/part-00000.parquet: No space left on device"
    told = str(PartitionsError("read", {3: reason}, 10))
    assert told.endswith("what was finished is kept: make room, and run again to go on")
    assert "--max-failed" not in told


def test_an_output_that_is_deleted_is_told(shards: Path, tmp_path: Path, client: Client) -> None:
    out = tmp_path / "OUT"

    def delete(phase: str, done: int, total: int, result: dict[str, Any]) -> None:
        if phase == "read" and done == 1:
            # A worker may write meanwhile.
            while out.exists():
                shutil.rmtree(out, ignore_errors=True)

    stages = [FilePartitioningStage(str(shards), 1), ImageReaderStage(), ImageWriterStage()]
    with pytest.raises(ImgcurateError, match="was deleted while the run was writing to it"):
        Pipeline(stages).run(str(out), client=client, progress=delete)
