"""Stages in a row, planned, run and resumed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distributed import Client

from imgcurate.backend import get_backend
from imgcurate.cluster import cluster_device, open_client
from imgcurate.errors import ConfigError
from imgcurate.execution import Progress
from imgcurate.origins import ShardOrigin
from imgcurate.plan import Plan, make_plan
from imgcurate.results import Result
from imgcurate.runner import Run
from imgcurate.stages.base import Stage, stage_config
from imgcurate.storage import is_local, local_path

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

    def run(
        self,
        output_dir: str | None = None,
        *,
        client: Client | None = None,
        scheduler: str | None = None,
        device: str = "auto",
        n_workers: int | None = None,
        overwrite: bool = False,
        resume: bool = False,
        progress: Progress | None = None,
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
        device : {"auto", "cpu", "gpu"}
            What the workers compute on.
        n_workers : int, optional
            Workers of the local cluster.
        overwrite : bool
            Delete another run in `output_dir` first.
        resume : bool
            Refuse to begin: `output_dir` has to hold this run.
        progress : callable, optional
            Called as partitions end.

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
        """
        plan = self.plan()
        folder = output_dir or (plan.writer.output_dir if plan.writer else None)
        if folder is None:
            raise ConfigError("no output folder: name it in run(output_dir) or ImageWriterStage(output_dir)")
        folder = str(Path(local_path(folder)).absolute()) if is_local(folder) else folder
        run = Run(plan, self._described, ShardOrigin(plan, folder), folder, progress)
        with contextlib.ExitStack() as stack:
            if client is None and scheduler is None:
                run.device = get_backend(device).name
                if (finished := run.finished(overwrite=overwrite, resume=resume)) is not None:
                    return finished
                tasks_per_gpu = max(1, round(1 / plan.reader.num_gpus_per_worker))
                local = open_client(device=run.device, n_workers=n_workers, tasks_per_gpu=tasks_per_gpu)
                run.client = stack.enter_context(local)
            else:
                run.client = client or stack.enter_context(open_client(scheduler=scheduler))
                run.device = cluster_device(run.client, device)
            return run.execute(overwrite=overwrite, resume=resume)

    def _described(self) -> list[dict[str, Any]]:
        """Return all that decides the results of the stages, as plain data; looks for the weights."""
        return [{**stage_config(s), **s.fingerprint()} for s in self.stages]
