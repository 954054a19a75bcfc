"""Heads: against golden values, the published files, and references computed in plain Python."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from imgcurate.errors import ConfigError, EncoderMismatchError, WeightsError
from imgcurate.models import weights
from imgcurate.models.head_files import load_aesthetic_head, load_nsfw_head, nsfw_tensors
from imgcurate.models.heads import AestheticHead, Head, NsfwHead
from imgcurate.models.savedmodel import SavedModel

L14, B32 = "ViT-L-14/openai", "ViT-B-32/openai"
DIM = 8
PUBLISHED = {
    L14: ("clip_autokeras_binary_nsfw.zip", "nsfw_vit_l_14"),
    B32: ("clip_autokeras_nsfw_b32.zip", "nsfw_vit_b_32"),
}


def unit(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn((n, dim), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=1)


def aesthetic_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    widths = (768, 1024, 128, 64, 16, 1)
    tensors = {}
    for i, n_in, n_out in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        tensors[f"layers.{i}.weight"] = torch.randn((n_out, n_in), generator=generator) / n_in**0.5
        tensors[f"layers.{i}.bias"] = torch.randn(n_out, generator=generator)
    return tensors


def small_nsfw_tensors(vocabularies: dict[int, list[str]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "norm.mean": torch.randn(DIM, generator=generator) / 10,
        "norm.variance": torch.rand(DIM, generator=generator) * 100 + 1,
        "dense0.kernel": torch.randn((DIM, 4), generator=generator),
        "dense0.bias": torch.randn(4, generator=generator),
        "dense1.kernel": torch.randn((4, 1), generator=generator),
        "dense1.bias": torch.randn(1, generator=generator),
        "int_columns": torch.tensor(sorted(vocabularies), dtype=torch.int64),
    }
    for column, texts in vocabularies.items():
        micro = [-(2**31) if t == "-0.000000" else int(t.replace(".", "")) for t in texts]
        tensors[f"vocab.{column}.micro"] = torch.tensor(micro, dtype=torch.int32)
    return tensors


def reference_nsfw(tensors: dict[str, torch.Tensor], vocabularies: dict[int, list[str]], x: np.ndarray) -> list[float]:
    """Compute the published model row by row: printf, list lookup, float64."""
    t = {k: v.double().numpy() for k, v in tensors.items()}
    out = []
    for row in x.astype(np.float64):
        encoded = row.copy()
        for column, texts in vocabularies.items():
            text = f"{row[column]:.6f}"
            encoded[column] = texts.index(text) + 1 if text in texts else 0
        h = (encoded - t["norm.mean"]) / np.maximum(np.sqrt(t["norm.variance"]), 1e-7)
        h = np.maximum(h @ t["dense0.kernel"] + t["dense0.bias"], 0)
        out.append(1 / (1 + math.exp(-(h @ t["dense1.kernel"] + t["dense1.bias"])[0])))
    return out


def small_nsfw_head(vocabularies: dict[int, list[str]]) -> NsfwHead:
    return NsfwHead(small_nsfw_tensors(vocabularies), "small", "tiny/test")


@pytest.fixture(params=["aesthetic", "nsfw"])
def head(request: pytest.FixtureRequest) -> Head:
    if request.param == "aesthetic":
        return AestheticHead(aesthetic_tensors())
    return small_nsfw_head({2: ["0.500000", "-0.250000"], 5: ["0.000000"]})


def test_head_of_no_rows_gives_no_scores(head: Head) -> None:
    scores = head(torch.zeros((0, head.dim)))
    assert scores.shape == (0,)
    assert scores.dtype == torch.float32


def test_head_gives_nan_for_rows_that_are_not_finite_and_only_for_them(head: Head) -> None:
    x = unit(300, head.dim)
    expected = head(x)
    for column in range(head.dim):
        x[column % 7, column] = math.nan
    x[7, 2], x[8, 5] = math.inf, -math.inf
    bad = torch.arange(300) < 9
    bad[:7] = torch.isnan(x[:7]).any(dim=1)
    scores = head(x)
    assert torch.isnan(scores).tolist() == bad.tolist()
    torch.testing.assert_close(scores[~bad], expected[~bad], rtol=0, atol=0)


@pytest.mark.parametrize("sizes", [[1] * 20, [19, 1], [7, 13]])
def test_head_does_not_depend_on_the_batch(head: Head, sizes: list[int]) -> None:
    x = torch.cat([unit(20, head.dim), unit(300, head.dim, seed=1)])
    whole = head(x)
    assert whole.shape == (320,)
    parts = torch.cat([head(part) for part in torch.split(x[:20], sizes)])
    torch.testing.assert_close(parts, whole[:20], rtol=0, atol=1e-6)


def test_head_takes_other_floating_types(head: Head) -> None:
    x = unit(5, head.dim).half()
    torch.testing.assert_close(head(x), head(x.float()), rtol=0, atol=0)
    torch.testing.assert_close(head(x.double()), head(x.float()), rtol=0, atol=0)
    assert head(x).dtype == torch.float32


def test_head_refuses_wrong_input(head: Head) -> None:
    with pytest.raises(EncoderMismatchError, match=rf"length {head.dim + 1}, expected {head.dim}"):
        head(torch.zeros((2, head.dim + 1)))
    for bad in (
        torch.zeros(head.dim),
        torch.zeros((1, 2, head.dim)),
        torch.zeros((2, head.dim), dtype=torch.int64),
    ):
        with pytest.raises(ConfigError, match=rf"expected embeddings of shape \(n, {head.dim}\)"):
            head(bad)


def test_head_checks_the_encoder(head: Head) -> None:
    for encoder in head.encoders:
        head.check_encoder(encoder)
    for encoder in ("ViT-B-16/openai", "ViT-L-14/laion2b_s32b_b82k", "tiny-image", ""):
        with pytest.raises(EncoderMismatchError, match=rf"{head.encoders[0]}, got those of '{encoder}'"):
            head.check_encoder(encoder)


def test_head_moves_to_a_device(head: Head) -> None:
    assert head.device == torch.device("cpu")
    assert head.to("cpu") is head
    assert head.to("meta").device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_head_gives_the_same_on_a_gpu(head: Head) -> None:
    x = unit(300, head.dim)
    expected = head(x)
    scores = head.to("cuda:0")(x)
    assert scores.device.type == "cuda"
    torch.testing.assert_close(scores.cpu(), expected, rtol=0, atol=1e-5)


def test_aesthetic_head_is_the_layers_one_after_the_other() -> None:
    tensors = aesthetic_tensors()
    x = unit(40, 768)
    h = x.double()
    for i in (0, 2, 4, 6, 7):
        h = h @ tensors[f"layers.{i}.weight"].double().T + tensors[f"layers.{i}.bias"].double()
    torch.testing.assert_close(AestheticHead(tensors)(x).double(), h[:, 0], rtol=0, atol=1e-6)


def test_aesthetic_score_is_a_tenth_clipped() -> None:
    raw = torch.tensor([-1.0, 0.0, 5.0, 10.0, 11.0, math.nan])
    expected = torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0, math.nan])
    torch.testing.assert_close(AestheticHead.score(raw), expected, equal_nan=True)


def test_nsfw_head_looks_values_up_as_printf_writes_them() -> None:
    rng = np.random.default_rng(0)
    odd = np.arange(-127, 128, 2, dtype=np.float32)
    near_zero = [0.0, 1e-9, 4.999e-7, 5e-7, 5.001e-7, 1.5e-6]
    specials = np.array([*near_zero, *(-v for v in near_zero), 1, -1, 2147.4836, -2147.4836], np.float32)
    values = np.concatenate(
        [
            odd / 128,  # exactly halfway between two texts of six decimals
            specials,
            np.nextafter(odd / 128, np.float32(np.inf)),
            rng.uniform(-1, 1, 400).astype(np.float32),
            (rng.uniform(-1, 1, 400) * 1e-5).astype(np.float32),
            rng.uniform(-3, 3, 200).astype(np.float16).astype(np.float32),
        ]
    ).astype(np.float32)
    texts = list(dict.fromkeys(f"{v:.6f}" for v in values.tolist()))
    assert {"-0.000000", "0.000000"} <= set(texts)
    assert len(texts) < len(values), "some values share a text"
    vocabularies = {2: [t for i, t in enumerate(texts) if i % 3], 6: texts[::-1][::2]}
    x = unit(len(values), DIM).numpy()
    x[:, 2], x[:, 6] = values, values[::-1]
    tensors = small_nsfw_tensors(vocabularies)
    head = NsfwHead(tensors, "small", "tiny/test")
    found = head._lookup(torch.from_numpy(x[:, [2, 6]]))
    for i, column in enumerate((2, 6)):
        index = {t: float(n + 1) for n, t in enumerate(vocabularies[column])}
        assert found[:, i].tolist() == [index.get(f"{v:.6f}", 0.0) for v in x[:, column].tolist()]
    np.testing.assert_allclose(head(torch.from_numpy(x)), reference_nsfw(tensors, vocabularies, x), atol=1e-6)


def test_nsfw_head_without_columns_of_categories() -> None:
    tensors = small_nsfw_tensors({})
    x = unit(10, DIM)
    scores = NsfwHead(tensors, "small", "tiny/test")(x)
    np.testing.assert_allclose(scores, reference_nsfw(tensors, {}, x.numpy()), atol=1e-6)


def test_nsfw_head_does_not_change_its_input() -> None:
    x = unit(3, DIM)
    before = x.clone()
    small_nsfw_head({2: ["0.500000"]})(x)
    assert torch.equal(x, before)


def saved_model(texts: dict[int, tuple[bytes, ...]]) -> SavedModel:
    variables: dict[str, np.ndarray] = {
        "keras_api/metrics/0/count": np.zeros((), np.float32),
        "layer_with_weights-1/count": np.zeros((), np.int64),
        "layer_with_weights-1/mean": np.arange(DIM, dtype=np.float32),
        "layer_with_weights-1/variance": np.ones(DIM, np.float32),
        "layer_with_weights-2/kernel": np.ones((DIM, 1), np.float32),
        "layer_with_weights-2/bias": np.ones(1, np.float32),
    }
    constants: dict[str, np.ndarray | tuple[bytes, ...]] = {"first": np.zeros((1, 1), np.float32)}
    for column, vocabulary in texts.items():
        key = f"layer_with_weights-0/encoding_layers/{column}/token_counts/.ATTRIBUTES/table-values"
        variables[key] = np.zeros(0, np.int64)
        constants[f"t{column}"] = vocabulary
        constants[f"i{column}"] = np.arange(1, len(vocabulary) + 1)
    return SavedModel(variables, constants | {"last": (b"text",)})


def test_nsfw_tensors_orders_columns_by_number() -> None:
    tensors = nsfw_tensors(saved_model({2: (b"0.500000", b"-0.000000", b"-1.250000"), 10: (b"0.000000",)}))
    assert tensors["int_columns"].tolist() == [2, 10]
    assert tensors["vocab.2.micro"].tolist() == [500_000, -(2**31), -1_250_000]
    assert tensors["vocab.10.micro"].tolist() == [0]
    assert tensors["vocab.10.micro"].dtype == torch.int32
    assert sorted(tensors) == [
        "dense0.bias", "dense0.kernel", "int_columns", "norm.mean", "norm.variance",
        "vocab.10.micro", "vocab.2.micro",
    ]  # fmt: skip


def test_nsfw_tensors_refuses_other_models() -> None:
    with pytest.raises(WeightsError, match="expected six decimals"):
        nsfw_tensors(saved_model({2: (b"cat",)}))
    model = saved_model({2: (b"0.500000", b"0.600000")})
    with pytest.raises(WeightsError, match="not 1, 2, 3"):
        nsfw_tensors(SavedModel(model.variables, {**model.constants, "i2": np.array([2, 1])}))
    with pytest.raises(WeightsError, match="0 vocabularies for 1 columns"):
        nsfw_tensors(SavedModel(model.variables, {}))


def test_load_aesthetic_head_takes_other_values_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "aesthetic").mkdir()
    path = tmp_path / "aesthetic" / "sac+logos+ava1-l14-linearMSE.safetensors"
    tensors = aesthetic_tensors()
    safetensors.torch.save_file(tensors, path)
    head = load_aesthetic_head(tmp_path)
    assert head.path == path
    assert head.sha256 == AestheticHead(tensors).sha256 != AestheticHead(aesthetic_tensors(seed=1)).sha256
    assert "not the published ones" in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers.0.bias": None}, "'layers.0.bias' is missing"),
        ({"extra": torch.zeros(1)}, "'extra' is not known"),
        (
            {"layers.0.bias": torch.zeros(3)},
            r"'layers.0.bias' is torch.float32 of shape \(3,\), .*\(1024,\)",
        ),
        ({"layers.7.bias": torch.zeros(1, dtype=torch.float64)}, "torch.float64"),
        ({"layers.7.bias": torch.tensor([math.nan])}, "not finite"),
    ],
)
def test_load_aesthetic_head_checks_the_tensors(
    tmp_path: Path, change: dict[str, torch.Tensor | None], words: str
) -> None:
    tensors = {k: v for k, v in (aesthetic_tensors() | change).items() if v is not None}
    safetensors.torch.save_file(tensors, tmp_path / "sac+logos+ava1-l14-linearMSE.safetensors")
    with pytest.raises(WeightsError, match=words):
        load_aesthetic_head(tmp_path)


@pytest.mark.parametrize("data", [b"", b"\xff" * 100, b"\x10\0\0\0\0\0\0\0not json at all!"])
def test_load_aesthetic_head_of_a_damaged_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "sac+logos+ava1-l14-linearMSE.safetensors").write_bytes(data)
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        load_aesthetic_head(tmp_path)


def test_load_heads_never_open_an_original_of_another_checksum(tmp_path: Path) -> None:
    torch.save(aesthetic_tensors(), tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    (tmp_path / "clip_autokeras_binary_nsfw.zip").write_bytes(b"PK")
    with pytest.raises(WeightsError, match="is not the published"):
        load_aesthetic_head(tmp_path)
    with pytest.raises(WeightsError, match="is not the published"):
        load_nsfw_head(L14, tmp_path)


def test_load_nsfw_head_refuses_encoders_without_a_head(tmp_path: Path) -> None:
    with pytest.raises(EncoderMismatchError, match=f"'ViT-B-16/openai'.*{L14} and {B32}"):
        load_nsfw_head("ViT-B-16/openai", tmp_path)


@pytest.mark.parametrize("encoder", [L14, B32])
def test_load_nsfw_head_checks_the_tensors(data_dir: Path, tmp_path: Path, encoder: str) -> None:
    stem = PUBLISHED[encoder][1]
    good = safetensors.torch.load_file(data_dir / "weights" / "nsfw" / f"{stem}.safetensors")
    column = good["int_columns"][0].item()
    changes = [
        ({"int_columns": torch.tensor([column, 5000])}, "'vocab"),
        (
            {"int_columns": good["int_columns"].flip(0), "norm.variance": -good["norm.variance"]},
            "negative variance",
        ),
        ({f"vocab.{column}.micro": torch.tensor([1, 1], dtype=torch.int32)}, "value twice"),
        (
            {"int_columns": torch.tensor([-1]), "vocab.-1.micro": torch.zeros(1, dtype=torch.int32)},
            "not known",
        ),
    ]
    for change, words in changes:
        safetensors.torch.save_file(good | change, tmp_path / f"{stem}.safetensors")
        with pytest.raises(WeightsError, match=words):
            load_nsfw_head(encoder, tmp_path)


def test_load_aesthetic_head_matches_golden_values(data_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    golden = np.load(data_dir / "weights" / "golden" / "laion_rating_l14_10.npz")
    head = load_aesthetic_head(data_dir / "weights")
    assert (head.dim, head.encoders) == (768, (L14,))
    np.testing.assert_allclose(head(torch.from_numpy(golden["embedding"])), golden["aesthetic_v2"], atol=2e-6)
    assert caplog.records == []


def test_load_aesthetic_head_from_the_published_file(data_dir: Path, tmp_path: Path) -> None:
    shutil.copy(data_dir / "weights" / "aesthetic" / weights.AESTHETIC_V2.name, tmp_path)
    head = load_aesthetic_head(tmp_path)
    assert head.path == tmp_path / weights.AESTHETIC_V2.name
    assert head.sha256 == load_aesthetic_head(data_dir / "weights").sha256


@pytest.mark.parametrize(
    ("encoder", "file", "column"),
    [(L14, "laion_rating_l14_10.npz", "nsfw_l14"), (B32, "clip_vit_b32_clip-retrieval7.npz", "nsfw_b32")],
)
def test_load_nsfw_head_matches_golden_values(
    data_dir: Path, encoder: str, file: str, column: str, caplog: pytest.LogCaptureFixture
) -> None:
    golden = np.load(data_dir / "weights" / "golden" / file)
    check = np.load(data_dir / "weights" / "nsfw" / f"{PUBLISHED[encoder][1]}_check.npz")
    head = load_nsfw_head(encoder, data_dir / "weights")
    assert head.encoders == (encoder,)
    np.testing.assert_allclose(head(torch.from_numpy(golden["embedding"])), golden[column], atol=1e-6)
    np.testing.assert_allclose(head(torch.from_numpy(check["x"])), check["y"], atol=2e-6)
    assert caplog.records == []


@pytest.mark.parametrize("encoder", [L14, B32])
def test_load_nsfw_head_converts_the_published_zip_bit_for_bit(data_dir: Path, tmp_path: Path, encoder: str) -> None:
    archive, stem = PUBLISHED[encoder]
    shutil.copy(data_dir / "weights" / "nsfw" / archive, tmp_path)
    head = load_nsfw_head(encoder, tmp_path)
    assert head.path == tmp_path / archive
    expected = safetensors.torch.load_file(data_dir / "weights" / "nsfw" / f"{stem}.safetensors")
    converted = safetensors.torch.load_file(tmp_path / f"{stem}.safetensors")
    assert sorted(converted) == sorted(expected)
    for name, tensor in expected.items():
        assert converted[name].dtype == tensor.dtype
        assert torch.equal(converted[name], tensor), name
    again = load_nsfw_head(encoder, tmp_path)
    assert again.path == tmp_path / f"{stem}.safetensors"
    assert again.sha256 == head.sha256


def test_load_nsfw_head_works_where_nothing_can_be_written(
    data_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(data_dir / "weights" / "nsfw" / PUBLISHED[B32][0], tmp_path)
    # A folder in the place of the file: not even root can write there.
    (tmp_path / f"{PUBLISHED[B32][1]}.safetensors" / "x").mkdir(parents=True)
    with caplog.at_level("INFO"):
        assert load_nsfw_head(B32, tmp_path).dim == 512
    assert "converted weights are not kept" in caplog.text
    assert not list(tmp_path.glob(".*"))
