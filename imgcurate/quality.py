"""Pixels -> numbers that tell what a picture is like, without a model.

Every function takes a batch on any device and treats each image by itself: sums are sums of whole
numbers, which are exact in any order, so a value does not depend on the size of the batch.
"""

from __future__ import annotations

import functools
import math
from typing import Final

from imgcurate.lazy import torch

__all__ = ["PHASH_SIDE", "brightness", "colorfulness", "contrast", "entropy", "gray_of", "perceptual_hash", "sharpness"]

PHASH_SIDE: Final = 32
"""Side of the gray picture that :func:`perceptual_hash` takes, in pixels."""

_HASH_SIDE: Final = 8
# 2^8 gray levels, two factors of 2^17 and two sums of 2^5 values stay below 2^53: exact in float64.
_DCT_BITS: Final = 17
_FLAT_LEVELS: Final = 2.0
_MIN_WAVES: Final = 16


def gray_of(pixels: torch.Tensor) -> torch.Tensor:
    """Return the luma of ITU-R 601, rounded as Pillow's ``convert("L")`` does it.

    Parameters
    ----------
    pixels : torch.Tensor
        uint8 RGB of shape (n, height, width, 3), 0-255.

    Returns
    -------
    torch.Tensor
        int32 of shape (n, height, width), 0-255.
    """
    red, green, blue = (channel.to(torch.int32) for channel in pixels.unbind(-1))
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def brightness(gray: torch.Tensor) -> torch.Tensor:
    """Return the mean of the luma, 0 (black) to 255 (white); float32 of shape (n,)."""
    return _moments(gray)[0].float()


def contrast(gray: torch.Tensor) -> torch.Tensor:
    """Return the standard deviation of the luma, 0 (flat) to 127.5; float32 of shape (n,)."""
    return _moments(gray)[1].sqrt().float()


def sharpness(gray: torch.Tensor) -> torch.Tensor:
    """Return the variance of the Laplacian, 0 (flat) upwards, higher is sharper; float32 of shape (n,).

    The Laplacian is that of 3x3 pixels with a mirrored border, ``cv2.Laplacian(gray, cv2.CV_64F).var()``.

    References
    ----------
    Pech-Pacheco et al.: Diatom autofocusing in brightfield microscopy: a comparative study, ICPR 2000.
    """
    laplacian = -4 * gray
    for axis in (1, 2):
        n = gray.shape[axis]
        if n > 1:
            before, after = gray.narrow(axis, 0, n - 1), gray.narrow(axis, 1, n - 1)
            laplacian.narrow(axis, 1, n - 1).add_(before)
            laplacian.narrow(axis, 0, n - 1).add_(after)
            laplacian.narrow(axis, 0, 1).add_(gray.narrow(axis, 1, 1))
            laplacian.narrow(axis, n - 1, 1).add_(gray.narrow(axis, n - 2, 1))
        else:
            laplacian.add_(gray, alpha=2)
    return _moments(laplacian)[1].float()


def entropy(gray: torch.Tensor) -> torch.Tensor:
    """Return the Shannon entropy of the luma's histogram, 0 (flat) to 8 bits; float32 of shape (n,)."""
    n = len(gray)
    flat = gray.flatten(1).long()
    one = torch.ones((), dtype=torch.int64, device=gray.device)
    counts = torch.zeros((n, 256), dtype=torch.int64, device=gray.device).scatter_add_(1, flat, one.expand_as(flat))
    share = counts.double() / max(1, flat.shape[1])
    nats: torch.Tensor = torch.special.entr(share).sum(dim=1)
    return (nats / math.log(2)).float()


def colorfulness(pixels: torch.Tensor) -> torch.Tensor:
    """Return Hasler and Suesstrunk's colourfulness; float32 of shape (n,).

    0 is gray, 15 slightly, 33 moderately, 59 quite and 109 extremely colourful.

    Parameters
    ----------
    pixels : torch.Tensor
        uint8 RGB of shape (n, height, width, 3), 0-255.

    References
    ----------
    Hasler, Suesstrunk: Measuring colourfulness in natural images, SPIE 5007, 2003.
    """
    red, green, blue = (channel.to(torch.int32) for channel in pixels.unbind(-1))
    mean_rg, var_rg = _moments(red - green)
    # Twice yellow-blue, which is a whole number.
    mean_yb, var_yb = _moments(red + green - 2 * blue)
    spread = (var_rg + var_yb / 4).sqrt()
    return (spread + 0.3 * (mean_rg**2 + (mean_yb / 2) ** 2).sqrt()).float()


def perceptual_hash(gray: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pHash: which of the 8 x 8 slowest waves of a picture are stronger than their median.

    Parameters
    ----------
    gray : torch.Tensor
        int32 of shape (n, 32, 32), 0-255: the whole picture, squashed.

    Returns
    -------
    hashes : torch.Tensor
        int64 of shape (n,). The bits are those of the 8 x 8 corner of the 2-D DCT-II, row by row (the
        row is the vertical frequency); the first one, the mean, is the highest bit.
    valid : torch.Tensor
        bool of shape (n,); False for a picture with fewer than 16 waves of at least 2 gray levels (in an
        orthonormal DCT), such as one of a single colour: its hash would be that of others like it.

    References
    ----------
    Zauner: Implementation and benchmarking of perceptual image hash functions, 2010; the layout of the
    bits is that of ``imagehash.phash``.
    """
    basis = _dct_basis().to(gray.device)
    waves = (basis @ gray.double() @ basis.T).reshape(len(gray), _HASH_SIDE**2)
    middle = waves.sort(dim=1).values[:, _HASH_SIDE**2 // 2 - 1 :][:, :2].sum(dim=1)
    bits = (2 * waves > middle[:, None]).long()
    shifts = torch.arange(_HASH_SIDE**2 - 1, -1, -1, device=gray.device)
    # In an orthonormal DCT a wave is 1/16 of its sum; the mean, which comes first, is no wave.
    strong = waves[:, 1:].abs() >= _FLAT_LEVELS * (PHASH_SIDE / 2) * 4.0**_DCT_BITS
    return (bits << shifts).sum(dim=1), strong.sum(dim=1) >= _MIN_WAVES


@functools.cache
def _dct_basis() -> torch.Tensor:
    """Return the 8 slowest cosines over 32 pixels, times 2^17 and rounded to whole numbers, float64."""
    k, x = torch.arange(_HASH_SIDE)[:, None].double(), torch.arange(PHASH_SIDE).double()
    return (torch.cos(math.pi * k * (2 * x + 1) / (2 * PHASH_SIDE)) * 2.0**_DCT_BITS).round()


def _moments(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and variance of whole numbers over each image, float64 of shape (n,)."""
    flat = values.flatten(1)
    n = max(1, flat.shape[1])
    # Values are below 2^15, so squares fit into the int32 that they come in; sums are int64.
    total, squares = flat.sum(dim=1), (flat * flat).sum(dim=1)
    return total.double() / n, (n * squares - total * total).double() / n**2
