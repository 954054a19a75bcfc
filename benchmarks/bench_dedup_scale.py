"""Deduplication on disk, on a local cluster: seconds of each step, and the memory of all processes together.

    python benchmarks/bench_dedup_scale.py --rows 1000000 --workers 2 --folder SCRATCH

Vectors are those of bench_dedup.py, in Parquet parts of 50,000, made once per folder. One run, for it takes
minutes: the growth with the number of rows is what it is for.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from bench_dedup import planted
from harness import argument_parser, environment

from imgcurate.backend import list_array
from imgcurate.catalog import Catalog
from imgcurate.cluster import open_client
from imgcurate.dedup import DedupConfig
from imgcurate.dedup.catalog import CatalogDedup
from imgcurate.execution import run_on_client

PART_ROWS = 50_000


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="vectors (default: 1,000,000)")
    parser.add_argument("--dim", type=int, default=512, help="values of a vector (default: 512)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default: 2)")
    parser.add_argument("--folder", type=Path, help="for vectors and scratch files (default: a temporary one)")
    args = parser.parse_args()
    rows = 3000 if args.smoke else args.rows
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        catalog = vectors(args.folder or Path(scratch), rows, args.dim)
        steps, removed = measure(catalog, scratch, args.workers)
    total_s, peak_bytes = sum(s.seconds for s in steps), max(s.peak_bytes for s in steps)
    for step in steps:
        print(f"{step.name:32} {step.seconds:8.1f} s {step.peak_bytes / 2**30:8.2f} GiB")
    print(f"{rows:,} rows: {total_s:.1f} s, {removed:,} removed, {peak_bytes / 2**30:.2f} GiB in all processes")
    case = {"name": "total", "median_s": total_s, "counted": {"rows": rows, "removed": removed}}
    report = {
        "benchmark": "dedup_scale", "smoke": args.smoke, "environment": environment(["scikit-learn"]),
        "parameters": {"rows": rows, "dim": args.dim, "workers": args.workers},
        "results": [case], "steps": [asdict(s) for s in steps], "peak_rss_bytes": peak_bytes,
    }  # fmt: skip
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def vectors(folder: Path, rows: int, dim: int) -> Catalog:
    """Return a catalog with the vectors; those that are there already are not made again."""
    catalog = Catalog(str(folder / f"vectors-{rows}-{dim}"), -(-rows // PART_ROWS))
    catalog.make_folders()
    for part in catalog.missing_parts():
        n = min(PART_ROWS, rows - part * PART_ROWS)
        columns = {
            "uid": (part << 32) + np.arange(n),
            "shard": pa.array([f"{part:05d}.tar"] * n),
            "key": pa.array([str(i) for i in range(n)]),
            "status": pa.array(["ok"] * n),
            "reason": pa.array([""] * n),
            "embedding": list_array(planted(n, dim, seed=part)),
        }
        catalog.write_part(part, pa.table(columns))
    return catalog


@dataclass
class Step:
    """What a step took, and the memory of all processes together while it ran."""

    name: str
    seconds: float = 0.0
    peak_bytes: int = 0


def measure(catalog: Catalog, scratch: str, workers: int) -> tuple[list[Step], int]:
    """Run it, and return the steps and the rows that went."""
    steps = [Step("start")]
    done = threading.Event()

    def watch() -> None:
        me = psutil.Process(os.getpid())
        while not done.wait(0.2):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.Error:
                    continue
            steps[-1].peak_bytes = max(steps[-1].peak_bytes, total)

    thread = threading.Thread(target=watch)
    with open_client(device="cpu", n_workers=workers) as client:

        def run(
            step: str,
            function: Callable[[int], dict[str, Any]],
            numbers: Sequence[int],
            *,
            light: bool = False,
            on_device: bool = False,
        ) -> dict[int, Any]:
            del on_device
            steps.append(Step(step))
            start = time.perf_counter()
            result = run_on_client(step, function, numbers, client=client, light=light)
            steps[-1].seconds = time.perf_counter() - start
            return result

        thread.start()
        job = CatalogDedup(catalog, DedupConfig(), f"{scratch}/dedup", "cpu")
        removed = job.run(run)
        steps.append(Step("collect"))
        start = time.perf_counter()
        gone = sum(int(job.decided(part).goes.sum()) for part in range(catalog.n_parts))
        steps[-1].seconds = time.perf_counter() - start
        done.set()
        thread.join()
    if gone != removed[job.config.eps]:
        raise AssertionError(f"{removed} were counted and {gone} are gone")
    return steps, gone


if __name__ == "__main__":
    raise SystemExit(main())
