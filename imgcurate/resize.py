"""Decoded images -> views of a fixed size.

On a CPU torch resizes image by image: its filters of 8-bit pixels are those of Pillow, with vector instructions, and
take a fifth of the time that DALI's take. On a GPU DALI's operators are part of the graph that decodes. Both put the
same part of an image at the same place.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from imgcurate.batches import PixelView
from imgcurate.lazy import torch

__all__ = ["Box", "make_views", "view_operators"]

Box: TypeAlias = "tuple[float, ...]"
"""Top, left, bottom and right of a part of an image, in pixels; the part reaches to a border in both directions."""

_OPERATORS: Final = {
    "bicubic": "_upsample_bicubic2d_aa",
    "bilinear": "_upsample_bilinear2d_aa",
    "lanczos": "_upsample_lanczos2d_aa",
}


def make_views(
    images: Sequence[npt.NDArray[np.uint8]],
    views: Sequence[PixelView],
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
    boxes: Sequence[Box] | None = None,
    num_threads: int = 1,
) -> list[torch.Tensor]:
    """Return each view of some images, made on the CPU.

    Parameters
    ----------
    images : sequence of ndarray of shape (height, width, 3)
        uint8 RGB; not changed, and not needed afterwards.
    views : sequence of PixelView
        What to make.
    sizes : sequence of (height, width), optional
        Sizes of the whole images, where they were decoded smaller; by default those of the arrays.
    boxes : sequence of Box, optional
        Where in the arrays the images lie; by default everywhere.
    num_threads : int
        Images that are resized at the same time.

    Returns
    -------
    list of torch.Tensor
        Per view, uint8 of shape (n, height, width, 3).
    """
    made = [torch.empty((len(images), view.height, view.width, 3), dtype=torch.uint8) for view in views]

    def make(i: int) -> None:
        size = images[i].shape[:2] if sizes is None else sizes[i]
        for view, out in zip(views, made, strict=True):
            _make(images[i], view, size, None if boxes is None else boxes[i], out[i])

    if num_threads > 1 and len(images) > 1:
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(make, range(len(images))))
    else:
        for i in range(len(images)):
            make(i)
    return made


def _make(
    image: npt.NDArray[np.uint8], view: PixelView, size: tuple[int, ...], box: Box | None, out: torch.Tensor
) -> None:
    """Write a view of an image to `out`, of shape (view.height, view.width, 3)."""
    scaled, first = _placed(view, *size)
    resized = _resample(image, box, scaled, view.interpolation)
    if scaled[0] < view.height or scaled[1] < view.width:
        out.fill_(view.fill)
    spans = [(max(-f, 0), max(f, 0), min(s, side)) for f, s, side in zip(first, scaled, out.shape, strict=False)]
    to, source = (tuple(slice(span[i], span[i] + span[2]) for span in spans) for i in (0, 1))
    out[to] = resized[source]


def _placed(view: PixelView, rows: int, columns: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the height and width that an image is scaled to, and which of its pixels is the view's first one.

    Negative are pixels beside the image. Rounding is that of torchvision and open_clip: where the shorter side decides,
    the longer one is rounded down, or half to even for a view that is not square, and the offset of the middle half to
    even; where the longer side decides, the shorter one is rounded half to even, and of an odd number of padded pixels
    one more comes after the image.
    """
    shape = view.height, view.width
    if view.resize == "squash":
        return shape, (0, 0)
    ratios = Fraction(view.height, rows), Fraction(view.width, columns)
    if view.resize == "longest":
        scale = min(ratios)
        height, width = (max(1, round(side * scale)) for side in (rows, columns))
        return (height, width), (-((view.height - height) // 2), -((view.width - width) // 2))
    scale = max(ratios)
    # What is not square is scaled by open_clip's own transform, which rounds; the rest by torchvision's.
    whole = int if view.height == view.width else round
    height, width = (whole(side * scale) for side in (rows, columns))
    return (height, width), (round((height - view.height) / 2), round((width - view.width) / 2))


def _resample(image: npt.NDArray[np.uint8], box: Box | None, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """Return an image, or a part of it, in another size: uint8 of shape (*size, 3)."""
    # F.interpolate calls these, and takes no scales beside a size.
    operator = getattr(torch.ops.aten, _OPERATORS[interpolation])
    scales: tuple[float | None, float | None] = (None, None)
    turned: tuple[int, ...] = ()
    if box is not None:
        # Distances are counted from the first row and column: an image that reaches to the last ones is turned around.
        turned = tuple(axis for axis in (0, 1) if box[axis] > 0)
        image = np.flip(image, turned)
        scales = size[0] / (box[2] - box[0]), size[1] / (box[3] - box[1])
    pixels = torch.from_numpy(np.require(image, requirements=("C", "W")))
    made: torch.Tensor = operator(pixels.permute(2, 0, 1).unsqueeze(0), size, False, *scales)[0].permute(1, 2, 0)
    return made.flip(turned) if turned else made


def view_operators(image: Any, view: PixelView, size: Any) -> Any:
    """Add the operators that make a view of decoded images to the DALI graph that is being defined.

    `size` holds height and width of the images as floats on the CPU.
    """
    from nvidia.dali import fn, math, types

    interpolation = {
        "bicubic": types.INTERP_CUBIC,
        "bilinear": types.INTERP_TRIANGULAR,
        "lanczos": types.INTERP_LANCZOS3,
    }[view.interpolation]
    options = {"interp_type": interpolation, "antialias": True, "mode": "stretch"}
    shape = [view.height, view.width]
    if view.resize == "squash":
        return fn.resize(image, size=shape, **options)
    sides = size[0], size[1]
    # As in _placed; DALI's own rounding is one pixel off for one image in four.
    if view.resize == "longest":
        scale = math.min(view.height / sides[0], view.width / sides[1])
        scaled = [math.max(_nearest(math, side * scale), 1.0) for side in sides]
        start = [-math.floor((length - side) / 2) for side, length in zip(scaled, shape, strict=True)]
    else:
        scale = math.max(view.height / sides[0], view.width / sides[1])
        square = view.height == view.width
        scaled = [math.floor(side * scale + 1e-3) if square else _nearest(math, side * scale) for side in sides]
        start = [_nearest(math, (side - length) / 2) for side, length in zip(scaled, shape, strict=True)]
    resized = fn.resize(image, size=fn.stack(*scaled), **options)
    return fn.slice(
        resized, start=fn.cast(fn.stack(*start), dtype=types.INT32), shape=shape, axis_names="HW",
        out_of_bounds_policy="pad", fill_values=[float(view.fill)],
    )  # fmt: skip


def _nearest(math: Any, value: Any) -> Any:
    """Return the nearest whole number, halves to even, in DALI arithmetic; `value` is not negative."""
    up = math.floor(value + 0.5)
    is_half, is_odd = up - value == 0.5, up - 2 * math.floor(up / 2) == 1
    return up - (is_half & is_odd)
