"""Look at an image's first bytes: its format, its size in pixels, and which decoder it goes to.

Nothing is decoded here, so an image that claims 60,000 x 60,000 pixels costs no memory. DALI takes
what it decodes as our pixel rule asks (see :mod:`imgcurate.decode`); all else is decoded one by one,
off the hot path (see :mod:`imgcurate.pillow`):

=====================================================  ======
JPEG: baseline, extended, progressive; gray or colour  DALI
JPEG: CMYK, arithmetic, lossless, cut off              Pillow
PNG: gray, RGB, palette; 1 to 16 bits                  DALI
PNG: with alpha or tRNS, with EXIF                     Pillow
WebP: lossy or lossless, without alpha, EXIF, frames   DALI
WebP: else; AVIF, BMP, GIF, HEIC (with pillow-heif),   Pillow
ICO, JPEG 2000, PAM, PCX, PPM, QOI, SGI, TGA, TIFF
=====================================================  ======

DALI also decodes BMP, TIFF, PPM and JPEG 2000, to the same pixels. They stay with Pillow: they are
rare in shards, and its readers of them have stood years of fuzzing.
"""

from __future__ import annotations

import contextlib
import functools
import io
import struct
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal

from PIL import Image, UnidentifiedImageError

from imgcurate import schema
from imgcurate.signatures import describe_bytes, format_of, unsupported

__all__ = ["Probe", "open_with_pillow", "pam_header", "pillow_settings", "png_chunks", "probe"]

# Start-of-frame markers: 0xC0-0xCF without DHT (C4), JPG (C8) and DAC (CC).
_SOF: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SOF_PROGRESSIVE: Final = 0xC2
_STANDALONE: Final = frozenset(range(0xD0, 0xD9)) | {0x01}
# DALI 2.4 decodes baseline, extended and progressive Huffman frames.
_SOF_DALI: Final = frozenset({0xC0, 0xC1, 0xC2})
_EOI_WINDOW_BYTES: Final = 4096
# Each scan of a progressive JPEG goes over all pixels: some hundred kB could ask for hours.
_MAX_SCAN_PIXELS: Final = 20_000_000_000
# More pixels its library does not even open.
_LARGEST_AVIF: Final = 16384 * 16384
_GRAY, _RGB, _PALETTE = 0, 2, 3

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
        Why nobody can, or why it is not wanted, in words; else ``""``.
    status : str
        The row's status if it is not decoded; else ``ok``.
    """

    format: str
    width: int = 0
    height: int = 0
    route: Literal["dali", "pillow", "none"] = "pillow"
    reason: str = ""
    status: str = schema.STATUS_OK

    def refused(self, reason: str, status: str = schema.STATUS_DECODE_ERROR) -> Probe:
        """Return what is said of this image if it is not decoded."""
        return replace(self, route="none", reason=reason, status=status)


def probe(
    data: bytes, *, max_pixels: int | None = None, max_aspect_ratio: float | None = None, min_size: int = 1
) -> Probe:
    """Read the header of an encoded image.

    Parameters
    ----------
    data : bytes
        The whole encoded image.
    max_pixels : int, optional
        Images with more pixels (width x height) are refused.
    max_aspect_ratio : float, optional
        Images that are more elongated are refused: resized to the shorter side they are enormous.
    min_size : int
        Images whose shorter side has fewer pixels are left out as ``too_small``.

    Returns
    -------
    Probe
        Never raises: bytes that are no image give ``route="none"`` with the reason.

    Notes
    -----
    What is refused for safety is a ``decode_error``, since nobody has seen whether it is an image.
    A small image is a good one that is not wanted, and has a status of its own.
    """
    found = _probe(data)
    if found.route == "none":
        return found if found.reason else found.refused("not an image")
    size, pixels = f"{found.width}x{found.height}", found.width * found.height
    if pixels <= 0:
        return found.refused(f"damaged {found.format}: its header says that it has no pixels")
    if max_pixels is not None and pixels > max_pixels:
        return found.refused(f"{size} = {_si(pixels)}px, over the limit of {_si(max_pixels)}px (max_pixels)")
    longer, shorter = max(found.width, found.height), min(found.width, found.height)
    if max_aspect_ratio is not None and longer > max_aspect_ratio * shorter:
        return found.refused(
            f"{size}: aspect ratio {longer / shorter:.6g}, over the limit of {max_aspect_ratio:g} (max_aspect_ratio)"
        )
    if shorter < min_size:
        reason = f"{size}: shorter side under the limit of {min_size} (min_size)"
        return found.refused(reason, schema.STATUS_TOO_SMALL)
    return found


def _probe(data: bytes) -> Probe:
    if not data:
        return Probe("").refused("0 bytes")
    if data[:3] == b"\xff\xd8\xff":
        return _probe_jpeg(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _probe_png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _probe_webp(data)
    if data[:3] == b"P7\n":
        return _probe_pam(data)
    if data[:4] == b"\0\0\1\0":
        return _probe_ico(data)
    return _probe_with_pillow(data)


def _probe_jpeg(data: bytes) -> Probe:
    pos, end = 2, len(data)
    while pos + 4 <= end:
        if data[pos] != 0xFF:
            return _probe_with_pillow(data)
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
            return _probe_jpeg_frame(data, pos, marker)
        pos += 2 + length
    return Probe("JPEG").refused("truncated JPEG: it ends before its frame header")


def _probe_jpeg_frame(data: bytes, pos: int, marker: int) -> Probe:
    precision, height, width, components = struct.unpack_from(">BHHB", data, pos + 4)
    found = Probe("JPEG", width, height)
    if precision != 8:
        return found.refused(f"{precision}-bit JPEG is not supported")
    if marker == _SOF_PROGRESSIVE:
        scans = data.count(b"\xff\xda")
        if scans * width * height > _MAX_SCAN_PIXELS:
            return found.refused(f"progressive JPEG of {width}x{height} pixels in {scans:,} scans: too much work")
    plain = components in (1, 3) and marker in _SOF_DALI
    # Without an end-of-image marker or a scan the file is cut off: DALI would fail its whole batch.
    whole = data.find(b"\xff\xd9", max(pos, len(data) - _EOI_WINDOW_BYTES)) >= 0 and _has_scan(data, pos)
    return replace(found, route="dali") if plain and whole else found


def _has_scan(data: bytes, pos: int) -> bool:
    """Tell if marker segments lead from one to the next up to the first scan."""
    while pos + 4 <= len(data) and data[pos] == 0xFF and data[pos + 1] not in _STANDALONE:
        if data[pos + 1] == 0xDA:
            return True
        pos += 1 if data[pos + 1] == 0xFF else 2 + (data[pos + 2] << 8 | data[pos + 3])
    return False


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, offset of the data, its length) of the chunks of a PNG, as far as they go."""
    pos = 8
    while pos + 8 <= len(data):
        length = int.from_bytes(data[pos : pos + 4], "big")
        yield data[pos + 4 : pos + 8], pos + 8, length
        pos += 12 + length


def _probe_png(data: bytes) -> Probe:
    if len(data) < 33 or data[12:16] != b"IHDR":
        return Probe("PNG").refused("truncated PNG: it ends before its header")
    width, height, depth, color = struct.unpack_from(">IIBB", data, 16)
    found = Probe("PNG", width, height)
    if color not in (_GRAY, _RGB, _PALETTE) or b"eXIf" in data or depth not in (1, 2, 4, 8, 16):
        return found
    for kind, start, length in png_chunks(data):
        # DALI takes the memory that a chunk claims, before it finds that the file is shorter.
        if kind == b"tRNS" or start + length > len(data):
            return found
        if kind == b"IEND":
            break
    whole = data.find(b"IEND", max(0, len(data) - _EOI_WINDOW_BYTES)) >= 0
    return replace(found, route="dali") if whole else found


def _probe_webp(data: bytes) -> Probe:
    kind = data[12:16]
    # Only the simple layouts have neither animation nor EXIF, and only lossless ones may have alpha.
    whole = len(data) >= int.from_bytes(data[4:8], "little") + 8
    if kind == b"VP8 " and len(data) >= 30 and data[23:26] == b"\x9d\x01\x2a":
        width, height = (v & 0x3FFF for v in struct.unpack_from("<HH", data, 26))
        return Probe("WEBP", width, height, "dali" if whole else "pillow")
    if kind == b"VP8L" and len(data) >= 25 and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        width, height, alpha = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, bits >> 28 & 1
        return Probe("WEBP", width, height, "dali" if whole and not alpha else "pillow")
    if kind == b"VP8X" and len(data) >= 30:
        width, height = (int.from_bytes(data[i : i + 3], "little") + 1 for i in (24, 27))
        return Probe("WEBP", width, height)
    if len(data) < 30:
        return Probe("WEBP").refused("truncated WEBP: it ends before its header")
    return Probe("WEBP").refused("damaged WEBP: its header cannot be read")


def _probe_ico(data: bytes) -> Probe:
    """Read the headers of the pictures in an ICO: what its own header says of them need not be true."""
    sizes = [(0, 0)]
    for entry in range(6, 6 + 16 * int.from_bytes(data[4:6], "little"), 16):
        if entry + 16 > len(data):
            break
        (at,) = struct.unpack_from("<I", data, entry + 12)
        if data[at : at + 8] == b"\x89PNG\r\n\x1a\n" and len(data) >= at + 24:
            sizes.append(struct.unpack_from(">II", data, at + 16))
        elif len(data) >= at + 12:
            width, height = struct.unpack_from("<ii", data, at + 4)
            sizes.append((abs(width), abs(height) // 2))
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    return Probe("ICO", width, height)


def _probe_pam(data: bytes) -> Probe:
    fields = pam_header(data)[0]
    try:
        return Probe("PAM", int(fields["WIDTH"]), int(fields["HEIGHT"]))
    except (KeyError, ValueError):
        return Probe("PAM").refused("damaged PAM: its header cannot be read")


def pam_header(data: bytes) -> tuple[dict[str, str], int]:
    """Return the fields of a PAM's header and where its pixels begin."""
    end = data.find(b"ENDHDR\n", 0, 4096)
    lines = data[3 : max(end, 3)].decode("ascii", "replace").splitlines()
    words = (line.split(None, 1) for line in lines if not line.startswith("#"))
    return {w[0]: w[1].strip() for w in words if len(w) == 2}, end + 7


def _probe_with_pillow(data: bytes) -> Probe:
    name = format_of(data)
    if not name and (refusal := unsupported(data)):
        return Probe("").refused(refusal)
    try:
        with pillow_settings(None), open_with_pillow(data) as image:
            return Probe(image.format or "", *image.size)
    except UnidentifiedImageError:
        if refusal := unsupported(data):
            return Probe("").refused(refusal)
        width, height = _claimed_size(data) if name in ("AVIF", "HEIC") else (0, 0)
        if width * height > _LARGEST_AVIF:
            return Probe(name, width, height)
        if name:
            return Probe(name).refused(f"damaged {name}, or a kind that is not supported")
        return Probe("").refused(f"not an image: {describe_bytes(data)}")
    except Exception:  # noqa: BLE001 - Pillow's plugins raise nearly any type on hostile bytes
        return Probe(name).refused(f"damaged {name or 'image'}, or a kind that is not supported")


def _claimed_size(data: bytes) -> tuple[int, int]:
    """Return the first size that an AVIF or HEIC names, (0, 0) if it names none."""
    at = data.find(b"ispe", 0, 65536)
    return struct.unpack_from(">II", data, at + 8) if 0 <= at <= len(data) - 16 else (0, 0)


@contextlib.contextmanager
def pillow_settings(max_pixels: int | None) -> Iterator[None]:
    """Set Pillow's limit of pixels and Python's warnings, for one thread at a time: they belong to the process.

    An image in an image, as in ICO, is held to the limit too: Pillow raises
    ``DecompressionBombWarning`` or ``DecompressionBombError`` before it decodes.
    """
    with _pillow_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


_pillow_lock = threading.RLock()


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
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in _PILLOW_FORMATS if name in Image.OPEN)


def _si(value: int) -> str:
    if value >= 10**9:
        return f"{value / 1e9:.1f} G"
    return f"{value / 1e6:.0f} M" if value >= 10**6 else f"{value} "
