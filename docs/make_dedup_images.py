"""Make docs/images/dedup-pairs.jpg: photos, changed copies of them, and how similar encoders find them.

Usage: python docs/make_dedup_images.py PHOTO [PHOTO...]; every photo becomes a row.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from imgcurate.backend import get_backend
from imgcurate.decode import Decoder
from imgcurate.models.encoders import TinyImageEncoder

SIDE = 150
CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "original": lambda im: im,
    "half the size": lambda im: im.resize((im.width // 2, im.height // 2)),
    "JPEG quality 15": lambda im: recompressed(im, 15),
    "90% crop": lambda im: im.crop((im.width // 20, im.height // 20, im.width * 19 // 20, im.height * 19 // 20)),
    "white border": lambda im: ImageOps.expand(im, im.width // 12, (255, 255, 255)),
    "70% crop": lambda im: ImageOps.crop(im, (im.width * 3 // 20, im.height * 3 // 20)),
    "mirrored": ImageOps.mirror,
}


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return Image.open(io.BytesIO(out.getvalue())).convert("RGB")


def embeddings(images: list[Image.Image]) -> np.ndarray:
    encoder = TinyImageEncoder()
    blobs = []
    for image in images:
        out = io.BytesIO()
        image.save(out, "PNG")
        blobs.append(out.getvalue())
    decoder = Decoder((encoder.view,), get_backend("cpu"), batch_size=len(blobs), num_threads=1)
    return encoder(decoder.decode(blobs).images[encoder.view]).numpy()


def main() -> None:
    photos = [Image.open(p).convert("RGB") for p in sys.argv[1:]]
    sheet = Image.new("RGB", (SIDE * len(CHANGES), (SIDE + 26) * len(photos) + 20), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for column, name in enumerate(CHANGES):
        draw.text((column * SIDE + 6, 3), name, "black", font=font)
    for row, photo in enumerate(photos):
        changed = [change(photo) for change in CHANGES.values()]
        x = embeddings(changed)
        for column, image in enumerate(changed):
            top = 20 + row * (SIDE + 26)
            small = ImageOps.contain(image, (SIDE - 6, SIDE - 6))
            sheet.paste(small, (column * SIDE + 3, top + 3))
            draw.text((column * SIDE + 6, top + small.height + 5), f"cosine {x[0] @ x[column]:.3f}", "black", font=font)
    sheet.save(Path(__file__).with_name("images") / "dedup-pairs.jpg", quality=85)


if __name__ == "__main__":
    main()
