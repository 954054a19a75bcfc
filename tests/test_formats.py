"""The pixel rule, format by format: against pixels known by construction, and DALI against Pillow."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import tifffile
from PIL import Image, features

from imgcurate.backend import Backend, get_backend
from imgcurate.batches import PixelView
from imgcurate.decode import MAX_PIXELS, Decoder
from imgcurate.pillow import decode_with_pillow
from imgcurate.probe import probe

RNG = np.random.default_rng(7)
SIDE = 24
RAW = PixelView(SIDE, SIDE, "squash")
RGB = RNG.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
RGB16 = RNG.integers(0, 65536, (SIDE, SIDE, 3), dtype=np.uint16)
ALPHA = RNG.integers(0, 256, (SIDE, SIDE, 1), dtype=np.uint8)
ALPHA16 = RNG.integers(0, 65536, (SIDE, SIDE, 1), dtype=np.uint16)
PALETTE = Image.fromarray(RGB).quantize(64)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(samples: np.ndarray, depth: int, color: int, *, before: bytes = b"", after: bytes = b"") -> bytes:
    """Return a PNG of (h, w, channels) samples, packed as its depth says."""
    height, width = samples.shape[:2]
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in samples]
    elif depth == 8:
        rows = [row.astype(np.uint8).tobytes() for row in samples]
    else:
        bits = np.unpackbits(samples.reshape(height, width, 1).astype(np.uint8), axis=2)[:, :, 8 - depth :]
        rows = [np.packbits(row.reshape(-1)).tobytes() for row in bits]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + r for r in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + before + data + after + chunk(b"IEND", b"")


def pil(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(out, kind, **options)
    return out.getvalue()


def tiff(samples: np.ndarray, **options: object) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, samples, **options)
    return out.getvalue()


def pam(samples: np.ndarray, kind: str, white: int) -> bytes:
    height, width, depth = samples.shape
    head = f"P7\nWIDTH {width}\nHEIGHT {height}\nDEPTH {depth}\nMAXVAL {white}\nTUPLTYPE {kind}\nENDHDR\n"
    return head.encode() + samples.astype(np.uint8 if white < 256 else ">u2").tobytes()


def gray(levels: np.ndarray) -> np.ndarray:
    return np.repeat(levels.reshape(SIDE, SIDE, 1), 3, axis=2)


def to8(values: np.ndarray) -> np.ndarray:
    return np.rint(values.astype(np.float64) / 257).astype(np.uint8)


def on_white(color: np.ndarray, alpha: np.ndarray, white: int) -> np.ndarray:
    share = alpha.astype(np.float64) / white
    return np.rint((color * share + white * (1 - share)) * (255 / white)).astype(np.uint8)


def cmyk(levels: np.ndarray) -> np.ndarray:
    levels = 255 - levels.astype(np.float64)
    return np.rint(levels[:, :, :3] * levels[:, :, 3:] / 255).astype(np.uint8)


LEVELS = {depth: RNG.integers(0, 2**depth, (SIDE, SIDE, 1)).astype(np.uint8) for depth in (1, 2, 4)}
CMYK = RNG.integers(0, 256, (SIDE, SIDE, 4), dtype=np.uint8)
KEY16 = tuple(int(v) for v in RGB16[3, 3])
NEAR16 = RGB16.copy()
NEAR16[5, 5] = [KEY16[0], KEY16[1], KEY16[2] ^ 1]
PALETTE_RGB = np.asarray(PALETTE.convert("RGB"))


def keyed(values: np.ndarray, key: tuple[int, ...], white: int) -> np.ndarray:
    out = values.copy()
    out[(values == np.array(key)).all(axis=2)] = white
    return out


def palette_alpha() -> np.ndarray:
    out = PALETTE_RGB.copy()
    out[np.asarray(PALETTE) == 5] = 255
    return out


LOSSLESS: Mapping[str, tuple[Callable[[], bytes], Callable[[], np.ndarray]]] = {
    "png rgb": (lambda: png(RGB, 8, 2), lambda: RGB),
    "png gray": (lambda: png(RGB[:, :, :1], 8, 0), lambda: gray(RGB[:, :, 0])),
    "png gray 1": (lambda: png(LEVELS[1], 1, 0), lambda: gray(LEVELS[1] * 255)),
    "png gray 2": (lambda: png(LEVELS[2], 2, 0), lambda: gray(LEVELS[2] * 85)),
    "png gray 4": (lambda: png(LEVELS[4], 4, 0), lambda: gray(LEVELS[4] * 17)),
    "png gray 16": (lambda: png(RGB16[:, :, :1], 16, 0), lambda: gray(to8(RGB16[:, :, 0]))),
    "png rgb 16": (lambda: png(RGB16, 16, 2), lambda: to8(RGB16)),
    "png palette": (lambda: pil(PALETTE, "PNG"), lambda: PALETTE_RGB),
    "png interlaced": (lambda: INTERLACED, lambda: gray(np.arange(SIDE * SIDE) % 251)),
    "png palette tRNS": (lambda: pil(PALETTE, "PNG", transparency=5), palette_alpha),
    "png gray tRNS": (
        lambda: png(LEVELS[4], 4, 0, before=chunk(b"tRNS", b"\0\3")),
        lambda: gray(np.where(LEVELS[4] == 3, 255, LEVELS[4] * 17).astype(np.uint8)),
    ),
    "png black and white tRNS": (
        lambda: png(LEVELS[1], 1, 0, before=chunk(b"tRNS", b"\0\0")), lambda: gray(LEVELS[1] * 0 + 255),
    ),
    "png rgb tRNS": (
        lambda: png(RGB, 8, 2, before=chunk(b"tRNS", struct.pack(">HHH", *RGB[3, 3].tolist()))),
        lambda: keyed(RGB, tuple(RGB[3, 3]), 255),
    ),
    "png rgb 16 tRNS": (
        lambda: png(NEAR16, 16, 2, before=chunk(b"tRNS", struct.pack(">HHH", *KEY16))),
        lambda: to8(keyed(NEAR16, KEY16, 65535)),
    ),
    "png gray 16 tRNS": (
        lambda: png(RGB16[:, :, :1], 16, 0, before=chunk(b"tRNS", struct.pack(">H", KEY16[0]))),
        lambda: gray(to8(keyed(RGB16[:, :, :1], KEY16[:1], 65535))),
    ),
    "png rgba": (lambda: png(np.dstack([RGB, ALPHA]), 8, 6), lambda: on_white(RGB, ALPHA, 255)),
    "png gray alpha": (
        lambda: png(np.dstack([RGB[:, :, :1], ALPHA]), 8, 4),
        lambda: gray(on_white(RGB[:, :, :1], ALPHA, 255)),
    ),
    "png rgba 16": (lambda: png(np.dstack([RGB16, ALPHA16]), 16, 6), lambda: on_white(RGB16, ALPHA16, 65535)),
    "png gray alpha 16": (
        lambda: png(np.dstack([RGB16[:, :, :1], ALPHA16]), 16, 4),
        lambda: gray(on_white(RGB16[:, :, :1], ALPHA16, 65535)),
    ),
    "apng": (lambda: pil(RGB, "PNG", save_all=True, append_images=[Image.fromarray(255 - RGB)]), lambda: RGB),
    "webp lossless": (lambda: pil(RGB, "WEBP", lossless=True), lambda: RGB),
    "webp alpha": (
        lambda: pil(np.dstack([RGB, ALPHA]), "WEBP", lossless=True, exact=True),
        lambda: on_white(RGB, ALPHA, 255),
    ),
    "webp animated": (
        lambda: pil(RGB, "WEBP", lossless=True, save_all=True, append_images=[Image.fromarray(255 - RGB)]),
        lambda: RGB,
    ),
    "gif": (lambda: pil(PALETTE, "GIF", save_all=True, append_images=[PALETTE.rotate(90)]), lambda: PALETTE_RGB),
    "gif transparent": (lambda: pil(PALETTE, "GIF", transparency=5), palette_alpha),
    "bmp": (lambda: pil(RGB, "BMP"), lambda: RGB),
    "bmp palette": (lambda: pil(PALETTE, "BMP"), lambda: PALETTE_RGB),
    "bmp 1": (lambda: pil(Image.fromarray(LEVELS[1][:, :, 0] > 0), "BMP"), lambda: gray(LEVELS[1] * 255)),
    "tiff": (lambda: pil(RGB, "TIFF"), lambda: RGB),
    "tiff lzw": (lambda: pil(RGB, "TIFF", compression="tiff_lzw"), lambda: RGB),
    "tiff deflate": (lambda: pil(RGB, "TIFF", compression="tiff_adobe_deflate"), lambda: RGB),
    "tiff tiles": (lambda: tiff(RGB, tile=(16, 16), photometric="rgb"), lambda: RGB),
    "tiff planar": (
        lambda: tiff(np.ascontiguousarray(RGB.transpose(2, 0, 1)), photometric="rgb", planarconfig="separate"),
        lambda: RGB,
    ),
    "tiff pages": (lambda: pil(RGB, "TIFF", save_all=True, append_images=[Image.new("L", (5, 5))]), lambda: RGB),
    "tiff gray 16": (lambda: tiff(RGB16[:, :, 0], photometric="minisblack"), lambda: gray(to8(RGB16[:, :, 0]))),
    "tiff gray 16 white": (
        lambda: tiff(65535 - RGB16[:, :, 0], photometric="miniswhite"), lambda: gray(to8(RGB16[:, :, 0])),
    ),
    "tiff gray 16 big": (
        lambda: tiff(RGB16[:, :, 0], photometric="minisblack", byteorder=">"), lambda: gray(to8(RGB16[:, :, 0])),
    ),
    "tiff rgb 16": (lambda: tiff(RGB16, photometric="rgb"), lambda: to8(RGB16)),
    "tiff rgba 16": (
        lambda: tiff(np.dstack([RGB16, ALPHA16]), photometric="rgb", extrasamples=["unassalpha"]),
        lambda: on_white(RGB16, ALPHA16, 65535),
    ),
    "tiff cmyk": (lambda: pil(Image.fromarray(CMYK, "CMYK"), "TIFF"), lambda: cmyk(CMYK)),
    "ppm": (lambda: pil(RGB, "PPM"), lambda: RGB),
    "ppm text": (lambda: b"P3\n24 24\n255\n" + " ".join(map(str, RGB.reshape(-1))).encode(), lambda: RGB),
    "ppm 16": (lambda: b"P6 24 24 65535\n" + RGB16.astype(">u2").tobytes(), lambda: to8(RGB16)),
    "pgm 16": (
        lambda: b"P5 24 24 65535\n" + RGB16[:, :, 0].astype(">u2").tobytes(), lambda: gray(to8(RGB16[:, :, 0])),
    ),
    "pbm": (
        lambda: b"P4 24 24\n" + np.packbits(1 - LEVELS[1][:, :, 0], axis=1).tobytes(), lambda: gray(LEVELS[1] * 255),
    ),
    "pam rgba": (
        lambda: pam(np.dstack([RGB, ALPHA]), "RGB_ALPHA", 255), lambda: on_white(RGB, ALPHA, 255),
    ),
    "pam gray 16": (lambda: pam(RGB16[:, :, :1], "GRAYSCALE", 65535), lambda: gray(to8(RGB16[:, :, 0]))),
    "jpeg 2000": (lambda: pil(RGB, "JPEG2000"), lambda: RGB),
    "jpeg 2000 alpha": (lambda: pil(np.dstack([RGB, ALPHA]), "JPEG2000"), lambda: on_white(RGB, ALPHA, 255)),
    "ico": (lambda: pil(np.dstack([RGB, ALPHA]), "ICO", sizes=[(SIDE, SIDE)]), lambda: on_white(RGB, ALPHA, 255)),
    "tga": (lambda: pil(RGB, "TGA"), lambda: RGB),
    "tga rle": (lambda: pil(RGB, "TGA", compression="tga_rle"), lambda: RGB),
    "qoi": (lambda: pil(RGB, "QOI"), lambda: RGB),
    "pcx": (lambda: pil(RGB, "PCX"), lambda: RGB),
    "sgi": (lambda: pil(RGB, "SGI"), lambda: RGB),
}  # fmt: skip


def interlaced() -> bytes:
    """Return a gray PNG in the seven passes of Adam7, its levels 0, 1, 2 ... row by row, modulo 251."""
    levels = (np.arange(SIDE * SIDE) % 251).astype(np.uint8).reshape(SIDE, SIDE)
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = [b"\0" + row.tobytes() for y, x, dy, dx in passes for row in levels[y::dy, x::dx]]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 8, 0, 0, 0, 1))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"".join(rows))) + chunk(b"IEND", b"")


INTERLACED = interlaced()


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder((RAW,), get_backend("cpu"), batch_size=8, num_threads=1)


def decode_one(data: bytes, decoder: Decoder) -> np.ndarray:
    decoded = decoder.decode([data])
    assert decoded.reasons == [""]
    assert (decoded.widths[0], decoded.heights[0]) == (SIDE, SIDE)
    return decoded.images[RAW][0].cpu().numpy().astype(int)


@pytest.mark.parametrize("name", LOSSLESS)
def test_pixels_are_those_that_the_rule_says(name: str, decoder: Decoder) -> None:
    make, expected = LOSSLESS[name]
    tolerance = (
        2
        if name == "png gray alpha 16"
        else 1
        if any(word in name for word in ("alpha", "rgba", "cmyk", "ico", "webp alpha"))
        else 0
    )
    difference = np.abs(decode_one(make(), decoder) - expected().astype(int))
    assert difference.max() <= tolerance


@pytest.mark.parametrize("name", [n for n, (make, _) in LOSSLESS.items() if probe(make()).route == "dali"])
def test_dali_and_pillow_give_the_same_pixels(name: str, decoder: Decoder) -> None:
    data = LOSSLESS[name][0]()
    alone = decode_with_pillow(data, max_pixels=MAX_PIXELS).astype(int)
    # Of 16-bit colour Pillow keeps the high bytes; that never goes to it.
    assert np.abs(decode_one(data, decoder) - alone).max() <= (1 if name == "png rgb 16" else 0)


def smooth(mode: str = "RGB") -> Image.Image:
    ramp = np.linspace(0, 255, SIDE).astype(np.uint8)
    image = np.dstack(
        [np.tile(ramp, (SIDE, 1)), np.tile(ramp[:, None], (1, SIDE)), np.full((SIDE, SIDE), 90, np.uint8)]
    )
    return Image.fromarray(image).convert(mode)


JPEGS: Mapping[str, Callable[[], bytes]] = {
    "baseline": lambda: pil(smooth(), "JPEG", quality=95),
    "progressive": lambda: pil(smooth(), "JPEG", quality=95, progressive=True),
    "gray": lambda: pil(smooth("L"), "JPEG", quality=95),
    "4:4:4": lambda: pil(smooth(), "JPEG", quality=95, subsampling="4:4:4"),
    "4:2:2": lambda: pil(smooth(), "JPEG", quality=95, subsampling="4:2:2"),
    "4:2:0": lambda: pil(smooth(), "JPEG", quality=95, subsampling="4:2:0"),
    "rgb": lambda: pil(smooth(), "JPEG", quality=95, keep_rgb=True),
    "restarts": lambda: pil(smooth(), "JPEG", quality=95, restart_marker_blocks=1),
    "comment": lambda: pil(smooth(), "JPEG", quality=95, comment=b"\xff\xd9" * 90),
    "mpo": lambda: pil(smooth(), "MPO", save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE))]),
    "fill bytes": lambda: b"\xff\xd8\xff\xff\xff" + pil(smooth(), "JPEG", quality=95)[3:],
    "bytes after the end": lambda: pil(smooth(), "JPEG", quality=95) + b"\0" * 6000,
    "adobe cmyk": lambda: pil(smooth("CMYK"), "JPEG", quality=95),
}


@pytest.mark.parametrize("name", JPEGS)
def test_jpegs_decode_alike_on_both_ways(name: str, decoder: Decoder) -> None:
    data = JPEGS[name]()
    got, alone = decode_one(data, decoder), decode_with_pillow(data, max_pixels=MAX_PIXELS).astype(int)
    expected = np.asarray(smooth("L" if name == "gray" else "RGB").convert("RGB"), dtype=int)
    assert np.abs(got - alone).max() <= 2
    assert np.abs(got - expected).mean() < 4


def test_lossy_formats_are_near_the_original(decoder: Decoder) -> None:
    expected = np.asarray(smooth(), dtype=int)
    for data in (pil(smooth(), "WEBP", quality=95), pil(smooth(), "AVIF", quality=95)):
        assert np.abs(decode_one(data, decoder) - expected).mean() < 4


def test_heic_is_decoded_where_its_library_is(decoder: Decoder) -> None:
    heif = pytest.importorskip("pillow_heif")
    out = io.BytesIO()
    heif.from_pillow(smooth().resize((64, 64))).save(out, quality=95)
    found = probe(out.getvalue())
    assert (found.route, found.width, found.height) == ("pillow", 64, 64)
    pixels = decode_with_pillow(out.getvalue(), max_pixels=MAX_PIXELS).astype(int)
    assert np.abs(pixels - np.asarray(smooth().resize((64, 64)), dtype=int)).mean() < 4


TURNS: Mapping[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a),
}  # fmt: skip


@pytest.mark.parametrize("orientation", TURNS)
def test_orientation_is_applied_in_every_format(orientation: int, backend: Backend) -> None:
    wide = np.kron(RNG.integers(0, 2, (3, 5, 3), dtype=np.uint8) * 255, np.ones((16, 16, 1), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    deep = np.dstack([wide, wide[:, :, :1] * 0 + 255]).astype(np.uint16) * 257
    blobs = [
        pil(wide, "JPEG", quality=98, subsampling=0, exif=exif), pil(wide, "PNG", exif=exif),
        pil(wide, "WEBP", lossless=True, exif=exif), pil(wide, "TIFF", tiffinfo={0x0112: orientation}),
        png(deep, 16, 6, before=chunk(b"eXIf", exif.tobytes()[6:])),
        tiff(wide.astype(np.uint16) * 257, photometric="rgb", extratags=[(0x0112, 3, 1, orientation, True)]),
    ]  # fmt: skip
    expected = TURNS[orientation](wide)
    view = PixelView(*expected.shape[:2], "squash")
    decoded = Decoder((view,), backend, batch_size=8, num_threads=1).decode(blobs)
    assert decoded.reasons == [""] * len(blobs)
    assert set(decoded.heights) == {expected.shape[0]}
    for pixels in decoded.images[view].cpu().numpy():
        assert np.abs(pixels.astype(int) - expected).max() <= 6


def test_orientation_in_xmp_is_not_applied_by_either(decoder: Decoder) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    for data in (png(RGB, 8, 2, before=text), png(np.dstack([RGB, ALPHA * 0 + 255]), 8, 6, before=text)):
        assert (decode_one(data, decoder) == RGB).all()
    jpeg = pil(smooth(), "JPEG", quality=95, xmp=xmp)
    assert np.abs(decode_with_pillow(jpeg, max_pixels=MAX_PIXELS).astype(int) - decode_one(jpeg, decoder)).max() <= 2


def test_a_name_in_a_text_is_no_chunk(decoder: Decoder) -> None:
    key = struct.pack(">HHH", *RGB[3, 3].tolist())
    data = png(RGB, 8, 2, before=chunk(b"tEXt", b"Comment\0IDAT") + chunk(b"tRNS", key))
    assert (decode_one(data, decoder) == keyed(RGB, tuple(RGB[3, 3]), 255)).all()


def test_colour_profiles_are_not_applied(decoder: Decoder) -> None:
    profile = features.check("littlecms2") and __import__("PIL.ImageCms").ImageCms.createProfile("LAB")
    icc = __import__("PIL.ImageCms").ImageCms.ImageCmsProfile(profile).tobytes()
    assert (decode_one(pil(RGB, "PNG", icc_profile=icc), decoder) == RGB).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (lambda: tiff(RGB16[:, :, 0].astype(np.float32)), "32-bit float pixels are not supported"),
        (lambda: tiff(RGB16[:, :, 0].astype(np.int32)), "32-bit integer pixels are not supported"),
        (lambda: b"v/1\x01" + b"\0" * 90, "EXR is not supported"),
        (lambda: b"#?RADIANCE\n" + b"\0" * 90, "Radiance HDR is not supported"),
        (lambda: b"<?xml version='1.0'?><svg/>", "SVG is not supported"),
        (lambda: b"\xff\x0a" + b"\0" * 90, "JPEG XL is not supported"),
        (lambda: twelve_bit(), "12-bit JPEG is not supported"),
        (lambda: png(RGB, 8, 2)[:-300], "truncated PNG"),
        (lambda: pil(smooth(), "JPEG")[:-200], "truncated JPEG"),
        (lambda: pil(smooth(), "GIF")[:-20], "truncated GIF"),
        (lambda: b"GIF89a", "damaged GIF, or a kind that is not supported"),
        (lambda: pam(RGB, "RGB", 255)[:-1], "truncated PAM"),
        (lambda: b"\0\0\0\x18ftypmp42" + b"\0" * 30, "not an image: video/mp4"),
    ],
)
def test_what_cannot_be_decoded_is_said_in_words(data: Callable[[], bytes], reason: str, decoder: Decoder) -> None:
    decoded = decoder.decode([data()])
    assert (decoded.reasons, decoded.statuses) == ([reason], ["decode_error"])


def twelve_bit() -> bytes:
    data = bytearray(JPEGS["baseline"]())
    data[data.index(b"\xff\xc0") + 4] = 12
    return bytes(data)


def test_small_images_have_a_status_of_their_own() -> None:
    decoder = Decoder((RAW,), get_backend("cpu"), batch_size=4, num_threads=1, min_size=10, max_pixels=1000)
    decoded = decoder.decode([pil(Image.new("RGB", size), "PNG") for size in ((12, 9), (12, 10), (90, 90))])
    assert decoded.statuses == ["too_small", "ok", "decode_error"]
    assert decoded.reasons[0] == "12x9: shorter side under the limit of 10 (min_size)"
    assert decoded.reasons[2] == "90x90 = 8100 px, over the limit of 1000 px (max_pixels)"
    assert (decoded.widths[0], decoded.heights[0]) == (12, 9)
