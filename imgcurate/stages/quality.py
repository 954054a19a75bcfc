"""Filters that need no weights: sizes, sharpness, exposure, colour; and the hashes that duplicates are found by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Final, Literal

import dask.dataframe as dd
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imgcurate import quality, schema
from imgcurate.batches import ImageBatch, PixelView
from imgcurate.errors import ConfigError, nearest
from imgcurate.facts import FACTS
from imgcurate.lazy import torch
from imgcurate.stages.base import IMAGE, ProcessingStage
from imgcurate.stages.executor import apply_stages
from imgcurate.stages.reading import ImageReaderStage
from imgcurate.stages.rules import Rule
from imgcurate.stages.scoring import Range, check_pair, rules_of

__all__ = ["ImageQualityFilterStage", "score_quality"]

_VIEW: Final = PixelView(224, 224)
_HASH_VIEW: Final = PixelView(quality.PHASH_SIDE, quality.PHASH_SIDE, "squash", "bilinear")
_GIVEN: Final = (schema.WIDTH, schema.HEIGHT, schema.NBYTES)
_OF_GRAY: Final = {
    schema.SHARPNESS: quality.sharpness,
    schema.BRIGHTNESS: quality.brightness,
    schema.CONTRAST: quality.contrast,
    schema.ENTROPY: quality.entropy,
}
_NUMBERS: Final = (*_GIVEN, schema.ASPECT_RATIO, schema.CHANNELS, *_OF_GRAY, schema.COLORFULNESS)
_CHEAP: Final = (*_NUMBERS[len(_GIVEN) :], schema.CONTENT_HASH, schema.PHASH)
_COLUMNS: Final = (*_GIVEN, *_CHEAP, schema.PIXEL_HASH)


@dataclass
class ImageQualityFilterStage(ProcessingStage):
    """Measure images without a model, and keep those whose values lie in given ranges.

    ==================  ===========================================  =====================================
    column              range                                        of what
    ==================  ===========================================  =====================================
    ``width height``    pixels, EXIF orientation applied             the image
    ``nbytes``          bytes                                        the image as stored
    ``aspect_ratio``    longer / shorter side, >= 1                  the image
    ``channels``        1 gray, 2 gray with alpha, 3 colour, 4       the image as stored
                        colour with alpha or CMYK; 0 unknown
    ``sharpness``       variance of the Laplacian, >= 0; below 100   luma of the middle at 224 x 224
                        is often blurred
    ``brightness``      mean, 0 to 255                               luma of the middle at 224 x 224
    ``contrast``        standard deviation, 0 to 127.5               luma of the middle at 224 x 224
    ``entropy``         0 to 8 bits                                  luma of the middle at 224 x 224
    ``colorfulness``    0 gray, 33 moderate, 109 extreme             RGB of the middle at 224 x 224
    ``content_hash``    32 hexadecimal digits                        the image as stored
    ``pixel_hash``      32 hexadecimal digits                        all pixels, and their shape
    ``phash``           64 bits                                      the whole picture at 32 x 32, squashed
    ==================  ===========================================  =====================================

    Where no image decoded they are null, but for ``width``, ``height`` and ``nbytes``. ``phash`` is null
    for a picture that is nearly flat, too. See :mod:`imgcurate.quality` for the formulas.

    Attributes
    ----------
    ranges : mapping of str to pair
        Per column the smallest and the largest value that is kept, both inclusive; None is open:
        ``{"sharpness": (100, None), "width": (256, None), "aspect_ratio": (None, 3)}``. A row outside
        has the status ``quality`` and a reason such as ``sharpness 41.20 < 100.00``.
    columns : sequence of str, optional
        What to compute, besides what `ranges` asks for. By default all but ``pixel_hash``, which costs a
        pass over all pixels; a dedup stage needs its hash here.

    Raises
    ------
    ConfigError
        If a column is unknown or cannot be compared, or a range is none.

    Notes
    -----
    Sharpness depends on the scale, so it is measured at a fixed one: the shorter side at 224 pixels, the
    middle cut out, which are the pixels that most CLIP models take anyway. An image that is smaller is
    enlarged, and counts as blurred for that. ``pixel_hash`` compares images of one run: on a GPU the
    decoder may round differently.
    """

    ranges: Mapping[str, Range] = field(default_factory=dict)
    columns: Sequence[str] | None = None

    name: ClassVar[str] = schema.STATUS_QUALITY
    needs: ClassVar[tuple[str, ...]] = (IMAGE,)

    def __post_init__(self) -> None:
        if not isinstance(self.ranges, Mapping):
            raise ConfigError(
                f"ranges={self.ranges!r} should be a mapping of columns to pairs, such as width: [256, null] "
                f"in a YAML file, {{'width': (256, None)}} in Python"
            )
        if self.columns is not None and (isinstance(self.columns, str) or not isinstance(self.columns, Sequence)):
            raise ConfigError(f"columns={self.columns!r} should be a sequence, such as ('sharpness', 'phash')")
        for column in self.columns or ():
            if column not in _COLUMNS:
                raise ConfigError(f"columns: unknown column {column!r}{nearest(str(column), _COLUMNS)}")
        for column, bounds in self.ranges.items():
            _check_range(column, bounds)

    @cached_property
    def _wanted(self) -> tuple[str, ...]:
        """What to add, in the order of the catalog."""
        asked = {*(_CHEAP if self.columns is None else self.columns), *self.ranges}
        return tuple(c for c in _COLUMNS if c in asked and c not in _GIVEN)

    @property
    def adds(self) -> Mapping[str, str | pa.DataType]:  # type: ignore[override]
        """The columns that are asked for."""
        return {c: schema.arrow_type(c) for c in self._wanted}

    @property
    def views(self) -> tuple[PixelView, ...]:  # type: ignore[override]
        """The middle at 224 x 224, and 32 x 32 for the perceptual hash: those that are needed."""
        looks = any(c in _OF_GRAY or c == schema.COLORFULNESS for c in self._wanted)
        return (*([_VIEW] if looks else []), *([_HASH_VIEW] if schema.PHASH in self._wanted else []))

    @property
    def facts(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the decoder tells. Something is always asked for, so that images are decoded and have a size."""
        wanted = tuple(c for c in self._wanted if c in FACTS)
        return wanted or (() if self.views else (schema.CONTENT_HASH,))

    @property
    def rules(self) -> tuple[Rule, ...]:  # type: ignore[override]
        """A rule for each bound."""
        return rules_of(self.ranges, schema.STATUS_QUALITY)

    def process(self, batch: ImageBatch) -> ImageBatch:
        """Measure the images of a batch; what the decoder told is in its rows already."""
        if _VIEW in self.views:
            pixels = batch.pixels(_VIEW)
            gray = quality.gray_of(pixels)
            for column, measure in _OF_GRAY.items():
                if column in self._wanted:
                    batch[column] = measure(gray)
            if schema.COLORFULNESS in self._wanted:
                batch[schema.COLORFULNESS] = quality.colorfulness(pixels)
        if schema.PHASH in self._wanted:
            batch[schema.PHASH] = _or_null(*quality.perceptual_hash(quality.gray_of(batch.pixels(_HASH_VIEW))))
        if schema.ASPECT_RATIO in self._wanted:
            sides = np.stack([batch.rows[schema.WIDTH], batch.rows[schema.HEIGHT]]).astype(np.float64)
            batch[schema.ASPECT_RATIO] = (sides.max(axis=0) / sides.min(axis=0)).astype(np.float32)
        return batch


def score_quality(
    ddf: dd.DataFrame,
    *,
    columns: Sequence[str] | None = None,
    batch_size: int | Literal["auto"] = "auto",
    device: str = "auto",
    storage_options: Mapping[str, Any] | None = None,
) -> dd.DataFrame:
    """Decode the images of a frame and measure them, lazily.

    Parameters
    ----------
    ddf : dask.dataframe.DataFrame
        From :func:`read_webdataset`.
    columns : sequence of str, optional
        As in :class:`ImageQualityFilterStage`, which says what they are.
    batch_size : int or "auto"
        Images per batch; ``auto`` is 32 on a CPU and 256 on a GPU.
    device : {"auto", "cpu", "gpu"}
        Where.
    storage_options : mapping, optional
        For reading the shards.

    Returns
    -------
    dask.dataframe.DataFrame
        With the columns, and ``width`` and ``height`` filled. Nothing is dropped: filter with
        ``ddf[ddf.sharpness >= 100]``. Rows that did not decode have ``status`` ``decode_error``.
    """
    stage = ImageQualityFilterStage(columns=columns)
    reader = ImageReaderStage(dali_batch_size=batch_size)
    return apply_stages(ddf, [stage], reader=reader, device=device, storage_options=storage_options)


def _check_range(column: str, bounds: Any) -> None:
    """Raise ConfigError if a range is none, or its column does not hold numbers."""
    if column not in _NUMBERS:
        what = "holds hashes, which have no range" if column in _COLUMNS else "is unknown"
        raise ConfigError(f"ranges: the column {column!r} {what}{nearest(str(column), _NUMBERS)}")
    check_pair(column, bounds)


def _or_null(values: torch.Tensor, valid: torch.Tensor) -> npt.NDArray[Any]:
    """Return whole numbers as objects, None where they are not valid: NaN would not hold 64 bits."""
    # One copy from the device, not two.
    words, are_valid = torch.stack([values, valid.to(values.dtype)]).cpu().numpy()
    out: npt.NDArray[Any] = words.astype(object)
    out[are_valid == 0] = None
    return out
