"""Semantic deduplication: embeddings -> which samples show the same thing, and which one stays."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import dask
import dask.dataframe as dd
import numpy as np
import pyarrow as pa
from distributed import Client

from imgcurate import schema
from imgcurate.backend import Backend, get_backend
from imgcurate.catalog import Catalog
from imgcurate.dedup.catalog import CatalogDedup
from imgcurate.dedup.config import DedupConfig
from imgcurate.errors import ConfigError
from imgcurate.execution import Progress, call_frame, run_waves
from imgcurate.stages.base import DatasetStage
from imgcurate.stages.executor import frame_types
from imgcurate.storage import join_url

__all__ = ["SemanticDedupStage", "semantic_dedup"]

_ADDS = (schema.CLUSTER, schema.DUPLICATE_OF, schema.SIMILARITY)


@dataclass(frozen=True)
class SemanticDedupStage(DatasetStage):
    """Remove samples whose embeddings are near that of a sample that stays.

    Adds ``cluster``, and for a sample that goes ``duplicate_of`` (the uid of one that is kept) and
    ``similarity`` (to it, at least ``1 - eps``); its status is ``duplicate``. Samples that have left
    already, and those without an embedding, take no part.

    Attributes
    ----------
    eps : float
        Samples are duplicates where their cosine similarity is >= 1 - eps; in [0, 1].
    n_clusters : int or "auto"
        Number of k-means clusters; see :class:`imgcurate.dedup.DedupConfig` for the rule.
    n_probe : int
        In how many clusters, nearest first, a sample is looked for; 1 does not look across borders.
    which_to_keep : {"hard", "easy", "random"}
        Keep the member of a group that is farthest from its centroid, nearest to it, or any.
    keep_by : sequence of str
        Columns that decide first: ``("-width*height", "-aesthetic_score")`` keeps the largest image.
    fit_data_fraction : float, optional
        Share of the samples that k-means is fitted on; by default 64 per cluster, at least 20,000.
    max_iter, tol, init, n_init, random_state, oversampling_factor
        As in cuML's and scikit-learn's ``KMeans``.

    Raises
    ------
    ConfigError
        If a value is out of its range.

    References
    ----------
    Abbas et al.: SemDeDup: Data-efficient learning at web-scale through semantic deduplication, 2023.
    """

    eps: float = 0.05
    n_clusters: int | Literal["auto"] = "auto"
    n_probe: int = 2
    which_to_keep: str = "hard"
    keep_by: Sequence[str] = ()
    fit_data_fraction: float | None = None
    max_iter: int = 25
    tol: float = 1e-4
    init: str = "k-means++"
    n_init: int = 1
    random_state: int = 42
    oversampling_factor: float = 2.0

    name: ClassVar[str] = "SemanticDedupStage"
    adds: ClassVar[Mapping[str, str | pa.DataType]] = {name: schema.arrow_type(name) for name in _ADDS}

    def __post_init__(self) -> None:
        if isinstance(self.keep_by, str):
            raise ConfigError(f"keep_by={self.keep_by!r} should be a sequence, such as ('-width*height',)")
        _ = self.config

    @property
    def config(self) -> DedupConfig:
        """The parameters of deduplication."""
        return DedupConfig(
            eps=self.eps, n_clusters=self.n_clusters, n_probe=self.n_probe, which_to_keep=self.which_to_keep,
            keep_by=tuple(self.keep_by), fit_data_fraction=self.fit_data_fraction, max_iter=self.max_iter,
            tol=self.tol, init=self.init, n_init=self.n_init, random_state=self.random_state,
            oversampling_factor=self.oversampling_factor,
        )  # fmt: skip

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The embedding and the columns of ``keep_by``."""
        return (schema.EMBEDDING, *self.config.keep_order.columns)

    def process_dataset(self, ddf: dd.DataFrame) -> dd.DataFrame:
        """Process a frame; see :func:`semantic_dedup`."""
        return _dedup_frame(ddf, self.config, "auto", None)

    def process_catalog(
        self,
        before: Catalog,
        *,
        scratch_dir: str,
        client: Client,
        device: str,
        progress: Progress | None = None,
    ) -> dd.DataFrame:
        """Process a catalog, with checkpoints in `scratch_dir`; the way that :class:`Pipeline` takes."""
        job = CatalogDedup(before, self.config, scratch_dir, device)
        job.run(partial(_run_on_client, client=client, progress=progress))
        return _decided_frame(job, device, [schema.STATUS, schema.REASON, *_ADDS])


def semantic_dedup(
    ddf: dd.DataFrame,
    *,
    eps: float = 0.05,
    scratch_dir: str | None = None,
    device: str = "auto",
    **parameters: Any,
) -> dd.DataFrame:
    """Find semantic duplicates in a frame.

    Parameters
    ----------
    ddf : dask.dataframe.DataFrame
        With an ``embedding`` column, from :func:`embed`; rows that were masked away are not seen.
    eps : float
        Samples are duplicates where their cosine similarity is >= 1 - eps.
    scratch_dir : str, optional
        Folder or fsspec URL that all workers can write to; what lies there stays as long as the result
        is used. By default a temporary folder of this machine, deleted when Python ends.
    device : {"auto", "cpu", "gpu"}
        Where.
    **parameters
        As in :class:`SemanticDedupStage`.

    Returns
    -------
    dask.dataframe.DataFrame
        The same rows with ``cluster``, ``duplicate_of`` and ``similarity``. Duplicates are still there,
        with the status ``duplicate``: ``ddf[ddf.status == "ok"]`` leaves them out.

    Raises
    ------
    ConfigError
        If a column that is needed is missing, or a parameter is unknown or out of its range.

    Notes
    -----
    Computes the frame once, on the current Dask client or scheduler, and stores it in `scratch_dir`.
    """
    try:
        stage = SemanticDedupStage(eps=eps, **parameters)
    except TypeError as exc:
        raise ConfigError(f"semantic_dedup: {exc}") from exc
    return _dedup_frame(ddf, stage.config, device, scratch_dir)


def _dedup_frame(ddf: dd.DataFrame, config: DedupConfig, device: str, scratch_dir: str | None) -> dd.DataFrame:
    needed = (schema.UID, schema.SHARD, schema.KEY, schema.STATUS, schema.REASON, schema.EMBEDDING)
    for column in (*needed, *config.keep_order.columns):
        if column not in ddf.columns:
            raise ConfigError(f"semantic_dedup needs the column {column!r}, and the frame has {', '.join(ddf.columns)}")
    if scratch_dir is None:
        scratch_dir = tempfile.mkdtemp(prefix="imgcurate-dedup-")
        atexit.register(shutil.rmtree, scratch_dir, ignore_errors=True)
    types = {c: t for c, t in frame_types(ddf).items() if c not in _ADDS}
    spooled = Catalog(join_url(scratch_dir, "frame"), ddf.npartitions)
    spooled.make_folders()
    out = schema.arrow_schema(types, types)
    spool = dask.delayed(_spool, pure=False)
    dask.compute(*(spool(part, i, spooled, out) for i, part in enumerate(ddf[out.names].to_delayed())))
    job = CatalogDedup(spooled, config, join_url(scratch_dir, "dedup"), device)
    job.run(_run_here)
    return _decided_frame(job, device, [*out.names, *_ADDS])


def _spool(frame: Any, number: int, catalog: Catalog, out: pa.Schema) -> None:
    backend = Backend("cpu" if type(frame).__module__.startswith("pandas") else "gpu")
    catalog.write_part(number, backend.frame_to_arrow(frame, out))


def _run_on_client(
    step: str,
    function: Callable[[int], dict[str, Any]],
    numbers: Sequence[int],
    *,
    client: Client,
    progress: Progress | None,
) -> dict[int, dict[str, Any]]:
    todo = list(numbers)
    return run_waves(client, lambda n: call_frame(function, n, n), todo, phase=f"dedup: {step}", progress=progress)


def _run_here(
    step: str, function: Callable[[int], dict[str, Any]], numbers: Sequence[int]
) -> dict[int, dict[str, Any]]:
    """Run a step on whatever Dask computes on: the current client, or threads."""
    del step
    task = dask.delayed(function, pure=False)
    return dict(zip(numbers, dask.compute(*(task(n) for n in numbers)), strict=True))


def _decided_frame(job: CatalogDedup, device: str, columns: Sequence[str]) -> dd.DataFrame:
    types = {f.name: f.type for f in job.catalog.schema} | {c: schema.arrow_type(c) for c in _ADDS}
    out = schema.arrow_schema(columns, types)
    backend = get_backend(device)
    return dd.from_map(
        _decided_part, list(range(job.catalog.n_parts)), job=job, out=out, device=backend.name,
        meta=backend.meta(out), enforce_metadata=False, label="semantic-dedup",
    )  # fmt: skip


def _decided_part(number: int, job: CatalogDedup, out: pa.Schema, device: str) -> Any:
    table = job.catalog.read(number, [c for c in out.names if c not in _ADDS])
    return get_backend(device).frame_from_arrow(_with_decisions(table, job, number, out))


def _with_decisions(table: pa.Table, job: CatalogDedup, number: int, out: pa.Schema) -> pa.Table:
    decided = job.decided(number)
    goes = decided.keeper >= 0
    status = np.where(goes, schema.STATUS_DUPLICATE, table[schema.STATUS].to_numpy(zero_copy_only=False))
    reason = table[schema.REASON].to_pylist()
    for i in np.flatnonzero(goes):
        reason[i] = f"duplicate of {decided.keeper_name[i]}, cosine {decided.similarity[i]:.3f}"
    columns = {name: table[name] for name in table.column_names} | {
        schema.STATUS: pa.array(status.astype(object), pa.string()),
        schema.REASON: pa.array(reason, pa.string()),
        schema.CLUSTER: pa.array(decided.cluster.astype(np.int32), mask=decided.cluster < 0),
        schema.DUPLICATE_OF: pa.array(decided.keeper, mask=~goes),
        schema.SIMILARITY: pa.array(decided.similarity.astype(np.float32), mask=~goes),
    }
    return pa.table({name: columns[name] for name in out.names}).cast(out)
