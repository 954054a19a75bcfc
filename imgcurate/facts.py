"""What only the decoder can tell of an image besides its pixels: hashes, and channels as stored.

A stage names the facts that it wants in :attr:`ProcessingStage.facts`; they are computed while the
image is decoded, and stand in ``batch.rows`` under these names.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from imgcurate import schema
from imgcurate.probe import open_with_pillow

__all__ = ["BYTE_FACTS", "FACTS", "HASH_BYTES", "bytes_hash", "pixels_hash", "stored_channels"]

HASH_BYTES: Final = 16


def bytes_hash(data: bytes) -> str:
    """Return the hash of an image as stored: BLAKE2b of 128 bits, as 32 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=HASH_BYTES).hexdigest()


def pixels_hash(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return the hash of decoded pixels and their shape, 16 bytes of BLAKE2b.

    Parameters
    ----------
    pixels : ndarray of uint8 of shape (height, width, 3)
        RGB, 0-255, at full size.
    """
    digest = hashlib.blake2b("x".join(map(str, pixels.shape)).encode(), digest_size=HASH_BYTES)
    digest.update(np.ascontiguousarray(pixels).data)
    return np.frombuffer(digest.digest(), np.uint8)


def stored_channels(data: bytes) -> int:
    """Return the channels of an image as stored, 1 to 4; 0 if its header cannot be understood.

    1 is gray, 2 gray with alpha, 3 colour, 4 colour with alpha, or CMYK. A palette counts as the
    colours in it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_with_pillow(data) as image:
                bands = 3 if image.mode in ("P", "PA") else len([b for b in image.getbands() if b not in ("A", "a")])
                return min(4, bands + bool(image.has_transparency_data))
    except Exception:  # noqa: BLE001 - Pillow's plugins raise nearly any type on hostile bytes
        return 0


BYTE_FACTS: Final[Mapping[str, Callable[[bytes], Any]]] = {
    schema.CONTENT_HASH: bytes_hash,
    schema.CHANNELS: stored_channels,
}
"""Facts that follow from the encoded bytes alone."""

FACTS: Final[Mapping[str, str]] = {schema.CONTENT_HASH: "U32", schema.CHANNELS: "i4", schema.PIXEL_HASH: "U32"}
"""All facts with their NumPy types; the hash of the pixels costs a pass over all of them."""
