"""The demo's data: real photos that ship inside packages, planted near-duplicates, broken files."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from PIL import Image, ImageEnhance, ImageFilter

from imgcurate import schema
from imgcurate.errors import ConfigError

__all__ = ["DemoFindings", "DemoTruth", "check_demo", "make_demo_shards"]

_N_SHARDS: Final = 4
_MIN_SIDE: Final = 200
# scikit-image's files that are drawings, masks, text, or a second view of another photo.
_NOT_PHOTOS: Final = frozenset(
    "cell chessboard_GRAY chessboard_RGB color horse logo microaneurysms motorcycle_right page phantom text".split()
)
_CAPTIONS: Final = {
    "astronaut": "an astronaut",
    "chelsea": "a cat",
    "china": "a Chinese palace under a blue sky",
    "coffee": "a cup of coffee",
    "flower": "a dahlia",
    "rocket": "a rocket on its pad",
}


def _crop(image: Image.Image, share: float) -> Image.Image:
    dx, dy = (round(side * (1 - share) / 2) for side in image.size)
    return image.crop((dx, dy, image.width - dx, image.height - dy))


_COPIES: Final[Mapping[str, tuple[Callable[[Image.Image], Image.Image], str, dict[str, Any]]]] = {
    "jpeg50": (lambda i: i, "jpg", {"quality": 50}),
    "jpeg20": (lambda i: i, "jpg", {"quality": 20}),
    "progressive": (lambda i: i, "jpg", {"quality": 85, "progressive": True}),
    "webp": (lambda i: i, "webp", {"quality": 60}),
    "png": (lambda i: i, "png", {}),
    "half": (
        lambda i: i.resize((i.width // 2, i.height // 2), Image.Resampling.LANCZOS),
        "jpg",
        {"quality": 90},
    ),
    "brighter": (lambda i: ImageEnhance.Brightness(i).enhance(1.15), "jpg", {"quality": 90}),
    "contrast": (lambda i: ImageEnhance.Contrast(i).enhance(0.8), "jpg", {"quality": 90}),
    "blurred": (lambda i: i.filter(ImageFilter.GaussianBlur(1.5)), "jpg", {"quality": 90}),
    "crop98": (lambda i: _crop(i, 0.98), "jpg", {"quality": 90}),
}


@dataclass(frozen=True, slots=True)
class DemoTruth:
    """What was put into the demo's shards.

    Attributes
    ----------
    samples : int
        Samples in all.
    photos : int
        Distinct photos.
    planted : int
        Near-duplicate copies of them.
    broken : int
        Samples that cannot be decoded.
    eps : float
        The threshold that goes with the encoder ``tiny-image``.
    """

    samples: int
    photos: int
    planted: int
    broken: int
    eps: float = 0.05


@dataclass(frozen=True, slots=True)
class DemoFindings:
    """What a run found in the demo's shards.

    Attributes
    ----------
    planted, found : int
        Planted near-duplicates, and how many of them were removed as copies of their own photo.
    merged : int
        Samples that were removed as copies of another photo; should be 0.
    reported : int
        Broken samples that have a reason.
    """

    planted: int
    found: int
    merged: int
    reported: int


def make_demo_shards(folder: Path) -> DemoTruth:
    """Write four shards of photos, near-duplicates and broken files.

    Parameters
    ----------
    folder : Path
        Where ``00000.tar`` to ``00003.tar`` go. The same bytes come out every time.

    Raises
    ------
    ConfigError
        If scikit-image, whose photos are used, is not installed.
    """
    photos = list(_photos())
    samples: list[tuple[str, dict[str, bytes]]] = []
    for name, image in photos:
        samples.append((f"{name}/original", _members(name, _encode(image, "jpg", {"quality": 95}), "jpg")))
        for copy, (change, ext, options) in _COPIES.items():
            samples.append((f"{name}/{copy}", _members(name, _encode(change(image), ext, options), ext)))
    # Neighbouring samples should not be copies of one photo, as in a crawl.
    samples.sort(key=lambda s: (s[0].split("/")[1], s[0]))
    jpeg = samples[0][1]["jpg"]
    broken = {
        "truncated": {"jpg": jpeg[: len(jpeg) // 3], "txt": b"a JPEG that is cut off"},
        "webpage": {"jpg": b"<!DOCTYPE html><html>404 Not Found</html>", "txt": b"a page called .jpg"},
        "empty": {"jpg": b"", "txt": b"no bytes"},
        "noise": {"png": bytes(range(256)) * 8, "txt": b"no image at all"},
        "caption-only": {"txt": b"a sample without an image"},
    }
    for i, (name, members) in enumerate(broken.items()):
        samples.insert((i + 1) * len(samples) // (len(broken) + 1), (f"broken/{name}", members))
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(_N_SHARDS):
        part = samples[shard * len(samples) // _N_SHARDS : (shard + 1) * len(samples) // _N_SHARDS]
        _write_tar(folder / f"{shard:05d}.tar", part)
    # The last shard is cut in the middle of its last sample, as an interrupted download leaves it.
    last = folder / f"{_N_SHARDS - 1:05d}.tar"
    with tarfile.open(last) as tar:
        cut = tar.getmembers()[-1]
    with last.open("r+b") as file:
        file.truncate(cut.offset_data + cut.size // 2)
    return DemoTruth(len(samples), len(photos), len(photos) * len(_COPIES) - 1, len(broken) + 1)


def check_demo(truth: DemoTruth, result: Any) -> DemoFindings:
    """Compare a run's catalog with what was planted."""
    catalog = result.catalog[[schema.UID, schema.KEY, schema.STATUS, schema.DUPLICATE_OF]].compute()
    photo_of = dict(zip(catalog[schema.UID], catalog[schema.KEY].str.split("/").str[0], strict=True))
    removed = catalog[catalog[schema.STATUS] == schema.STATUS_DUPLICATE]
    same = sum(
        photo_of[uid] == photo_of[of] for uid, of in zip(removed[schema.UID], removed[schema.DUPLICATE_OF], strict=True)
    )
    reported = catalog[schema.STATUS].isin(
        [schema.STATUS_DECODE_ERROR, schema.STATUS_NO_IMAGE, schema.STATUS_TAR_ERROR]
    )
    return DemoFindings(truth.planted, same, len(removed) - same, int(reported.sum()))


def _photos() -> Iterator[tuple[str, Image.Image]]:
    if find_spec("skimage") is None:
        raise ConfigError("the demo uses the photos of scikit-image: pip install scikit-image")
    folders = [(_package_folder("skimage") / "data"), _package_folder("sklearn") / "datasets" / "images"]
    for folder in folders:
        for path in sorted(folder.iterdir()):
            if path.suffix not in (".png", ".jpg") or path.stem in _NOT_PHOTOS:
                continue
            with Image.open(path) as image:
                if min(image.size) >= _MIN_SIDE:
                    yield path.stem, image.convert("RGB")


def _package_folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(f"{package} is not installed: pip install scikit-image")
    return Path(spec.origin).parent


def _encode(image: Image.Image, ext: str, options: Mapping[str, Any]) -> bytes:
    out = io.BytesIO()
    image.save(out, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[ext], **options)
    return out.getvalue()


def _members(name: str, data: bytes, ext: str) -> dict[str, bytes]:
    caption = _CAPTIONS.get(name, f"a photo of {name.replace('_', ' ')}")
    return {
        ext: data,
        "txt": caption.encode(),
        "json": json.dumps({"photo": name, "caption": caption}).encode(),
    }


def _write_tar(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for key, members in samples:
            for ext, data in members.items():
                info = tarfile.TarInfo(f"{key}.{ext}")
                info.size, info.mtime, info.mode = len(data), 0, 0o644
                tar.addfile(info, io.BytesIO(data))
