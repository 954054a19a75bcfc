"""Decode one image by the pixel rule: what DALI does not take goes here, off the hot path.

Pillow decodes it, but for 16-bit PNG and TIFF with several channels, of which Pillow keeps the high
bytes alone: these go to nvImageCodec, which comes with DALI. It does not decode gray PNG with 16-bit
alpha, whose high bytes have to do: its pixels may be two levels off.
"""

from __future__ import annotations

import functools
import io
import re
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, JpegImagePlugin

from imgcurate.probe import open_with_pillow, pam_header, pillow_settings, png_chunks
from imgcurate.signatures import format_of, shown_format

__all__ = ["UndecodableError", "decode_with_pillow", "smaller_jpeg"]

_16_BIT_MODES: Final = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
# Orientation is that of EXIF, as in browsers and DALI; Pillow would also take it from these.
_OTHER_ORIENTATIONS: Final = ("xmp", "XML:com.adobe.xmp", "Raw profile type exif", "Raw profile type APP1")
_TIFF_BITS, _TIFF_PHOTOMETRIC = 258, 262
_TIFF_SHORT: Final = 3
_DEEP_PNG: Final = ("RGB;16B", "RGBA;16B")
# Pillow scales the levels of these to 0..255, and not the level that is transparent.
_FEW_LEVELS: Final = {"L;2": 85, "L;4": 17}
_BLOCK_ROWS: Final = 64
_PAM_CHANNELS: Final = {"BLACKANDWHITE": 1, "GRAYSCALE": 1, "RGB": 3, "GRAYSCALE_ALPHA": 2, "RGB_ALPHA": 4}
_ADDRESS: Final = re.compile(r"<[^>]*>|\b0x[0-9a-fA-F]+|b'|'|/\S+/")
_WORDS: Final = tuple(
    (re.compile(pattern, re.IGNORECASE), words)
    for words, pattern in {
        "truncated {format}": "truncated|not enough image data|unexpected end|buffer is not large enough",
        "{format} whose text or colour profile unpacks to more than 1 MB": "MAX_TEXT",
        "damaged {format}: its compressed pixels are broken": (
            "broken data stream|(decoding|decoder|encoder) error|unrecognized data|failed to decode|decode failed|"
            "corrupt|buffer overrun"
        ),
        "damaged {format}, or a kind that is not supported": (
            r"cannot identify|unpack requires|index out of range|subscriptable|not a \w+ file|create decoder object|"
            "^'[A-Z]+'$"
        ),
        "damaged {format}: a number in it is broken": "token|invalid literal|non-decimal",
        "damaged {format}: a part of it lies outside the image": "tile cannot extend",
        "a kind of {format} that is not supported": "not available|codec|compression|unknown (raw|pixel) mode",
    }.items()
)


class UndecodableError(Exception):
    """An image that cannot be decoded; the message is the row's reason."""


def decode_with_pillow(data: bytes, *, max_pixels: int) -> npt.NDArray[np.uint8]:
    """Decode one image by the pixel rule of :mod:`imgcurate.decode`.

    Returns
    -------
    ndarray of shape (height, width, 3)
        uint8 RGB, 0-255.

    Raises
    ------
    UndecodableError
        With the reason in words.
    """
    format_ = format_of(data) or "image"
    try:
        if data[:3] == b"P7\n":
            format_, pixels = "PAM", _decode_pam(data)
        else:
            with pillow_settings(max_pixels), open_with_pillow(data) as image:
                format_ = shown_format(image.format)
                pixels = _decode(image, data)
    except UndecodableError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as exc:
        found = re.search(r"\d+", str(exc))
        pixels_ = int(found[0]) if found else 0
        raise UndecodableError(
            f"{format_} of {pixels_:,} pixels, over the limit of {max_pixels:,} (max_pixels)"
        ) from exc
    except Exception as exc:
        raise UndecodableError(reason_of(exc, format_)) from exc
    if 0 in pixels.shape:
        raise UndecodableError(f"damaged {format_}: it has {pixels.shape[1]}x{pixels.shape[0]} pixels")
    return np.ascontiguousarray(pixels)


def smaller_jpeg(data: bytes, divisor: int) -> tuple[npt.NDArray[np.uint8], tuple[float, ...]] | None:
    """Decode a gray or colour JPEG at a half, a quarter or an eighth of its size, from the low frequencies alone.

    Each pixel is the mean of a square of pixels, nearly, and takes a fraction of the time. The caller has seen to it
    that the image is not too large.

    Parameters
    ----------
    data : bytes
        The whole encoded image.
    divisor : {2, 4, 8}
        The part of its size.

    Returns
    -------
    pixels : ndarray of shape (height, width, 3)
        uint8 RGB, 0-255, orientation applied; sides are divided and rounded up.
    box : tuple of float
        Where the image lies in them: top, left, bottom and right, in pixels. What is beside it fills up the square
        of pixels of which the last one is the mean.

    None if the image does not decode so.
    """
    try:
        # Without Image.open, whose limit of pixels belongs to the process, threads need not wait for each other.
        with JpegImagePlugin.JpegImageFile(io.BytesIO(data)) as image:
            size = image.size
            image.draft("RGB", (size[0] // divisor, size[1] // divisor))
            orientation = _plain_orientation([data for name, data in image.applist if name == "APP1"])
            expected = tuple(-(-side // divisor) for side in size)
            if image.size != expected or image.mode not in ("L", "RGB") or orientation is None:
                return None
            image.load()
            turned = image.transpose(_METHODS[orientation]) if orientation in _METHODS else image
            pixels = np.asarray(turned if turned.mode == "RGB" else turned.convert("RGB"))
            width, height = size[::-1] if orientation in _ON_THE_SIDE else size
            top = pixels.shape[0] - height / divisor if orientation in _FROM_BELOW else 0.0
            left = pixels.shape[1] - width / divisor if orientation in _FROM_THE_RIGHT else 0.0
            return pixels, (top, left, top + height / divisor, left + width / divisor)
    except Exception:  # noqa: BLE001 - Pillow's plugins raise nearly any type on hostile bytes
        return None


def _plain_orientation(segments: Sequence[bytes]) -> int | None:
    """Return the EXIF orientation of a JPEG, of its APP1 segments; 1 without one, None if decoders may differ on it."""
    exif = [s[6:] for s in segments if s[:4] == b"Exif"]
    if not exif:
        return 1
    (data, *more), order = exif, {b"II*\0": "<", b"MM\0*": ">"}.get(exif[0][:4])
    if more or order is None:
        return None
    (at,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, at)
    found = [struct.unpack_from(f"{order}HHIH", data, at + 2 + 12 * i) for i in range(count)]
    orientations = [entry[1:] for entry in found if entry[0] == ExifTags.Base.Orientation]
    if not orientations:
        return 1
    type_, values, orientation = orientations[0]
    plain = len(orientations) == 1 and type_ == _TIFF_SHORT and values == 1
    return orientation if plain else None


def reason_of(exc: BaseException, format_: str) -> str:
    """Say in words why an image does not decode, without the inner life of libraries."""
    if isinstance(exc, MemoryError):
        return f"{format_} that needs more memory than there is"
    text = str(exc).strip() or type(exc).__name__
    for pattern, words in _WORDS:
        if pattern.search(text):
            return words.format(format=format_)
    line = " ".join(_ADDRESS.sub("", text.splitlines()[0]).split())
    return f"damaged {format_}: {line[:100]}" if line else f"damaged {format_}"


def _decode(image: Image.Image, data: bytes) -> npt.NDArray[np.uint8]:
    white, inverted = _gray_range(image)
    deep = _is_deep(image)
    scale = next((_FEW_LEVELS[t[3]] for t in getattr(image, "tile", ()) if t[3] in ("L;2", "L;4")), 1)
    _forget_orientations(image)
    # load() turns a TIFF, and forgets that it was to be turned.
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if image.format == "TIFF" else 0
    image.load()
    _forget_orientations(image)
    orientation = orientation or image.getexif().get(ExifTags.Base.Orientation, 1)
    if deep:
        return _flatten(*_deep_pixels(data), _TURNS.get(orientation, _unturned))
    if image.format != "TIFF" and orientation in _METHODS:
        image = image.transpose(_METHODS[orientation])
    if white:
        levels = np.asarray(image, dtype=np.float32) * np.float32(255 / white)
        gray = np.clip(np.rint(255 - levels if inverted else levels), 0, 255).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise UndecodableError(f"32-bit {'integer' if image.mode == 'I' else 'float'} pixels are not supported")
    if scale > 1 and "transparency" in image.info:
        image.info["transparency"] *= scale
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white_page = Image.new("RGB", image.size, (255, 255, 255))
        white_page.paste(image, mask=image)
        return np.asarray(white_page)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _forget_orientations(image: Image.Image) -> None:
    for key in _OTHER_ORIENTATIONS:
        image.info.pop(key, None)


def _gray_range(image: Image.Image) -> tuple[int, bool]:
    """Return the level that is white, and if levels count from white, of gray of 9 to 16 bits; else (0, False)."""
    tags = getattr(image, "tag_v2", {})
    if image.format == "PPM" and image.mode == "I":
        return 65535, False
    if image.mode not in _16_BIT_MODES:
        return 0, False
    bits = tags.get(_TIFF_BITS, (16,))[0]
    return 2**bits - 1, tags.get(_TIFF_PHOTOMETRIC) == 0


def _is_deep(image: Image.Image) -> bool:
    """Tell if Pillow would keep the high bytes of the pixels alone."""
    if image.format == "PNG":
        return any(tile[3] in _DEEP_PNG for tile in getattr(image, "tile", ())) or (
            image.mode in _16_BIT_MODES and "transparency" in image.info
        )
    if image.format == "TIFF" and image.mode in ("RGB", "RGBA", "RGBX"):
        tags = getattr(image, "tag_v2", {})
        return bool(tags.get(_TIFF_BITS, (8,))[0] == 16 and tags.get(_TIFF_PHOTOMETRIC) == 2)
    return False


def _deep_pixels(data: bytes) -> tuple[npt.NDArray[np.uint16], tuple[int, ...] | None]:
    """Return the pixels of a 16-bit PNG or TIFF, as stored, and the colour that is transparent."""
    from nvidia import nvimgcodec

    params = nvimgcodec.DecodeParams(
        allow_any_depth=True, apply_exif_orientation=False, color_spec=nvimgcodec.ColorSpec.UNCHANGED
    )
    with _deep_lock:
        image = _deep_decoder().decode(nvimgcodec.CodeStream(data), params=params)
        pixels = None if image is None else np.array(image.cpu())
    if pixels is None or pixels.dtype != np.uint16:
        raise UndecodableError("damaged image: its 16-bit pixels are broken")
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    for kind, at, length in png_chunks(data) if data[:4] == b"\x89PNG" else ():
        if kind == b"tRNS" and length in (2, 6):
            return pixels, struct.unpack_from(f">{length // 2}H", data, at)
    return pixels, None


_deep_lock = threading.Lock()


@functools.cache
def _deep_decoder() -> Any:
    from nvidia import nvimgcodec

    backends = [nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)]
    return nvimgcodec.Decoder(device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY, backends=backends, max_num_cpu_threads=1)


def _flatten(
    pixels: npt.NDArray[np.uint16], transparent: tuple[int, ...] | None, turned: Callable[[Any], Any]
) -> npt.NDArray[np.uint8]:
    """Composite 16-bit pixels on white and scale them to 8 bits, some rows at a time."""
    channels = pixels.shape[2]
    out = np.empty((*pixels.shape[:2], 3), np.uint8)
    for start in range(0, len(pixels), _BLOCK_ROWS):
        block = pixels[start : start + _BLOCK_ROWS]
        color: npt.NDArray[Any] = block[:, :, : 3 if channels >= 3 else 1].astype(np.float32)
        if transparent is not None:
            color[(block[:, :, : len(transparent)] == np.array(transparent)).all(axis=2)] = 65535
        elif channels in (2, 4):
            alpha = block[:, :, -1:].astype(np.float32) / np.float32(65535)
            color = color * alpha + 65535 * (1 - alpha)
        out[start : start + _BLOCK_ROWS] = np.rint(color / 257)
    return np.ascontiguousarray(turned(out))


def _unturned(pixels: Any) -> Any:
    return pixels


_METHODS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Orientations by which columns become rows, and by which these are reversed.
_ON_THE_SIDE: Final = frozenset({5, 6, 7, 8})
_FROM_BELOW: Final = frozenset({3, 4, 7, 8})
_FROM_THE_RIGHT: Final = frozenset({2, 3, 6, 7})
_TURNS: Final[dict[int, Callable[[Any], Any]]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


def _decode_pam(data: bytes) -> npt.NDArray[np.uint8]:
    fields, start = pam_header(data)
    width, height, depth, white = (int(fields[k]) for k in ("WIDTH", "HEIGHT", "DEPTH", "MAXVAL"))
    channels = _PAM_CHANNELS.get(fields.get("TUPLTYPE", ""), depth)
    if channels != depth or depth not in (1, 2, 3, 4) or not 0 < white < 65536:
        raise UndecodableError(f"PAM of {depth} channels ({fields.get('TUPLTYPE', 'no TUPLTYPE')}) is not supported")
    dtype = np.dtype(np.uint8 if white < 256 else ">u2")
    if len(data) - start < width * height * depth * dtype.itemsize:
        raise UndecodableError("truncated PAM")
    levels = np.frombuffer(data, dtype, width * height * depth, start).reshape(height, width, depth)
    wide = np.empty(levels.shape, np.uint16)
    for i in range(height):
        wide[i] = np.rint(np.minimum(levels[i], white) * (65535 / white))
    return _flatten(wide, None, _unturned)
