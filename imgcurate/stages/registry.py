"""Stages by name: those of imgcurate, and by their import path those of one's own."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Final

import yaml

from imgcurate.errors import ConfigError, nearest
from imgcurate.stages.aesthetic import ImageAestheticFilterStage
from imgcurate.stages.base import DatasetStage, Stage, stage_config
from imgcurate.stages.caption import ImageCaptionFilterStage
from imgcurate.stages.columns import ColumnFilterStage
from imgcurate.stages.deduplication import SemanticDedupStage
from imgcurate.stages.embedding import ImageEmbeddingStage
from imgcurate.stages.hash_dedup import ExactDedupStage, PerceptualDedupStage
from imgcurate.stages.nsfw import ImageNSFWFilterStage
from imgcurate.stages.quality import ImageQualityFilterStage
from imgcurate.stages.reading import ImageReaderStage
from imgcurate.stages.rules import AnyRule, rule_of
from imgcurate.stages.writer import ImageWriterStage
from imgcurate.stages.zero_shot import ImageZeroShotFilterStage

__all__ = ["STAGES", "find_stage", "make_stage", "pipeline_yaml", "recorded_phases", "recorded_rules", "works_by_batch"]

_WIDTH: Final = 100
STAGES: Final[Mapping[str, type[Stage]]] = {
    stage.__name__: stage
    for stage in (
        ImageReaderStage,
        ImageQualityFilterStage,
        ImageEmbeddingStage,
        ImageAestheticFilterStage,
        ImageNSFWFilterStage,
        ImageCaptionFilterStage,
        ImageZeroShotFilterStage,
        ColumnFilterStage,
        ExactDedupStage,
        PerceptualDedupStage,
        SemanticDedupStage,
        ImageWriterStage,
    )
}


def find_stage(place: str, name: str) -> type[Stage]:
    """Return the class of a stage.

    Parameters
    ----------
    place : str
        Where the name stands, for errors.
    name : str
        One of :data:`STAGES`, or an import path such as ``mypackage.stages.MyStage``.

    Raises
    ------
    ConfigError
        If there is none; the message names the nearest that there is.
    """
    if name in STAGES:
        return STAGES[name]
    if "." not in name:
        raise ConfigError(f"{place}: unknown stage {name!r}{nearest(name, STAGES)}")
    module, _, attribute = name.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as exc:
        where = "in the installed packages and the folder that the command is run in, or PYTHONPATH names"
        raise ConfigError(f"{place}: cannot import {name}: there is no module {exc.name!r} ({where})") from exc
    except (Exception, SystemExit) as exc:
        raise ConfigError(f"{place}: cannot import {name}: {type(exc).__name__}: {exc}") from exc
    if not (isinstance(kind, type) and issubclass(kind, Stage)):
        raise ConfigError(f"{place}: {name} is not a subclass of ProcessingStage or DatasetStage")
    return kind


def make_stage(place: str, name: str, params: Mapping[str, Any], *, others: Mapping[str, Any] | None = None) -> Stage:
    """Make a stage of its name and parameters.

    Parameters
    ----------
    place, name
        As in :func:`find_stage`.
    params : mapping
        Parameters by name; one that the stage does not have is an error.
    others : mapping, optional
        Further ones, such as those of a manifest, which tell more than parameters: what the stage does not
        have is left out, and `params` come first.

    Raises
    ------
    ConfigError
        If the stage or a parameter is unknown or wrong.
    """
    kind = find_stage(place, name)
    known = inspect.signature(kind).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for key in params:
        if key not in known and not takes_any:
            raise ConfigError(f"{place} {name} has no parameter {key!r}{nearest(key, known)}")
    given = {**{k: v for k, v in (others or {}).items() if k in known}, **params}
    required = [k for k, p in known.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if missing := [k for k in required if k not in given]:
        raise ConfigError(f"{place} {name} needs the parameter {missing[0]!r}")
    try:
        return kind(**given)
    except ConfigError as exc:
        raise type(exc)(f"{place} {name}: {exc}") from exc
    except Exception as exc:
        shown = ", ".join(f"{key}={value!r}" for key, value in given.items())
        raise ConfigError(f"{place} {name}({shown}): {exc}") from exc


def pipeline_yaml(source: Mapping[str, Any], stages: Sequence[Stage]) -> str:
    """Return a run as a YAML file that ``imgcurate run`` takes.

    Parameters
    ----------
    source : mapping
        ``file_paths``, ``files_per_partition`` and ``sidecar_columns``; the inputs' options, which may hold secrets,
        are not written.
    stages : sequence of Stage
        All after the one that says what is read.
    """
    entries = []
    for stage in stages:
        config = stage_config(stage)
        name, known = config.pop("stage"), inspect.signature(type(stage)).parameters
        entries.append({name: {key: value for key, value in config.items() if key in known and key != "output_dir"}})
    content = {
        "inputs": source["file_paths"], "files_per_partition": source["files_per_partition"],
        "sidecar_columns": source["sidecar_columns"], "stages": entries,
    }  # fmt: skip
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=_WIDTH)


def works_by_batch(entry: Mapping[str, Any]) -> bool:
    """Return whether a stage, as a manifest tells it, is one which reads, or works batch by batch."""
    name = entry["stage"]
    if "." in name:
        # Of stages of one's own those that work batch by batch tell their rules.
        return "rules" in entry
    kind = STAGES.get(name)
    return kind is None or not issubclass(kind, DatasetStage | ImageWriterStage)


def recorded_phases(config: Mapping[str, Any]) -> list[str]:
    """Return for each phase of a run the stage that needed the whole data set; "" for phases of per-batch stages.

    As :func:`imgcurate.plan.make_phases` divides them.
    """
    entries = [e for e in config.get("stages", []) if e["stage"] != ImageWriterStage.__name__]
    phases = [""]
    for entry in entries:
        if not works_by_batch(entry):
            phases.append(entry["stage"].rpartition(".")[2])
        elif phases[-1]:
            phases.append("")
    return phases


def recorded_rules(config: Mapping[str, Any]) -> tuple[AnyRule, ...]:
    """Return the rules of a stage as a manifest tells it; its code is not needed, nor its model."""
    name = config["stage"]
    if "rules" in config:
        return tuple(map(rule_of, config["rules"]))
    if name not in STAGES or name == ImageReaderStage.__name__:
        return ()
    return tuple(getattr(make_stage("the run's", name, {}, others=config), "rules", ()))
