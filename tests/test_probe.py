"""Headers of images, without decoding."""

from __future__ import annotations

import struct
import zlib

import pytest
from PIL import Image

from imgcurate.probe import probe
from imgcurate.signatures import describe_bytes


def png_header(width: int, height: int, depth: int = 8, color: int = 2) -> bytes:
    ihdr = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunk = b"IHDR" + ihdr
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


@pytest.mark.parametrize(
    ("kind", "mode", "route"),
    [
        ("JPEG", "RGB", "dali"), ("JPEG", "L", "dali"), ("JPEG", "CMYK", "pillow"),
        ("PNG", "RGB", "dali"), ("PNG", "L", "dali"), ("PNG", "RGBA", "pillow"), ("PNG", "P", "dali"),
        ("PNG", "I;16", "dali"), ("WEBP", "RGB", "dali"), ("WEBP", "RGBA", "pillow"), ("GIF", "P", "pillow"),
        ("BMP", "RGB", "pillow"), ("TIFF", "RGB", "pillow"), ("PPM", "RGB", "pillow"),
    ],
)  # fmt: skip
def test_probe_tells_size_and_route(kind: str, mode: str, route: str, encode) -> None:
    found = probe(encode(Image.new(mode, (37, 21)), kind))
    assert (found.format, found.width, found.height, found.route) == (kind, 37, 21, route)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (b"<!DOCTYPE html><html></html>", "not an image: text/html"),
        (b"plain words", "not an image: text/plain"),
        (b"\xff\xd8\xff\xe0\x00\x10JF", "truncated JPEG: it ends before its frame header"),
        (b"\x89PNG\r\n\x1a\n\0\0", "truncated PNG: it ends before its header"),
        (b"\0" * 100, "not an image: 100 zero bytes"),
        (b"\x93\x01\x02\x03" * 8, "not an image: unknown format, begins with 93 01 02 03 93 01 02 03"),
    ],
)
def test_probe_says_why_bytes_are_no_image(data: bytes, reason: str) -> None:
    found = probe(data)
    assert (found.route, found.reason) == ("none", reason)


def test_probe_refuses_too_many_pixels_by_the_header_alone() -> None:
    found = probe(png_header(60_000, 60_000), max_pixels=179_000_000)
    assert found.route == "none"
    assert found.reason == "60000x60000 = 3.6 Gpx, over the limit of 179 Mpx (max_pixels)"


def test_probe_sends_a_jpeg_without_an_end_off_the_hot_path(encode) -> None:
    data = encode(Image.new("RGB", (64, 64), (9, 99, 199)))
    assert probe(data).route == "dali"
    assert probe(data[:-2]).route == "pillow"


def test_a_png_whose_chunk_claims_more_than_there_is_does_not_go_to_dali(encode) -> None:
    data = bytearray(encode(Image.new("RGB", (64, 64)), "PNG"))
    assert probe(bytes(data)).route == "dali"
    data[33:37] = (0xBF000000).to_bytes(4, "big")
    assert probe(bytes(data)).route == "pillow"


def test_probe_never_raises_on_any_prefix(encode, photos) -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encode(photos[0], kind)
        for n in [*range(64), *range(64, len(data), 997)]:
            probe(data[:n])


def test_describe_bytes_knows_utf8_across_the_cut() -> None:
    assert describe_bytes("ä".encode() * 300) == "text/plain"
