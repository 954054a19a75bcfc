"""Check a pipeline before it starts, and divide it into phases."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import pyarrow as pa

from imgcurate import schema
from imgcurate.errors import ConfigError, InputError, nearest
from imgcurate.stages.base import IMAGE, DatasetStage, ProcessingStage, Stage, columns_added
from imgcurate.stages.reading import FilePartitioningStage, ImageReaderStage
from imgcurate.stages.rules import AnyRule, holds_numbers
from imgcurate.stages.writer import ImageWriterStage
from imgcurate.storage import StorageError

__all__ = ["Phase", "Plan", "check_numbers", "make_phases", "make_plan"]

# Which stage gives a column, and how the command line asks for it.
_MAKERS: Final[Mapping[str, tuple[str, str]]] = {
    schema.EMBEDDING: ("ImageEmbeddingStage", "--encoder"),
    schema.ENCODER: ("ImageEmbeddingStage", "--encoder"),
    schema.AESTHETIC_SCORE: ("ImageAestheticFilterStage", "--min-aesthetic"),
    schema.NSFW_SCORE: ("ImageNSFWFilterStage", "--max-nsfw"),
    schema.CAPTION_SIMILARITY: ("ImageCaptionFilterStage", "--min-caption-similarity"),
    **{
        c: (f"ImageQualityFilterStage(columns=[{c!r}])", "")
        for c in (schema.CONTENT_HASH, schema.PIXEL_HASH, schema.PHASH)
    },
}


@dataclass(frozen=True)
class Phase:
    """Stages that run together.

    Attributes
    ----------
    name : str
        Such as ``0-read`` or ``1-SemanticDedupStage``; names the folder of the checkpoint.
    stages : tuple of Stage
        Per-batch stages that are fused, or one stage that needs the whole data set.
    """

    name: str
    stages: tuple[Stage, ...]

    @property
    def label(self) -> str:
        """The name without its number, for people."""
        return self.name.split("-", 1)[1]

    @property
    def is_dataset(self) -> bool:
        """Whether the phase is one stage over the whole data set."""
        return bool(self.stages) and isinstance(self.stages[0], DatasetStage)

    @property
    def batch_stages(self) -> tuple[ProcessingStage, ...]:
        """The phase's per-batch stages."""
        return tuple(s for s in self.stages if isinstance(s, ProcessingStage))


@dataclass(frozen=True)
class Plan:
    """A pipeline that can work.

    Attributes
    ----------
    source : FilePartitioningStage
        What is read.
    reader : ImageReaderStage
        How it is decoded.
    phases : tuple of Phase
        What runs, in order; the first one reads the shards.
    writer : ImageWriterStage or None
        What is written at the end.
    types : dict of str to pa.DataType
        Arrow types of all columns of the catalog, but for those of sidecars.
    """

    source: FilePartitioningStage
    reader: ImageReaderStage
    phases: tuple[Phase, ...]
    writer: ImageWriterStage | None
    types: dict[str, pa.DataType] = field(default_factory=dict)


def make_plan(stages: Sequence[Stage]) -> Plan:
    """Check a pipeline's stages and divide them into phases.

    Raises
    ------
    ConfigError
        If a stage stands in the wrong place or needs a column that no stage before it adds; the
        message names both.
    EncoderMismatchError
        If a head would get embeddings of a model that it was not trained on.
    """
    source, reader, rest = _head(stages)
    writer = None
    if rest and isinstance(rest[-1], ImageWriterStage):
        writer, rest = rest[-1], rest[:-1]
    types = _check_columns(source, reader, [*rest, *([writer] if writer else [])])
    return Plan(source, reader, make_phases(rest), writer, types)


def make_phases(stages: Sequence[Stage]) -> tuple[Phase, ...]:
    """Divide per-batch stages and those that need the whole data set into phases; the first one reads."""
    phases: list[Phase] = []
    fused: list[Stage] = []
    for stage in stages:
        if isinstance(stage, DatasetStage):
            if fused or not phases:
                phases.append(_batch_phase(len(phases), fused))
            phases.append(Phase(f"{len(phases)}-{stage.name}", (stage,)))
            fused = []
        else:
            fused.append(stage)
    if fused or not phases:
        phases.append(_batch_phase(len(phases), fused))
    return tuple(phases)


def _batch_phase(number: int, stages: Sequence[Stage]) -> Phase:
    return Phase(f"{number}-{'read' if number == 0 else 'batches'}", tuple(stages))


def _head(stages: Sequence[Stage]) -> tuple[FilePartitioningStage, ImageReaderStage, list[Stage]]:
    for stage in stages:
        if not isinstance(stage, Stage):
            raise ConfigError(f"{stage!r} is not a stage: expected instances of ProcessingStage and its kin")
    if not stages or not isinstance(stages[0], FilePartitioningStage):
        raise ConfigError("a pipeline begins with FilePartitioningStage(file_paths=...), which says what is read")
    if len(stages) < 2 or not isinstance(stages[1], ImageReaderStage):
        raise ConfigError("the second stage of a pipeline is ImageReaderStage(), which reads the samples")
    rest = list(stages[2:])
    for stage in rest:
        if isinstance(stage, (FilePartitioningStage, ImageReaderStage)):
            raise ConfigError(f"stage {type(stage).__name__} stands twice in the pipeline")
        if not isinstance(stage, (ProcessingStage, DatasetStage)):
            raise ConfigError(f"stage {stage.name} is neither a ProcessingStage nor a DatasetStage")
        if isinstance(stage, ImageWriterStage) and stage is not rest[-1]:
            raise ConfigError("ImageWriterStage must be the last stage")
    return stages[0], stages[1], rest


def _check_columns(
    source: FilePartitioningStage, reader: ImageReaderStage, stages: Sequence[Stage]
) -> dict[str, pa.DataType]:
    types = columns_added(reader)
    beside = _Beside(source, {column for stage in (reader, *stages) for column in columns_added(stage)})
    decodes = any(IMAGE in stage.needs for stage in stages)
    removed: dict[str, str] = {}
    encoder: str | None = None
    for stage in stages:
        for column in stage.needs:
            if column not in types and column not in beside:
                raise ConfigError(_missing(stage, column, types, removed, beside))
        check_numbers(stage, {**beside.known, **types})
        if not decodes and (size := _sizes_in(stage)):
            raise ConfigError(
                f"stage {stage.name} has a rule on {size!r}, which nobody knows, for no stage looks at the images: put "
                "ImageQualityFilterStage in its place, or before it"
            )
        stage.check(encoder)
        _check_statuses(stage)
        added = columns_added(stage)
        clash = [c for c in added if c in schema.INDEX_COLUMNS]
        if clash:
            raise ConfigError(f"stage {stage.name} adds the column {clash[0]!r}, which belongs to imgcurate")
        revised = stage.revises if isinstance(stage, DatasetStage) else ()
        twice = [c for c in added if c in types and c not in revised]
        if twice:
            raise ConfigError(f"stage {stage.name} adds the column {twice[0]!r}, which a stage before it added")
        types |= added
        if schema.EMBEDDING in added and isinstance(stage, ProcessingStage):
            encoder = stage.encoder
        for rule in stage.rules if isinstance(stage, ProcessingStage) else ():
            if rule.column not in types and rule.column not in beside:
                raise ConfigError(_without_column(stage, rule.column, types, removed))
            _check_rule(stage, rule, types.get(rule.column, beside.known.get(rule.column)))
        before = f"{stage.name}: move the stage before it"
        if isinstance(stage, DatasetStage):
            gone = {IMAGE: before}
        else:
            gone = dict.fromkeys(stage.removes, f"{before} (or set remove_image_data=False there)")
        for column in gone:
            types.pop(column, None)
        removed |= gone
    types.pop(IMAGE, None)
    return types


def _check_rule(stage: Stage, rule: AnyRule, type_: pa.DataType | None) -> None:
    try:
        rule.check_type(type_)
    except ConfigError as exc:
        raise ConfigError(f"stage {stage.name}: {exc}") from exc


def _sizes_in(stage: Stage) -> str | None:
    """Return which of the sizes that decoding tells a stage has a rule on."""
    rules = stage.rules if isinstance(stage, ProcessingStage) else ()
    return next((rule.column for rule in rules if rule.column in (schema.WIDTH, schema.HEIGHT)), None)


def _without_column(stage: Stage, column: str, types: dict[str, pa.DataType], removed: dict[str, str]) -> str:
    """Say that a stage has a rule on a column that is not there."""
    if column in _MAKERS or column in removed:
        return _missing(stage, column, types, removed)
    words = f"stage {stage.name} has a rule on the column {column!r}, which neither it, in 'adds', "
    return f"{words}nor a stage before it gives{nearest(column, types)}"


class _Beside:
    """The columns of sidecars, looked for when a stage needs a column that no stage gives."""

    def __init__(self, source: FilePartitioningStage, taken: set[str]) -> None:
        self._source, self._taken = source, taken
        self._found = False
        self.known: dict[str, pa.DataType] = {}

    def __contains__(self, column: str) -> bool:
        if not self._found and column not in schema.COLUMNS and column != IMAGE:
            self._found = True
            # That there are no inputs is told when they are read.
            with contextlib.suppress(InputError, StorageError):
                self.known = dict(self._source.find(taken=self._taken)[1].types)
        return column in self.known


def check_numbers(stage: Stage, types: Mapping[str, pa.DataType]) -> None:
    """Check that columns hold numbers of which a stage computes an order, and text where it reads that.

    Raises
    ------
    ConfigError
        If one is of another type.
    """
    for column in stage.numbers if isinstance(stage, DatasetStage) else ():
        type_ = types[column]
        if not holds_numbers(type_):
            raise ConfigError(f"{stage.name}: keep_by: the column {column!r} does not hold numbers, but {type_}")
    for column in stage.texts if isinstance(stage, ProcessingStage) else ():
        type_ = types[column]
        if not (pa.types.is_string(type_) or pa.types.is_large_string(type_)):
            raise ConfigError(f"stage {stage.name}: the column {column!r} does not hold text, but {type_}")


def _check_statuses(stage: Stage) -> None:
    """Refuse statuses that would say of samples that a stage drops what imgcurate itself says of others."""
    if not isinstance(stage, ProcessingStage):
        return
    given = {**dict.fromkeys((rule.status for rule in stage.rules), "a rule with the status"), stage.name: "the name"}
    for status in given.keys() & schema.RESERVED_STATUSES:
        raise ConfigError(
            f"stage {stage.name} has {given[status]} {status!r}, which says something else of a sample: choose another"
        )


def _missing(
    stage: Stage,
    column: str,
    types: dict[str, pa.DataType],
    removed: dict[str, str],
    beside: _Beside | None = None,
) -> str:
    if column in removed:
        return f"stage {stage.name} needs the {column!r} data, which is gone after {removed[column]}"
    maker, option = _MAKERS.get(column, ("", ""))
    if maker:
        hint = f" (on the command line: {option})" if option else ""
        return f"stage {stage.name} needs the column {column!r}: put {maker} before it{hint}"
    known = {**types, **(beside.known if beside is not None else {})}
    words = f"stage {stage.name} needs the column {column!r}, which no stage before it gives{nearest(column, known)}"
    if column in schema.COLUMNS or not isinstance(stage, ProcessingStage):
        return words
    return (
        f"{words} (text_columns of ImageReaderStage, or --text-column, makes columns of members, as txt; json_columns, "
        "or --json-column, of keys in members .json)"
    )
