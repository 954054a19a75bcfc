"""The README's examples run as they stand, in a folder with shards and (small, random) weights."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from test_models_heads import aesthetic_tensors

README = Path(__file__).resolve().parents[1] / "README.md"

# A model of the same name and embedding size as the example's, small enough for a test.
SMALL_MODEL = {
    "embed_dim": 768,
    "vision_cfg": {"image_size": 224, "layers": 1, "width": 64, "head_width": 32, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 64, "width": 32, "heads": 1, "layers": 1},
}

# Added where open_clip is imported, and nowhere else: the import takes seconds.
ADDS_MODEL = """
import importlib.util
import sys
from pathlib import Path


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "open_clip":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def run_and_add(module):
            run(module)
            module.add_model_config(Path(__file__).with_name("ViT-L-14.json"))

        spec.loader.exec_module = run_and_add
        return spec


sys.meta_path.insert(0, Finder())
"""


def code_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what the examples name, and a model in place of the big one."""
    import open_clip

    folder = tmp_path_factory.mktemp("readme")
    (folder / "shards").symlink_to(shards)
    (folder / "models").mkdir()
    (folder / "site").mkdir()
    (folder / "site" / "ViT-L-14.json").write_text(json.dumps(SMALL_MODEL))
    (folder / "site" / "sitecustomize.py").write_text(ADDS_MODEL)
    torch.manual_seed(0)
    model = open_clip.CLIP(**{**SMALL_MODEL, "quick_gelu": True})
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "models" / "ViT-L-14-openai.safetensors"
    )
    aesthetic = aesthetic_tensors(seed=3)
    aesthetic["layers.7.bias"] += 6
    save_file(aesthetic, folder / "models" / "sac+logos+ava1-l14-linearMSE.safetensors")
    generator = torch.Generator().manual_seed(4)
    nsfw = {
        "norm.mean": torch.zeros(768),
        "norm.variance": torch.ones(768) / 768,
        "int_columns": torch.zeros(0, dtype=torch.int64),
    }
    for i, (n_in, n_out) in enumerate([(768, 64), (64, 512), (512, 256), (256, 1)]):
        nsfw[f"dense{i}.kernel"] = torch.randn((n_in, n_out), generator=generator) / n_in**0.5
        nsfw[f"dense{i}.bias"] = torch.randn(n_out, generator=generator) / 10
    nsfw["dense3.bias"] -= 1
    save_file(nsfw, folder / "models" / "nsfw_vit_l_14.safetensors")
    return folder


def run_example(folder: Path, code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder / "site"), "PYTHONWARNINGS": "ignore"}
    script = folder / "example.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_stage_example(folder: Path) -> None:
    (code,) = (c for c in code_blocks() if "Pipeline(" in c)
    assert len([line for line in code.splitlines() if line.strip()]) <= 35
    out = run_example(folder, code)
    first = out.splitlines()[0]
    match = re.fullmatch(r"72 samples in = (\d+) kept((?: \+ \d+ (?:aesthetic|duplicate|nsfw))+)", first)
    assert match, out
    dropped = [int(n) for n in re.findall(r"\+ (\d+)", match[2])]
    assert int(match[1]) + sum(dropped) == 72
    assert "photo/000" in out
    with tarfile.open(folder / "OUT" / "shards" / "00000.tar") as tar:
        assert len(tar.getmembers()) >= 2 * int(match[1])
    catalog = pq.read_table(folder / "OUT" / "catalog").to_pandas()
    assert catalog.aesthetic_score.between(0, 1).all()
    assert catalog.nsfw_score.between(0, 1).all()
    assert ((catalog.aesthetic_score >= 0.5) | (catalog.status == "aesthetic")).all()


def test_frame_example_keeps_the_same_samples(folder: Path) -> None:
    (code,) = (c for c in code_blocks() if "read_webdataset" in c)
    out = run_example(folder, code)
    catalog = pq.read_table(folder / "OUT" / "catalog").to_pandas()
    uids = pq.read_table(folder / "OUT2" / "shards" / "00000.parquet")["uid"].to_pylist()
    assert uids == sorted(catalog.uid[catalog.status == "ok"])
    assert f"'samples': {len(uids)}" in out
    first, second = (folder / o / "shards" / "00000.tar" for o in ("OUT", "OUT2"))
    assert first.read_bytes() == second.read_bytes()


def test_yaml_example(folder: Path) -> None:
    """The file of the README runs, with its own stage beside it, and keeps what Python keeps."""
    (text,) = re.findall(r"```yaml\n(.*?)```", README.read_text(), flags=re.DOTALL)
    (code,) = (c for c in code_blocks() if "(ProcessingStage)" in c)
    (folder / "mystages.py").write_text(code)
    (folder / "pipeline.yaml").write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(folder / "site"), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", "imgcurate.cli", "run", "pipeline.yaml", "-o", "OUT4", "-q"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"72 samples in = \d+ kept( \+ \d+ (aesthetic|dark|duplicate))+\n", done.stdout)


def test_custom_stage_example(folder: Path) -> None:
    (code,) = (c for c in code_blocks() if "(ProcessingStage)" in c)
    use = """
from imgcurate import FilePartitioningStage, ImageReaderStage, ImageWriterStage, Pipeline

if __name__ == "__main__":
    stages = [FilePartitioningStage("shards/*.tar"), ImageReaderStage(), Bright(), ImageWriterStage()]
    print(Pipeline(stages).run("OUT3").accounting())
"""
    out = run_example(folder, code + use)
    assert re.fullmatch(r"72 samples in = \d+ kept \+ \d+ dark\n", out)
