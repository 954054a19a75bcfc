"""What a run tells while it runs: lines of JSON, Dask's report, counters for Prometheus, a line for each phase."""

from __future__ import annotations

import json
import time
import urllib.request
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest
from typer.testing import CliRunner

from imgcurate import ImageBatch, Pipeline, PixelView, ProcessingStage, heartbeat, progress
from imgcurate.cli import app
from imgcurate.cluster import open_client
from imgcurate.progress import progress_or_auto, show_progress
from imgcurate.stages import FilePartitioningStage, ImageEmbeddingStage, ImageReaderStage, ImageWriterStage


def pipeline(shards: Path) -> Pipeline:
    stages = [FilePartitioningStage(str(shards), 1), ImageReaderStage(), ImageEmbeddingStage(model="tiny-image")]
    return Pipeline([*stages, ImageWriterStage(images_per_tar=30)])


def test_workers_count_what_they_did(shards: Path, tmp_path: Path) -> None:
    with open_client(device="cpu", n_workers=1) as client:
        pipeline(shards).run(str(tmp_path / "OUT"), client=client)
        (worker,) = client.scheduler_info(n_workers=-1)["workers"].values()
        url = f"http://127.0.0.1:{worker['services']['dashboard']}/metrics"
        with urllib.request.urlopen(url) as answer:
            lines = answer.read().decode().splitlines()
    found = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith("imgcurate_")}
    assert found['imgcurate_partitions_total{work="make"}'] == 4
    assert found['imgcurate_samples_total{status="ok",work="make"}'] == 72
    assert found['imgcurate_partitions_total{work="write"}'] == 3
    assert found['imgcurate_samples_total{status="ok",work="write"}'] == 72
    assert found['imgcurate_seconds_total{work="make"}'] > 0


def test_progress_shows_by_itself_where_somebody_looks(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    with progress_or_auto("auto") as show:
        assert show is None
    with progress_or_auto(print) as show:
        assert show is print
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_or_auto("auto") as show:
        show("read", 1, 1, {"counts": {"ok": 3}})
    assert "read" in capsys.readouterr().err


def test_progress_in_a_notebook_is_one_output_that_changes() -> None:
    cell = nbformat.v4.new_code_cell(
        "from imgcurate.progress import progress_or_auto\n"
        "with progress_or_auto('auto') as show:\n"
        "    show('read', 1, 2, {'counts': {'ok': 3}})\n"
        "    show('read', 2, 2, {'counts': {'ok': 2}})\n"
        "    show('write', 1, 1, {})\n"
    )
    notebook = nbformat.v4.new_notebook(cells=[cell])
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    (output,) = notebook.cells[0].outputs
    read, write = output["data"]["text/plain"].splitlines()
    assert read.startswith("read: 2 of 2 (5 samples, 100.0% ok")
    assert write == "write: 1 of 1"


def test_a_log_has_a_line_for_each_partition_and_dask_reports_its_tasks(shards: Path, tmp_path: Path) -> None:
    log, performance = tmp_path / "log.jsonl", tmp_path / "performance.html"
    log.write_text('{"before": 1}\n')
    command = ["curate", str(shards), "-o", str(tmp_path / "OUT"), "--encoder", "tiny-image", "--workers", "1", "-q"]
    command += ["--files-per-partition", "1", "--log-json", str(log), "--performance-report", str(performance)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    before, *lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert before == {"before": 1}
    read = [line for line in lines if line["phase"] == "read"]
    assert [(line["done"], line["total"]) for line in read] == [(i, 4) for i in (1, 2, 3, 4)]
    assert sum(line["counts"]["ok"] for line in read) == 72
    assert all(line["time"].endswith("+00:00") for line in lines)
    text = performance.read_text()
    assert "Bokeh" in text
    assert '<script type="text/javascript" src=' not in text


def test_a_log_that_cannot_be_written_is_wrong_usage(shards: Path, tmp_path: Path) -> None:
    command = [
        "curate",
        str(shards),
        "-o",
        str(tmp_path / "OUT"),
        "--encoder",
        "tiny-image",
        "--log-json",
        str(tmp_path),
    ]
    done = CliRunner().invoke(app, command)
    assert "cannot write the log" in str(done.exception)


def test_plain_lines_say_how_many_are_left_and_how_fast(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress(quiet=False) as show:
        assert show is not None
        for done in range(1, 4):
            show("read", done, 3, {"counts": {"ok": 6, "nsfw": 1, "decode_error": 1}})
        # What takes no time is worth no line.
        show("write", 1, 1, {})
        show._last -= 60
        show("finish", 1, 1, {})
    read, finish = capsys.readouterr().err.splitlines()
    assert read.startswith("read: 3 of 3 (24 samples, 75.0% ok, 3 errors, ")
    assert read.endswith("/s)")
    assert finish == "finish: 1 of 1"


def test_plain_lines_tell_of_partitions_in_work(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(progress, "_PLAIN_EVERY_S", 0.0)
    with show_progress(quiet=False) as show:
        show.within("read", 2, 0.75, 30)
        show("read", 1, 2, {"counts": {"ok": 20}})
        show.within("read", 2, 0.9, 18)
        show("read", 2, 2, {"counts": {"ok": 20}})
    words = [line.rpartition(", ")[0] for line in capsys.readouterr().err.splitlines()]
    assert words == [
        "read: 0 of 2 (30 samples", "read: 1 of 2 (30 samples, 100.0% ok", "read: 1 of 2 (38 samples, 100.0% ok",
        "read: 2 of 2 (40 samples, 100.0% ok",
    ]  # fmt: skip


class Slow(ProcessingStage):
    """A stage of one's own that takes its time."""

    needs = ("image",)
    views = (PixelView(8, 8),)

    def process(self, batch: ImageBatch) -> ImageBatch:
        time.sleep(0.05)
        return batch


def test_workers_tell_how_far_they_are_within_a_partition(shards: Path, tmp_path: Path, monkeypatch, client) -> None:
    monkeypatch.setattr(heartbeat, "_EVERY_S", 0.0)
    heard: list[tuple[float, int]] = []

    class Display:
        def __call__(self, phase: str, done: int, total: int, result: dict[str, Any]) -> None:
            pass

        def within(self, phase: str, total: int, parts: float, samples: int) -> None:
            assert (phase, total) == ("read", 1)
            heard.append((parts, samples))

    stages = [FilePartitioningStage(str(shards), 4), ImageReaderStage(dali_batch_size=6), Slow()]
    Pipeline(stages).run(str(tmp_path / "OUT"), client=client, progress=Display())
    samples = [n for _, n in heard]
    assert len(samples) >= 3
    assert samples == sorted(samples)
    assert samples[-1] < 72
    assert all(0 < parts < 1 for parts, _ in heard)
