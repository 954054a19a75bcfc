"""What imgcurate itself costs per shard: runs over many tiny shards whose stages do nothing.

    python benchmarks/bench_scale.py --shards 1000 10000 100000 --folder SCRATCH

Each shard holds two samples, and nothing is decoded. By default up to 64 such tiny shards share a partition, the unit
of work and of the checkpoint; `--files-per-partition 1` tells what a partition costs. All else is that of any run:
index, catalog, a stage, counts, output shards, checksums, marks. Given are milliseconds per shard, by phase too, and
the peak memory of the process that holds client and scheduler and of the largest worker. One run for each number of
shards, for the growth is what it is for.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from harness import argument_parser, environment, write_tar

from imgcurate import FilePartitioningStage, ImageReaderStage, ImageWriterStage, Pipeline, ProcessingStage
from imgcurate.cluster import open_client

_LINKS = 30_000
_SAMPLE_EVERY_S = 0.1


class Nothing(ProcessingStage):
    """A stage that looks at no pixels and keeps everything."""

    name = "nothing"

    def process(self, batch: Any) -> Any:
        return batch


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--shards", type=int, nargs="+", default=[1000, 10_000], help="(default: 1,000 and 10,000)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default: 2)")
    parser.add_argument("--files-per-partition", type=int, help="(default: tiny ones together)")
    parser.add_argument("--folder", type=Path, help="for shards and output (default: a temporary one)")
    args = parser.parse_args()
    results = []
    for n in [80] if args.smoke else args.shards:
        with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
            results.append(measure(Path(scratch), n, args.workers, args.files_per_partition))
        r = results[-1]
        print(
            f"{n:,} shards: {r['median_s']:.1f} s, {r['ms_per_shard']:.2f} ms a shard; client and scheduler "
            f"{r['client_peak_bytes'] / 2**20:,.0f} MiB, largest worker {r['worker_peak_bytes'] / 2**20:,.0f} MiB"
        )
        print("  " + ", ".join(f"{name} {ms:.2f}" for name, ms in r["ms_by_phase"].items()) + " ms a shard")
    report = {
        "benchmark": "scale", "smoke": args.smoke, "environment": environment([]),
        "parameters": {"workers": args.workers, "files_per_partition": args.files_per_partition}, "results": results,
    }  # fmt: skip
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def make_shards(folder: Path, n: int) -> None:
    """Make n tars of two samples each; they share their bytes on disk."""
    folder.mkdir()
    image, caption = b"\xff\xd8\xff\xe0" + bytes(96), b"a caption"
    for i in range(n):
        path = folder / f"{i:07d}.tar"
        if i % _LINKS:
            os.link(folder / f"{i - i % _LINKS:07d}.tar", path)
        else:
            write_tar(path, [("a.jpg", image), ("a.txt", caption), ("b.jpg", image), ("b.txt", caption)])


def measure(scratch: Path, n: int, workers: int, files_per_partition: int | None) -> dict[str, Any]:
    make_shards(scratch / "in", n)
    pipeline = Pipeline(
        [
            FilePartitioningStage(str(scratch / "in"), files_per_partition),
            ImageReaderStage(),
            Nothing(),
            ImageWriterStage(images_per_tar=10_000),
        ]
    )
    with open_client(device="cpu", n_workers=workers, dashboard_address=None) as client, watched() as peaks:
        client.wait_for_workers(workers)
        start = time.perf_counter()
        result = pipeline.run(str(scratch / "OUT"), client=client)
        seconds = time.perf_counter() - start
    if result.counts != {"ok": 2 * n}:
        raise AssertionError(f"{result.counts} of {2 * n} samples")
    phases = json.loads((scratch / "OUT" / "manifest.json").read_text())["timings_s"]
    phases["rest"] = seconds - sum(phases.values())
    shutil.rmtree(scratch / "OUT")
    return {
        "name": f"{n} shards", "median_s": seconds, "counted": {"shards": n}, "ms_per_shard": 1000 * seconds / n,
        "ms_by_phase": {name: 1000 * s / n for name, s in phases.items()}, **peaks,
    }  # fmt: skip


@contextmanager
def watched() -> Iterator[dict[str, int]]:
    """Yield a dict that has the peak memory of this process and of its largest child at the end."""
    peaks = {"client_peak_bytes": 0, "worker_peak_bytes": 0}
    done = threading.Event()

    def watch() -> None:
        me = psutil.Process()
        while not done.wait(_SAMPLE_EVERY_S):
            peaks["client_peak_bytes"] = max(peaks["client_peak_bytes"], me.memory_info().rss)
            for child in me.children(recursive=True):
                try:
                    peaks["worker_peak_bytes"] = max(peaks["worker_peak_bytes"], child.memory_info().rss)
                except psutil.Error:
                    continue

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    raise SystemExit(main())
