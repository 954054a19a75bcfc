"""Execute a plan on a cluster, or go on with it: phases -> catalog -> shards -> manifest."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, Final

import dask.dataframe as dd
import pandas as pd
import pyarrow as pa
from distributed import Client

from imgcurate import schema
from imgcurate.backend import Backend
from imgcurate.catalog import Catalog, Manifest, fingerprint
from imgcurate.errors import CatalogError, ConfigError, ImgcurateError, InputError
from imgcurate.execution import RESULT_META, Progress, call_frame, number_frame, result_frame, run_waves
from imgcurate.export import OutputShard, kept_counts, plan_shards, shard_name, write_shard
from imgcurate.frame import ShardGroup, frame_of_groups, group_shards
from imgcurate.inputs import describe_shards
from imgcurate.outputs import find_run, open_run
from imgcurate.plan import Phase, Plan
from imgcurate.results import Result
from imgcurate.shards import Shard
from imgcurate.stages.base import DatasetStage, Stage, columns_added, stage_config
from imgcurate.stages.executor import apply_stages
from imgcurate.storage import (
    exclusive,
    file_size,
    join_url,
    list_files,
    make_folder,
    remove_temporary_files,
)

__all__ = ["Run"]

# Parameters that change how fast a run is, or where its files lie, and not what comes out.
_NOT_IN_FINGERPRINT: Final = frozenset(
    {"num_threads", "num_gpus_per_worker", "storage_options", "model_dir", "output_dir", "file_paths"}
)
_PACKAGES: Final = ("torch", "open_clip_torch", "pillow", "numpy", "scikit-learn")
logger = logging.getLogger(__name__)


class Run:
    """One execution of a plan on a cluster; ``client`` and ``device`` are set before it is executed."""

    client: Client
    device: str

    def __init__(self, plan: Plan, stages: Sequence[Stage], folder: str, progress: Progress | None) -> None:
        self.plan, self.stages, self.folder, self.progress = plan, stages, folder, progress
        self.options = plan.source.storage_options
        shards, self.sidecars = plan.source.find(taken=plan.types)
        self.shards = _without_output(shards, folder)
        self.groups = group_shards(self.shards, plan.source.files_per_partition)
        self.types = plan.types | self.sidecars.types
        self.timings_s: dict[str, float] = {}

    def finished(self, *, overwrite: bool) -> Result | None:
        """Return the result of the same run if it is done already; refuse another one's folder.

        Needs no cluster.
        """
        manifest = find_run(self.folder, self._config, work="catalog", overwrite=overwrite)
        if manifest is None or manifest.state != "done" or manifest.fingerprint != fingerprint(self._config):
            return None
        return self._result(manifest)

    def execute(self, *, overwrite: bool) -> Result:
        """Do what is missing of the run, and return its result; see :meth:`Pipeline.run`."""
        # What is wrong with inputs or weights is said before a folder is made.
        _ = self._config
        make_folder(self.folder)
        with exclusive(self.folder):
            manifest = open_run(
                self.folder, self._config, len(self.groups), work="catalog", overwrite=overwrite
            )  # fmt: skip
            return self._execute(manifest)

    def _execute(self, manifest: Manifest) -> Result:
        catalog = Catalog(self.folder, len(self.groups))
        if manifest.state != "done":
            catalog = self._run_phases(catalog)
            counts = self._count(catalog)
            manifest.counts, manifest.samples = dict(sorted(counts.items())), sum(counts.values())
            if self.plan.writer:
                manifest.shards = self._export(catalog, self.plan.writer.images_per_tar)
            self._merge(catalog)
            self._check(manifest)
            self._check_inputs(manifest)
            manifest.state, manifest.timings_s = "done", self.timings_s
            manifest.save(self.folder)
            catalog.remove_checkpoints()
            remove_temporary_files(self.folder)
        return self._result(manifest)

    def _result(self, manifest: Manifest) -> Result:
        final = Catalog(self.folder, len(self.groups))
        shards = [join_url(self.folder, "shards", s["name"]) for s in manifest.shards]
        return Result(self.folder, manifest.samples, manifest.counts, shards, final)

    @cached_property
    def _config(self) -> dict[str, Any]:
        inputs = self._inputs()
        stages = [{**stage_config(s), **s.fingerprint()} for s in self.stages]
        stages = [{k: v for k, v in s.items() if k not in _NOT_IN_FINGERPRINT} for s in stages]
        versions = {p: importlib.metadata.version(p) for p in _PACKAGES}
        return {
            "imgcurate": importlib.metadata.version("imgcurate"),
            "device": self.device,
            "stages": stages,
            "versions": versions,
            "sidecars": [[source, name, str(type_)] for source, name, type_ in self.sidecars.columns],
            "inputs": inputs,
        }

    def _inputs(self) -> list[dict[str, Any]]:
        return describe_shards(self.shards, self.options, self.sidecars)

    def _check_inputs(self, manifest: Manifest) -> None:
        """Refuse to call a run done whose inputs changed under it: it may hold some of both states."""
        for before, now in zip(manifest.config["inputs"], self._inputs(), strict=True):
            if before != now:
                raise ImgcurateError(
                    f"{now['url']} changed while the run was going on, so its output cannot be relied on: "
                    "run again with --overwrite"
                )

    def _run_phases(self, catalog: Catalog) -> Catalog:
        for number, phase in enumerate(self.plan.phases):
            with self._timed(phase.name):
                if number == 0:
                    catalog.make_folders()
                    read = partial(self._read_frame, catalog=catalog)
                    self._waves(phase.label, catalog.missing_parts(), read)
                    continue
                before, catalog = catalog, catalog.with_phase(phase.name)
                catalog.make_folders()
                missing = catalog.missing_deltas()
                if missing:
                    self._waves(phase.label, missing, self._later_phase(phase, before, catalog))
        return catalog

    def _read_frame(self, numbers: list[int], catalog: Catalog) -> dd.DataFrame:
        """Return the frame that reads, decodes, scores and writes some partitions: one task each."""
        reader = self.plan.reader
        groups: list[ShardGroup] = [self.groups[n] for n in numbers]
        ddf = frame_of_groups(
            groups, text_columns=reader.text_columns, sidecars=self.sidecars, device=self.device,
            storage_options=self.options,
        )  # fmt: skip
        stages = self.plan.phases[0].batch_stages
        if stages:
            ddf = apply_stages(
                ddf, stages, reader=reader, device=self.device, storage_options=self.options,
                attempts=catalog.attempts, numbers=numbers,
            )  # fmt: skip
        return _written(ddf, numbers, catalog, schema.arrow_schema(ddf.columns, self.types), delta=False)

    def _later_phase(self, phase: Phase, before: Catalog, after: Catalog) -> Callable[[list[int]], dd.DataFrame]:
        """Return what builds the frame of a later phase for some partitions."""
        columns = [schema.STATUS, schema.REASON, *(c for s in phase.stages for c in columns_added(s))]
        out = schema.arrow_schema(columns, self.types)
        if phase.is_dataset:
            stage = phase.stages[0]
            assert isinstance(stage, DatasetStage)  # noqa: S101 - Phase.is_dataset says so
            whole = self._process_dataset(stage, phase, before)

            def build(numbers: list[int]) -> dd.DataFrame:
                return _written(whole.partitions[numbers], numbers, after, out, delta=True)

        else:

            def build(numbers: list[int]) -> dd.DataFrame:
                ddf = before.frame(device=self.device).partitions[numbers]
                ddf = apply_stages(ddf, phase.batch_stages, device=self.device)
                return _written(ddf, numbers, after, out, delta=True)

        return build

    def _process_dataset(self, stage: DatasetStage, phase: Phase, before: Catalog) -> dd.DataFrame:
        run_on_catalog = getattr(stage, "process_catalog", None)
        with self.client.as_current():
            if run_on_catalog is not None:
                scratch = join_url(before.checkpoint_folder, f"{phase.name}-scratch")
                ddf = run_on_catalog(
                    before, scratch_dir=scratch, client=self.client, device=self.device, progress=self.progress
                )
            else:
                ddf = stage.process_dataset(before.frame(device=self.device))
        if ddf.npartitions != before.n_parts:
            raise ConfigError(
                f"stage {stage.name} returned {ddf.npartitions} partitions for {before.n_parts}: it must keep "
                "rows and partitions, and set 'status' of the rows to drop"
            )
        return ddf

    def _waves(
        self, phase: str, numbers: Sequence[int], build: Callable[[list[int]], dd.DataFrame]
    ) -> dict[int, dict[str, Any]]:
        return run_waves(self.client, build, numbers, phase=phase, resources=self._resources(), progress=self.progress)

    def _resources(self) -> dict[str, float] | None:
        if self.device != "gpu":
            return None
        workers = self.client.scheduler_info(n_workers=-1)["workers"].values()
        declared = workers and all("GPU" in w["resources"] for w in workers)
        return {"GPU": self.plan.reader.num_gpus_per_worker} if declared else None

    def _count(self, catalog: Catalog) -> Counter[str]:
        """Count the rows by status, from the files, so that a resumed run counts all."""
        numbers = list(range(catalog.n_parts))
        results = self._waves("count", numbers, lambda n: call_frame(_count_part, n, n, catalog=catalog))
        self._kept = [results[n].get(schema.STATUS_OK, 0) for n in numbers]
        total: Counter[str] = Counter()
        for result in results.values():
            total.update(result)
        return total

    def _export(self, catalog: Catalog, images_per_tar: int) -> list[dict[str, Any]]:
        folder = join_url(self.folder, "shards")
        make_folder(folder)
        shards = plan_shards(self._kept, images_per_tar)
        there = set(list_files(folder, ".parquet"))
        done = {s.number for s in shards if f"{shard_name(s.number)}.parquet" in there}

        def build(numbers: list[int]) -> dd.DataFrame:
            todo: list[OutputShard] = [shards[n] for n in numbers]
            return call_frame(write_shard, numbers, todo, catalog=catalog, folder=folder, read_options=self.options)

        with self._timed("write"):
            results = self._waves("write", [s.number for s in shards if s.number not in done], build)
        for number in done:
            name = f"{shard_name(number)}.tar"
            results[number] = {
                "name": name,
                "samples": shards[number].samples,
                "nbytes": file_size(join_url(folder, name)),
            }
        return [results[s.number] for s in shards]

    def _merge(self, catalog: Catalog) -> None:
        if catalog.phases:
            with self._timed("merge"):
                numbers = range(catalog.n_parts)
                self._waves("merge", numbers, lambda n: call_frame(_merge_part, n, n, catalog=catalog))

    def _check(self, manifest: Manifest) -> None:
        written = sum(s["samples"] for s in manifest.shards)
        kept = manifest.counts.get(schema.STATUS_OK, 0)
        if self.plan.writer and written != kept:
            raise CatalogError(f"{kept} samples were kept and {written} written: please report this bug")

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.timings_s[name] = round(time.perf_counter() - start, 3)


def _written(ddf: dd.DataFrame, numbers: list[int], catalog: Catalog, out: pa.Schema, *, delta: bool) -> dd.DataFrame:
    """Write each partition of a frame to the catalog; what comes back are counts by status."""
    return dd.map_partitions(
        _write_part, ddf, number_frame(numbers), catalog, out, delta, meta=RESULT_META, align_dataframes=False
    )


def _write_part(frame: Any, numbers: pd.DataFrame, catalog: Catalog, out: pa.Schema, delta: bool) -> pd.DataFrame:
    number = int(numbers["number"].iloc[0])
    backend = Backend("cpu" if isinstance(frame, pd.DataFrame) else "gpu")
    table = backend.frame_to_arrow(frame, out)
    (catalog.write_delta if delta else catalog.write_part)(number, table)
    if not delta:
        catalog.attempts.end(number)
    return result_frame(number, kept_counts(table))


def _count_part(number: int, catalog: Catalog) -> dict[str, Any]:
    return kept_counts(catalog.read(number, [schema.STATUS]))


def _merge_part(number: int, catalog: Catalog) -> dict[str, Any]:
    catalog.merge(number)
    return {}


def _without_output(shards: list[Shard], folder: str) -> list[Shard]:
    """Return the inputs but for those that a pattern found in the output folder itself."""
    inside = [s.url for s in shards if f"{s.url}/".startswith(folder.rstrip("/") + "/")]
    if len(inside) == len(shards):
        raise InputError(f"the inputs lie in the output folder ({inside[0]}): name another output folder")
    if inside:
        logger.warning("%d inputs lie in the output folder and are left out: %s ...", len(inside), inside[0])
    return [s for s in shards if s.url not in set(inside)]
