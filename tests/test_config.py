"""YAML files: what is understood, and how mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from imgcurate.config import load_config
from imgcurate.errors import ConfigError
from imgcurate.options import storage_options
from imgcurate.stages import (
    ExactDedupStage,
    ImageAestheticFilterStage,
    ImageEmbeddingStage,
    ImageReaderStage,
    ImageWriterStage,
    PerceptualDedupStage,
    SemanticDedupStage,
)


def write(folder: Path, text: str) -> Path:
    path = folder / "pipeline.yaml"
    path.write_text(text)
    return path


def test_stages_and_parameters_are_read(tmp_path: Path) -> None:
    text = """
    inputs: [a/*.tar, b/*.tar]
    files_per_partition: 2
    device: cpu
    stages:
      - ImageEmbeddingStage: {model: tiny-image}
      - SemanticDedupStage
    """
    config = load_config(write(tmp_path, text))
    source, reader, embed, dedup = config.pipeline().stages
    assert (source.file_paths, source.files_per_partition) == (["a/*.tar", "b/*.tar"], 2)
    assert isinstance(reader, ImageReaderStage)
    assert embed == ImageEmbeddingStage(model="tiny-image")
    assert dedup == SemanticDedupStage()
    assert config.device == "cpu"


def test_quality_and_dedup_by_hashes_are_read(tmp_path: Path) -> None:
    text = """
    inputs: x
    stages:
      - ImageQualityFilterStage: {ranges: {sharpness: [100, null], aspect_ratio: [null, 3]}, columns: [phash]}
      - ExactDedupStage: {by: pixels}
      - PerceptualDedupStage: {max_distance: 6}
    """
    stages = load_config(write(tmp_path, text)).pipeline().stages[2:]
    assert [r.reason(0.5) for r in stages[0].rules[:1]] == ["sharpness 0.50 < 100.00"]
    assert [(r.column, r.op, r.threshold) for r in stages[0].rules] == [
        ("sharpness", ">=", 100),
        ("aspect_ratio", "<=", 3),
    ]
    assert stages[1:] == [ExactDedupStage("pixels"), PerceptualDedupStage(6)]
    with pytest.raises(ConfigError, match="the column 'sharp' is unknown; did you mean 'sharpness'"):
        load_config(write(tmp_path, text.replace("sharpness", "sharp"))).pipeline()


def test_a_stage_of_ones_own_is_named_by_its_import_path(tmp_path: Path) -> None:
    text = "inputs: x\nstages:\n  - imgcurate.stages.aesthetic.ImageAestheticFilterStage: {score_threshold: 0.4}\n"
    stages = load_config(write(tmp_path, text)).pipeline().stages
    assert stages[-1] == ImageAestheticFilterStage(0.4)


@pytest.mark.parametrize(
    "name", ["imgcurate.stages.aesthetic.ImageAestheticFilterStage", "ImageAestheticFilterStage", "0"]
)
def test_set_reaches_a_stage_of_ones_own_by_any_of_its_names(name: str, tmp_path: Path) -> None:
    text = "inputs: x\nstages:\n  - imgcurate.stages.aesthetic.ImageAestheticFilterStage: {score_threshold: 0.4}\n"
    config = load_config(write(tmp_path, text), [f"stages.{name}.score_threshold=0.6"])
    assert config.pipeline().stages[-1] == ImageAestheticFilterStage(0.6)
    with pytest.raises(ConfigError, match="there is no stage 'Aesthetic'"):
        load_config(write(tmp_path, text), ["stages.Aesthetic.score_threshold=0.6"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "inputs: x\nstages: [ImageEmbedingStage]",
            "unknown stage 'ImageEmbedingStage'; did you mean 'ImageEmbeddingS",
        ),
        ("inputs: x\nstages: [{SemanticDedupStage: {epz: 1}}]", "has no parameter 'epz'; did you mean 'eps'"),
        ("inputs: x\nstages: [{SemanticDedupStage: {eps: 7}}]", r"stages\[0\] SemanticDedupStage: eps=7 should be"),
        ("input: x\nstages: [SemanticDedupStage]", "did you mean 'inputs'|inputs: Field required"),
        ("inputs: x\nstages: []", "stages: List should have at least 1 item"),
        ("inputs: x\nstages: [os.system]", "os.system is not a subclass"),
        ("inputs: x\nstages: [no.such.Stage]", "cannot import no.such.Stage"),
        ("inputs: x\nstages: [{A: 1, B: 2}]", r"stages\[0\] should be"),
        (
            "inputs: x\nstages:\n  - SemanticDedupStage:\n    eps: 0.1",
            r"parameters indented under it, not .*SemanticDedupStage",
        ),
        (
            "inputs: x\nstages: [{SemanticDedupStage: {eps: '0.1'}}]",
            "SemanticDedupStage: eps='0.1' should be a number in",
        ),
        ("inputs: x\nstages: [FilePartitioningStage]", "what is read is said by 'inputs'"),
        ("inputs: x\ninputs: y\nstages: [ImageReaderStage]", "the key 'inputs' stands twice"),
        ("- a\n- b", "should be a mapping with 'inputs' and 'stages', not list"),
        ("inputs: [x", "is not valid YAML"),
        ("inputs: !!python/object/apply:os.system [ls]\nstages: [A]", "is not valid YAML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text)).pipeline()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "inputs: x\nstages:\n  - ImageReaderStage\n  - SemanticDedupStage:\n      keep_by: []\n      eps: 3\n",
            r"pipeline.yaml, line 6: stages\[1\] SemanticDedupStage: eps=",
        ),
        (
            "inputs: x\nstages:\n  - ImageReaderStage\n  - SemanticDedupStage: {epz: 3}\n",
            r"pipeline.yaml, line 4: stages\[1\] SemanticDedupStage has no parameter 'epz'; did you mean 'eps'",
        ),
        ("inputs: x\n\nstages:\n  - ImageReaderStag\n", r"line 4: stages\[0\]: unknown stage 'ImageReaderStag'"),
        (
            "inputs: x\nstages: [A]\nworkers: many\n",
            r"pipeline.yaml, line 3: workers should be a valid integer, not 'many'",
        ),
        ("input: x\nstages: [A]\n", r"pipeline.yaml, line 1: there is no key 'input'; did you mean 'inputs'"),
        ("stages: [A]\n", r"pipeline.yaml: the key 'inputs' is missing, as in inputs: shards/\*.tar"),
        ("inputs: x\nstages:\n  - ImageReaderStage\n  - 3\n", r"line 4: stages\[1\] should be the name of a stage"),
        (
            "inputs: x\nstages:\n  - ImageQualityFilterStage:\n      ranges: {width: (100}\n",
            r"line 4: .*should be a pair, least and largest: \[256, null\] in YAML",
        ),
        (
            "inputs: x\nstages:\n  - ImageEmbeddingStage\n    model: tiny-image\n",
            r"line 4: this is not valid YAML: mapping values .* \(is the colon missing behind the name of the stage",
        ),
        (
            "inputs: x\nstages:\n  - SemanticDedupStage:\n      eps: 0.1\n    keep_by: [uid]\n   - ImageWriterStage\n",
            r"line 6: this is not valid YAML: expected <block end>.*look at the indentation, .* of lines 3 to 6",
        ),
        ("inputs: x\nstages:\n\t- A\n", r"line 3: .*a tab: indent with spaces"),
        ("inputs: *.tar\nstages: [A]\n", r"line 1: .*text that begins with \* or & stands in quotes"),
        ("inputs: x\nstages:\n  A: {}\n", r"line 2: stages should be a list: put '- ' before the name of each stage"),
        (
            "inputs: x\nstages: [SemanticDedupStage: {reference: 3}]\n",
            "reference=3 should be a sequence of strings",
        ),
        ("inputs: x\nstages: [SemanticDedupStage: {eps: '0.05'}]\n", r"eps='0.05' should be a number in \[0, 1\]"),
        ("inputs: x\nstages: [ImageReaderStage: {jpeg_scaling: 'no'}]\n", "jpeg_scaling='no' should be true or false"),
        ("inputs: x\nstages: [ImageReaderStage: {dali_batch_size: 99999999999}]\n", "should be at most 65,536"),
        ("inputs: x\nstages: [A]\nstorage_options: &x {a: *x}\n", "contains itself"),
        (
            "inputs: x\nstages:\n  - no.such.Stage\n",
            r"line 3: .* there is no module 'no' \(in the installed packages and",
        ),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text)).pipeline()


def test_what_set_says_is_not_looked_for_in_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "inputs: x\nstages:\n  - SemanticDedupStage: {eps: 0.05}\n")
    with pytest.raises(ConfigError, match=r"^--set stages.SemanticDedupStage.esp=1: stages\[0\] .* has no"):
        load_config(path, ["stages.SemanticDedupStage.esp=1"]).pipeline()
    both = ["stages.SemanticDedupStage.eps=0.01", "stages.SemanticDedupStage.epz=1"]
    with pytest.raises(ConfigError, match=r"^--set stages.SemanticDedupStage.epz=1: .* no parameter 'epz'"):
        load_config(path, both).pipeline()
    wrong = write(tmp_path, "inputs: x\nstages:\n  - ImageReaderStage\n  - SemanticDedupStage: {eps: 3}\n")
    with pytest.raises(ConfigError, match="pipeline.yaml, line 4: .*eps=3"):
        load_config(wrong, ["stages.0.min_size=1"]).pipeline()


def test_storage_options_are_yaml_scalars_and_dots_nest() -> None:
    assert storage_options([]) is None
    given = [
        "anon=true",
        "client_kwargs.endpoint_url=http://127.0.0.1:5000",
        "client_kwargs.verify=false",
        "timeout=2.5",
    ]
    assert storage_options(given) == {
        "anon": True, "client_kwargs": {"endpoint_url": "http://127.0.0.1:5000", "verify": False}, "timeout": 2.5,
    }  # fmt: skip
    assert storage_options(["key=0123", "secret=a=b: {c", "profile="]) == {
        "key": "0123", "secret": "a=b: {c", "profile": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["anon"], "--storage-option anon should be KEY=VALUE"),
        (["=hidden"], "should be KEY=VALUE"),
        (["a..b=hidden"], "a..b=... should be KEY=VALUE"),
        (["a=[hidden]"], "a=... should be text, a number"),
        (["a=1", "a=hidden"], "a=... is given twice"),
        (["a=1", "a.b=hidden"], "a.b=... is given twice, or one of them is within the other"),
        (["a.b=1", "a=hidden"], "a=... is given twice"),
    ],
)
def test_mistakes_in_storage_options_are_named_without_their_values(pairs: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        storage_options(pairs)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "parameter"),
    [
        (ImageReaderStage, "dali_batch_size"), (ImageReaderStage, "num_threads"), (ImageReaderStage, "min_size"),
        (ImageReaderStage, "max_pixels"), (ImageReaderStage, "max_image_bytes"), (ImageWriterStage, "images_per_tar"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [2.5, True, "3", float("nan"), [1]])
def test_counts_are_whole_numbers(stage: type, parameter: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{parameter}=.* should be a whole number"):
        stage(**{parameter: value})
    with pytest.raises(ConfigError, match=f"{parameter}=0 should be >= 1"):
        stage(**{parameter: 0})


@pytest.mark.parametrize("value", [0.5, True, "3", float("nan"), None])
def test_the_limit_of_the_aspect_ratio_is_a_number(value: object) -> None:
    with pytest.raises(ConfigError, match="max_aspect_ratio=.* should be a number >= 1"):
        ImageReaderStage(max_aspect_ratio=value)
