"""What quarantine costs: imgcurate's decoder against a bare DALI pipeline that makes the same view.

The bare pipeline takes JPEGs that are known to be good and gives the pixels of a 224 x 224 view, batch
after batch, as a loop on DALI would be written by hand: it looks at nothing and stops at the first broken
image. The decoder looks at each header, checks limits, keeps what is broken out and tells why. Both are
given the same good images; the case "1% broken" has broken ones between them: cut off, not an image,
of no bytes, and some that only DALI finds out about while it decodes. On a CPU, where the decoder leaves
resizing to torch, the bare pipeline does too, and one that resizes with DALI is measured beside it.

    python benchmarks/bench_decode.py --photos DIR --json decode.json
    python benchmarks/bench_decode.py            # JPEGs of 640 x 480 pixels, made here
    python benchmarks/bench_decode.py --photos DIR --megapixels 12 --images 64   # as large as those of a camera
    python benchmarks/bench_decode.py --smoke

Claimed: 0.95 of the bare pipeline's speed on clean data, 0.8 with 1% broken images. With --megapixels a decoder
that decodes large JPEGs at their full size is measured too.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Case, argument_parser, compare
from PIL import Image, ImageFilter

from imgcurate.backend import Backend, get_backend
from imgcurate.batches import PixelView
from imgcurate.decode import Decoder
from imgcurate.resize import make_views, view_operators

VIEW = PixelView(224, 224)
CLAIM_CLEAN, CLAIM_BROKEN = 0.95, 0.8


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--photos", type=Path, metavar="DIR", help="JPEGs to decode (default: made here)")
    parser.add_argument("--megapixels", type=float, metavar="M", help="enlarge the images to so many, with grain")
    parser.add_argument("--images", type=int, default=512, help="images to decode (default: 512)")
    parser.add_argument("--batch-size", type=int, default=32, help="images per batch (default: 32)")
    parser.add_argument("--threads", type=int, default=2, help="DALI's threads (default: 2)")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    args = parser.parse_args()
    n = 40 if args.smoke else args.images
    backend = get_backend(args.device)
    clean = photos(args.photos, n) if args.photos else generated(n)
    if args.megapixels:
        clean = enlarged(clean, args.megapixels)
    broken = with_broken(clean, 1 if args.smoke else max(1, n // 100))
    decoder = Decoder((VIEW,), backend, batch_size=args.batch_size, num_threads=args.threads)
    bare = BareDali(backend, args.batch_size, args.threads, resizes=backend.is_gpu)
    expected = {"images": n, "values": n * VIEW.height * VIEW.width * 3}
    cases = [
        Case("bare DALI", lambda: bare.decode(clean), count, expected),
        Case("decoder, clean", lambda: decode(decoder, clean), count, expected, min_ratio=CLAIM_CLEAN),
        Case("decoder, 1% broken", lambda: decode(decoder, broken), count, expected, min_ratio=CLAIM_BROKEN),
    ]
    if not backend.is_gpu:
        alone = BareDali(backend, args.batch_size, args.threads, resizes=True)
        cases.append(Case("bare DALI that resizes", lambda: alone.decode(clean), count, expected))
    if args.megapixels:
        whole = Decoder((VIEW,), backend, batch_size=args.batch_size, num_threads=args.threads, jpeg_scaling=False)
        cases.append(Case("decoder, full size", lambda: decode(whole, clean), count, expected))
    return compare(
        "decode", cases, args, baseline="bare DALI", packages=["nvidia-dali-cuda120", "nvidia-dali-cuda130", "pillow"],
        synchronize=torch.cuda.synchronize if backend.is_gpu else lambda: None,
        parameters={"images": n, "broken": len(broken) - n, "batch_size": args.batch_size, "threads": args.threads,
                    "device": backend.name, "mean_bytes": sum(map(len, clean)) // n,
                    "megapixels": args.megapixels, "source": "photos" if args.photos else "generated"},
    )  # fmt: skip


class BareDali:
    """The decoder's graph, and nothing around it."""

    def __init__(self, backend: Backend, batch_size: int, threads: int, *, resizes: bool) -> None:
        from nvidia.dali import Pipeline, fn, types

        self._batch_size, self._threads, self._resizes = batch_size, threads, resizes
        self._graph = Pipeline(batch_size, threads, backend.dali_device_id, prefetch_queue_depth=1, exec_dynamic=True)
        with self._graph:
            source = fn.external_source(name="source", device="cpu")
            image = fn.decoders.image(source, output_type=types.RGB, **backend.dali_decoder)
            if resizes:
                image = view_operators(image, VIEW, fn.cast(image.shape(device="cpu"), dtype=types.FLOAT))
            self._graph.set_outputs(image)
        self._graph.build()

    def decode(self, blobs: Sequence[bytes]) -> list[list[int]]:
        """Return the shapes of the batches; the pixels are gone with the next batch, which the decoder's are not."""
        shapes = []
        for start in range(0, len(blobs), self._batch_size):
            batch = [np.frombuffer(b, np.uint8) for b in blobs[start : start + self._batch_size]]
            (pixels,) = self._graph.run(source=batch)
            if self._resizes:
                shapes.append(list(pixels.as_tensor().shape()))
            else:
                images = [np.asarray(image) for image in pixels]
                shapes.append(list(make_views(images, [VIEW], num_threads=self._threads)[0].shape))
        return shapes


def decode(decoder: Decoder, blobs: Sequence[bytes]) -> list[list[int]]:
    size = decoder.batch_size
    return [list(decoder.decode(blobs[i : i + size]).images[VIEW].shape) for i in range(0, len(blobs), size)]


def count(shapes: list[list[int]]) -> dict[str, int]:
    return {"images": sum(s[0] for s in shapes), "values": sum(int(np.prod(s)) for s in shapes)}


def photos(folder: Path, n: int) -> list[bytes]:
    """Return n good JPEGs of a folder, from its first again if it has fewer."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise SystemExit(f"{folder} holds no .jpg or .jpeg")
    blobs = [p.read_bytes() for p in files[:n]]
    return [blobs[i % len(blobs)] for i in range(n)]


def generated(n: int) -> list[bytes]:
    """Return n JPEGs of 640 x 480 pixels with about as much detail as photos have."""
    rng = np.random.default_rng(0)
    distinct = [encode(rng) for _ in range(min(n, 64))]
    return [distinct[i % len(distinct)] for i in range(n)]


def enlarged(blobs: Sequence[bytes], megapixels: float) -> list[bytes]:
    """Return the images with so many pixels, and grain as that of a camera; at most 16 different ones."""
    rng = np.random.default_rng(1)
    made = []
    for blob in blobs[:16]:
        image = Image.open(io.BytesIO(blob)).convert("RGB")
        factor = (megapixels * 1e6 / (image.width * image.height)) ** 0.5
        large = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)
        pixels = np.asarray(large) + rng.normal(0, 3, (large.height, large.width, 1)).round()
        out = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
        made.append(out.getvalue())
    return [made[i % len(made)] for i in range(len(blobs))]


def encode(rng: np.random.Generator) -> bytes:
    picture = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((640, 480))
    grain = Image.fromarray(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(1))
    out = io.BytesIO()
    Image.blend(picture, grain, 0.25).save(out, "JPEG", quality=90)
    return out.getvalue()


def with_broken(blobs: Sequence[bytes], broken: int) -> list[bytes]:
    """Return the images with broken ones spread among them."""
    out: list[Any] = list(blobs)
    for k in range(broken):
        at = (k * len(blobs)) // broken + k
        good = blobs[k]
        # A Huffman table that cannot be: only decoding finds out.
        table = good.index(b"\xff\xc4") + 5
        hidden = good[:table] + b"\xff" * 16 + good[table + 16 :]
        out.insert(at, (good[: len(good) // 2], b"<html>not found</html>", hidden, b"")[k % 4])
    return out


if __name__ == "__main__":
    raise SystemExit(main())
