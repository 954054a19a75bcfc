"""Export against `cp`: whole samples from input shards to output shards, as byte spans, with checksums.

    python benchmarks/bench_export.py --folder SCRATCH

Both read the same bytes and write as many, one file after the other in one process, and have them on the disk at the
end (fsync). Export reads the catalog too, makes a SHA-256 of each shard, and writes the Parquet files beside them.
Samples are dealt out anew, so no output shard is an input shard.

Claimed: 0.7 of `cp`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from harness import Case, argument_parser, compare, write_tar

from imgcurate import FilePartitioningStage, ImageReaderStage, Pipeline
from imgcurate.catalog import Catalog
from imgcurate.export import plan_shards, write_shard

CLAIM = 0.7
MEAN_BYTES = 28_000


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--shards", type=int, default=8, help="input shards (default: 8)")
    parser.add_argument("--samples", type=int, default=2000, help="samples in each, 28 kB on average (default: 2,000)")
    parser.add_argument("--folder", type=Path, help="for inputs and output (default: a temporary one)")
    args = parser.parse_args()
    n_shards, samples = (2, 20) if args.smoke else (args.shards, args.samples)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch)
        make_shards(folder / "in", n_shards, samples)
        Pipeline([FilePartitioningStage(str(folder / "in")), ImageReaderStage()]).run(str(folder / "RUN"), n_workers=1)
        catalog, kept = Catalog(str(folder / "RUN"), n_shards), [samples] * n_shards
        in_bytes = sum(p.stat().st_size for p in (folder / "in").iterdir())
        out_bytes = tar_bytes(export(catalog, kept, folder / "out"))
        cases = [
            Case("cp", lambda: copy(folder / "in", folder / "out"), count, {"bytes": in_bytes}),
            Case(
                "export", partial(export, catalog, kept, folder / "out"), count, {"bytes": out_bytes}, min_ratio=CLAIM
            ),
        ]
        return compare(
            "export", cases, args, baseline="cp",
            parameters={"shards": n_shards, "samples": samples, "mean_bytes": MEAN_BYTES},
        )  # fmt: skip


def make_shards(folder: Path, n_shards: int, samples: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for shard in range(n_shards):
        sizes = rng.integers(8000, 2 * MEAN_BYTES - 8000, samples).tolist()
        members = (
            (f"{shard:05d}{i:05d}.{ext}", b"\xff\xd8\xff\xe0" + rng.bytes(n - 4))
            for i, size in enumerate(sizes)
            for ext, n in (("jpg", size), ("txt", 60))
        )
        write_tar(folder / f"{shard:05d}.tar", members)


def export(catalog: Catalog, kept: list[int], out: Path) -> Path:
    """Write all output shards, half as large again as the input's."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for shard in plan_shards(kept, kept[0] * 3 // 2):
        write_shard(shard, catalog, str(out))
    return out


def copy(source: Path, out: Path) -> Path:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for path in sorted(source.iterdir()):
        subprocess.run(["cp", "--reflink=never", path, out / path.name], check=True)
        with (out / path.name).open("rb+") as file:
            os.fsync(file.fileno())
    return out


def tar_bytes(out: Path) -> int:
    return sum(p.stat().st_size for p in out.glob("*.tar"))


def count(out: Path) -> Mapping[str, int]:
    return {"bytes": tar_bytes(out)}


if __name__ == "__main__":
    raise SystemExit(main())
