"""Stages in a row, planned, run and resumed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from distributed import Client
from distributed.security import Security

from imgcurate.errors import ConfigError
from imgcurate.execution import Progress
from imgcurate.origins import ShardOrigin
from imgcurate.plan import Plan, make_plan
from imgcurate.results import Result, html_table
from imgcurate.runner import Run
from imgcurate.stages.base import Stage, check_count, columns_added, stage_config
from imgcurate.stages.registry import pipeline_yaml
from imgcurate.storage import check_output, check_page, is_local, local_path

__all__ = ["Pipeline", "Result"]


class Pipeline:
    """Stages in the order in which samples pass through them.

    Parameters
    ----------
    stages : sequence of Stage
        Begins with :class:`FilePartitioningStage` and :class:`ImageReaderStage`.

    Examples
    --------
    >>> pipeline = Pipeline([
    ...     FilePartitioningStage("shards/*.tar"),
    ...     ImageReaderStage(),
    ...     ImageEmbeddingStage(model="tiny-image"),
    ...     SemanticDedupStage(eps=0.05),
    ...     ImageWriterStage(images_per_tar=1000),
    ... ])
    >>> result = pipeline.run("OUT")
    """

    def __init__(self, stages: Sequence[Stage] = ()) -> None:
        self.stages = list(stages)

    def add_stage(self, stage: Stage) -> Pipeline:
        """Append a stage and return the pipeline."""
        self.stages.append(stage)
        return self

    def plan(self) -> Plan:
        """Check the stages and divide them into phases; see :func:`imgcurate.plan.make_plan`."""
        return make_plan(self.stages)

    def __repr__(self) -> str:
        """Show the stages with their parameters."""
        return f"Pipeline([{''.join(f'{chr(10)}    {stage!r},' for stage in self.stages)}{chr(10)}])"

    def _repr_html_(self) -> str:
        """Show the plan in a notebook: phases, stages, what they need and add."""
        plan = self.plan()
        rows = [
            (phase.label, stage.name, ", ".join(stage.needs), ", ".join(columns_added(stage)))
            for phase in plan.phases
            for stage in phase.stages
        ]
        rows += [("write", plan.writer.name, "", "")] if plan.writer else []
        return html_table(("phase", "stage", "needs", "adds"), [("read", plan.reader.name, "", ""), *rows])

    def run(
        self,
        output_dir: str | None = None,
        *,
        client: Client | None = None,
        scheduler: str | None = None,
        security: Security | None = None,
        device: str = "auto",
        n_workers: int | None = None,
        overwrite: bool = False,
        resume: bool = False,
        max_failed: int = 0,
        retry_failed: bool = False,
        report: bool | None = None,
        performance_report: str | None = None,
        progress: Progress | Literal["auto"] | None = "auto",
    ) -> Result:
        """Run the pipeline, or go on with a run that was stopped.

        Parameters
        ----------
        output_dir : str
            The run's folder, a path or fsspec URL; see :mod:`imgcurate.catalog` for what is in it. If it
            holds the same run (same inputs, parameters and weights), only what is missing is done. If more
            inputs have come, only these are decoded and scored, and what needs the whole data set
            (duplicates, shards) is decided anew, as if all had been there from the beginning; the new
            ones are numbered after the old ones.
        client : distributed.Client, optional
            A cluster to run on; by default a local one is started and closed.
        scheduler : str, optional
            Address or file of a running scheduler, instead of `client`.
        security : distributed.security.Security, optional
            TLS settings for `scheduler`, see :func:`imgcurate.cluster.tls_security`.
        device : {"auto", "cpu", "gpu"}
            What the workers compute on.
        n_workers : int, optional
            Workers of the local cluster.
        overwrite : bool
            Delete another run in `output_dir` first.
        resume : bool
            Refuse to begin: `output_dir` has to hold this run.
        max_failed : int
            How many partitions may fail for good, after a second chance alone on the cluster: by an error
            of a stage, or because they kill their worker. Their samples have the status ``failed``. If more
            fail, the run ends with an error once all others are done, and can go on.
        retry_failed : bool
            Try the partitions again that failed in a run which is done.
        report : bool, optional
            Whether ``report.html`` is made at the end; by default unless the environment variable
            ``IMGCURATE_REPORT`` is ``0``.
        performance_report : str, optional
            Path of an HTML file that gets Dask's own report of tasks, transfers and memory.
        progress : callable or "auto", optional
            Called as partitions end. ``auto`` shows progress on a terminal and in a notebook; None shows nothing.

        Returns
        -------
        Result
            Counts, the catalog, the shards.

        Raises
        ------
        ConfigError
            If the pipeline cannot work, or `output_dir` holds something else.
        InputError
            If an input does not exist.
        WeightsError
            If weights are missing.
        CatalogError
            If the accounting does not add up.
        PartitionsError
            If more partitions failed than may.
        ClusterError
            If the given cluster cannot be used: see :mod:`imgcurate.preflight`.
        """
        plan = self.plan()
        folder = output_dir if output_dir is not None else plan.writer.output_dir if plan.writer else None
        if not folder:
            raise ConfigError("no output folder: name it in run(output_dir) or ImageWriterStage(output_dir)")
        check_output(folder)
        if performance_report is not None:
            check_page(performance_report)
        folder = str(Path(local_path(folder)).absolute()) if is_local(folder) else folder
        check_count("max_failed", max_failed, 0)
        origin = ShardOrigin(plan, folder)
        run = Run(
            plan, self._described, origin, folder, progress, max_failed=max_failed, retry_failed=retry_failed,
            described=pipeline_yaml(origin.source, self.stages[1:]),
        )  # fmt: skip
        return run.start(
            client=client, scheduler=scheduler, security=security, device=device, n_workers=n_workers,
            overwrite=overwrite, resume=resume, report=report, performance_report=performance_report,
        )  # fmt: skip

    def _described(self) -> list[dict[str, Any]]:
        """Return all that decides the results of the stages, as plain data; looks for the weights."""
        return [{**stage_config(s), **s.fingerprint()} for s in self.stages]
