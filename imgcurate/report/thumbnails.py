"""Small pictures of samples, as data URIs."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

import numpy as np
import pyarrow as pa
from PIL import Image, ImageFilter, ImageOps

from imgcurate import schema
from imgcurate.errors import ImgcurateError
from imgcurate.pillow import UndecodableError, decode_with_pillow
from imgcurate.probe import open_with_pillow, pillow_settings
from imgcurate.report.sample import CatalogSample
from imgcurate.stages.reading import read_images
from imgcurate.storage import StorageOptions

__all__ = ["thumbnails"]

logger = logging.getLogger(__name__)
_THREADS: Final = 4
_QUALITY: Final = 70
_MAX_PIXELS: Final = 100_000_000
_BLURRED: Final = 8
# Of these there is no picture, or none that should be looked for in this process.
_UNSEEN: Final = (
    schema.STATUS_TAR_ERROR, schema.STATUS_NO_IMAGE, schema.STATUS_READ_ERROR, schema.STATUS_DECODE_ERROR,
    schema.STATUS_DECODER_CRASH, schema.STATUS_FAILED, schema.STATUS_TOO_SMALL,
)  # fmt: skip


def thumbnails(
    sample: CatalogSample,
    rows: Iterable[int],
    side: int,
    *,
    blurred: frozenset[int] = frozenset(),
    storage_options: StorageOptions | None = None,
) -> dict[int, str]:
    """Return pictures of samples as ``data:`` URIs; those that cannot be read or decoded are left out.

    Parameters
    ----------
    sample : CatalogSample
        The rows.
    rows : iterable of int
        Which of them.
    side : int
        Their longer side, in pixels.
    blurred : frozenset of int
        Rows of whose pictures colours and nothing else are to be seen.
    storage_options : mapping, optional
        Passed to fsspec for the input shards.
    """
    unseen = sample.has_status(*_UNSEEN)
    numbers = sample.numbers(schema.NBYTES)
    wanted = sorted({r for r in rows if not unseen[r] and numbers[r] > 0})
    if not wanted:
        return {}
    shards = sample.values(schema.SHARD, wanted)
    made: dict[int, str] = {}
    failures: list[str] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        for shard in dict.fromkeys(shards):
            rows_ = [row for row, where in zip(wanted, shards, strict=True) if where == shard]
            try:
                for batch in read_images(sample.table.take(pa.array(rows_, pa.int64())), storage_options):
                    hidden = [rows_[i] in blurred for i, _ in batch]
                    uris = pool.map(partial(_thumbnail, side=side), (data for _, data in batch), hidden)
                    made |= {rows_[i]: uri for (i, _), uri in zip(batch, uris, strict=True) if uri}
            except (ImgcurateError, OSError) as exc:
                failures.append(str(exc))
    if failures:
        logger.warning("pictures are missing from the report, of %d shards: %s", len(failures), failures[0])
    return made


def _thumbnail(data: bytes, blurred: bool, side: int) -> str | None:
    try:
        picture = _small(data, side)
    except Exception as exc:  # noqa: BLE001 - a picture less is no reason to have no report
        logger.info("no thumbnail: %s", exc)
        return None
    if blurred:
        small = picture.resize((_BLURRED, _BLURRED), Image.Resampling.BOX)
        picture = small.resize(picture.size, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(2))
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=_QUALITY, method=2)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"


def _small(data: bytes, side: int) -> Image.Image:
    with pillow_settings(_MAX_PIXELS), open_with_pillow(data) as image:
        if image.format == "JPEG" and image.mode in ("RGB", "L"):
            image.draft("RGB", (2 * side, 2 * side))
            picture = ImageOps.exif_transpose(image).convert("RGB")
            picture.thumbnail((side, side))
            return picture
    try:
        pixels = decode_with_pillow(data, max_pixels=_MAX_PIXELS)
    except UndecodableError as exc:
        raise ValueError(str(exc)) from exc
    picture = Image.fromarray(np.asarray(pixels))
    picture.thumbnail((side, side))
    return picture
