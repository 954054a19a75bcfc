"""The commented pipeline file, its schema, and the file that a run keeps."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
import yaml
from distributed import Client
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from imgcurate import Pipeline
from imgcurate.cli import app
from imgcurate.config import load_config
from imgcurate.errors import ConfigError
from imgcurate.stages import (
    FilePartitioningStage,
    ImageEmbeddingStage,
    ImageReaderStage,
    ImageWriterStage,
    SemanticDedupStage,
)
from imgcurate.stages.base import stage_config
from imgcurate.stages.registry import STAGES
from imgcurate.templates import commented_yaml, json_schema

ROOT = Path(__file__).resolve().parents[1]
README_YAML = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def validator() -> Draft202012Validator:
    schema = json_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def test_commented_file_is_valid_and_plans(tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(commented_yaml(["a/*.tar", "b/*.tar"]))
    validator().validate(yaml.safe_load(file.read_text()))
    config = load_config(file)
    assert config.inputs == ["a/*.tar", "b/*.tar"]
    assert config.pipeline().plan().writer is not None


def test_commented_file_names_every_stage_and_parameter() -> None:
    text = commented_yaml()
    for name, kind in STAGES.items():
        assert f"- {name}:" in text
        for parameter in set(inspect.signature(kind).parameters) - {"output_dir"}:
            assert re.search(rf"^ +(# )?{parameter}:", text, flags=re.MULTILINE), parameter


def test_commented_file_plans_with_every_comment_taken_off(tmp_path: Path) -> None:
    # A comment that is a key: one word, a colon, a value or nothing.
    lines = [re.sub(r"^(#? *)# (\w+: .*)$", r"\1\2", line) for line in commented_yaml().splitlines()]
    text = "\n".join(re.sub(r"^# ( +- \w+:)$", r"  \1"[2:], line) for line in lines)
    (tmp_path / "pipeline.yaml").write_text(text)
    config = load_config(tmp_path / "pipeline.yaml")
    assert len(config.stages) == len(STAGES)
    defaults = {type(s).__name__: stage_config(s) for s in config.pipeline().stages}
    assert defaults["SemanticDedupStage"]["n_probe"] == 2


@pytest.mark.parametrize("text", README_YAML)
def test_schema_takes_the_examples(text: str) -> None:
    validator().validate(yaml.safe_load(text))


@pytest.mark.parametrize(
    "content",
    [
        {"inputs": "a"},
        {"inputs": "a", "stages": []},
        {"inputs": "a", "stages": ["ImageReader"]},
        {"inputs": "a", "stages": [{"SemanticDedupStage": {"epsilon": 0.1}}]},
        {"inputs": "a", "stages": [{"SemanticDedupStage": {}, "ImageWriterStage": {}}]},
        {"inputs": "a", "stages": ["ImageWriterStage"], "worker": 2},
        {"inputs": "a", "stages": [{"ImageReaderStage": {"max_pixels": "many"}}]},
    ],
)
def test_schema_refuses_what_is_wrong(content: dict[str, object]) -> None:
    assert not validator().is_valid(content)


def test_published_schema_is_that_of_the_stages() -> None:
    assert json.loads((ROOT / "docs" / "pipeline.schema.json").read_text()) == json_schema()


def test_schema_describes_every_parameter() -> None:
    stages = json_schema()["properties"]["stages"]["items"]["anyOf"][2]["properties"]
    assert set(stages) == set(STAGES)
    for name, stage in stages.items():
        assert stage["description"]
        for parameter, field in stage["properties"].items():
            assert field["description"], f"{name}.{parameter}"


def test_init_writes_once(tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    run = CliRunner()
    assert run.invoke(app, ["init", str(file), "-i", "x/*.tar"]).exit_code == 0
    assert load_config(file).inputs == "x/*.tar"
    assert (tmp_path / "pipeline.schema.json").exists()
    again = run.invoke(app, ["init", str(file)])
    assert isinstance(again.exception, ConfigError)
    assert "--overwrite" in str(again.exception)
    assert run.invoke(app, ["init", str(file), "--overwrite"]).exit_code == 0
    assert load_config(file).inputs == "shards/*.tar"


def test_schema_command_prints_it() -> None:
    assert json.loads(CliRunner().invoke(app, ["schema"]).output) == json_schema()


def test_a_run_keeps_its_file_which_gives_the_same_run(shards: Path, tmp_path: Path, client: Client) -> None:
    stages = [
        FilePartitioningStage(str(shards / "*.tar"), 2), ImageReaderStage(min_size=8),
        ImageEmbeddingStage(model="tiny-image"), SemanticDedupStage(eps=0.04), ImageWriterStage(images_per_tar=30),
    ]  # fmt: skip
    out = str(tmp_path / "OUT")
    first = Pipeline(stages).run(out, client=client)
    again = load_config(tmp_path / "OUT" / "pipeline.yaml").pipeline()
    assert [stage_config(s) for s in again.stages[1:]] == [stage_config(s) for s in stages[1:]]
    assert again.run(out, client=client, resume=True).counts == first.counts


@pytest.mark.parametrize(
    ("text", "place", "value"),
    [
        ("workers=4", lambda c: c.workers, 4),
        ("stages.1.eps=0.2", lambda c: c.stages[1]["SemanticDedupStage"]["eps"], 0.2),
        ("stages.SemanticDedupStage.eps=0.3", lambda c: c.stages[1]["SemanticDedupStage"]["eps"], 0.3),
        ("stages.ImageWriterStage.images_per_tar=7", lambda c: c.stages[2]["ImageWriterStage"]["images_per_tar"], 7),
        ("storage_options.client_kwargs.url=http://x", lambda c: c.storage_options["client_kwargs"]["url"], "http://x"),
        ("inputs=a=b.tar", lambda c: c.inputs, "a=b.tar"),
    ],
)  # fmt: skip
def test_overrides_take_the_place_of_the_file(tmp_path: Path, text: str, place: object, value: object) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(
        "inputs: a\nstages: [{ImageEmbeddingStage: {model: tiny-image}}, SemanticDedupStage, ImageWriterStage]\n"
    )
    assert place(load_config(file, [text])) == value


@pytest.mark.parametrize(
    ("encoder", "stages"),
    [
        ("tiny-image", ["ImageQualityFilterStage", "ImageEmbeddingStage", "ExactDedupStage", "SemanticDedupStage"]),
        ("none", ["ImageQualityFilterStage", "ExactDedupStage"]),
    ],
)
def test_init_for_an_encoder_uses_what_it_can_do(tmp_path: Path, encoder: str, stages: list[str]) -> None:
    file = tmp_path / "p.yaml"
    assert CliRunner().invoke(app, ["init", str(file), "--encoder", encoder]).exit_code == 0
    pipeline = load_config(file).pipeline()
    pipeline.plan()
    assert [type(s).__name__ for s in pipeline.stages[2:]] == [*stages, "ImageWriterStage"]
    assert "#   - ImageAestheticFilterStage:" in file.read_text()
    assert CliRunner().invoke(app, ["init", str(tmp_path / "q.yaml"), "--encoder", "ViT-Q"]).exit_code != 0


def test_comments_write_values_as_yaml_does() -> None:
    text = commented_yaml()
    assert not re.search(r"\bNone\b|\bTrue\b|\(\"", text)
    shown = text[text.index('{"sharpness"') :].split("}")[0].replace("#", "") + "}"
    assert yaml.safe_load(shown) == {"sharpness": [100, None], "width": [256, None], "aspect_ratio": [None, 3]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("workers", "should be KEY=VALUE"),
        ("stages.SemanticDedup.eps=1", "did you mean 'SemanticDedupStage'"),
        ("stages.9.eps=1", "there is no stage '9' (they are numbered 0 to 1)"),
        ("inputs.0=a", "nothing to set"),
        ("stages.0.model.x=1", "nothing to set"),
        ("workers=[", "not valid YAML"),
        ("wrkers=3", "did you mean 'workers'"),
    ],
)
def test_overrides_that_fit_nowhere_say_why(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("inputs: a\nstages: [{ImageEmbeddingStage: {model: tiny-image}}, SemanticDedupStage]\n")
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(file, [text])
