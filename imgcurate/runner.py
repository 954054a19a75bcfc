"""Execute a plan on a cluster, or go on with it: phases -> catalog -> shards -> manifest."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, Final, Literal

import dask.dataframe as dd
from distributed import Client
from distributed import performance_report as dask_performance_report
from distributed.security import Security

from imgcurate import schema
from imgcurate.backend import get_backend
from imgcurate.catalog import Catalog, Manifest, fingerprint, part_name
from imgcurate.cluster import cluster_device, open_client
from imgcurate.errors import CatalogError, ConfigError, ImgcurateError
from imgcurate.execution import COUNTS, Progress, call_frame, run_on_client, run_waves
from imgcurate.export import OutputShard, describe_shard, plan_shards, shard_name, write_shard
from imgcurate.heartbeat import heard
from imgcurate.inputs import CHANGED
from imgcurate.liveness import gpu_share
from imgcurate.origins import Origin
from imgcurate.outputs import PIPELINE, find_run, open_run, warn_of_code, warn_of_lost
from imgcurate.parts import (
    FILE,
    count_part,
    deltas,
    failed_parts,
    finish_part,
    made_parts,
    reset_part,
    salvaged_parts,
    write_decided,
)
from imgcurate.plan import Phase, Plan
from imgcurate.preflight import check_stages, check_storage, check_versions
from imgcurate.progress import progress_or_auto
from imgcurate.report import is_wanted, make_report
from imgcurate.results import REPORT, Result
from imgcurate.stages.base import DatasetStage, Stage, columns_added, told_beside
from imgcurate.stages.executor import Program, apply_stages, make_program
from imgcurate.storage import (
    atomic_write,
    check_shared,
    clear_away,
    exclusive,
    exists,
    join_url,
    list_files,
    make_folder,
    remove,
    remove_temporary_files,
    remove_tree,
)
from imgcurate.success import FileDigest, Success, file_digest
from imgcurate.timeline import Timeline

__all__ = ["Run"]

_WORK: Final = "catalog"
# Parameters that change how fast a run is, or where its files lie, and not what comes out.
_NOT_IN_FINGERPRINT: Final = frozenset(
    {"num_threads", "num_gpus_per_worker", "storage_options", "model_dir", "output_dir", "file_paths"}
)
_PACKAGES: Final = ("torch", "open_clip_torch", "pillow", "numpy", "scikit-learn")
logger = logging.getLogger(__name__)


class Run:
    """One execution of a plan on a cluster.

    Parameters
    ----------
    plan : Plan
        The phases.
    stages : sequence of dict
        All that decides the results of the stages, as plain data.
    origin : Origin
        Where the rows come from.
    folder : str
        The output folder.
    progress : callable or "auto", optional
        Called as partitions end; see :func:`imgcurate.progress.progress_or_auto`.
    max_failed : int
        How many partitions of the first phase may fail.
    retry_failed : bool
        Whether partitions that failed in a run which is done are tried again.
    described : str
        The run as a YAML file, which is kept in the folder.
    """

    client: Client
    device: str

    def __init__(
        self, plan: Plan, stages: Callable[[], list[dict[str, Any]]], origin: Origin, folder: str,
        progress: Progress | Literal["auto"] | None, *, max_failed: int = 0, retry_failed: bool = False,
        described: str = "",
    ) -> None:  # fmt: skip
        self.plan, self.stages, self.origin, self.folder, self._asked = plan, stages, origin, folder, progress
        self.progress: Progress | None = None
        self.max_failed, self.retry_failed, self.described = max_failed, retry_failed, described
        self.types = plan.types | origin.types
        self.timings_s: dict[str, float] = {}
        self._made: dict[int, dict[str, Any]] = {}
        self._timeline: list[tuple[float, int]] = []
        self._executed = False
        origin.arrange(Manifest.load(folder))

    def start(
        self,
        *,
        client: Client | None,
        scheduler: str | None,
        security: Security | None,
        device: str,
        n_workers: int | None,
        overwrite: bool,
        resume: bool,
        report: bool | None = None,
        performance_report: str | None = None,
    ) -> Result:
        """Do what is missing of the run on a cluster, and return its result; see :meth:`Pipeline.run`."""
        with progress_or_auto(self._asked) as self.progress:
            result = self._run(
                client, scheduler, security, device, n_workers, overwrite=overwrite, resume=resume,
                performance_report=performance_report,
            )  # fmt: skip
            if is_wanted(report) and (self._executed or not exists(join_url(self.folder, REPORT))):
                self._report()
        return result

    def _report(self) -> None:
        """Make the report; a run without one is done all the same."""
        try:
            make_report(self.folder, storage_options=self.origin.options)
        except Exception as exc:
            logger.warning("no report was made: %s: %s", type(exc).__name__, exc, exc_info=logger.isEnabledFor(10))
        if self.progress is not None:
            self.progress("report", 1, 1, {})

    def _run(
        self, client: Client | None, scheduler: str | None, security: Security | None, device: str,
        n_workers: int | None, *, overwrite: bool, resume: bool, performance_report: str | None,
    ) -> Result:  # fmt: skip
        with contextlib.ExitStack() as stack:
            if client is None and scheduler is None:
                self.device = get_backend(device).name
                if (finished := self._finished(overwrite=overwrite, resume=resume)) is not None:
                    return finished
                check_shared(self.folder)
                tasks_per_gpu = max(1, round(1 / self.plan.reader.num_gpus_per_worker))
                local = open_client(device=self.device, n_workers=n_workers, tasks_per_gpu=tasks_per_gpu)
                self.client = stack.enter_context(local)
            else:
                self.client = client or stack.enter_context(open_client(scheduler=scheduler, security=security))
                check_versions(self.client)
                check_stages(self.client, (stage for phase in self.plan.phases for stage in phase.stages))
                self.device = cluster_device(self.client, device)
                if (finished := self._finished(overwrite=overwrite, resume=resume)) is not None:
                    return finished
                check_storage(self.client, self.folder, self.origin.first, self.origin.options)
            if performance_report is not None:
                stack.enter_context(self.client.as_current())
                stack.enter_context(dask_performance_report(performance_report, mode="inline"))
            return self._start(overwrite=overwrite, resume=resume)

    def _finished(self, *, overwrite: bool, resume: bool) -> Result | None:
        """Return the result of the same run if it is done already; refuse another one's folder."""
        manifest = find_run(self.folder, self._config, work=_WORK, overwrite=overwrite, resume=resume, grows=True)
        if manifest is None or manifest.state != "done" or manifest.fingerprint != fingerprint(self._config):
            return None
        if self._retries(manifest):
            return None
        if warn_of_lost(self.folder):
            return None
        if exists(checkpoints := Catalog(self.folder, 0).checkpoint_folder):
            # The run was killed when all but this was done.
            with exclusive(self.folder):
                clear_away(checkpoints)
        warn_of_code(self.folder, manifest.source, self._source)
        logger.info("the run in %s was done already: nothing was computed", self.folder)
        return self._result(manifest)

    @property
    def _source(self) -> dict[str, Any]:
        """What a manifest tells of inputs and code beside what decides the results."""
        return {**told_beside(stage for phase in self.plan.phases for stage in phase.stages), **self.origin.source}

    def _retries(self, manifest: Manifest) -> bool:
        """Whether partitions that failed in a run which is done are to be tried again."""
        return self.retry_failed and manifest.counts.get(schema.STATUS_FAILED, 0) > 0

    def _start(self, *, overwrite: bool, resume: bool) -> Result:
        make_folder(self.folder)
        with exclusive(self.folder):
            manifest = open_run(
                self.folder, self._config, self.origin.n_parts, work=_WORK, overwrite=overwrite, resume=resume,
                grows=True, increments=self.origin.increments, source=self._source,
            )  # fmt: skip
            warn_of_code(self.folder, manifest.source, self._source)
            try:
                return self._execute(manifest)
            except ImgcurateError as exc:
                if not exists(self.folder):
                    raise ImgcurateError(f"{self.folder} was deleted while the run was writing to it") from exc
                with contextlib.suppress(ImgcurateError):
                    self._distrust_changed(manifest)
                raise

    def _execute(self, manifest: Manifest) -> Result:
        catalog = Catalog(self.folder, self.origin.n_parts)
        lost = Success.lost_from(self.folder) if manifest.state == "done" else []
        if manifest.state == "done" and (lost or self._retries(manifest)):
            for name in lost:
                remove(join_url(self.folder, name))
            manifest.state, manifest.exporting = "growing", False
            manifest.save(self.folder)
            Success.withdraw(self.folder)
        if manifest.state == "growing":
            self._take_back(catalog, manifest)
        if manifest.state != "done":
            self._executed = True
            if self.described:
                with atomic_write(join_url(self.folder, PIPELINE)) as out:
                    out.write(self.described.encode())
            remove(join_url(self.folder, REPORT))
            catalog = self._run_phases(catalog)
            counts = self._count(catalog)
            manifest.counts, manifest.samples = dict(sorted(counts.items())), sum(counts.values())
            files: dict[str, FileDigest] = {}
            if self.plan.writer:
                files |= self._export(catalog, manifest, self.plan.writer.images_per_tar)
            files |= self._finish_parts(catalog)
            self._check(manifest)
            self._check_inputs(manifest)
            self._complete(manifest, files)
            clear_away(catalog.checkpoint_folder)
            remove_temporary_files(self.folder)
        return self._result(manifest)

    def _take_back(self, catalog: Catalog, manifest: Manifest) -> None:
        """Bring the parts of a run that goes on to the state after the first phase; remove those that failed."""
        there = sorted(set(range(catalog.n_parts)) - set(catalog.missing_parts()))
        columns = self._columns(self.plan.phases[0])
        self._light("take back", partial(reset_part, catalog=catalog, columns=columns), there)
        catalog.remove_checkpoints()
        manifest.state = "running"
        manifest.save(self.folder)

    def _complete(self, manifest: Manifest, files: dict[str, FileDigest]) -> None:
        """Say that the run is done: first to those who use its files, then to imgcurate."""
        dedup = join_url(self.folder, "dedup")
        for name in list_files(dedup, ""):
            files[f"dedup/{name}"] = file_digest(join_url(dedup, name))
        Success(manifest.fingerprint, manifest.samples, manifest.counts, dict(sorted(files.items()))).save(self.folder)
        manifest.state, manifest.timings_s, manifest.timeline = "done", self.timings_s, self._timeline
        manifest.save(self.folder)

    def _result(self, manifest: Manifest) -> Result:
        final = Catalog(self.folder, self.origin.n_parts)
        shards = [join_url(self.folder, "shards", s["name"]) for s in manifest.shards]
        return Result(self.folder, manifest.samples, manifest.counts, shards, final)

    @cached_property
    def _config(self) -> dict[str, Any]:
        versions = {p: importlib.metadata.version(p) for p in _PACKAGES}
        stages = [{k: v for k, v in s.items() if k not in _NOT_IN_FINGERPRINT} for s in self.stages()]
        return {
            "imgcurate": importlib.metadata.version("imgcurate"),
            "device": self.device,
            "stages": stages,
            "versions": versions,
            **self.origin.identity,
        }

    def _check_inputs(self, manifest: Manifest) -> None:
        """Refuse to call a run done whose inputs changed under it: it may hold some of both states."""
        if changed := self._changed(manifest):
            raise ImgcurateError(f"{manifest.config['inputs'][changed[0]]['url']} {CHANGED}")

    def _changed(self, manifest: Manifest) -> list[int]:
        """Return the numbers of the inputs that are not as they were when the run began."""
        pairs = zip(manifest.config["inputs"], self.origin.inputs_now(), strict=True)
        return [number for number, (before, now) in enumerate(pairs) if before != now]

    def _distrust_changed(self, manifest: Manifest) -> None:
        """Take back what may have been made of inputs that changed.

        Should they be as they were when the run goes on, it is not to be taken for theirs.
        """
        if manifest.state == "done" or not (changed := self._changed(manifest)):
            return
        catalog = Catalog(self.folder, self.origin.n_parts)
        for number in self.origin.parts_of(changed):
            remove(catalog.part_url(number))
        manifest.state, manifest.exporting = "growing", False
        manifest.save(self.folder)

    def _run_phases(self, catalog: Catalog) -> Catalog:
        for number, phase in enumerate(self.plan.phases):
            with self._timed(phase.name):
                if number == 0:
                    catalog.make_folders()
                    self._read(phase, catalog)
                    continue
                before, catalog = catalog, catalog.with_phase(phase.name)
                catalog.make_folders()
                missing = catalog.missing_deltas()
                if missing:
                    self._later_phase(phase, missing, before, catalog)
        return catalog

    def _read(self, phase: Phase, catalog: Catalog) -> None:
        """Make the parts that are missing; rows of partitions that may fail, and do, say why."""
        failed: dict[int, str] = {}
        timeline = Timeline(self.progress)
        missing = catalog.missing_parts()
        if there := catalog.n_parts - len(missing):
            logger.info(
                "going on with the run in %s: %d of %d partitions are there", self.folder, there, catalog.n_parts
            )
        within = getattr(self.progress, "within", None)
        with heard(self.client, within and partial(within, phase.label, len(missing))) as topic:
            self._made = run_waves(
                self.client, partial(self._first_phase, catalog=catalog, topic=topic), missing, phase=phase.label,
                resources=self._resources(), progress=timeline, max_failed=self.max_failed, failed=failed,
            )  # fmt: skip
        self._timeline = timeline.points()
        if failed:
            for number, reason in failed.items():
                logger.warning("partition %d failed: %s", number, reason)
            left: dict[int, str] = {}
            self._made |= run_waves(
                self.client, partial(self._salvaged_parts, catalog=catalog, failed=failed), sorted(failed),
                phase="shards of failed partitions", resources=self._resources(), progress=self.progress,
                max_failed=len(failed), failed=left,
            )  # fmt: skip
            rows = partial(self._failed_parts, catalog=catalog, failed=failed)
            self._made |= self._waves("failed", sorted(left), rows)

    def _salvaged_parts(self, numbers: list[int], catalog: Catalog, failed: dict[int, str]) -> dd.DataFrame:
        """Return the frame that makes of partitions that failed what it can."""
        ddf, program = self._first_frame(numbers)
        out = schema.arrow_schema(self._columns(self.plan.phases[0]), self.types)
        return salvaged_parts(ddf, numbers, catalog, program, out, failed)

    def _failed_parts(self, numbers: list[int], catalog: Catalog, failed: dict[int, str]) -> dd.DataFrame:
        """Return the frame that writes the index of some partitions, and why they have nothing else."""
        out = schema.arrow_schema(self._columns(self.plan.phases[0]), self.types)
        ddf = self.origin.frame(numbers, self.device)
        return failed_parts(ddf, numbers, catalog, out, failed)

    def _columns(self, phase: Phase) -> list[str]:
        """Return the columns of the catalog after the first phase."""
        index = [c for c in columns_added(self.plan.reader) if c in self.types]
        added = [c for s in phase.stages for c in columns_added(s) if c in self.types]
        names: list[str] = schema.arrow_schema([*index, *self.origin.types, *added], self.types).names
        return names

    def _first_phase(self, numbers: list[int], catalog: Catalog, topic: str) -> dd.DataFrame:
        """Return the frame that reads, decodes, scores and writes partitions: one task each."""
        ddf, program = self._first_frame(numbers)
        return made_parts(ddf, numbers, catalog, program, topic)

    def _first_frame(self, numbers: list[int]) -> tuple[dd.DataFrame, Program | None]:
        ddf = self.origin.frame(numbers, self.device)
        stages = self.plan.phases[0].batch_stages
        program = None
        if stages:
            program = make_program(
                ddf, stages, reader=self.origin.reader, device=self.device, storage_options=self.origin.options
            )
        return ddf, program

    def _later_phase(self, phase: Phase, missing: Sequence[int], before: Catalog, after: Catalog) -> None:
        """Write the deltas of a later phase that are missing."""
        columns = [schema.STATUS, schema.REASON, *(c for s in phase.stages for c in columns_added(s))]
        out = schema.arrow_schema(columns, self.types)
        run_on_catalog = getattr(phase.stages[0], "process_catalog", None) if phase.is_dataset else None
        if run_on_catalog is not None:
            scratch = join_url(before.checkpoint_folder, f"{phase.name}-scratch")
            ledger = run_on_catalog(
                before, scratch_dir=scratch, client=self.client, device=self.device, progress=self.progress
            )
            self._light(phase.label, partial(write_decided, ledger=ledger, catalog=after, out=out), missing)
            return
        frame = before.frame(device=self.device)
        if phase.is_dataset:
            frame = self._process_dataset(phase.stages[0], frame)

        def build(numbers: list[int]) -> dd.DataFrame:
            ddf = frame.partitions[numbers]
            if phase.batch_stages:
                ddf = apply_stages(ddf, phase.batch_stages, device=self.device)
            return deltas(ddf, numbers, after, out)

        self._waves(phase.label, missing, build, self._resources())

    def _process_dataset(self, stage: Stage, frame: dd.DataFrame) -> dd.DataFrame:
        assert isinstance(stage, DatasetStage)  # noqa: S101 - Phase.is_dataset says so
        with self.client.as_current():
            ddf = stage.process_dataset(frame)
        if ddf.npartitions != frame.npartitions:
            raise ConfigError(
                f"stage {stage.name} returned {ddf.npartitions} partitions for {frame.npartitions}: it must keep "
                "rows and partitions, and set 'status' of the rows to drop"
            )
        return ddf

    def _waves(
        self,
        phase: str,
        numbers: Sequence[int],
        build: Callable[[list[int]], dd.DataFrame],
        resources: dict[str, float] | None = None,
    ) -> dict[int, dict[str, Any]]:
        return run_waves(self.client, build, numbers, phase=phase, resources=resources, progress=self.progress)

    def _light(
        self, phase: str, function: Callable[[int], dict[str, Any]], numbers: Sequence[int]
    ) -> dict[int, dict[str, Any]]:
        """Run something small for each part."""
        return run_on_client(phase, function, numbers, client=self.client, progress=self.progress, light=True)

    def _resources(self) -> dict[str, float] | None:
        """Return what a task takes that computes on images."""
        return gpu_share(self.client, self.plan.reader.num_gpus_per_worker) if self.device == "gpu" else None

    def _count(self, catalog: Catalog) -> Counter[str]:
        """Count the rows by status, from the files, so that a resumed run counts all."""
        numbers = list(range(catalog.n_parts))
        results = {n: self._made[n] for n in numbers if n in self._made} if not catalog.phases else {}
        todo = [n for n in numbers if n not in results]
        results |= self._light("count", partial(count_part, catalog=catalog), todo)
        self._kept = [results[n][COUNTS].get(schema.STATUS_OK, 0) for n in numbers]
        total: Counter[str] = Counter()
        for result in results.values():
            total.update(result[COUNTS])
        return total

    def _export(self, catalog: Catalog, manifest: Manifest, images_per_tar: int) -> dict[str, FileDigest]:
        """Write the output shards that are missing, and return the files of all."""
        folder = join_url(self.folder, "shards")
        if not manifest.exporting:
            # What is there was kept when there were fewer inputs.
            remove_tree(folder)
            manifest.exporting = True
            manifest.save(self.folder)
        make_folder(folder)
        shards = plan_shards(self._kept, images_per_tar)
        there = set(list_files(folder, ".parquet"))
        done = [s.number for s in shards if f"{shard_name(s.number)}.parquet" in there]
        todo = sorted({s.number for s in shards} - set(done))
        planned: Callable[[list[int]], list[OutputShard]] = lambda numbers: [shards[n] for n in numbers]  # noqa: E731
        with self._timed("write"):
            results = self._waves("write", todo, lambda n: call_frame(
                write_shard, n, planned(n), catalog=catalog, folder=folder, read_options=self.origin.options
            ))  # fmt: skip
            results |= self._waves("look at shards", done, lambda n: call_frame(
                describe_shard, n, planned(n), folder=folder
            ))  # fmt: skip
        files: dict[str, FileDigest] = {}
        manifest.shards = []
        for shard in shards:
            sidecar = FileDigest(**results[shard.number].pop("sidecar"))
            description = results[shard.number]
            manifest.shards.append(description)
            files[f"shards/{description['name']}"] = FileDigest(description["nbytes"], description["sha256"])
            files[f"shards/{shard_name(shard.number)}.parquet"] = sidecar
        return files

    def _finish_parts(self, catalog: Catalog) -> dict[str, FileDigest]:
        """Merge what the phases decided into the parts, and return these as files."""
        with self._timed("finish"):
            numbers = range(catalog.n_parts)
            results = {n: r for n, r in self._made.items() if FILE in r} if not catalog.phases else {}
            todo = [n for n in numbers if n not in results]
            results |= self._light("finish", partial(finish_part, catalog=catalog), todo)
        return {f"catalog/{part_name(n)}": FileDigest(**results[n][FILE]) for n in numbers}

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
