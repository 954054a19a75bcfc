"""Encoders: values, batches, weights from files and from a hub, and what is refused."""

from __future__ import annotations

import hashlib
import http.server
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from distributed import Client
from open_clip.pretrained import get_pretrained_cfg
from safetensors.torch import load_file, save_file

from imgcurate import Pipeline
from imgcurate.backend import get_backend
from imgcurate.errors import ConfigError, ImgcurateError, WeightsError
from imgcurate.models import clip_weights, encoders
from imgcurate.models.encoders import EncoderSpec, OpenClipEncoder, TinyImageEncoder, load_encoder
from imgcurate.stages import FilePartitioningStage, ImageEmbeddingStage, ImageReaderStage

CPU = get_backend("cpu")
MODEL = "ViT-S-32-alt"


@pytest.fixture(autouse=True)
def quiet_open_clip(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    model = open_clip.create_model(MODEL, load_weights=False)
    path = tmp_path_factory.mktemp("weights") / "mine.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return path


def pixels(n: int, side: int = 224, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, side, side, 3), generator=generator, dtype=torch.uint8)


def test_tiny_image_is_the_centred_thumbnail() -> None:
    images = pixels(5, 16)
    x = images.numpy().reshape(5, -1).astype(np.float64)
    x -= x.mean(axis=1, keepdims=True)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(TinyImageEncoder()(images).numpy(), x, atol=1e-6)


def test_tiny_image_of_a_single_colour_is_the_zero_vector() -> None:
    assert not TinyImageEncoder()(torch.full((1, 16, 16, 3), 9, dtype=torch.uint8)).any()


def test_open_clip_encoder_equals_open_clip(weights_file: Path) -> None:
    encoder = OpenClipEncoder(EncoderSpec(MODEL, str(weights_file), precision="fp32", batch_size=4), CPU)
    model = open_clip.create_model(MODEL, pretrained=str(weights_file)).eval()
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).reshape(1, 3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).reshape(1, 3, 1, 1)
    images = pixels(6)
    with torch.inference_mode():
        planes = (images.permute(0, 3, 1, 2).float() / 255 - mean) / std
        theirs = model.encode_image(planes, normalize=True)
    torch.testing.assert_close(encoder(images), theirs, atol=1e-5, rtol=1e-4)
    assert encoder.dim == theirs.shape[1]


def test_embeddings_do_not_depend_on_the_batch() -> None:
    encoder = OpenClipEncoder(EncoderSpec(MODEL, "random", precision="fp32", batch_size=4), CPU)
    images = pixels(9)
    together = encoder(images)
    apart = torch.cat([encoder(images[i : i + 2]) for i in range(0, 9, 2)])
    torch.testing.assert_close(together, apart, atol=2e-6, rtol=0)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(9))
    assert encoder(images[:0]).shape == (0, encoder.dim)


def test_batches_of_large_arrays_go_in_equal_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = OpenClipEncoder(EncoderSpec(MODEL, "random", precision="fp32"), CPU)
    # Eight images of 224 x 224 as planes of float32.
    monkeypatch.setattr(encoders, "_LARGEST_KEPT", 8 * 3 * 224 * 224 * 4)
    parted = OpenClipEncoder(EncoderSpec(MODEL, "random", precision="fp32"), CPU)
    seen: list[int] = []
    parted._visual.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    images = pixels(20)
    torch.testing.assert_close(parted(images), whole(images), atol=1e-6, rtol=1e-5)
    assert seen == [7, 7, 6]
    assert parted(images, at_most=5).shape == (20, parted.dim)
    assert seen[3:] == [5, 5, 5, 5]


def test_random_weights_are_the_same_every_time() -> None:
    spec = EncoderSpec(MODEL, "random", precision="fp32", batch_size=2)
    torch.manual_seed(1)
    first = OpenClipEncoder(spec, CPU)(pixels(2))
    torch.manual_seed(2)
    assert torch.equal(first, OpenClipEncoder(spec, CPU)(pixels(2)))


def test_bf16_is_close_to_fp32() -> None:
    exact = OpenClipEncoder(EncoderSpec(MODEL, "random", precision="fp32", batch_size=4), CPU)(pixels(4))
    fast = OpenClipEncoder(EncoderSpec(MODEL, "random", precision="bf16", batch_size=4), CPU)(pixels(4))
    assert fast.dtype == torch.float32
    assert (exact * fast).sum(dim=1).min() > 0.999


def test_load_encoder_loads_once() -> None:
    spec = EncoderSpec(MODEL, "random", batch_size=2)
    assert load_encoder(spec, CPU) is load_encoder(EncoderSpec(MODEL, "random", batch_size=2), CPU)


def test_identity_names_the_weights(weights_file: Path) -> None:
    digest = hashlib.sha256(weights_file.read_bytes()).hexdigest()
    assert EncoderSpec(MODEL, str(weights_file)).identity() == f"{MODEL}/sha256:{digest[:16]}"
    assert EncoderSpec(MODEL, str(weights_file)).fingerprint()["weights_sha256"] == digest
    assert EncoderSpec("ViT-L-14", "openai").identity() == "ViT-L-14/openai"
    assert EncoderSpec("ViT-L-14-quickgelu", "openai").identity() == "ViT-L-14/openai"
    assert EncoderSpec("ViT-B-32", "laion2b_s34b_b79k").identity() == "ViT-B-32/laion2b_s34b_b79k"
    assert EncoderSpec("tiny-image").identity() == "tiny-image"


def test_weights_in_model_dir_are_found_by_model_and_tag(weights_file: Path, tmp_path: Path, monkeypatch) -> None:
    import open_clip.pretrained as registry

    monkeypatch.setattr(registry, "get_pretrained_cfg", lambda model, tag: {"hf_hub": "a/b/"} if tag == "mytag" else {})
    target = tmp_path / f"{MODEL}-mytag.safetensors"
    target.write_bytes(weights_file.read_bytes())
    found = clip_weights.find(MODEL, "mytag", str(tmp_path))
    assert (found.path, found.identity) == (target, f"{MODEL}/mytag")


class Scripted(torch.nn.Module):
    """A state dict as a TorchScript archive, which is what OpenAI published."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, value in state.items():
            *path, leaf = name.split(".")
            module: torch.nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, torch.nn.Module())
                module = module._modules[part]
            module.register_buffer(leaf, value)

    def forward(self, x: int) -> int:
        return x


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_openai_weights_get_quickgelu_also_from_a_file(tmp_path: Path, monkeypatch) -> None:
    """OpenAI's file is known by its checksum, whatever it is called."""
    torch.manual_seed(3)
    model = open_clip.create_model(MODEL, load_weights=False, force_quick_gelu=True).eval()
    state = model.state_dict()
    extra = {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}
    path = tmp_path / "renamed.pt"
    torch.jit.script(Scripted({**state, **extra})).save(str(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()

    unknown = EncoderSpec(MODEL, str(path), precision="fp32", batch_size=2)
    with pytest.raises(WeightsError, match="does not hold weights"):
        OpenClipEncoder(unknown, CPU)

    monkeypatch.setattr(clip_weights, "_openai_checksums", lambda: frozenset({digest}))
    encoder = OpenClipEncoder(EncoderSpec(MODEL, str(path), precision="fp32", batch_size=2), CPU)
    assert encoder.identity == f"{MODEL}/openai"
    images = pixels(2)
    with torch.inference_mode():
        theirs = model.encode_image(encoder.planes(images), normalize=True)
        torch.testing.assert_close(encoder(images), theirs, atol=1e-5, rtol=1e-4)
        # With the usual GELU the numbers are others.
        plain = OpenClipEncoder(EncoderSpec(MODEL, "random", precision="fp32"), CPU)
        assert any(type(module) is torch.nn.GELU for module in plain._visual.modules())
        assert not any(type(module) is torch.nn.GELU for module in encoder._visual.modules())


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown encoder 'ViT-L14'.*did you mean ViT-L-14"):
        EncoderSpec("ViT-L14")
    with pytest.raises(ConfigError, match="neither a file nor a tag of ViT-B-32: its tags are openai"):
        EncoderSpec("ViT-B-32", "opneai").identity()
    with pytest.raises(ConfigError, match="precision='fp7'"):
        EncoderSpec("tiny-image", precision="fp7")


@pytest.mark.parametrize("damage", ["short", "other", "pickle"])
def test_damaged_or_foreign_weights_are_a_clear_error(damage: str, weights_file: Path, tmp_path: Path) -> None:
    path = tmp_path / ("bad.pt" if damage == "pickle" else "bad.safetensors")
    if damage == "short":
        path.write_bytes(weights_file.read_bytes()[:5000])
    elif damage == "other":
        save_file({"x": torch.zeros(3)}, path)
    else:
        import pickle

        path.write_bytes(pickle.dumps({"x": os.system}))
    with pytest.raises(WeightsError, match=f"{path.name} does not hold weights of {MODEL}"):
        OpenClipEncoder(EncoderSpec(MODEL, str(path)), CPU)


class Hub(http.server.BaseHTTPRequestHandler):
    """A model hub with one repository."""

    content = b""
    requests: list[str] = []

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        type(self).requests.append(f"{self.command} {self.path}")
        if not self.path.endswith("/open_clip_model.safetensors"):
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(self.content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        if body:
            self.wfile.write(self.content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(weights_file: Path) -> Iterator[str]:
    Hub.content, Hub.requests = weights_file.read_bytes(), []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


DOWNLOAD = f"""
import sys
import open_clip.pretrained as registry
registry.get_pretrained_cfg = lambda model, tag: {{"hf_hub": "someone/somemodel/"}} if tag == "mytag" else {{}}
from imgcurate.errors import WeightsError
from imgcurate.models import clip_weights, encoders
try:
    found = clip_weights.find({MODEL!r}, "mytag", sys.argv[1])
except WeightsError as exc:
    print("refused:", exc)
    sys.exit(3)
clip_weights.load(found)
print(found.sha256())
"""


def run_download(folder: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    # The hub's address is read when its library is imported, so each try is a process of its own.
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run(
        [sys.executable, "-c", DOWNLOAD, str(folder)], env=env, capture_output=True, text=True, timeout=200, check=False
    )


def test_weights_that_were_downloaded_before_are_found_where_the_hub_has_no_address(hub: str, tmp_path: Path) -> None:
    assert run_download(tmp_path, hub).returncode == 0
    offline = run_download(tmp_path, "http://hub.invalid")
    assert offline.returncode == 0, offline.stdout
    nothing = run_download(tmp_path / "other", "http://hub.invalid")
    assert nothing.returncode == 3
    assert "could not be downloaded from the hub (someone/somemodel)" in nothing.stdout
    assert "Retrying" not in nothing.stderr


def test_missing_weights_are_downloaded_once_into_model_dir(hub: str, tmp_path: Path) -> None:
    first = run_download(tmp_path, hub)
    assert first.stdout.strip() == hashlib.sha256(Hub.content).hexdigest(), first.stderr
    fetched = sum(r.startswith("GET") for r in Hub.requests)
    assert fetched == 1
    again = run_download(tmp_path, hub)
    assert again.returncode == 0
    assert sum(r.startswith("GET") for r in Hub.requests) == fetched


def test_two_processes_that_download_at_once_do_not_clash(hub: str, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: run_download(tmp_path, hub), range(2)))
    assert [d.stdout.strip() for d in both] == [hashlib.sha256(Hub.content).hexdigest()] * 2, both
    assert not list(tmp_path.rglob("*.incomplete"))


def test_offline_says_what_to_do(tmp_path: Path) -> None:
    done = run_download(tmp_path, "http://127.0.0.1:9")
    assert done.returncode == 3
    assert f"the weights of {MODEL}/mytag are not in {tmp_path} and could not be downloaded" in done.stdout
    assert f"put them there as {MODEL}-mytag.safetensors" in done.stdout
    assert "--model-dir" in done.stdout
    assert "tiny-image" in done.stdout


def test_a_file_of_weights_is_prepared_for_as_its_kin_or_as_is_told_beside_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="imgcurate")
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"x")
    tag, file = (clip_weights._preprocess("ViT-B-16-SigLIP", get_pretrained_cfg("ViT-B-16-SigLIP", "webli")),
                 clip_weights.find("ViT-B-16-SigLIP", str(weights)))  # fmt: skip
    assert file.preprocess == tag
    assert (tag["resize_mode"], list(tag["mean"])) == ("squash", [0.5, 0.5, 0.5])
    assert "squash" in EncoderSpec("ViT-B-16-SigLIP", str(weights)).fingerprint()["preprocess"]
    # Most of the published weights of ViT-L-14 want what OpenAI's do.
    usual = clip_weights.find("ViT-L-14", str(weights))
    assert usual.preprocess == clip_weights._preprocess("ViT-L-14", None)
    assert "preprocess" not in EncoderSpec("ViT-L-14", str(weights)).fingerprint()
    assert not caplog.text
    told = {"preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "resize_mode": "longest", "size": 99, "other": 1}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(told))
    beside = clip_weights.find("ViT-L-14", str(weights)).preprocess
    assert (beside["mean"], beside["resize_mode"], beside["size"]) == ([0.1, 0.2, 0.3], "longest", (224, 224))
    (tmp_path / "open_clip_config.json").write_text("[]")
    with pytest.raises(WeightsError, match="does not say how images are prepared"):
        clip_weights.find("ViT-L-14", str(weights))


def test_where_published_weights_differ_it_is_said(tmp_path: Path, monkeypatch, caplog) -> None:
    caplog.set_level(logging.WARNING, logger="imgcurate")
    (tmp_path / "w.pt").write_bytes(b"x")
    monkeypatch.setattr(clip_weights, "_AGREED", 1.0)
    assert clip_weights.find("ViT-L-14", str(tmp_path / "w.pt")).preprocess["resize_mode"] == "shortest"
    assert "an open_clip_config.json beside it would tell" in caplog.text


def test_a_text_tower_of_transformers_is_not_needed_for_images(tmp_path: Path, monkeypatch) -> None:
    """Models such as xlm-roberta-base-ViT-B-32: that package, and files of the hub, are for texts alone."""
    name = "test-hf-text"
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": {"hf_model_name": "nobody/nothing"}}
    (tmp_path / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / f"{name}.json")
    plain = {**config, "text_cfg": {"context_length": 7, "vocab_size": 11, "width": 16, "heads": 1, "layers": 1}}
    torch.manual_seed(3)
    whole = open_clip.CustomTextCLIP(**plain).eval()
    torch.save(whole.state_dict(), tmp_path / "w.pt")
    spec = EncoderSpec(name, str(tmp_path / "w.pt"), precision="fp32")
    images = pixels(5, 32)
    encoder = OpenClipEncoder(spec, CPU)
    with torch.inference_mode():
        expected = whole.encode_image(encoder.planes(images), normalize=True)
    torch.testing.assert_close(encoder(images), expected, atol=1e-5, rtol=1e-4)
    assert clip_weights.takes_transformers(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsError, match="text tower of test-hf-text is built by transformers"):
        clip_weights.load(clip_weights.find(name, str(tmp_path / "w.pt")))
    state = whole.state_dict()
    del state["visual.proj"]
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(
        WeightsError, match=r"1 tensors of the image tower are missing or not its own, first visual\.proj"
    ):
        OpenClipEncoder(EncoderSpec(name, str(tmp_path / "part.pt"), precision="fp32"), CPU)


def test_an_address_of_the_hub_is_refused_with_what_to_do() -> None:
    for name in ("hf-hub:laion/CLIP-ViT-B-32", "local-dir:/tmp/x"):
        with pytest.raises(ConfigError, match=r"not loaded by address: name the architecture.*open_clip_config\.json"):
            EncoderSpec(name)


def test_weights_that_give_nan_end_the_run(weights_file: Path, shards: Path, tmp_path: Path, client: Client) -> None:
    state = load_file(weights_file)
    state["visual.proj"][0, 0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    embedding = ImageEmbeddingStage(MODEL, str(tmp_path / "nan.safetensors"), precision="fp32")
    run = Pipeline([FilePartitioningStage(str(shards)), ImageReaderStage(), embedding])
    with pytest.raises(ImgcurateError, match=r"18 of 18 values of 'embedding' are not finite: the weights are damaged"):
        run.run(str(tmp_path / "OUT"), client=client)
