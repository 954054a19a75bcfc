"""Pixels: DALI and Pillow, good images and bad ones, against open_clip's own preprocessing."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from imgcurate.backend import Backend, get_backend
from imgcurate.batches import PixelView
from imgcurate.decode import MAX_PIXELS, Decoder, borrow_decoder
from imgcurate.errors import ConfigError, ImgcurateError
from imgcurate.models.encoders import EncoderSpec, OpenClipEncoder
from imgcurate.pillow import decode_with_pillow, smaller_jpeg
from imgcurate.probe import probe

CLIP = PixelView(224, 224)


def make_decoder(backend: Backend, *views: PixelView, batch_size: int = 16) -> Decoder:
    return Decoder(views or (CLIP,), backend, batch_size=batch_size, num_threads=2)


def test_decode_keeps_the_order_around_bad_images(backend, photos, encode) -> None:
    solid = [Image.new("RGB", (50, 40), (20 * i, 0, 255 - 20 * i)) for i in range(8)]
    blobs = [encode(s, "PNG" if i % 2 else "JPEG") for i, s in enumerate(solid)]
    blobs[2], blobs[4] = b"", encode(photos[0])[:700]
    blobs[5] = encode(solid[5].convert("RGBA"), "PNG")
    decoded = make_decoder(backend).decode(blobs)
    assert decoded.ok.tolist() == [True, True, False, True, False, True, True, True]
    assert decoded.reasons[2] == "0 bytes"
    assert decoded.reasons[4].startswith("truncated JPEG")
    means = decoded.images[CLIP].float().mean(dim=(1, 2)).cpu().numpy()
    expected = [[20 * i, 0, 255 - 20 * i] for i in (0, 1, 3, 5, 6, 7)]
    np.testing.assert_allclose(means, expected, atol=2)


def test_decode_survives_a_batch_of_images_that_only_dali_finds_bad(backend, photos, encode) -> None:
    blobs = [encode(p) for p in photos[:12]]
    for i in (1, 3, 4, 6, 8, 9):
        # A Huffman table that cannot be: the damage shows only while decoding.
        table = blobs[i].index(b"\xff\xc4") + 5
        blobs[i] = blobs[i][:table] + b"\xff" * 16 + blobs[i][table + 16 :]
    assert {probe(b).route for b in blobs} == {"dali"}
    decoded = make_decoder(backend).decode(blobs)
    assert decoded.ok[[0, 2, 5, 7, 10, 11]].all()
    assert len(decoded.images[CLIP]) == decoded.ok.sum()
    assert {decoded.reasons[i] for i in np.flatnonzero(~decoded.ok)} == {
        "damaged JPEG: its compressed pixels are broken"
    }
    alone = make_decoder(backend).decode([blobs[11]])
    torch.testing.assert_close(decoded.images[CLIP][-1], alone.images[CLIP][0])


def test_bad_images_of_a_batch_cost_some_runs_and_not_one_each(backend, photos, encode, monkeypatch) -> None:
    blobs = [encode(photos[i % len(photos)]) for i in range(64)]
    for i in (1, 9, 17, 33, 34, 63):
        table = blobs[i].index(b"\xff\xc4") + 5
        blobs[i] = blobs[i][:table] + b"\xff" * 16 + blobs[i][table + 16 :]
    decoder = make_decoder(backend, batch_size=64)
    runs = []
    run_bytes = decoder._run_bytes
    monkeypatch.setattr(decoder, "_run_bytes", lambda some: runs.append(len(some)) or run_bytes(some))
    decoded = decoder.decode(blobs)
    assert decoded.ok.sum() == 58
    assert len(runs) < 24
    alone = make_decoder(backend).decode([blobs[62]])
    torch.testing.assert_close(decoded.images[CLIP][-1], alone.images[CLIP][0])


def test_two_decoders_beside_an_encoder_do_not_mix_pixels(backend, photos, encode) -> None:
    batches = [[encode(photos[(8 * k + i) % len(photos)], quality=60 + k) for i in range(8)] for k in range(6)]
    expected = [make_decoder(backend).decode(b).images[CLIP].cpu() for b in batches]
    load = torch.randn(1024, 1024, device=backend.torch_device)

    def work(first: int) -> list[tuple[int, torch.Tensor]]:
        decoder, found = make_decoder(backend), []
        with contextlib.closing(backend.holder()) as holder:
            for k in [*range(first, 6), *range(first)] * 3:
                pixels = decoder.decode(batches[k]).images[CLIP]
                for _ in range(4):
                    load @ load
                # Read on the stream of the stages, long after it was queued.
                found.append((k, pixels.clone()))
                holder.hold(pixels)
        return [(k, made.cpu()) for k, made in found]

    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(work, (0, 3)):
            assert all(torch.equal(made, expected[k]) for k, made in found)


def test_a_batch_that_a_gpu_has_no_memory_for_is_decoded_in_parts(photos, encode, monkeypatch) -> None:
    decoder = make_decoder(get_backend("cpu"))
    decoder.backend = Backend("gpu")
    freed, runs = [], []
    monkeypatch.setattr(Backend, "free_memory", lambda _: freed.append(1))

    def run(blobs: list[bytes]) -> tuple[list[torch.Tensor], np.ndarray]:
        runs.append(len(blobs))
        if len(blobs) > most:
            raise RuntimeError("CUDA allocation failed")
        views = torch.stack([torch.full((224, 224, 3), len(b) % 251, dtype=torch.uint8) for b in blobs])
        return [views], np.full((len(blobs), 2), 224)

    monkeypatch.setattr(decoder, "_run_bytes", run)
    blobs, most = [encode(p) for p in photos[:10]], 3
    decoded = decoder.decode(blobs)
    assert decoded.ok.all()
    assert decoded.images[CLIP][:, 0, 0, 0].tolist() == [len(b) % 251 for b in blobs]
    assert runs == [10, 5, 3, 2, 5, 3, 2]
    assert len(freed) == 3
    most = 0
    with pytest.raises(ImgcurateError, match="cannot decode any more"):
        decoder.decode(blobs)


@pytest.mark.parametrize(
    "text",
    ["CUDA error: an illegal memory access was encountered", "cudaErrorIllegalAddress", "CUDA allocation failed"],
)
def test_an_error_of_the_device_is_none_of_the_images(text: str, photos, encode, monkeypatch) -> None:
    decoder = make_decoder(get_backend("cpu"))
    # As on a GPU from here on, of which nothing is there.
    decoder.backend = Backend("gpu")
    monkeypatch.setattr(Backend, "free_memory", lambda _: None)

    def fail(_: object) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(decoder, "_run_bytes", fail)
    with pytest.raises(ImgcurateError, match="cannot decode any more"):
        decoder.decode([encode(p) for p in photos[:4]])
    monkeypatch.setattr(decoder, "_run_pixels", fail)
    with pytest.raises(ImgcurateError, match="cannot decode any more"):
        decoder.decode([encode(photos[0], "GIF")])


def test_decode_gives_the_same_pixels_whatever_the_batch(backend, photos, encode) -> None:
    blobs = [encode(p) for p in photos[:10]]
    together = make_decoder(backend).decode(blobs).images[CLIP]
    decoder = make_decoder(backend, batch_size=3)
    apart = torch.cat([decoder.decode(blobs[i : i + 3]).images[CLIP] for i in range(0, 10, 3)])
    assert torch.equal(together, apart)


def test_decode_of_nothing_and_of_bad_images_alone(backend) -> None:
    decoded = make_decoder(backend).decode([])
    assert decoded.images[CLIP].shape == (0, 224, 224, 3)
    decoded = make_decoder(backend).decode([b"", b"x"])
    assert decoded.images[CLIP].shape == (0, 224, 224, 3)
    assert not decoded.ok.any()


def test_decode_makes_several_views_of_one_image(backend, photos, encode) -> None:
    tall = Image.new("RGB", (40, 80), (200, 10, 10))
    views = (PixelView(32, 32, "squash"), PixelView(32, 32, "longest", fill=7), PixelView(16, 24))
    decoded = make_decoder(backend, *views).decode([encode(tall, "PNG")])
    squashed, padded, cut = (decoded.images[v][0].cpu().numpy() for v in views)
    assert (squashed.shape, padded.shape, cut.shape) == ((32, 32, 3), (32, 32, 3), (16, 24, 3))
    assert (padded[:, :8] == 7).all()
    assert (padded[:, -8:] == 7).all()
    np.testing.assert_allclose(padded[:, 12:20].reshape(-1, 3), np.tile([200, 10, 10], (256, 1)), atol=1)
    np.testing.assert_allclose(cut.reshape(-1, 3).mean(0), [200, 10, 10], atol=1)


def test_decode_tells_the_displayed_size(backend, encode) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.new("RGB", (60, 30)), "JPEG", exif=exif)
    decoded = make_decoder(backend).decode([data])
    assert (decoded.widths[0], decoded.heights[0]) == (30, 60)


def large_jpeg(photo: Image.Image, width: int, height: int, encode, **options) -> bytes:
    return encode(photo.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), "JPEG", quality=92, **options)


@pytest.mark.parametrize("size", [(1901, 1451), (1403, 2002), (5611, 5701)])
def test_large_jpegs_decoded_smaller_are_the_same_pictures(size, photos, encode, monkeypatch) -> None:
    from imgcurate import decode

    backend = get_backend("cpu")
    blobs = [large_jpeg(p, *size, encode) for p in photos[:4]] + [encode(photos[4])]
    whole = Decoder((CLIP,), backend, batch_size=3, num_threads=1, jpeg_scaling=False)
    smaller, asked = make_decoder(backend, batch_size=8), []
    monkeypatch.setattr(decode, "smaller_jpeg", lambda data, d: asked.append(d) or smaller_jpeg(data, d))
    expected, got = [torch.cat([w.images[CLIP] for w in parts]).int() for parts in (
        [whole.decode(blobs[i : i + 3]) for i in (0, 3)], [smaller.decode(blobs)]
    )]  # fmt: skip
    assert asked == [{1403: 2, 1451: 2, 5611: 8}[min(size)]] * 4
    assert torch.equal(got[4], expected[4])
    difference = (got - expected).abs().float()
    assert difference[:4].mean() < 0.5
    # A signal-to-noise ratio of 45 dB.
    assert float((difference[:4] ** 2).mean()) < 255**2 / 10**4.5
    decoded = smaller.decode(blobs)
    assert list(zip(decoded.widths[:4].tolist(), decoded.heights[:4].tolist(), strict=True)) == [size] * 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_large_jpegs_decoded_smaller_are_turned(orientation: int, photos, encode) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = large_jpeg(photos[0], 1801, 1397, encode, exif=exif)
    backend = get_backend("cpu")
    whole = Decoder((CLIP,), backend, batch_size=3, num_threads=1, jpeg_scaling=False).decode([data])
    smaller = make_decoder(backend).decode([data])
    assert (smaller.images[CLIP].int() - whole.images[CLIP].int()).abs().float().mean() < 1
    assert (smaller.widths[0], smaller.heights[0]) == (whole.widths[0], whole.heights[0])


def test_large_jpegs_whose_orientation_is_read_differently_are_decoded_whole(photos, encode) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = large_jpeg(photos[0], 1801, 1397, encode, exif=exif)
    at = plain.index(b"\x01\x12\x00\x03")
    odd = [plain[: at + 2] + kind + plain[at + 4 :] for kind in (b"\x00\x01", b"\x00\x04", b"\x00\x09")]
    odd.append(plain[: at + 4] + b"\0\0\0\0" + plain[at + 8 :])
    segment = plain[plain.index(b"\xff\xe1") :]
    segment = segment[: 2 + int.from_bytes(segment[2:4], "big")]
    odd.append(plain[:2] + segment.replace(b"\x00\x06", b"\x00\x03") + plain[2:])
    backend = get_backend("cpu")
    whole = Decoder((CLIP,), backend, batch_size=8, num_threads=1, jpeg_scaling=False).decode(odd)
    scaled = make_decoder(backend).decode(odd)
    assert torch.equal(scaled.images[CLIP], whole.images[CLIP])
    assert scaled.widths.tolist() == whole.widths.tolist()


def test_large_jpegs_in_gray_and_broken_ones(photos, encode) -> None:
    gray = encode(photos[0].convert("L").resize((1400, 1400)), "JPEG")
    broken = bytearray(large_jpeg(photos[1], 1400, 1400, encode))
    table = broken.index(b"\xff\xc4") + 5
    broken[table : table + 16] = b"\xff" * 16
    decoder = make_decoder(get_backend("cpu"))
    decoded = decoder.decode([bytes(broken), gray, large_jpeg(photos[2], 1400, 1400, encode)])
    assert decoded.ok.tolist() == [False, True, True]
    assert decoded.reasons[0] == "damaged JPEG: its compressed pixels are broken"
    assert torch.equal(decoded.images[CLIP][0, ..., 0], decoded.images[CLIP][0, ..., 2])
    alone = make_decoder(get_backend("cpu")).decode([large_jpeg(photos[2], 1400, 1400, encode)])
    assert torch.equal(decoded.images[CLIP][1], alone.images[CLIP][0])


def test_what_needs_all_pixels_gets_them(photos, encode) -> None:
    data = large_jpeg(photos[0], 1400, 1400, encode)
    decoder = Decoder((CLIP,), get_backend("cpu"), batch_size=2, num_threads=1, facts=("pixel_hash",))
    other = Decoder((), get_backend("cpu"), batch_size=2, num_threads=1, facts=("pixel_hash",))
    assert decoder.decode([data]).facts["pixel_hash"] == other.decode([data]).facts["pixel_hash"]
    large = PixelView(600, 600)
    whole = Decoder((CLIP, large), get_backend("cpu"), batch_size=2, num_threads=1, jpeg_scaling=False)
    both = make_decoder(get_backend("cpu"), CLIP, large)
    assert torch.equal(both.decode([data]).images[CLIP], whole.decode([data]).images[CLIP])


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
        ("LA", (0, 255), (0, 0, 0)),
        ("L", 90, (90, 90, 90)),
        ("1", 1, (255, 255, 255)),
        ("P", 0, (0, 0, 0)),
    ],
)
def test_pixel_rule(mode: str, color, expected, encode) -> None:
    pixels = decode_with_pillow(encode(Image.new(mode, (9, 9), color), "PNG"), max_pixels=MAX_PIXELS)
    np.testing.assert_allclose(pixels[4, 4], expected, atol=1)


def test_pixel_rule_scales_16_bit(encode) -> None:
    ramp = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    pixels = decode_with_pillow(encode(Image.fromarray(ramp), "PNG"), max_pixels=MAX_PIXELS)
    assert pixels[0, :, 0].tolist() == [0, 1, 128, 255]


def test_max_pixels_is_checked_before_decoding(backend, encode) -> None:
    decoder = Decoder((CLIP,), backend, batch_size=2, num_threads=1, max_pixels=1000)
    decoded = decoder.decode([encode(Image.new("RGB", (40, 40))), encode(Image.new("RGB", (30, 30)))])
    assert decoded.ok.tolist() == [False, True]
    assert "over the limit" in decoded.reasons[0]


def test_borrow_decoder_reuses_graphs() -> None:
    options = {"batch_size": 5, "num_threads": 1}
    with (
        borrow_decoder((CLIP,), get_backend("cpu"), **options) as first,
        borrow_decoder((CLIP,), get_backend("cpu"), **options) as second,
    ):
        assert first is not second
    with borrow_decoder((CLIP,), get_backend("cpu"), **options) as again:
        assert again in (first, second)


def test_pixel_view_checks_its_values() -> None:
    with pytest.raises(ConfigError, match="resize='fit'"):
        PixelView(8, 8, "fit")
    with pytest.raises(ConfigError, match="outside"):
        PixelView(0, 8)


def real_images(data_dir, n: int) -> list[bytes]:
    photos = [p.read_bytes() for p in sorted((data_dir / "photos" / "clothing").glob("*.jpg"))[: n // 2]]
    return photos + [p.read_bytes() for p in sorted((data_dir / "photos" / "kodak").glob("*.png"))[: n - n // 2]]


def test_preprocessing_matches_open_clip(data_dir, record_property) -> None:
    """Our pixels against those of open_clip's own transform, and the embeddings of both."""
    import io

    blobs = real_images(data_dir, 16)
    encoder = OpenClipEncoder(EncoderSpec("ViT-B-32", "random", batch_size=16, precision="fp32"), get_backend("cpu"))
    ours = make_decoder(get_backend("cpu")).decode(blobs).images[CLIP]
    cfg = open_clip.transform.PreprocessCfg(mean=(0, 0, 0), std=(1, 1, 1))
    transform = open_clip.transform.image_transform_v2(cfg, is_train=False)
    theirs = (
        torch.stack([transform(Image.open(io.BytesIO(b))) for b in blobs]).mul(255).round().byte().permute(0, 2, 3, 1)
    )
    difference = (ours.float() - theirs.float()).abs().mean().item()
    cosine = (encoder(ours) * encoder(theirs.contiguous())).sum(dim=1).min().item()
    record_property("mean_absolute_difference", difference)
    record_property("min_cosine", cosine)
    assert difference < 0.02
    assert cosine > 0.99999


def test_golden_pixels_pass_through_unchanged(data_dir, encode) -> None:
    """Photos that have the model's size already, as CLIP's own preprocessing left them."""
    golden = np.load(data_dir / "weights" / "golden" / "clip_vit_b32_clip-retrieval7.npz")["pixel"]
    mean = np.array([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
    std = np.array([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)
    pixels = np.round((golden * std + mean) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    encoder = OpenClipEncoder(EncoderSpec("ViT-B-32", "random", batch_size=8, precision="fp32"), get_backend("cpu"))
    ours = make_decoder(get_backend("cpu")).decode([encode(p, "PNG") for p in pixels]).images[CLIP]
    assert np.abs(ours.numpy().astype(int) - pixels).max() == 0
    normalised = encoder.planes(ours)
    assert np.abs(normalised.numpy() - golden).max() < 1e-5
    with torch.inference_mode():
        theirs = torch.nn.functional.normalize(encoder._visual(torch.from_numpy(golden)), dim=1)
    assert (encoder(ours) * theirs).sum(dim=1).min() > 0.999999
