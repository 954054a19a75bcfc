"""What a run would do, told before it does it, and what the machine can do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from imgcurate import Pipeline, doctor
from imgcurate.cli import app
from imgcurate.doctor import examine
from imgcurate.errors import InputError
from imgcurate.estimate import estimate_run
from imgcurate.stages import (
    FilePartitioningStage,
    ImageAestheticFilterStage,
    ImageEmbeddingStage,
    ImageNSFWFilterStage,
    ImageReaderStage,
    ImageWriterStage,
    SemanticDedupStage,
)


def pipeline(shards: Path, *, files: int = 1, **model: str) -> Pipeline:
    stages = [FilePartitioningStage(str(shards / "*.tar"), files), ImageReaderStage(), ImageEmbeddingStage(**model)]
    return Pipeline([*stages, SemanticDedupStage(), ImageWriterStage(100)])


def test_estimate_counts_and_measures(shards: Path, tmp_path: Path) -> None:
    made = estimate_run(pipeline(shards, files=2, model="tiny-image"), str(tmp_path / "OUT"), device="cpu", n_workers=3)
    assert (made.inputs, made.samples, made.partitions, made.workers) == (4, 72, 2, 3)
    assert made.input_bytes == sum(p.stat().st_size for p in shards.iterdir())
    assert [name for name, _ in made.phases] == ["read", "SemanticDedupStage"]
    assert {"embedding", "duplicate_of"} <= set(made.columns)
    assert made.images_per_s is not None
    assert made.seconds == pytest.approx(72 / (3 * made.images_per_s))
    assert made.weights == {}
    assert not (tmp_path / "OUT").exists()


def test_estimate_of_many_shards_is_near(
    tmp_path: Path, photos: list, encode: Callable[..., bytes], write_tar: Callable[..., Path]
) -> None:
    for k in range(30):
        write_tar(tmp_path / "in" / f"{k:02}.tar", [(f"{i}", {"jpg": encode(photos[i])}) for i in range(3 + k % 3)])
    made = estimate_run(pipeline(tmp_path / "in", model="tiny-image"), str(tmp_path / "OUT"), measure=False)
    assert made.samples == pytest.approx(120, rel=0.3)
    assert made.images_per_s is None


def test_estimate_says_which_weights_are_missing(shards: Path, tmp_path: Path) -> None:
    work = pipeline(shards, model="ViT-L-14", model_dir=str(tmp_path))
    work.stages.insert(3, ImageAestheticFilterStage(model_dir=str(tmp_path)))
    made = estimate_run(work, str(tmp_path / "OUT"))
    assert set(made.weights) == {"ViT-L-14, openai", "ImageAestheticFilterStage"}
    assert all(text.startswith("to be fetched") for text in made.weights.values())
    assert made.seconds is None
    assert "not measured" in made.notes[0]
    (tmp_path / "ViT-L-14-openai.safetensors").touch()
    again = estimate_run(work, str(tmp_path / "OUT"), measure=False)
    assert again.weights["ViT-L-14, openai"] == str(tmp_path / "ViT-L-14-openai.safetensors")


def test_estimate_of_no_input_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing matches"):
        estimate_run(pipeline(tmp_path, model="tiny-image"), str(tmp_path / "OUT"))


@pytest.mark.parametrize("command", ["curate", "run"])
def test_dry_run_does_nothing(command: str, shards: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(f"inputs: {shards}\nstages: [{{ImageEmbeddingStage: {{model: tiny-image}}}}, ImageWriterStage]\n")
    args = {"curate": [str(shards), "--encoder", "tiny-image"], "run": [str(file)]}[command]
    asked = [command, *args, "-o", str(tmp_path / "OUT"), "--dry-run"]
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 0, shown.output
    assert "about 72 samples" in " ".join(shown.output.split())
    assert shown.output.strip().endswith("nothing was done (--dry-run)")
    told = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert told["samples"] == 72
    assert not (tmp_path / "OUT").exists()


def test_json_of_a_run_is_one_object(shards: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "OUT")
    command = ["curate", str(shards), "-o", out, "--encoder", "tiny-image", "--workers", "1", "--report", "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["samples"] == sum(told["counts"].values()) == 72
    assert told["kept"] == told["counts"]["ok"]
    assert told["report"] == f"{out}/report.html"
    assert [Path(s).exists() for s in told["shards"]] == [True]


def test_examine_finds_this_machine_fit(tmp_path: Path) -> None:
    found = {f.what: f for f in doctor.examine(str(tmp_path), str(tmp_path))}
    assert not [f for f in found.values() if f.state == "problem"]
    assert found["decoding, cpu"].state == "ok"
    assert found["weights, CLIP ViT-L/14"].state == "note"
    assert str(tmp_path) in found["weights, CLIP ViT-L/14"].cure


def test_examine_says_what_is_wrong_and_how_to_mend_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "pandas":
            return "1.0"
        if name == "rich":
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return "2.4.0" if name.startswith("nvidia-dali") else real(name)

    real = doctor.importlib.metadata.version
    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    monkeypatch.setattr(doctor, "_decoding", lambda: 1 / 0)
    found = {f.what: f for f in doctor.examine(str(tmp_path))}
    assert found["packages"].state == "problem"
    assert "pandas is 1.0" in found["packages"].found
    assert "rich is missing" in found["packages"].found
    assert found["DALI"].state == "problem"
    assert "uninstall" in found["DALI"].cure
    assert "ZeroDivisionError" in found["<lambda>"].found
    monkeypatch.setattr(doctor, "free_bytes", lambda folder: 0)
    shown = CliRunner().invoke(app, ["doctor", "-o", str(tmp_path), "--json"])
    told = json.loads(shown.stdout)
    assert shown.exit_code == 1
    assert not told["ok"]
    assert next(f for f in told["findings"] if f["what"] == "output disk")["state"] == "warning"


def test_reprs_for_notebooks(shards: Path) -> None:
    shown = pipeline(shards, model="tiny-image")._repr_html_()
    assert shown.startswith("<table>")
    assert "<td>SemanticDedupStage</td>" in shown


def test_converted_heads_are_there_as_well(shards: Path, tmp_path: Path) -> None:
    for name in ("sac+logos+ava1-l14-linearMSE.safetensors", "nsfw_vit_l_14.safetensors"):
        (tmp_path / name).touch()
    work = pipeline(shards, model="ViT-L-14", model_dir=str(tmp_path))
    heads = [ImageAestheticFilterStage(model_dir=str(tmp_path)), ImageNSFWFilterStage(model_dir=str(tmp_path))]
    work.stages[3:3] = heads
    found = estimate_run(work, str(tmp_path / "OUT"), measure=False).weights
    assert found["ImageAestheticFilterStage"] == str(tmp_path / "sac+logos+ava1-l14-linearMSE.safetensors")
    assert found["ImageNSFWFilterStage"] == str(tmp_path / "nsfw_vit_l_14.safetensors")
    by_name = {f.what: f.state for f in examine(model_dir=str(tmp_path))}
    assert (by_name["weights, aesthetic"], by_name["weights, NSFW"]) == ("ok", "ok")
