"""The encoder by itself, on ready pixels: precisions, compiled or not, batch sizes; how fast, and how near to float32.

    python benchmarks/bench_encoder.py --model ViT-L-14 --photos DIR --images 1024 --json encoder.json    # on a GPU
    python benchmarks/bench_encoder.py --model ViT-B-32 --photos DIR --images 64                          # on a CPU
    python benchmarks/bench_encoder.py --smoke

Every case encodes the same images. "open_clip" is its own image tower in bfloat16 (in float32 where the hardware has no
bfloat16), as everybody calls it. Beside its speed stand: how many of the device's bfloat16 operations a second, as a
large matrix product does them here, the model's own are (each 2 for a multiplication and an addition); the cosine of
the embeddings to those of float32, and that without what all have in common; and, if `--head` names the file of LAION's
V2 head, how the aesthetic score changes. Weights are random: they cost what real ones cost, and round as they will.

Claimed, on a GPU, and judged with --json: bfloat16 reaches 0.60 of the matrix rate, and 8-bit floats are 1.15 times as
fast as bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_decode import generated, photos
from harness import Case, argument_parser, compare
from torch.utils.flop_counter import FlopCounterMode

from imgcurate.backend import Backend, get_backend
from imgcurate.decode import Decoder
from imgcurate.models import clip_weights
from imgcurate.models.encoders import EncoderSpec, OpenClipEncoder
from imgcurate.models.head_files import load_aesthetic_head

CLAIM_OF_RATE, CLAIM_FP8 = 0.60, 1.15
MATRIX = 8192
PLAIN = "open_clip"

Encode = Callable[[torch.Tensor], torch.Tensor]


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--photos", type=Path, metavar="DIR", help="JPEGs to take (default: made here)")
    parser.add_argument("--images", type=int, default=64, help="images to encode (default: 64)")
    parser.add_argument("--model", default="ViT-B-32", help="open_clip architecture (default: ViT-B-32)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="images per batch (default: one, that of `auto`)")
    parser.add_argument("--precisions", nargs="+", help="of fp32 bf16 fp16 fp8 (default: all that the device can do)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument(
        "--head", type=Path, metavar="DIR", help="folder with the aesthetic head of LAION, for 768 dimensions"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    args = parser.parse_args()
    backend = get_backend(args.device)
    torch.set_num_threads(args.threads)
    if args.smoke:
        args.images, args.batch_sizes, args.precisions = 2, [2], ["fp32", "bf16"]
    sizes = args.batch_sizes or [backend.batch_size("auto")]
    load_once(args.model)
    exact = OpenClipEncoder(EncoderSpec(args.model, "random", None, "fp32", min(32, args.images), False), backend)
    pixels = ready_pixels(args, exact, backend)
    encoders = made(args, backend, sizes)
    cases = [
        Case(name, lambda encode=encode: encode(pixels), lambda e: {"images": len(e)}, {"images": args.images})
        for name, encode in encoders.items()
    ]
    rate = matrix_rate(backend, smoke=args.smoke)
    code = compare(
        "encoder", cases, args, baseline=f"{PLAIN} {sizes[0]}", packages=["open_clip_torch", "triton"],
        synchronize=torch.cuda.synchronize if backend.is_gpu else lambda: None,
        parameters={"images": args.images, "model": args.model, "device": backend.name, "threads": args.threads,
                    "matrix_tflops": round(rate / 1e12, 2), "source": "photos" if args.photos else "made"},
    )  # fmt: skip
    return code or judge(args, encoders, exact, pixels, rate)


def load_once(model: str) -> None:
    """Let random weights of a large model, which take seconds to make, be made once."""
    made = clip_weights.load(clip_weights.find(model, "random"))
    clip_weights.load = lambda weights, texts=True: copy.deepcopy(made)


def ready_pixels(args: argparse.Namespace, encoder: OpenClipEncoder, backend: Backend) -> torch.Tensor:
    blobs = photos(args.photos, args.images) if args.photos else generated(args.images)
    decoder = Decoder((encoder.view,), backend, batch_size=32, num_threads=2)
    parts = [decoder.decode(blobs[i : i + 32]).images[encoder.view].clone() for i in range(0, len(blobs), 32)]
    return torch.cat(parts)


def made(args: argparse.Namespace, backend: Backend, sizes: list[int]) -> dict[str, Encode]:
    """Return what is measured, by name."""
    encoders: dict[str, Encode] = {}
    precisions = args.precisions or (["fp32", "bf16", "fp16", "fp8"] if backend.is_gpu else ["fp32", "bf16"])
    for size in sizes:
        encoders[f"{PLAIN} {size}"] = Plain(args.model, backend, size)
        for precision in precisions:
            spec = EncoderSpec(args.model, "random", None, precision, size)
            encoders[f"{precision} {size}"] = OpenClipEncoder(spec, backend)
        if backend.is_gpu:
            spec = EncoderSpec(args.model, "random", None, "bf16", size, compile=False)
            encoders[f"bf16 not compiled {size}"] = OpenClipEncoder(spec, backend)
    return encoders


class Plain:
    """The tower as open_clip makes it."""

    def __init__(self, model: str, backend: Backend, size: int) -> None:
        ours = OpenClipEncoder(EncoderSpec(model, "random", batch_size=size), backend)
        self._dtype, self._planes, self._size = ours.dtype, ours.planes, size
        tower = clip_weights.load(clip_weights.find(model, "random")).visual
        self._visual = tower.to(device=backend.torch_device, dtype=self._dtype).eval()

    @torch.inference_mode()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        chunks = pixels.split(self._size)
        planes = (self._planes(c).to(self._dtype) for c in chunks)
        return torch.cat([F.normalize(self._visual(p).float(), dim=1) for p in planes])


def matrix_rate(backend: Backend, *, smoke: bool) -> float:
    """Return how many bfloat16 operations a second a large matrix product does."""
    n = MATRIX if backend.is_gpu else 256 if smoke else 2048
    a, b = (torch.randn(n, n, device=backend.torch_device, dtype=torch.bfloat16) for _ in range(2))
    wait = torch.cuda.synchronize if backend.is_gpu else lambda: None
    seconds = []
    for _ in range(12):
        wait()
        start = time.perf_counter()
        a @ b
        wait()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / sorted(seconds)[len(seconds) // 2]


def model_flops(model: str, pixels: torch.Tensor) -> float:
    """Return the operations of an image, as open_clip's own tower does them."""
    tower = clip_weights.load(clip_weights.find(model, "random")).visual.eval()
    # What is fused in torch's own attention would not be counted.
    tower.train()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower(torch.zeros(1, 3, *pixels.shape[1:3]))
    return float(counter.get_total_flops())


def judge(
    args: argparse.Namespace, encoders: dict[str, Encode], exact: Encode, pixels: torch.Tensor, rate: float
) -> int:
    """Print what each case's speed is worth, and add it to the report."""
    truth, flops = exact(pixels), model_flops(args.model, pixels)
    head = load_aesthetic_head(args.head) if args.head else None
    report: dict[str, Any] = json.loads(args.json.read_text()) if args.json else {}
    medians = {case["name"]: case["median_s"] for case in report.get("results", [])}
    print(f"{flops / 1e9:.1f} GFLOP an image; matrix products at {rate / 1e12:.1f} TFLOP/s")
    rows = {}
    for name, encode in encoders.items():
        got = encode(pixels)
        cosine = F.cosine_similarity(got, truth)
        own = F.cosine_similarity(got - truth.mean(dim=0), truth - truth.mean(dim=0))
        row = {"cosine_min": cosine.min().item(), "cosine_mean": cosine.mean().item(), "own_mean": own.mean().item()}
        if name in medians:
            row["of_matrix_rate"] = args.images * flops / medians[name] / rate
        if head is not None:
            row["aesthetic_max"] = (head(got.cpu()) - head(truth.cpu())).abs().max().item()
        rows[name] = row
        print(f"  {name:22} " + ", ".join(f"{key} {value:.6f}" for key, value in row.items()))
    if args.json:
        args.json.write_text(json.dumps(report | {"fidelity": rows, "flops_per_image": flops}, indent=1) + "\n")
    if args.smoke or not (args.json and pixels.is_cuda):
        return 0
    rates = {name: row["of_matrix_rate"] for name, row in rows.items()}
    size = next(iter(rates)).removeprefix(f"{PLAIN} ")
    bf16 = rates.get(f"bf16 {size}", CLAIM_OF_RATE)
    fp8 = rates.get(f"fp8 {size}", CLAIM_FP8 * bf16)
    return int(bf16 < CLAIM_OF_RATE or fp8 < CLAIM_FP8 * bf16)


if __name__ == "__main__":
    raise SystemExit(main())
