"""Images that claim much and hold little: refused or decoded in bounded memory, and nothing hangs."""

from __future__ import annotations

import functools
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping

import pytest
from PIL import Image
from test_formats import chunk, pil

LIMIT_BYTES = 700 * 1024**2
SCRIPT = """
import json, pathlib, resource, sys
from imgcurate.backend import get_backend
from imgcurate.batches import PixelView
from imgcurate.decode import Decoder
good = pathlib.Path(sys.argv[2]).read_bytes()
decoder = Decoder((PixelView(32, 32),), get_backend("cpu"), batch_size=4, num_threads=1)
decoder.decode([good, b"GIF89a", good[:200]])
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
out = {}
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    before = peak()
    got = decoder.decode([good, path.read_bytes(), good])
    out[path.name] = [got.statuses, got.reasons[1], peak() - before]
print(json.dumps(out))
"""


@functools.cache
def zeros(nbytes: int) -> bytes:
    """Return zlib's compression of many zero bytes, made piece by piece."""
    packer = zlib.compressobj(9)
    block = bytes(1 << 20)
    parts = [packer.compress(block) for _ in range(nbytes >> 20)]
    return b"".join([*parts, packer.compress(bytes(nbytes & (1 << 20) - 1)), packer.flush()])


def png(width: int, height: int, data: bytes, *extra: bytes, depth: int = 8, color: int = 2) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def huge_png() -> bytes:
    """Return a whole PNG of 50,000 x 50,000 black and white pixels in about 300 kB."""
    data = png(50_000, 50_000, zeros(50_000 * (1 + 50_000 // 8)), depth=1, color=0)
    assert len(data) < 400_000
    return data


def small_png(*extra: bytes) -> bytes:
    return png(40, 40, zlib.compress(b"\0" * (1 + 3 * 40) * 40), *extra)


def tiff(width: int, height: int, strip: tuple[int, int], rows: int, count: int = 1) -> bytes:
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
            (273, 4, count, strip[0]), (277, 3, 1, 1), (278, 4, 1, rows), (279, 4, count, strip[1])]  # fmt: skip
    body = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + body + b"\0\0\0\0" + b"\0" * 64


def gif_of_frames(n: int) -> bytes:
    first = pil(Image.new("P", (40, 40), 3), "GIF")
    image = first[first.index(b"\x2c") : -1]
    return first[:-1] + image * n + b";"


def progressive_of_scans(n: int) -> bytes:
    jpeg = pil(Image.new("RGB", (40, 40)), "JPEG", progressive=True)
    at = jpeg.index(b"\xff\xc2") + 5
    jpeg = jpeg[:at] + struct.pack(">HH", 10_000, 10_000) + jpeg[at + 4 :]
    return jpeg[:-2] + b"\xff\xda\0\x08\1\1\0\1\x3f\0" * n + b"\xff\xd9"


def ico(inner: bytes) -> bytes:
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 40, 40, 0, 0, 1, 32, len(inner), 22) + inner


def jpeg2000(width: int, height: int, tile: int) -> bytes:
    data = bytearray(pil(Image.new("RGB", (40, 40)), "JPEG2000", no_jp2=True))
    at = data.index(b"\xff\x51") + 6
    struct.pack_into(">IIIIIIII", data, at, width, height, 0, 0, tile, tile, 0, 0)
    return bytes(data)


def webp(width: int, height: int) -> bytes:
    data = bytearray(pil(Image.new("RGBA", (40, 40), (1, 2, 3, 9)), "WEBP"))
    assert data[12:16] == b"VP8X"
    data[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


def avif(width: int, height: int) -> bytes:
    data = bytearray(pil(Image.new("RGB", (40, 40)), "AVIF"))
    struct.pack_into(">II", data, data.index(b"ispe") + 8, width, height)
    return bytes(data)


PIXELS = "over the limit of 179 Mpx (max_pixels)"
BOMBS: Mapping[str, tuple[Callable[[], bytes], str | None]] = {
    "png 50000": (huge_png, f"50000x50000 = 2.5 Gpx, {PIXELS}"),
    "png zTXt": (lambda: small_png(chunk(b"zTXt", b"a\0\0" + zeros(1 << 30))), None),
    "png iCCP": (lambda: small_png(chunk(b"iCCP", b"a\0\0" + zeros(1 << 30))), None),
    "png iTXt rgba": (
        lambda: png(40, 40, zlib.compress(bytes(161 * 40)), chunk(b"iTXt", b"a\0\1\0\0\0" + zeros(1 << 30)), color=6),
        None,
    ),
    "png too many pixels": (lambda: png(40, 40, zeros(1 << 30)), None),
    "png apng": (
        lambda: pil(Image.new("RGB", (40, 40)), "PNG", save_all=True,
                    append_images=[Image.new("RGB", (40, 40), (i % 250, 0, 0)) for i in range(1, 1000)]),
        "",
    ),
    "gif canvas": (lambda: b"GIF89a\xff\xff\xff\xff" + pil(Image.new("P", (40, 40)), "GIF")[10:],
                   f"65535x65535 = 4.3 Gpx, {PIXELS}"),
    "gif frames": (lambda: gif_of_frames(10_000), ""),
    "tiff sides": (lambda: tiff(2**31, 2**31, (300, 2**31), 2**31),
                   f"2147483648x2147483648 = 4611686018.4 Gpx, {PIXELS}"),
    "tiff strip": (lambda: tiff(40, 40, (140, 2**32 - 1), 40), None),
    "tiff strips": (lambda: tiff(40, 40, (140, 140), 1, count=2**31), None),
    "jpeg scans": (lambda: progressive_of_scans(1000),
                   "progressive JPEG of 10000x10000 pixels in 1,010 scans: too much work"),
    "ico in it": (lambda: ico(huge_png()), f"50000x50000 = 2.5 Gpx, {PIXELS}"),
    "jp2 sides": (lambda: jpeg2000(2**31, 2**31, 2**31), None),
    "jp2 tiles": (lambda: jpeg2000(13_000, 13_000, 1), None),
    "webp sides": (lambda: webp(16_384, 16_384), f"16384x16384 = 268 Mpx, {PIXELS}"),
    "webp sides below": (lambda: webp(13_000, 13_000), None),
    "avif sides": (lambda: avif(60_000, 60_000), f"60000x60000 = 3.6 Gpx, {PIXELS}"),
    "avif sides below": (lambda: avif(5_000, 5_000), None),
}  # fmt: skip


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[list[str], str, int]]:
    folder = tmp_path_factory.mktemp("bombs")
    for name, (make, _) in BOMBS.items():
        (folder / name).write_bytes(make())
    good = tmp_path_factory.mktemp("good") / "good.jpg"
    good.write_bytes(pil(Image.new("RGB", (64, 64), (9, 9, 9)), "JPEG"))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(good)], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_no_memory_and_spares_its_neighbours(name: str, told) -> None:
    statuses, reason, grown_bytes = told[name]
    assert (statuses[0], statuses[2]) == ("ok", "ok")
    assert statuses[1] in ("ok", "decode_error")
    assert (statuses[1] == "ok") == (reason == "")
    expected = BOMBS[name][1]
    assert expected is None or reason == expected
    assert grown_bytes < LIMIT_BYTES


def test_a_text_bomb_says_what_it_is(told) -> None:
    assert told["png iTXt rgba"][1] in ("", "PNG whose text or colour profile unpacks to more than 1 MB")
