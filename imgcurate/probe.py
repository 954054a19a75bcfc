"""Look at an image's first bytes: its format, its size in pixels, and which decoder it goes to.

Nothing is decoded here, so an image that claims 60,000 x 60,000 pixels costs no memory. DALI takes
what it decodes as our pixel rule asks (see :mod:`imgcurate.decode`); all else goes to Pillow, one by
one, off the hot path.
"""

from __future__ import annotations

import functools
import io
import struct
import warnings
from dataclasses import dataclass
from typing import Final, Literal

from PIL import Image, UnidentifiedImageError

__all__ = ["Probe", "describe_bytes", "open_with_pillow", "probe"]

# Start-of-frame markers: 0xC0-0xCF without DHT (C4), JPG (C8) and DAC (CC).
_SOF: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_STANDALONE: Final = frozenset(range(0xD0, 0xD9)) | {0x01}
# DALI 2.4 decodes baseline, extended and progressive Huffman frames.
_SOF_DALI: Final = frozenset({0xC0, 0xC1, 0xC2})
_EOI_WINDOW_BYTES: Final = 4096

_SIGNATURES: Final = (
    (b"%PDF", "application/pdf"),
    (b"PK\x03\x04", "application/zip"),
    (b"\x1f\x8b", "application/gzip"),
    (b"<svg", "image/svg+xml"),
    (b"<!doctype html", "text/html"),
    (b"<html", "text/html"),
    (b"<?xml", "text/xml"),
    (b"{", "application/json"),
)
_PILLOW_FORMATS: Final = (
    "AVIF", "BMP", "DIB", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA",
    "TIFF", "WEBP",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Probe:
    """What an image's header says.

    Attributes
    ----------
    format : str
        ``JPEG``, ``PNG``, ``WEBP`` ..., or ``""`` if the bytes are no image.
    width, height : int
        Pixels as stored, before EXIF orientation; 0 if unknown.
    route : {"dali", "pillow", "none"}
        Who decodes it; ``none`` if nobody can.
    reason : str
        Why nobody can, in words; else ``""``.
    """

    format: str
    width: int = 0
    height: int = 0
    route: Literal["dali", "pillow", "none"] = "pillow"
    reason: str = ""


def probe(data: bytes, *, max_pixels: int | None = None, max_aspect_ratio: float | None = None) -> Probe:
    """Read the header of an encoded image.

    Parameters
    ----------
    data : bytes
        The whole encoded image.
    max_pixels : int, optional
        Images with more pixels (width x height) are refused.
    max_aspect_ratio : float, optional
        Images that are more elongated are refused: resized to the shorter side they are enormous.

    Returns
    -------
    Probe
        Never raises: bytes that are no image give ``route="none"`` with the reason.
    """
    if not data:
        return Probe("", route="none", reason="0 bytes")
    if data[:3] == b"\xff\xd8\xff":
        found = _probe_jpeg(data)
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        found = _probe_png(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        found = _probe_webp(data)
    else:
        found = _probe_with_pillow(data)
    pixels = found.width * found.height
    if max_pixels is not None and pixels > max_pixels and found.route != "none":
        reason = f"{found.width}x{found.height} = {_si(pixels)}px, over the limit of {_si(max_pixels)}px (max_pixels)"
        return Probe(found.format, found.width, found.height, "none", reason)
    longer, shorter = max(found.width, found.height), max(1, min(found.width, found.height))
    if max_aspect_ratio is not None and longer > max_aspect_ratio * shorter and found.route != "none":
        reason = (
            f"{found.width}x{found.height}: aspect ratio {longer / shorter:.0f}, over the limit of "
            f"{max_aspect_ratio:g} (max_aspect_ratio)"
        )
        return Probe(found.format, found.width, found.height, "none", reason)
    return found


def _probe_jpeg(data: bytes) -> Probe:
    pos, end = 2, len(data)
    while pos + 4 <= end:
        if data[pos] != 0xFF:
            return Probe("JPEG", route="pillow")
        marker = data[pos + 1]
        if marker == 0xFF:
            pos += 1
            continue
        if marker in _STANDALONE:
            pos += 2
            continue
        length = data[pos + 2] << 8 | data[pos + 3]
        if marker in _SOF:
            if pos + 10 > end:
                break
            precision, height, width, components = struct.unpack_from(">BHHB", data, pos + 4)
            plain = precision == 8 and components in (1, 3) and marker in _SOF_DALI and height > 0
            # Without an end-of-image marker the file is cut off: DALI would fail its whole batch.
            whole = data.find(b"\xff\xd9", max(pos, end - _EOI_WINDOW_BYTES)) >= 0
            return Probe("JPEG", width, height, "dali" if plain and whole else "pillow")
        pos += 2 + length
    return Probe("JPEG", route="none", reason="truncated JPEG: it ends before its frame header")


def _probe_png(data: bytes) -> Probe:
    if len(data) < 33 or data[12:16] != b"IHDR":
        return Probe("PNG", route="none", reason="truncated PNG: it ends before its header")
    width, height, depth, color = struct.unpack_from(">IIBB", data, 16)
    header_end = data.find(b"IDAT", 33)
    ancillary = data[33 : header_end if header_end >= 0 else len(data)]
    plain = depth == 8 and color in (0, 2) and b"tRNS" not in ancillary and b"eXIf" not in data
    whole = data.find(b"IEND", max(0, len(data) - _EOI_WINDOW_BYTES)) >= 0
    return Probe("PNG", width, height, "dali" if plain and whole else "pillow")


def _probe_webp(data: bytes) -> Probe:
    # Only the simple lossy layout has neither alpha nor animation nor EXIF.
    riff_bytes = int.from_bytes(data[4:8], "little") + 8
    if data[12:16] == b"VP8 " and len(data) >= 30 and data[23:26] == b"\x9d\x01\x2a":
        width, height = (v & 0x3FFF for v in struct.unpack_from("<HH", data, 26))
        return Probe("WEBP", width, height, "dali" if len(data) >= riff_bytes else "pillow")
    return _probe_with_pillow(data)


def _probe_with_pillow(data: bytes) -> Probe:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_with_pillow(data) as image:
                return Probe(image.format or "", *image.size)
    except Image.DecompressionBombError as exc:
        return Probe("", route="none", reason=str(exc))
    except UnidentifiedImageError:
        return Probe("", route="none", reason=f"not an image: {describe_bytes(data)}")
    except Exception as exc:  # noqa: BLE001 - Pillow's plugins raise nearly any type on hostile bytes
        return Probe("", route="none", reason=f"unreadable image header: {exc or type(exc).__name__}")


def open_with_pillow(data: bytes) -> Image.Image:
    """Open an encoded image of a format on the list; Pillow's others run programs or are no images.

    Raises
    ------
    PIL.UnidentifiedImageError
        If it is of another format.
    """
    return Image.open(io.BytesIO(data), formats=_pillow_formats())


@functools.cache
def _pillow_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _PILLOW_FORMATS if name in Image.OPEN)


def describe_bytes(data: bytes) -> str:
    """Say what bytes that are not an image look like: a media type, or their first bytes in hex."""
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for signature, name in _SIGNATURES:
        if head.startswith(signature.lower()):
            return name
    if not data.strip(b"\0"):
        return f"{len(data):,} zero bytes"
    try:
        text = data[:512].decode("utf-8", errors="strict" if len(data) <= 512 else "ignore")
    except UnicodeDecodeError:
        text = "\0"
    if all(c.isprintable() or c in "\r\n\t" for c in text):
        return "text/plain"
    return f"unknown format, begins with {data[:8].hex(' ')}"


def _si(value: int) -> str:
    if value >= 10**9:
        return f"{value / 1e9:.1f} G"
    return f"{value / 1e6:.0f} M" if value >= 10**6 else f"{value} "
