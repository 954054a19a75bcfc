"""How near the pipeline comes to what its stages can do: reading, decoding, encoding, each by itself and together.

    python benchmarks/bench_pipeline.py --photos DIR --model ViT-B-32 --json pipeline.json

The stages by themselves run in this process with one thread, on inputs that are ready. The pipeline runs on a local
cluster that has loaded the model already, and writes catalog and shards too. Its *bound* is, on a GPU, the encoder
alone, for all else overlaps with it; on a CPU, whose cores all stages share, cores / (sum of the stages' CPU seconds an
image).

Claimed: 0.90 of the bound. Weights are random: they cost what real ones cost.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_decode import generated, photos
from distributed import Client
from harness import Case, argument_parser, compare, write_tar

from imgcurate import FilePartitioningStage, ImageEmbeddingStage, ImageReaderStage, ImageWriterStage, Pipeline
from imgcurate.backend import Backend, cpu_count, get_backend
from imgcurate.cluster import open_client
from imgcurate.decode import Decoder
from imgcurate.frame import read_group
from imgcurate.liveness import known_workers
from imgcurate.models.encoders import EncoderSpec, load_encoder
from imgcurate.shards import Shard

CLAIM = 0.90
STAGES = ("read", "decode", "encode")


@dataclass
class Timed:
    """A function that notes the CPU seconds of this process, all threads, each time that it is called."""

    function: Callable[[], Any]
    cpu_s: list[float] = field(default_factory=list)

    def __call__(self) -> Any:
        start = time.process_time()
        result = self.function()
        self.cpu_s.append(time.process_time() - start)
        return result


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--photos", type=Path, metavar="DIR", help="JPEGs to take (default: made here)")
    parser.add_argument("--images", type=int, default=960, help="images (default: 960)")
    parser.add_argument("--model", default="ViT-B-32", help="open_clip architecture (default: ViT-B-32)")
    parser.add_argument("--batch-size", type=int, help="images per batch (default: 32, or 256 on a GPU)")
    parser.add_argument("--precision", default="auto", help="of the model (default: auto)")
    parser.add_argument("--tasks-per-gpu", type=int, default=2, help="partitions at work on a GPU (default: 2)")
    parser.add_argument("--samples", type=int, default=240, help="images per shard (default: 240)")
    parser.add_argument("--workers", type=int, help="worker processes (default: one per core, or per GPU)")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--folder", type=Path, help="for shards and output (default: a temporary one)")
    args = parser.parse_args()
    n = 24 if args.smoke else args.images
    model, pretrained = ("tiny-image", "") if args.smoke else (args.model, "random")
    backend = get_backend(args.device)
    args.batch_size = args.batch_size or backend.batch_size("auto")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        blobs = photos(args.photos, n) if args.photos else generated(n)
        shards = write_shards(Path(scratch) / "in", blobs, args.samples)
        spec = EncoderSpec(model, pretrained, precision=args.precision, batch_size=args.batch_size)
        alone = stages(shards, blobs, spec, backend)
        embed = ImageEmbeddingStage(
            model, pretrained, model_inference_batch_size=args.batch_size, precision=args.precision
        )
        reader = ImageReaderStage(args.batch_size, num_gpus_per_worker=1 / args.tasks_per_gpu)
        with open_client(
            device=backend.name, n_workers=args.workers, tasks_per_gpu=args.tasks_per_gpu, dashboard_address=None
        ) as client:
            whole = partial(run, shards[0].parent, Path(scratch) / "OUT", embed, reader, client)
            cases = [Case(name, alone[name], dict, {"images": n}) for name in STAGES]
            cases.append(Case("end to end", whole, dict, {"images": n}))
            code = compare(
                "pipeline", cases, args, baseline="end to end", packages=["open_clip_torch", "nvidia-dali-cuda120"],
                synchronize=torch.cuda.synchronize if backend.is_gpu else lambda: None,
                parameters={"images": n, "model": model, "batch_size": args.batch_size, "device": backend.name,
                            "precision": args.precision, "samples": args.samples, "tasks_per_gpu": args.tasks_per_gpu,
                            "workers": len(known_workers(client)), "cores": cpu_count(),
                            "mean_bytes": sum(map(len, blobs)) // n, "source": "photos" if args.photos else "made"},
            )  # fmt: skip
    return code or add_bound(args.json, alone, n, backend, smoke=args.smoke)


def write_shards(folder: Path, blobs: list[bytes], samples: int) -> list[Path]:
    folder.mkdir()
    paths = []
    for start in range(0, len(blobs), samples):
        paths.append(folder / f"{start // samples:05d}.tar")
        write_tar(paths[-1], ((f"{i:08d}.jpg", b) for i, b in enumerate(blobs[start : start + samples], start)))
    return paths


def stages(shards: list[Path], blobs: list[bytes], spec: EncoderSpec, backend: Backend) -> dict[str, Timed]:
    encoder = load_encoder(spec, backend)
    size = spec.batch_size
    decoder = Decoder((encoder.view,), backend, batch_size=size, num_threads=cpu_count() if backend.is_gpu else 1)
    batches = [blobs[i : i + size] for i in range(0, len(blobs), size)]
    pixels = [decoder.decode(batch).images[encoder.view].clone() for batch in batches]
    return {
        "read": Timed(lambda: {"images": sum(read(path) for path in shards)}),
        "decode": Timed(lambda: {"images": sum(int(decoder.decode(batch).ok.sum()) for batch in batches)}),
        "encode": Timed(lambda: {"images": sum(len(encoder(p)) for p in pixels)}),
    }


def read(path: Path) -> int:
    """Index a shard and read its images; return how many these are."""
    table = read_group(((0, Shard(str(path))),))
    with path.open("rb") as file:
        for offset, nbytes in zip(table["offset"].to_pylist(), table["nbytes"].to_pylist(), strict=True):
            file.seek(offset)
            if len(file.read(nbytes)) != nbytes:
                raise AssertionError(f"{path} is cut off")
    return len(table)


def run(
    source: Path, out: Path, embed: ImageEmbeddingStage, reader: ImageReaderStage, client: Client
) -> Mapping[str, int]:
    shutil.rmtree(out, ignore_errors=True)
    pipeline = Pipeline([FilePartitioningStage(str(source), 1), reader, embed, ImageWriterStage(1000)])
    return {"images": pipeline.run(str(out), client=client).counts["ok"]}


def add_bound(path: Path | None, alone: Mapping[str, Timed], n: int, backend: Backend, *, smoke: bool) -> int:
    """Print how near the pipeline comes to its bound, and add it to the report."""
    if path is None:
        return 0
    report = json.loads(path.read_text())
    seconds = {case["name"]: case["median_s"] for case in report["results"]}
    cpu_s = {name: sorted(timed.cpu_s)[len(timed.cpu_s) // 2] / n for name, timed in alone.items()}
    bound = n / seconds["encode"] if backend.is_gpu else cpu_count() / sum(cpu_s.values())
    ratio = n / seconds["end to end"] / bound
    report |= {"cpu_s_per_image": cpu_s, "bound_images_per_s": bound, "end_to_end_over_bound": ratio}
    path.write_text(json.dumps(report, indent=1) + "\n")
    print("CPU ms an image: " + ", ".join(f"{name} {1000 * s:.2f}" for name, s in cpu_s.items()))
    print(f"bound {bound:.1f} images/s, end to end {n / seconds['end to end']:.1f}: {ratio:.3f} of the bound")
    return int(ratio < CLAIM and not smoke)


if __name__ == "__main__":
    raise SystemExit(main())
