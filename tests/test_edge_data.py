"""Runs over real edge cases: broken, fuzzed and odd files of every format, and photos of every orientation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from imgcurate.backend import Backend
from imgcurate.batches import PixelView
from imgcurate.decode import Decoder

GIB = 1024**3
# Words of libraries and of Python that tell a person nothing.
INNER_LIFE = re.compile(
    r"<_io|\b0x[0-9a-f]{6,}|Traceback|\.(cc|cpp|h|py)\b|Error\b|Exception|data stream|b'|nullptr|::|/dali/"
)


def extension(path: Path) -> str:
    """Return the extension of a file's sample; finds of fuzzers have that of their folder."""
    return path.parent.name if "fuzz-afl" in path.parts else path.suffix.lstrip(".").lower() or "bin"


def peak_bytes(process: subprocess.Popen[str]) -> int:
    """Wait for a process, and return the largest resident memory of it and its children together."""
    peak, done = 0, threading.Event()
    while process.poll() is None and not done.wait(0.2):
        total = 0
        for p in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            try:
                total += p.memory_full_info().pss if sys.platform == "linux" else p.memory_info().rss
            except psutil.Error:
                continue
        peak = max(peak, total)
    return peak


def test_a_run_over_broken_files_ends_and_says_why(data_dir: Path, tmp_path: Path, write_tar, record_property) -> None:
    root = data_dir / "edge"
    files = sorted(p for p in root.rglob("*") if p.is_file())
    samples = []
    for i, path in enumerate(files):
        key = re.sub(r"[^A-Za-z0-9_/-]+", "_", str(path.relative_to(root).with_suffix("")))
        samples.append((f"{i:04d}/{key}", {extension(path): path.read_bytes()}))
    for k in range(4):
        write_tar(tmp_path / "in" / f"{k}.tar", samples[k::4])
    out = tmp_path / "OUT"
    process = subprocess.Popen(
        [sys.executable, "-m", "imgcurate.cli", "curate", str(tmp_path / "in" / "*.tar"), "-o", str(out),
         "--encoder", "tiny-image", "--workers", "2", "-q"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    peak = peak_bytes(process)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert stdout.startswith(f"{len(files)} samples in = ")
    rows = pq.read_table(out / "catalog", columns=["key", "status", "reason"]).to_pandas()
    assert sorted(rows.key) == sorted(key for key, _ in samples)
    assert set(rows.status) <= {"ok", "duplicate", "decode_error", "no_image"}
    left = rows[rows.status != "ok"]
    assert (left.reason != "").all()
    assert not [r for r in left.reason if INNER_LIFE.search(r)]
    assert not [r for r in left.reason if len(r) > 150]
    record_property("peak_bytes", peak)
    record_property("counts", rows.status.value_counts().to_dict())
    assert peak < 2 * GIB


@pytest.mark.parametrize("kind", ["Landscape", "Portrait"])
def test_photos_of_every_orientation_look_alike(kind: str, data_dir: Path, backend: Backend) -> None:
    files = sorted((data_dir / "edge" / "exif").glob(f"{kind}_*.jpg"))
    assert len(files) == 9
    view = PixelView(96, 96, "squash")
    decoded = Decoder((view,), backend, batch_size=9, num_threads=1).decode([f.read_bytes() for f in files])
    assert decoded.reasons == [""] * 9
    width, height = (1800, 1200) if kind == "Landscape" else (1200, 1800)
    assert set(zip(decoded.widths.tolist(), decoded.heights.tolist(), strict=True)) == {(width, height)}
    pixels = decoded.images[view].cpu().numpy().astype(int)
    assert np.abs(pixels - pixels[1]).mean(axis=(1, 2, 3)).max() < 3
