"""A finished run decided anew: seconds of `imgcurate refilter` as a user calls it, by the run's own clock as well.

    python benchmarks/bench_refilter.py --rows 100000 --workers 2 --folder SCRATCH

The run to be decided anew is made first, once per folder: tiny JPEGs, 1,000 to a shard, with measures, hashes, and
embeddings of bench_dedup.py (512 values, a fifth near-duplicates), decided by rules, exact, perceptual and semantic
deduplication. Then thresholds of sharpness and of similarity change. DALI and open_clip cannot be imported meanwhile.
A first round warms the page cache and is not counted.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from bench_dedup import planted
from harness import argument_parser, environment, write_tar
from PIL import Image

from imgcurate import (
    ExactDedupStage,
    FilePartitioningStage,
    ImageBatch,
    ImageQualityFilterStage,
    ImageReaderStage,
    ImageWriterStage,
    PerceptualDedupStage,
    Pipeline,
    ProcessingStage,
    SemanticDedupStage,
)
from imgcurate.schema import UID_SHARD_BITS, arrow_type

SHARD_ROWS, DIM = 1000, 512
UNUSABLE = ("open_clip", "nvidia")


class Planted(ProcessingStage):
    """Embeddings by place in the input, in place of a model."""

    name = "planted"
    adds: ClassVar = {"embedding": arrow_type("embedding")}
    encoder = "planted"

    def process(self, batch: ImageBatch) -> ImageBatch:
        uid = batch.rows["uid"].to_numpy()
        shards, places = uid >> UID_SHARD_BITS, uid & ((1 << UID_SHARD_BITS) - 1)
        x = np.empty((len(uid), DIM), np.float32)
        for shard in np.unique(shards):
            x[shards == shard] = vectors(int(shard))[places[shards == shard]]
        batch["embedding"] = x
        return batch


@functools.lru_cache(maxsize=4)
def vectors(shard: int) -> np.ndarray:
    return planted(SHARD_ROWS, DIM, seed=shard)


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=int, default=100_000, help="samples (default: 100,000)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default: 2)")
    parser.add_argument("--folder", type=Path, help="for inputs and runs (default: a temporary one)")
    args = parser.parse_args()
    rows, rounds = (2000, 1) if args.smoke else (args.rows, args.repeats)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = args.folder or Path(scratch)
        run = finished_run(folder / f"refilter-{rows}", rows, args.workers)
        warm_up = 0 if args.smoke else 1
        results = [measure(run, Path(scratch), args.workers) for _ in range(warm_up + rounds)][warm_up:]
    seconds = [r["seconds"] for r in results]
    print(f"{rows:,} rows, {results[0]['kept']:,} of them kept: median {statistics.median(seconds):.1f} s of", *seconds)
    phases = {name: statistics.median(r["phases_s"][name] for r in results) for name in results[0]["phases_s"]}
    for name, value in phases.items():
        print(f"  {name:24} {value:6.1f} s")
    report(args, rows, results, phases)
    return 0


def report(args: argparse.Namespace, rows: int, results: list[dict[str, Any]], phases: dict[str, float]) -> None:
    if args.json is None:
        return
    case = {"name": "refilter", "median_s": statistics.median(r["seconds"] for r in results), "phases_s": phases}
    content = {
        "benchmark": "refilter", "smoke": args.smoke, "environment": environment(["dask", "distributed"]),
        "parameters": {"rows": rows, "workers": args.workers},
        "results": [case | {"counted": {"kept": results[0]["kept"]}, "seconds": [r["seconds"] for r in results]}],
    }  # fmt: skip
    args.json.write_text(json.dumps(content, indent=1) + "\n")


def finished_run(folder: Path, rows: int, workers: int) -> Path:
    """Return the output folder of the run; one that is there already is not made again."""
    if (folder / "RUN" / "_SUCCESS").exists():
        return folder / "RUN"
    (folder / "in").mkdir(parents=True, exist_ok=True)
    for shard in range(rows // SHARD_ROWS):
        if not (path := folder / "in" / f"{shard:05d}.tar").exists():
            write_shard(path, shard)
    # Distances of noise that is resized to 8 x 8 are large: few go by the perceptual hash.
    Pipeline([
        FilePartitioningStage(str(folder / "in")),
        ImageReaderStage(),
        ImageQualityFilterStage({"sharpness": (1, None)}, columns=["phash", "content_hash"]),
        Planted(),
        ExactDedupStage(),
        PerceptualDedupStage(2),
        SemanticDedupStage(eps=0.05),
        ImageWriterStage(),
    ]).run(str(folder / "RUN"), n_workers=workers)  # fmt: skip
    return folder / "RUN"


def write_shard(path: Path, shard: int) -> None:
    rng = np.random.default_rng(shard)
    write_tar(path.with_suffix(".tmp"), ((f"{shard:05d}{i:04d}.jpg", jpeg(rng)) for i in range(SHARD_ROWS)))
    path.with_suffix(".tmp").rename(path)


def jpeg(rng: np.random.Generator) -> bytes:
    out = io.BytesIO()
    pixels = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((48, 48), Image.Resampling.BICUBIC).save(out, "JPEG", quality=80)
    return out.getvalue()


def measure(run: Path, scratch: Path, workers: int) -> dict[str, Any]:
    for name in UNUSABLE:
        (scratch / "unusable").mkdir(exist_ok=True)
        (scratch / "unusable" / f"{name}.py").write_text("raise ImportError('unusable')\n")
    out = scratch / "OUT"
    command = [
        sys.executable, "-m", "imgcurate", "refilter", str(run), "-o", str(out), "--workers", str(workers), "--quiet",
        "--eps", "0.04", "--quality", "sharpness=2:",
    ]  # fmt: skip
    path = os.pathsep.join([str(scratch / "unusable"), os.environ.get("PYTHONPATH", "")])
    start = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL)
    seconds = round(time.perf_counter() - start, 1)
    manifest = json.loads((out / "manifest.json").read_text())
    shutil.rmtree(out)
    phases = manifest["timings_s"]
    phases["rest"] = seconds - sum(phases.values())
    return {"seconds": seconds, "phases_s": phases, "kept": manifest["counts"]["ok"]}


if __name__ == "__main__":
    raise SystemExit(main())
