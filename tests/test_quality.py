"""Qualities and hashes of pictures, against SciPy, Pillow and formulas written out."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import scipy.ndimage
import torch
from distributed import Client
from PIL import Image

from imgcurate import (
    FilePartitioningStage,
    ImageBatch,
    ImageEmbeddingStage,
    ImageQualityFilterStage,
    ImageReaderStage,
    ImageWriterStage,
    Pipeline,
    ProcessingStage,
    quality,
    read_webdataset,
    schema,
    score_quality,
)
from imgcurate.backend import get_backend
from imgcurate.decode import Decoder
from imgcurate.errors import ConfigError
from imgcurate.facts import stored_channels


@pytest.fixture(scope="module")
def pixels(photos: list[Image.Image]) -> np.ndarray:
    """Return 24 pieces of photos, noise, a flat picture and a gray one: (27, 60, 80, 3) uint8."""
    pieces = [np.asarray(p.convert("RGB").resize((80, 60))) for p in photos[:24]]
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    return np.stack([*pieces, noise, np.full((60, 80, 3), 77, np.uint8), np.repeat(pieces[0][..., :1], 3, axis=2)])


def luma(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).convert("L"), dtype=np.float64)


def phash(gray: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the bits of pHash, and how far each wave is from the median."""
    waves = scipy.fft.dct(scipy.fft.dct(gray, axis=0), axis=1)[:8, :8].reshape(-1)
    return waves > np.median(waves), np.abs(waves - np.median(waves))


def bits(values: torch.Tensor) -> np.ndarray:
    return np.array([[int(v) >> (63 - i) & 1 for i in range(64)] for v in values], dtype=bool)


def test_gray_is_that_of_pillow(pixels: np.ndarray) -> None:
    np.testing.assert_array_equal(quality.gray_of(torch.from_numpy(pixels)), np.stack([luma(p) for p in pixels]))


def test_qualities_are_those_of_the_formulas(pixels: np.ndarray) -> None:
    tensor = torch.from_numpy(pixels)
    gray = quality.gray_of(tensor)
    for i, picture in enumerate(pixels):
        light = luma(picture)
        assert quality.brightness(gray)[i] == pytest.approx(light.mean(), rel=1e-6)
        assert quality.contrast(gray)[i] == pytest.approx(light.std(), rel=1e-6)
        # The border of cv2.Laplacian is SciPy's "mirror".
        laplacian = scipy.ndimage.laplace(light, mode="mirror")
        assert quality.sharpness(gray)[i] == pytest.approx(laplacian.var(), rel=1e-6)
        share = np.unique(light, return_counts=True)[1] / light.size
        assert quality.entropy(gray)[i] == pytest.approx(-(share * np.log2(share)).sum(), rel=1e-6, abs=1e-6)
        red, green, blue = np.moveaxis(picture.astype(float), -1, 0)
        rg, yb = red - green, (red + green) / 2 - blue
        expected = np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())
        assert quality.colorfulness(tensor)[i] == pytest.approx(expected, rel=1e-6)


def test_qualities_worked_out_by_hand() -> None:
    # Two columns, black and white: each pixel's Laplacian is twice the step to the mirrored other one.
    gray = torch.tensor([[[0, 255], [0, 255]]], dtype=torch.int32)
    assert quality.sharpness(gray).item() == 510.0**2
    assert (quality.brightness(gray).item(), quality.contrast(gray).item()) == (127.5, 127.5)
    assert quality.entropy(gray).item() == 1
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).expand(1, 4, 4, 3)
    assert quality.colorfulness(red).item() == pytest.approx(0.3 * np.hypot(255, 127.5))
    one = torch.tensor([[[9]]], dtype=torch.int32)
    assert quality.sharpness(one).item() == 0


def test_perceptual_hash_is_pillows_dct_written_out(pixels: np.ndarray) -> None:
    small = np.stack([np.asarray(Image.fromarray(p).convert("L").resize((32, 32))) for p in pixels[:25]])
    hashes, valid = quality.perceptual_hash(torch.from_numpy(small).to(torch.int32))
    assert hashes.dtype == torch.int64
    assert valid.all()
    for i, found in enumerate(bits(hashes)):
        expected, distance = phash(small[i].astype(float))
        assert (found == expected)[distance > 0.1].all()
        assert (distance > 0.1).sum() >= 62


def test_perceptual_hash_of_flat_pictures_is_none() -> None:
    flat = torch.full((1, 32, 32), 200, dtype=torch.int32)
    noisy = flat + torch.randint(0, 2, (1, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    stripes = (torch.arange(32, dtype=torch.int32) * 8).expand(1, 32, 32)
    both = stripes // 2 + stripes.transpose(1, 2) // 2
    hashes, valid = quality.perceptual_hash(torch.cat([flat, noisy, stripes, both]))
    assert valid.tolist() == [False] * 4
    assert hashes[0].item() == -(2**63)


def test_values_do_not_depend_on_the_batch(pixels: np.ndarray) -> None:
    tensor = torch.from_numpy(pixels)
    measures = [quality.sharpness, quality.brightness, quality.contrast, quality.entropy]
    for size in (1, 4, 27):
        parts = tensor.split(size)
        for measure in measures:
            together = measure(quality.gray_of(tensor))
            assert torch.equal(torch.cat([measure(quality.gray_of(p)) for p in parts]), together)
        assert torch.equal(torch.cat([quality.colorfulness(p) for p in parts]), quality.colorfulness(tensor))
        gray = quality.gray_of(tensor)[:, :32, :32]
        hashes = [quality.perceptual_hash(g)[0] for g in gray.split(size)]
        assert torch.equal(torch.cat(hashes), quality.perceptual_hash(gray)[0])


def test_functions_take_empty_batches() -> None:
    empty = torch.empty((0, 32, 32, 3), dtype=torch.uint8)
    gray = quality.gray_of(empty)
    assert [len(m(gray)) for m in (quality.sharpness, quality.entropy, quality.contrast)] == [0, 0, 0]
    assert len(quality.colorfulness(empty)) == len(quality.perceptual_hash(gray)[0]) == 0


@pytest.mark.parametrize(
    ("mode", "kind", "expected"),
    [
        ("L", "PNG", 1), ("L", "JPEG", 1), ("1", "PNG", 1), ("LA", "PNG", 2), ("RGB", "JPEG", 3), ("P", "PNG", 3),
        ("RGB", "WEBP", 3), ("RGBA", "PNG", 4), ("RGBA", "WEBP", 4), ("CMYK", "JPEG", 4), ("I;16", "PNG", 1),
    ],
)  # fmt: skip
def test_channels_are_counted_as_stored(mode: str, kind: str, expected: int) -> None:
    out = io.BytesIO()
    Image.new(mode, (20, 10)).save(out, kind)
    assert stored_channels(out.getvalue()) == expected


def test_channels_of_a_palette_with_transparency(encode) -> None:
    assert stored_channels(encode(Image.new("P", (8, 8)), "PNG", transparency=0)) == 4
    assert stored_channels(b"no image") == 0


def test_decoder_tells_facts_of_what_decoded(photos, encode) -> None:
    picture = photos[0].convert("RGB")
    # A PNG for DALI, one for Pillow (a palette has no place in DALI's way) with the same pixels, and damage.
    plain = encode(picture.quantize(200).convert("RGB"), "PNG")
    palette = encode(picture.quantize(200), "PNG")
    blobs = [plain, b"no image", palette, encode(picture)]
    decoder = Decoder((), get_backend("cpu"), batch_size=4, num_threads=1, facts=("content_hash", "pixel_hash"))
    decoded = decoder.decode(blobs)
    assert decoded.ok.tolist() == [True, False, True, True]
    good = [b for b, ok in zip(blobs, decoded.ok, strict=True) if ok]
    assert decoded.facts["content_hash"].tolist() == [hashlib.blake2b(b, digest_size=16).hexdigest() for b in good]
    first, second, third = decoded.facts["pixel_hash"].tolist()
    assert first == second != third
    raw = np.asarray(picture.quantize(200).convert("RGB"))
    shape = f"{raw.shape[0]}x{raw.shape[1]}x3".encode()
    assert first == hashlib.blake2b(shape + raw.tobytes(), digest_size=16).hexdigest()
    assert decoder.decode([b""]).facts["pixel_hash"].tolist() == []
    with pytest.raises(ConfigError, match="cannot tell 'colour'"):
        Decoder((), get_backend("cpu"), batch_size=4, num_threads=1, facts=("colour",))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"ranges": {"sharpnes": (1, None)}}, "is unknown; did you mean 'sharpness'"),
        ({"ranges": {"phash": (1, None)}}, "holds hashes"),
        ({"ranges": {"width": (float("nan"), None)}}, "not \\(nan, None\\)"),
        ({"ranges": {"width": (None, float("inf"))}}, "pair"),
        ({"ranges": {"width": (9, 3)}}, "min=9 > max=3"),
        ({"ranges": {"width": ("9", None)}}, "should be a pair, least and largest"),
        ({"ranges": {"width": (True, None)}}, "should be a pair, least and largest"),
        ({"ranges": {"width": 256}}, "should be a pair, least and largest"),
        ({"ranges": {"width": (1, 2, 3)}}, "should be a pair, least and largest"),
        ({"ranges": ["width"]}, "should be a mapping"),
        ({"columns": ("sharpness", "phas")}, "did you mean 'phash'"),
        ({"columns": "phash"}, "should be a sequence"),
    ],
)
def test_stage_refuses_what_it_cannot_do(parameters: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ImageQualityFilterStage(**parameters)


def test_stage_computes_what_is_asked_for() -> None:
    assert set(ImageQualityFilterStage().adds) == {
        "aspect_ratio", "channels", "sharpness", "brightness", "contrast", "entropy", "colorfulness", "content_hash",
        "phash",
    }  # fmt: skip
    stage = ImageQualityFilterStage({"width": [256, None], "entropy": [None, 7]}, columns=["pixel_hash"])
    assert list(stage.adds) == ["entropy", "pixel_hash"]
    assert stage.facts == ("pixel_hash",)
    assert [(r.column, r.op, r.threshold) for r in stage.rules] == [("width", ">=", 256), ("entropy", "<=", 7)]
    # Sizes are known once an image was decoded, so something is always decoded.
    alone = ImageQualityFilterStage({"width": (256, None)}, columns=())
    assert not alone.adds
    assert alone.views or alone.facts


def test_frame_has_the_values_and_nulls_where_nothing_decoded(tmp_path: Path, photos, encode, write_tar) -> None:
    blobs = [encode(p, "PNG") for p in photos[:7]]
    blobs[3] = b"\xff\xd8\xff nothing"
    blobs.append(encode(Image.new("RGB", (40, 30), "white"), "PNG"))
    path = write_tar(tmp_path / "a.tar", [(f"{i}", {"png": b}) for i, b in enumerate(blobs)])
    columns = [*ImageQualityFilterStage().adds, "pixel_hash"]
    frames = [score_quality(read_webdataset(str(path)), columns=columns, batch_size=b).compute() for b in (1, 3, 32)]
    for other in frames[1:]:
        for column in columns:
            assert frames[0][column].equals(other[column]), column
    out = frames[0]
    assert out.status.tolist() == ["ok"] * 3 + ["decode_error"] + ["ok"] * 4
    assert out.loc[3, columns].isna().all()
    assert out.phash.isna().tolist() == [i in (3, 7) for i in range(8)]
    assert out.content_hash[0] == hashlib.blake2b(blobs[0], digest_size=16).hexdigest()
    assert out.channels.tolist()[:3] == [3, 3, 3]
    assert out.aspect_ratio[0] == pytest.approx(max(photos[0].size) / min(photos[0].size))
    assert out.entropy[7] == out.sharpness[7] == 0
    assert (out.dtypes["phash"], out.dtypes["channels"], out.dtypes["sharpness"]) == ("Int64", "Int32", "float32")
    expected, distance = phash(luma(np.asarray(photos[0].convert("RGB").resize((32, 32), Image.Resampling.BILINEAR))))
    found = bits([int(out.phash[0])])[0]
    assert (found != expected)[distance > 50].sum() == 0


def test_rows_outside_the_ranges_say_why(tmp_path: Path, photos, encode, write_tar, client: Client) -> None:
    blurred = photos[1].resize((8, 8)).resize((160, 120))
    sharp = Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8))
    pictures = [sharp, blurred, photos[2].resize((96, 90)), sharp.crop((0, 0, 160, 32))]
    blobs = [encode(p, "PNG") for p in pictures]
    write_tar(tmp_path / "a.tar", [(f"{i}", {"png": b}) for i, b in enumerate([*blobs[:2], b"broken"])])
    write_tar(tmp_path / "b.tar", [(f"{i}", {"png": b}) for i, b in enumerate(blobs[2:])])
    stages = [
        FilePartitioningStage(str(tmp_path / "*.tar")),
        ImageReaderStage(),
        ImageQualityFilterStage({"width": (100, None), "sharpness": (20, None), "aspect_ratio": (1, 3)}),
        ImageEmbeddingStage(model="tiny-image"),
        ImageWriterStage(),
    ]
    result = Pipeline(stages).run(str(tmp_path / "OUT"), client=client)
    out = result.catalog.compute().reset_index(drop=True)
    assert out.status.tolist() == ["ok", "quality", "decode_error", "quality", "quality"]
    assert out.reason[0] == ""
    assert out.reason[1] == f"sharpness {out.sharpness[1]:.2f} < 20.00"
    assert out.reason[3] == "width 96 < 100"
    assert out.reason[4] == "aspect_ratio 5.00 > 3.00"
    assert result.counts == {"decode_error": 1, "ok": 1, "quality": 3}


def test_bounds_are_inclusive(tmp_path: Path, photos, encode, write_tar, client: Client) -> None:
    write_tar(tmp_path / "a.tar", [("a", {"png": encode(photos[0].resize((100, 90)), "PNG")})])
    stages = [
        FilePartitioningStage(str(tmp_path / "a.tar")),
        ImageReaderStage(),
        ImageQualityFilterStage({"width": (100, 100), "height": (90, 90), "channels": (3, 3)}, columns=()),
    ]
    assert Pipeline(stages).run(str(tmp_path / "OUT"), client=client).counts == {"ok": 1}


class Told(ProcessingStage):
    """A stage of one's own that asks the decoder for facts, and looks at no pixels."""

    facts = ("content_hash", "channels")
    adds = {"content_hash": "string", "twice": "int32"}

    def process(self, batch: ImageBatch) -> ImageBatch:
        batch["twice"] = batch.rows["channels"].to_numpy() * 2
        return batch


def test_own_stage_is_told_facts(tmp_path: Path, photos, encode, write_tar, client: Client) -> None:
    blob = encode(photos[0])
    write_tar(tmp_path / "a.tar", [("a", {"jpg": blob}), ("b", {"jpg": b"broken"})])
    stages = [FilePartitioningStage(str(tmp_path / "a.tar")), ImageReaderStage(), Told()]
    out = Pipeline(stages).run(str(tmp_path / "OUT"), client=client).catalog.compute()
    assert out.content_hash[0] == hashlib.blake2b(blob, digest_size=16).hexdigest()
    assert out.twice[0] == 6
    assert out[[schema.CONTENT_HASH, "twice"]].loc[1].isna().all()


def test_perceptual_hashes_of_real_photos(data_dir: Path, encode) -> None:
    photos = [Image.open(p).convert("RGB") for p in sorted((data_dir / "photos" / "kodak").glob("*.png"))]
    (view,) = ImageQualityFilterStage(columns=["phash"]).views
    decoder = Decoder([view], get_backend("cpu"), batch_size=32, num_threads=1)

    def hashes(blobs: list[bytes]) -> np.ndarray:
        found, valid = quality.perceptual_hash(quality.gray_of(decoder.decode(blobs).images[view]))
        assert valid.all()
        return found.numpy().view(np.uint64)

    originals = hashes([encode(p, "PNG") for p in photos])
    for copies in (
        [encode(p, quality=30) for p in photos],
        [encode(p.resize((p.width // 2, p.height // 2))) for p in photos],
        [encode(p, "WEBP", quality=60) for p in photos],
    ):
        assert np.bitwise_count(originals ^ hashes(copies)).max() <= 4
    apart = np.bitwise_count(originals[:, None] ^ originals)[np.triu_indices(len(photos), 1)]
    assert apart.min() > 8
