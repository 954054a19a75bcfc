"""The YAML file of a run, written for people: a commented one to begin with, and its JSON schema."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Final

import yaml
from pydantic import PydanticUserError, TypeAdapter

from imgcurate import schema
from imgcurate.config import RunConfig
from imgcurate.stages.base import Stage
from imgcurate.stages.registry import STAGES

__all__ = ["SCHEMA_FILE", "commented_yaml", "json_schema", "stages_markdown"]

SCHEMA_FILE: Final = "pipeline.schema.json"
_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
# "name : type", or several names alone.
_FIELD: Final = re.compile(r"^(\w+(?:, \w+)*)(?: : .+)?$")
_KEY: Final = re.compile(r"\w+:( |$)")
_WIDTH: Final = 100
# What the commented file switches on; all other stages and parameters stand in it as comments.
_USED: Final[Mapping[str, Mapping[str, Any]]] = {
    "ImageReaderStage": {},
    "ImageQualityFilterStage": {"ranges": {"width": [200, None], "height": [200, None]}},
    "ImageEmbeddingStage": {"model": "ViT-L-14", "pretrained": "openai"},
    "ImageAestheticFilterStage": {"score_threshold": 0.5},
    "ImageNSFWFilterStage": {"score_threshold": 0.5},
    "ExactDedupStage": {},
    "SemanticDedupStage": {"eps": 0.05, "keep_by": [*schema.LARGEST_FIRST]},
    "ImageWriterStage": {"images_per_tar": 1000},
}
# What stands for parameters that have no default.
_EXAMPLES: Final[Mapping[str, Mapping[str, Any]]] = {
    "ImageZeroShotFilterStage": {"labels": {"photo": "a photo", "screenshot": ["a screenshot of a web page", "an app"]}}
}
# Said elsewhere in the file.
_ELSEWHERE: Final = frozenset({"output_dir"})
# Heads of ViT-L/14, and what takes an encoder at all.
_OF_CLIP: Final = frozenset({"ImageAestheticFilterStage", "ImageNSFWFilterStage"})
_OF_EMBEDDINGS: Final = frozenset({"ImageEmbeddingStage", "SemanticDedupStage"}) | _OF_CLIP
# Python's words for what YAML writes in others.
_LITERAL: Final = r"""(?:"[^"]*"|'[^']*'|-?\d+(?:\.\d+)?|None)"""
_TUPLE: Final = re.compile(rf"\(({_LITERAL}(?:, {_LITERAL})*),?\)")
_WORDS: Final = {"None": "null", "True": "true", "False": "false"}


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a pipeline's YAML file: keys, stages, their parameters and what they do."""
    top = RunConfig.model_json_schema()
    described = _described(RunConfig)
    for name, field in top["properties"].items():
        field.pop("title", None)
        field["description"] = described.get(name, "")
    stages = {name: _stage_schema(kind) for name, kind in STAGES.items()}
    own = {"type": "string", "pattern": r"^\w+(\.\w+)+$", "description": "A stage of one's own, by its import path."}
    entries: list[dict[str, Any]] = [
        {"type": "string", "enum": list(STAGES), "description": "A stage with its defaults."},
        own,
        {
            "type": "object", "minProperties": 1, "maxProperties": 1, "additionalProperties": False,
            "properties": stages, "patternProperties": {r"^\w+(\.\w+)+$": {"type": ["object", "null"]}},
        },
    ]  # fmt: skip
    top["properties"]["stages"] = {
        "type": "array", "minItems": 1, "description": described["stages"], "items": {"anyOf": entries},
    }  # fmt: skip
    return {"$schema": _DIALECT, **top, "title": "imgcurate pipeline", "description": "A run of imgcurate."}


def _stage_schema(kind: type[Stage]) -> dict[str, Any]:
    described = _described(kind)
    hints = typing.get_type_hints(kind if kind.__init__ is object.__init__ else kind.__init__)
    properties: dict[str, Any] = {}
    required = []
    for name, parameter in _parameters(kind).items():
        try:
            field = TypeAdapter(hints.get(name, Any)).json_schema()
        except PydanticUserError:
            field = {}
        if parameter.default is inspect.Parameter.empty:
            required.append(name)
        else:
            field["default"] = _plain(parameter.default)
        properties[name] = {**field, "description": described.get(name, "")}
    summary = (inspect.getdoc(kind) or "").splitlines()[0]
    made: dict[str, Any] = {
        "type": "object" if required else ["object", "null"], "description": summary, "additionalProperties": False,
        "properties": properties,
    }  # fmt: skip
    return {**made, "required": required} if required else made


def commented_yaml(inputs: Sequence[str] = ("shards/*.tar",), encoder: str = "ViT-L-14") -> str:
    """Return a pipeline's YAML file in which every key, stage and parameter stands with what it does.

    Parameters
    ----------
    inputs : sequence of str
        What it reads.
    encoder : str
        The encoder it uses, or ``none``; stages that need another one stand in it as comments.
    """
    used = {name: dict(params) for name, params in _USED.items()}
    if encoder != _USED["ImageEmbeddingStage"]["model"]:
        used["ImageEmbeddingStage"] = {"model": encoder}
        used = {k: v for k, v in used.items() if k not in (_OF_EMBEDDINGS if encoder == "none" else _OF_CLIP)}
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        "# A run of imgcurate:  imgcurate run pipeline.yaml -o OUT",
        "# What is commented out shows the default.",
        "",
        _dump({"inputs": list(inputs) if len(inputs) > 1 else inputs[0]}),
        "",
    ]
    described = _described(RunConfig)
    for name, field in RunConfig.model_fields.items():
        if name not in ("inputs", "stages"):
            default = field.get_default(call_default_factory=True)
            lines += [*_comment(described.get(name, ""), ""), f"# {_dump({name: default})}", ""]
    lines += ["# In the order in which samples pass through them.", "stages:"]
    for name, kind in STAGES.items():
        lines += ["", *_commented_stage(name, kind, used.get(name))]
    return "\n".join(lines).rstrip() + "\n"


def stages_markdown() -> str:
    """Return the documentation of the stages, from their docstrings, as Markdown."""
    lines = [
        "# Stages", "",
        "In the order in which a pipeline mostly has them. Parameters are those of Python and of YAML files,",
        "where a tuple is a list, `[100, null]`, and `None` is `null`.", "",
    ]  # fmt: skip
    for name, kind in STAGES.items():
        described = _described(kind)
        lines += [f"## {name}", "", *_prose(kind), "", "| parameter | default | |", "| --- | --- | --- |"]
        for parameter in _parameters(kind).values():
            default = "required" if parameter.default is inspect.Parameter.empty else f"`{_plain(parameter.default)}`"
            text = described.get(parameter.name, "").replace("|", "\\|")
            lines.append(f"| `{parameter.name}` | {default} | {text} |")
        lines.append("")
    return "\n".join(lines)


def _prose(kind: type[Stage]) -> list[str]:
    """Return what a docstring says before its first section."""
    lines = (inspect.getdoc(kind) or "").splitlines()
    ends = (i for i, below in enumerate(lines[1:]) if below and set(below) == {"-"})
    text = "\n".join(lines[: next(ends, len(lines))]).strip()
    table = re.compile(r"^(?:=[= ]+\n).*^=[= ]+$", re.MULTILINE | re.DOTALL)
    if found := table.search(text):
        before, after = text[: found.start()], text[found.end() :]
        return [
            *_plain_markup(before),
            "```text",
            *found[0].replace("``", "").splitlines(),
            "```",
            *_plain_markup(after),
        ]
    return _plain_markup(text)


def _plain_markup(text: str) -> list[str]:
    """Return reStructuredText as Markdown, as far as docstrings here use it."""
    return re.sub(r":\w+:`~?\.?([^`]+)`", r"`\1`", text.replace("``", "`")).splitlines()


def _commented_stage(name: str, kind: type[Stage], used: Mapping[str, Any] | None) -> list[str]:
    summary = (inspect.getdoc(kind) or "").splitlines()[0]
    off = "# " if used is None else ""
    described = _described(kind)
    body: list[str] = []
    for parameter in _parameters(kind).values():
        if parameter.name in _ELSEWHERE:
            continue
        body += _comment(described.get(parameter.name, ""), "      ")
        if used is not None and parameter.name in used:
            body.append(f"      {_dump({parameter.name: used[parameter.name]})}")
        else:
            default = _EXAMPLES.get(name, {}).get(parameter.name, "")
            if parameter.default is not inspect.Parameter.empty:
                default = _plain(parameter.default)
            body.append(f"      # {_dump({parameter.name: default})}")
    # A mapping with nothing in it but comments is none.
    head = f"  - {name}:" if used or off else f"  - {name}:  # with its defaults"
    if off:
        body = [line if line.lstrip().startswith("#") else f"# {line}" for line in body]
    return [*_comment(summary, "  "), f"{off}{head}", *body]


def _parameters(kind: type[Stage]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a stage; what a factory makes stands for the factory."""
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    made = {f.name: f.default_factory() for f in fields if f.default_factory is not dataclasses.MISSING}
    parameters = inspect.signature(kind).parameters
    return {name: p.replace(default=made.get(name, p.default)) for name, p in parameters.items()}


def _described(kind: type) -> dict[str, str]:
    """Return what a numpydoc docstring says of each attribute or parameter, as one line each."""
    found: dict[str, list[str]] = {}
    names: list[str] = []
    inside = False
    lines = (inspect.getdoc(kind) or "").splitlines()
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if set(below) == {"-"}:
            inside = line.strip() in ("Attributes", "Parameters")
            names = []
        elif inside and (match := _FIELD.match(line)):
            names = match[1].split(", ")
            found |= {name: [] for name in names}
        elif inside and line.startswith("    "):
            for name in names:
                found[name].append(line.strip())
    return {key: re.sub(r":\w+:`~?\.?([^`]+)`|``([^`]+)``", r"\1\2", " ".join(words)) for key, words in found.items()}


def _comment(text: str, indent: str) -> list[str]:
    words = _TUPLE.sub(r"[\1]", text)
    words = re.sub(r"\b(?:None|True|False)\b", lambda word: _WORDS[word[0]], words)
    # A line that began with a word and a colon would look like a parameter.
    widths = range(_WIDTH - len(indent), _WIDTH // 2, -1)
    wrapped = (textwrap.wrap(words, width) for width in widths)
    lines = next((found for found in wrapped if not any(map(_KEY.match, found))), textwrap.wrap(words, widths[0]))
    return [f"{indent}# {line}" for line in lines]


def _dump(content: Mapping[str, Any]) -> str:
    """Return a key with its value on one line."""
    ((name, value),) = content.items()
    if value == "" and isinstance(value, str):
        return f"{name}:"
    shown = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True).strip()
    return f"{name}: {shown.removesuffix('...').strip()}"


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list, frozenset, set)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
