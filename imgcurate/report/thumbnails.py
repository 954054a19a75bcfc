"""Small pictures of samples, as data URIs."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
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
_THREADS: Final = 16
_QUALITY: Final = 70
_MAX_PIXELS: Final = 100_000_000
_BLURRED: Final = 8
# Of these there is no picture, or none that should be looked for in this process.
_UNSEEN: Final = schema.UNREADABLE | {schema.STATUS_TOO_SMALL}


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
    by_shard: dict[str, list[int]] = {}
    for row, shard in zip(wanted, sample.values(schema.SHARD, wanted), strict=True):
        by_shard.setdefault(shard, []).append(row)

    def make(of_shard: list[int]) -> dict[int, str | None] | str:
        """Return the pictures of rows of one shard, or why there are none."""
        table = sample.table.take(pa.array(of_shard, pa.int64()))
        try:
            return {
                of_shard[i]: _thumbnail(data, side, blurred=of_shard[i] in blurred)
                for batch in read_images(table, storage_options)
                for i, data in batch
            }
        except (ImgcurateError, OSError) as exc:
            return str(exc)

    # Of a store far away each shard costs some round trips.
    with ThreadPoolExecutor(_THREADS) as pool:
        made = list(pool.map(make, by_shard.values()))
    if failures := [why for why in made if isinstance(why, str)]:
        logger.warning("pictures are missing, of %d shards: %s", len(failures), failures[0])
    return {row: uri for uris in made if isinstance(uris, dict) for row, uri in uris.items() if uri is not None}


def _thumbnail(data: bytes, side: int, *, blurred: bool) -> str | None:
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
