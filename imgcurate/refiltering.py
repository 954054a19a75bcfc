"""Decide a finished run anew from its catalog: other thresholds, other duplicates, no image decoded.

The catalog holds the measures and embeddings of every image that decoded, also of those that left. So the
rules of the per-batch stages are applied to its columns, the stages that need the whole data set run as
ever, and the kept samples are copied from the same inputs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import dask.dataframe as dd
import pyarrow as pa
from distributed import Client
from distributed.security import Security

from imgcurate import schema
from imgcurate.backend import get_backend, lazy_frame
from imgcurate.batches import ImageBatch
from imgcurate.catalog import Catalog, Manifest
from imgcurate.errors import ConfigError, InputError, nearest
from imgcurate.execution import Progress
from imgcurate.inputs import describe_shards, find_shards
from imgcurate.models.weights import absolute_path
from imgcurate.origins import Origin
from imgcurate.plan import Plan, check_numbers, make_phases
from imgcurate.results import Result
from imgcurate.runner import Run
from imgcurate.shards import Shard
from imgcurate.sidecars import Sidecars
from imgcurate.stages.base import IMAGE, DatasetStage, ProcessingStage, Stage, columns_added, stage_config
from imgcurate.stages.columns import LISTS_SHA256, ColumnFilterStage
from imgcurate.stages.embedding import ImageEmbeddingStage
from imgcurate.stages.quality import ImageQualityFilterStage
from imgcurate.stages.reading import FilePartitioningStage, ImageReaderStage
from imgcurate.stages.registry import find_stage, make_stage
from imgcurate.stages.rules import AnyRule, rule_of
from imgcurate.stages.writer import ImageWriterStage
from imgcurate.storage import StorageOptions, check_output, exists, is_local, local_path
from imgcurate.undoing import NOT_DECIDED, Undo, by_code, read_part

__all__ = ["refilter", "stages_of"]

Changes = Mapping[str, Mapping[str, Any] | None]
_READS: Final = (FilePartitioningStage.__name__, ImageReaderStage.__name__)
_THRESHOLDS: Final = frozenset({"score_threshold", "ranges", "is_in", "is_not_in"})
_OF_MODEL: Final = ("model", "pretrained", "model_dir")


def refilter(
    run: str,
    output_dir: str,
    changes: Changes | None = None,
    *,
    model_dir: str | None = None,
    storage_options: StorageOptions | None = None,
    client: Client | None = None,
    scheduler: str | None = None,
    security: Security | None = None,
    device: str = "auto",
    n_workers: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    report: bool | None = None,
    progress: Progress | Literal["auto"] | None = "auto",
) -> Result:
    """Decide a finished run anew, and write the shards of what is kept now into another folder.

    Parameters
    ----------
    run : str
        Output folder of a finished run; it is read only.
    output_dir : str
        Folder for the new one.
    changes : mapping of str to mapping or None
        By the name of a stage, the parameters that change: ``{"ImageAestheticFilterStage":
        {"score_threshold": 0.55}, "SemanticDedupStage": {"eps": 0.03}}``. None leaves the stage out. Of
        stages that look at images thresholds can change (``score_threshold``, ``ranges``), of those that look at
        columns alone, as scores of embeddings do, of deduplication and of ``ImageWriterStage`` everything. What the
        run did not have is added if it has the columns that are needed: a deduplication at its end, scores of columns
        before the first deduplication, ``ImageQualityFilterStage`` at its beginning. Parameters that are not given are
        those of the class, and those of the model those of the run's ``ImageEmbeddingStage``.
    model_dir : str, optional
        Folder with the weights of what is computed, if it is not the one that the run had.
    storage_options : mapping, optional
        Passed to fsspec for the inputs of the run.
    client, scheduler, security, device, n_workers, overwrite, resume, report, progress
        As in :meth:`Pipeline.run`.

    Returns
    -------
    Result
        Counts, the catalog, the shards.

    Raises
    ------
    InputError
        If `run` is no finished run, or one of its inputs is gone or has changed.
    ConfigError
        If a stage or parameter is unknown or cannot be changed without decoding, or a column is missing.
    WeightsError
        If a score that is computed anew needs weights that are missing and cannot be downloaded.

    Notes
    -----
    The result is that of a run with these parameters from the beginning: ``min_size``, ``max_pixels`` and the
    like, which decide what is decoded, stay as they were. Samples that a stage of one's own dropped in its
    ``process()``, not by rules, stay dropped where that is what a run would give: if all thresholds stay as they were,
    and no such stage stands after a deduplication. Else the run is refused.
    """
    check_output(output_dir)
    run, output_dir = (str(Path(local_path(f)).absolute()) if is_local(f) else f for f in (run, output_dir))
    if f"{output_dir.rstrip('/')}/".startswith(f"{run.rstrip('/')}/") or run.startswith(f"{output_dir.rstrip('/')}/"):
        how = "is the run itself" if output_dir.rstrip("/") == run.rstrip("/") else f"and {run} lie one in the other"
        raise ConfigError(f"{output_dir} {how}: name another output folder")
    manifest = Manifest.of_finished(run)
    # Where weights lie is not part of what a run is, and stands beside it.
    folder = {"model_dir": absolute_path(model_dir) or manifest.source.get("model_dir")}
    manifest.source |= folder
    recorded = [_Recorded.of(i, {**folder, **entry}) for i, entry in enumerate(manifest.config["stages"])]
    decided = _changed(recorded, changes or {}, run)
    origin = _CatalogOrigin(run, manifest, recorded, decided, storage_options)
    plan = _plan(decided, origin, run)
    execution = Run(plan, lambda: [r.config for r in decided], origin, output_dir, progress)
    return execution.start(
        client=client, scheduler=scheduler, security=security, device=device, n_workers=n_workers,
        overwrite=overwrite, resume=resume, report=report,
    )  # fmt: skip


def stages_of(run: str) -> list[str]:
    """Return the names of the stages of a finished run.

    Raises
    ------
    InputError
        If `run` is no finished run.
    """
    return [entry["stage"] for entry in Manifest.of_finished(run).config["stages"]]


class _Rules(ProcessingStage):
    """The rules of a stage, on columns that are there."""

    name: ClassVar[str] = "rules"

    def __init__(self, name: str, rules: Sequence[AnyRule]) -> None:
        self.name = name  # type: ignore[misc]
        self.rules = tuple(rules)

    def process(self, batch: ImageBatch) -> ImageBatch:
        return batch


@dataclass(frozen=True)
class _Recorded:
    """A stage as a manifest tells it.

    Attributes
    ----------
    name : str
        Class name, or import path of a stage of one's own.
    config : dict
        Its entry in the manifest.
    stage : Stage or None
        What decides now; None for stages that read, and those that decide nothing.
    computes : bool
        Whether it is a per-batch stage whose columns are computed, of other columns, and not those of the run.
    """

    name: str
    config: dict[str, Any]
    stage: Stage | None
    computes: bool = False

    @staticmethod
    def of(number: int, config: dict[str, Any]) -> _Recorded:
        name = config["stage"]
        if name in _READS:
            return _Recorded(name, config, None)
        if "." in name and "rules" in config:
            # A per-batch stage of one's own: its rules are there, its code is not needed.
            return _Recorded(name, config, _Rules(name, [rule_of(rule) for rule in config["rules"]]))
        stage = make_stage(f"stages[{number}] of the run:", name, {}, others=config)
        if isinstance(stage, ColumnFilterStage):
            # With another list the same rule is another one.
            stage = stage.with_checksums(config.get(LISTS_SHA256, {}))
        return _Recorded(name, config, stage)

    def changed(self, params: Mapping[str, Any], encoder: str | None) -> _Recorded:
        """Return the stage with other parameters, beside the embeddings of an encoder."""
        if isinstance(self.stage, _Rules) or self.stage is None:
            raise ConfigError(f"{self.name}: its parameters decide what is decoded or computed, so they cannot change")
        fixed = sorted(set(params) - _THRESHOLDS) if isinstance(self.stage, ProcessingStage) else []
        computes = bool(fixed) and IMAGE not in self.stage.needs
        if fixed and not computes:
            raise ConfigError(
                f"{self.name}: {fixed[0]!r} cannot change without decoding the images again; what can is "
                f"{' and '.join(sorted(_THRESHOLDS & set(self.config))) or 'nothing'}"
            )
        stage = make_stage("refilter:", self.name, params, others=self.config)
        if computes or isinstance(stage, DatasetStage):
            stage.check(encoder)
        # No model is looked for where none computes: its checksum is that of the run.
        identity = stage.fingerprint() if computes or isinstance(stage, DatasetStage) else {}
        return _Recorded(self.name, {**self.config, **stage_config(stage), **identity}, stage, computes).as_now()

    def as_now(self) -> _Recorded:
        """Return the stage with the lists that it decides by as they are now."""
        if not isinstance(self.stage, ColumnFilterStage):
            return self
        self.stage.check(None)
        stage = self.stage.with_checksums({})
        config = {k: v for k, v in self.config.items() if k != LISTS_SHA256}
        return dataclasses.replace(self, stage=stage, config={**config, **stage.fingerprint()})


def _changed(recorded: Sequence[_Recorded], changes: Changes, run: str) -> list[_Recorded]:
    """Return the stages of a run as they are asked for now."""
    names = [r.name for r in recorded]
    if twice := next((name for name in changes if names.count(name) > 1), None):
        raise ConfigError(f"{run} has {names.count(twice)} stages {twice}: which of them should change cannot be said")
    encoder = next((r.config["encoder"] for r in recorded if isinstance(r.config.get("encoder"), str)), None)
    out = []
    for stage in recorded:
        params = changes.get(stage.name, {})
        if params is not None:
            out.append(stage.changed(params, encoder) if params else stage.as_now())
    for name, params in changes.items():
        if name in names or params is None:
            continue
        kind = find_stage("refilter", name)
        if kind is ImageQualityFilterStage:
            # First, as `curate` has it; of its columns those of sizes are in every catalog.
            added = make_stage("refilter:", name, params)
            out.insert(sum(r.name in _READS for r in out), _Recorded(name, stage_config(added), added))
            continue
        added = make_stage("refilter:", name, params, others=_model_of(recorded))
        if IMAGE in added.needs:
            raise ConfigError(
                f"{run} was made without {name}, which looks at the images, and refilter looks at none: make a run "
                "with it first; with a threshold that drops nothing it can be decided anew as often as you like"
            )
        computes = not issubclass(kind, DatasetStage)
        added.check(encoder)
        config = {**stage_config(added), **added.fingerprint()}
        out.insert(_place(out, added), _Recorded(name, config, added, computes))
    _check_own(recorded, out)
    _check_skipped(recorded, out, run)
    return out


def _check_skipped(recorded: Sequence[_Recorded], decided: Sequence[_Recorded], run: str) -> None:
    """Refuse to bring back samples that a stage was spared, for they have no embedding."""

    def before(stages: Sequence[_Recorded]) -> list[AnyRule]:
        some = itertools.takewhile(lambda r: not r.config.get("skip_dropped"), stages)
        return [rule for r in some if isinstance(r.stage, ProcessingStage) for rule in r.stage.rules]

    if not any(r.config.get("skip_dropped") for r in recorded):
        return
    now = before(decided)
    gone = [rule for rule in before(recorded) if rule not in now]
    if gone:
        raise ConfigError(
            f"{run} did not embed what {gone[0].words} did not keep (skip_dropped), so that cannot be decided anew "
            "without decoding; what comes after the embeddings can"
        )


def _check_own(recorded: Sequence[_Recorded], decided: Sequence[_Recorded]) -> None:
    """Refuse to change columns that the code of a stage of one's own has looked at."""
    there = {r.name for r in decided if not r.computes}
    changed = {c for r in recorded if r.stage is not None and r.name not in there for c in columns_added(r.stage)}
    for own in (r for r in decided if isinstance(r.stage, _Rules)):
        if used := sorted(changed & set(own.config.get("needs", ()))):
            raise ConfigError(
                f"{own.name} was made of the column {used[0]!r}, which would be another: that takes a run that decodes"
            )


def _model_of(recorded: Sequence[_Recorded]) -> dict[str, Any]:
    """Return the parameters of the model that embedded the images of a run."""
    embedding = next((r.config for r in recorded if r.name == ImageEmbeddingStage.__name__), {})
    return {key: embedding[key] for key in _OF_MODEL if key in embedding}


def _place(stages: Sequence[_Recorded], added: Stage) -> int:
    """Return where a stage that the run did not have comes."""
    if isinstance(added, ImageWriterStage):
        return len(stages)
    if isinstance(added, DatasetStage):
        return len(stages) - bool(stages and isinstance(stages[-1].stage, ImageWriterStage))
    return next((i for i, r in enumerate(stages) if isinstance(r.stage, DatasetStage)), len(stages))


def _computed(recorded: Sequence[_Recorded], decided: Sequence[_Recorded]) -> set[str]:
    """Return the columns that are computed anew, and those of a run that give way to them."""
    computing = {r.name for r in decided if r.computes}
    stages = [r.stage for r in (*recorded, *decided) if r.name in computing]
    return {column for stage in stages if stage is not None for column in columns_added(stage)}


def _rules_of(stages: Sequence[_Recorded]) -> list[AnyRule]:
    """Return the rules on columns that a run has, in their order; not those on columns that are computed anew."""
    known = [r.stage for r in stages if isinstance(r.stage, ProcessingStage) and not r.computes]
    return [rule for stage in known for rule in stage.rules]


def _plan(decided: Sequence[_Recorded], origin: _CatalogOrigin, run: str) -> Plan:
    stages = [r.stage for r in decided if r.stage is not None]
    computing = [r.stage for r in decided if r.computes]
    last = stages[-1] if stages else None
    writer = last if isinstance(last, ImageWriterStage) else None
    stages = stages if writer is None else stages[:-1]
    deciding: list[Stage] = []
    types = dict(origin.types)
    for stage in stages:
        computes = any(stage is each for each in computing)
        if isinstance(stage, ProcessingStage) and not computes:
            deciding.append(_Rules(stage.name, stage.rules))
            needs = [rule.column for rule in stage.rules]
        else:
            deciding.append(stage)
            needs = list(stage.needs)
        if missing := [c for c in needs if c not in types]:
            raise ConfigError(
                f"{stage.name} needs the column {missing[0]!r}, which {run} does not have before it"
                f"{nearest(missing[0], types)}: it takes a run that decodes"
            )
        check_numbers(stage, types)
        types |= columns_added(stage) if computes or isinstance(stage, DatasetStage) else {}
    return Plan(FilePartitioningStage(""), ImageReaderStage(), make_phases(deciding), writer, types)


class _CatalogOrigin(Origin):
    """The catalog of a finished run, before any rule was applied."""

    def __init__(
        self,
        folder: str,
        manifest: Manifest,
        recorded: Sequence[_Recorded],
        decided: Sequence[_Recorded],
        options: StorageOptions | None,
    ) -> None:
        self.folder, self.manifest, self.options = folder, manifest, options
        self.catalog = Catalog(folder, manifest.n_parts)
        later = {c for r in recorded if isinstance(r.stage, DatasetStage) for c in columns_added(r.stage)}
        later |= _computed(recorded, decided)
        self.types = {f.name: f.type for f in self.catalog.schema if f.name not in later | {schema.PHASE}}
        stages = [r.stage for r in recorded if r.stage is not None and not isinstance(r.stage, ImageWriterStage)]
        batches = [i for i, phase in enumerate(make_phases(stages)) if not phase.is_dataset]
        rules, own = _rules_of(recorded), [r.name for r in recorded if isinstance(r.stage, _Rules)]
        all_there = own == [r.name for r in decided if isinstance(r.stage, _Rules)]
        self._undo = Undo(tuple(rules), frozenset(batches), keeps=all_there and _rules_of(decided) == rules)
        known = {rule.status for rule in self._undo.rules} | {s.name for s in stages if isinstance(s, DatasetStage)}
        unknown = sorted(set(manifest.counts) - known - NOT_DECIDED)
        if unknown and not self._undo.keeps:
            raise ConfigError(by_code(unknown[0], f"{manifest.counts[unknown[0]]:,} samples", folder))
        for before, now in zip(manifest.config["inputs"], self.inputs_now(), strict=True):
            if before != now:
                raise InputError(f"{before['url']} is gone or has changed since {folder} was made of it")

    @property
    def first(self) -> Shard | str | None:
        inputs = self.manifest.config["inputs"]
        return str(inputs[0]["url"]) if inputs and "nbytes" in inputs[0] else None

    @property
    def n_parts(self) -> int:
        return self.manifest.n_parts

    @property
    def identity(self) -> dict[str, Any]:
        config = self.manifest.config
        return {
            "sidecars": config.get("sidecars", []), "inputs": config["inputs"], "refilter": self.manifest.fingerprint,
        }  # fmt: skip

    @property
    def increments(self) -> list[int]:
        return self.manifest.increments

    @property
    def source(self) -> dict[str, Any]:
        return {**self.manifest.source, "refilter": self.folder}

    def arrange(self, manifest: Manifest | None) -> None:
        """Do nothing: the run that is decided anew has numbered its inputs."""

    def inputs_now(self) -> list[dict[str, Any]]:
        """Describe the inputs as they are now; one that is gone has a URL and nothing else."""
        config = self.manifest.config
        sidecars = Sidecars(tuple((s, n, pa.null()) for s, n, _ in config.get("sidecars", [])))
        urls = [i["url"] for i in config["inputs"] if "nbytes" in i]
        folders = sorted({i["url"] for i in config["inputs"] if "nbytes" not in i})
        shards = [Shard(url) for url in urls if exists(url, self.options)]
        for folder in folders:
            with contextlib.suppress(InputError):
                shards += find_shards(folder, self.options)
        described = describe_shards(shards, self.options, sidecars)
        there = {json.dumps(d, sort_keys=True, default=str) for d in described}
        return [
            i if json.dumps(i, sort_keys=True) in there else {"url": i["url"], "is": "gone or changed"}
            for i in config["inputs"]
        ]

    @property
    def reader(self) -> None:
        """Nothing is decoded."""

    def frame(self, numbers: Sequence[int], device: str) -> dd.DataFrame:
        """Return the rows of parts as they were before any rule."""
        out = schema.arrow_schema(self.types, self.types)
        backend = get_backend(device)
        return lazy_frame(
            read_part, list(numbers), catalog=self.catalog, names=out.names, undo=self._undo,
            device=backend.name, meta=backend.meta(out), label="read-catalog",
        )  # fmt: skip
