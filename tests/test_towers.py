"""Image towers with faster layers compute what open_clip's own compute."""

from __future__ import annotations

import copy
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower

from imgcurate.backend import get_backend
from imgcurate.errors import ConfigError, DeviceError
from imgcurate.models import towers
from imgcurate.models.encoders import EncoderSpec, OpenClipEncoder
from imgcurate.models.towers import Float8Linear, prepare

CPU = get_backend("cpu")
SMALL = {"layers": 3, "width": 64, "head_width": 32, "patch_size": 14, "image_size": 56}


def tower(**changes: Any) -> Any:
    torch.manual_seed(3)
    quick_gelu = changes.pop("quick_gelu", False)
    visual = _build_vision_tower(24, CLIPVisionCfg(**{**SMALL, **changes}), quick_gelu).eval()
    for parameter in visual.parameters():
        # Biases are zeros and scales are ones, or very small, until a model is trained.
        parameter.data += 0.05 * torch.randn_like(parameter)
    return visual


def images(n: int = 5, side: int = 56) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"quick_gelu": True}, {"pool_type": "avg"}, {"final_ln_after_pool": True}, {"ls_init_value": 0.1},
        {"no_ln_pre": True}, {"patch_size": 28}, {"layers": 1}, {"output_tokens": True},
        {"attentional_pool": True, "attn_pooler_heads": 2}, {"image_size": (56, 28)}, {"image_size": 60},
    ],
)  # fmt: skip
def test_prepared_towers_compute_the_same(changes: dict[str, Any]) -> None:
    theirs = tower(**changes)
    ours = prepare(copy.deepcopy(theirs))
    assert isinstance(ours.transformer.resblocks[0], towers._Block)
    height, width = (60, 60) if changes.get("image_size") == 60 else changes.get("image_size", (56, 56))
    x = images(side=height)[:, :, :, :width]
    torch.testing.assert_close(ours(x), theirs(x), atol=2e-5, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="needs a CPU that multiplies bfloat16")
@pytest.mark.parametrize(
    "changes",
    [{}, {"quick_gelu": True}, {"pool_type": "avg"}, {"layers": 1}, {"attentional_pool": True, "attn_pooler_heads": 2}],
)
def test_packed_towers_are_as_near_as_open_clips_own(changes: dict[str, Any]) -> None:
    exact, theirs = tower(**changes), tower(**changes).bfloat16()
    ours = prepare(tower(**changes), dtype=torch.bfloat16)
    assert isinstance(ours.transformer.resblocks[0], towers._PackedBlock)
    x = images(40)
    truth = exact(x)
    error, usual = (tower_(x.bfloat16()).float().sub(truth).norm(dim=1) for tower_ in (ours, theirs))
    assert (error < 0.05 * truth.norm(dim=1)).all()
    assert error.mean() < 1.25 * usual.mean()


@torch.inference_mode()
def test_scales_between_layers_and_sums_are_not_left_out() -> None:
    exact = tower(ls_init_value=0.1)
    ours = prepare(tower(ls_init_value=0.1), dtype=torch.bfloat16)
    assert not isinstance(ours.transformer.resblocks[0], towers._PackedBlock)
    assert torch.nn.functional.cosine_similarity(ours(images().bfloat16()).float(), exact(images())).min() > 0.999


@torch.inference_mode()
@pytest.mark.parametrize("changes", [{"timm_model_name": "resnet18", "timm_pool": "avg"}, {"layers": [1, 1, 1, 1]}])
def test_other_towers_stay_what_they_are(changes: dict[str, Any]) -> None:
    theirs = tower(**changes)
    ours = prepare(copy.deepcopy(theirs))
    torch.testing.assert_close(ours(images()), theirs(images()), atol=2e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match="fp8.* needs an image tower of open_clip's own transformer blocks"):
        prepare(theirs, float8=True)


@torch.inference_mode()
def test_float8_layers_are_near_the_exact_ones() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(128, 96).bfloat16()
    # Rows of very different sizes: each has a scale of its own.
    x = (torch.randn(40, 128) * torch.logspace(-3, 3, 40)[:, None]).bfloat16()
    exact = x.float() @ layer.weight.float().T
    got = Float8Linear(layer)(x).float() - layer.bias.float()
    error = (got - exact).norm(dim=1) / exact.norm(dim=1)
    # The bias is rounded away beside the largest rows, and outweighs the smallest.
    assert error[15:25].max() < 0.06
    assert error[15:25].min() > 0.005
    assert not Float8Linear(layer)(torch.zeros(2, 128).bfloat16()).isnan().any()


@torch.inference_mode()
def test_float8_towers_are_near_the_exact_ones() -> None:
    exact = tower(layers=12).bfloat16()
    ours = prepare(tower(layers=12), dtype=torch.bfloat16, float8=True)
    kinds = [type(module) for module in ours.modules()]
    assert Float8Linear in kinds
    x = images().bfloat16()
    assert torch.nn.functional.cosine_similarity(ours(x).float(), exact(x).float()).min() > 0.99


def test_float8_needs_a_gpu() -> None:
    with pytest.raises(DeviceError, match="precision='fp8' is not usable here: it needs a GPU"):
        OpenClipEncoder(EncoderSpec("ViT-S-32-alt", "random", precision="fp8"), CPU)


def test_why_a_model_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(towers.shutil, "which", lambda name: None)
    monkeypatch.setattr(towers.importlib.util, "find_spec", lambda name: "found")
    assert towers._why_not_compiled() == "there is no C compiler (gcc or clang)"
    monkeypatch.setattr(towers.importlib.util, "find_spec", lambda name: None)
    assert towers._why_not_compiled() == "triton is not installed"


def test_threads_take_turns_with_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch's tracer has one state for all threads: who calls a compiled function meanwhile gets an error.
    encoders = [OpenClipEncoder(EncoderSpec("ViT-S-32-alt", "random", compile=True), CPU) for _ in range(2)]
    inside, most = [0], [0]

    def encode(chunk: torch.Tensor, size: int) -> torch.Tensor:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        inside[0] -= 1
        return chunk.new_zeros((len(chunk), 4), dtype=torch.float32)

    for encoder in encoders:
        monkeypatch.setattr(encoder, "_encode", encode)
    pixels = torch.zeros((64, 224, 224, 3), dtype=torch.uint8)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: encoders[i % 2](pixels), range(8)))
    assert most[0] == 1


@pytest.mark.parametrize(
    ("parameter", "value"), [("precision", "int4"), ("compile", "maybe"), ("batch_size", 0), ("batch_size", "many")]
)
def test_unknown_options_are_refused(parameter: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{'model_inference_' if parameter == 'batch_size' else ''}{parameter}="):
        EncoderSpec("ViT-B-32", **{parameter: value})
