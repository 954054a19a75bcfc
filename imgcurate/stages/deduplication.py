"""Semantic deduplication: embeddings -> which samples show the same thing, and which one stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import dask.dataframe as dd
import pyarrow as pa
from distributed import Client

from imgcurate import schema
from imgcurate.backend import list_array
from imgcurate.catalog import Catalog, Manifest, write_parquet
from imgcurate.dedup.catalog import CatalogDedup
from imgcurate.dedup.config import DedupConfig
from imgcurate.dedup.exchange import Scratch
from imgcurate.dedup.verdicts import Ledger
from imgcurate.errors import ConfigError, EncoderMismatchError, InputError
from imgcurate.execution import Progress
from imgcurate.models.weights import absolute_path
from imgcurate.stages.base import DatasetStage, check_texts
from imgcurate.stages.dedup_frames import client_runner, dedup_frame
from imgcurate.storage import join_url, make_folder

__all__ = ["SemanticDedupStage", "save_summary", "semantic_dedup"]

_ADDS = (schema.CLUSTER, schema.DUPLICATE_OF, schema.DUPLICATE_BY, schema.SIMILARITY)


@dataclass(frozen=True)
class SemanticDedupStage(DatasetStage):
    """Remove samples whose embeddings are near that of a sample that stays.

    Adds ``cluster``, and for a sample that goes ``duplicate_of`` (the uid of one that is kept),
    ``duplicate_by`` (``embedding``) and ``similarity`` (to it, at least ``1 - eps``); its status is
    ``duplicate``. Samples that have left already, and those without an embedding, take no part; what
    was a duplicate of a sample that goes becomes one of what that sample goes for.

    Attributes
    ----------
    eps : float
        Samples are duplicates where their cosine similarity is >= 1 - eps; in [0, 1].
    n_clusters : int or "auto"
        Number of k-means clusters; see :class:`imgcurate.dedup.DedupConfig` for the rule.
    n_probe : int
        In how many clusters, nearest first, a sample is looked for; 1 does not look across borders.
    max_probe : int
        Up to so many, if `n_probe` is 2 or more, where something near is likely to lie behind their borders.
    which_to_keep : {"hard", "easy", "random"}
        Keep the member of a group that is farthest from its centroid, nearest to it, or any.
    keep_by : sequence of str
        Columns that decide first: ``("-width*height", "-aesthetic_score")`` keeps the largest image.
    mode : {"representatives", "semdedup"}
        ``"semdedup"`` is the published rule, by which a sample may go for one that goes itself.
    eps_list : sequence of float
        Further thresholds for which to count what would stay: see :attr:`Result.dedup`.
    reference : sequence of str
        Output folders of finished runs with the same encoder. What they kept stays kept: a sample near
        one of theirs goes, with ``duplicate_in`` naming the folder.
    only_reference : bool
        Compare with the reference alone, not the samples with each other: removes from a training set
        what is near an evaluation set.
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
    max_probe: int = 8
    which_to_keep: str = "hard"
    keep_by: Sequence[str] = ()
    mode: str = "representatives"
    eps_list: Sequence[float] = ()
    reference: Sequence[str] = ()
    only_reference: bool = False
    fit_data_fraction: float | None = None
    max_iter: int = 25
    tol: float = 1e-4
    init: str = "k-means++"
    n_init: int = 1
    random_state: int = 42
    oversampling_factor: float = 2.0

    name: ClassVar[str] = "SemanticDedupStage"

    def __post_init__(self) -> None:
        check_texts("keep_by", self.keep_by, "-width*height")
        check_texts("reference", self.reference, "OLD_OUT")
        if not isinstance(self.eps_list, (list, tuple)):
            raise ConfigError(f"eps_list={self.eps_list!r} should be a sequence of numbers, such as [0.03, 0.1]")
        # What a run records has a meaning in any folder.
        folders = tuple(absolute_path(folder) or folder for folder in self.reference)
        object.__setattr__(self, "reference", folders)
        if self.only_reference and not self.reference:
            raise ConfigError("only_reference=True needs a reference: the output folder of a finished run")
        _ = self.config

    @property
    def config(self) -> DedupConfig:
        """The parameters of deduplication."""
        return DedupConfig(
            eps=self.eps, n_clusters=self.n_clusters, n_probe=self.n_probe, max_probe=self.max_probe,
            which_to_keep=self.which_to_keep, keep_by=tuple(self.keep_by), mode=self.mode,
            eps_list=tuple(self.eps_list),
            only_reference=self.only_reference, fit_data_fraction=self.fit_data_fraction, max_iter=self.max_iter,
            tol=self.tol, init=self.init, n_init=self.n_init, random_state=self.random_state,
            oversampling_factor=self.oversampling_factor,
        )  # fmt: skip

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The embedding and the columns of ``keep_by``."""
        return (schema.EMBEDDING, *self.config.keep_order.columns)

    @property
    def numbers(self) -> tuple[str, ...]:
        """The columns of ``keep_by``."""
        return self.config.keep_order.columns

    @property
    def revises(self) -> tuple[str, ...]:
        """All that it adds: other dedup stages may stand before this one."""
        return tuple(self.adds)

    @property
    def adds(self) -> Mapping[str, str | pa.DataType]:  # type: ignore[override]
        """The columns of decisions."""
        return {name: schema.arrow_type(name) for name in _added(self.reference)}

    def check(self, encoder: str | None) -> None:
        """Refuse reference runs whose embeddings are of another encoder, before anything is embedded."""
        for folder in self.reference:
            reference, _ = _open_run(folder)
            if schema.EMBEDDING not in reference.schema.names:
                raise InputError(f"reference={folder!r} has no embeddings to compare with")
            if encoder is not None:
                _check_same(folder, _encoders(reference), {encoder})

    def fingerprint(self) -> dict[str, Any]:
        """Return the identity of the reference runs."""
        return {"references": [_open_run(folder)[1].fingerprint for folder in self.reference]} if self.reference else {}

    def process_dataset(self, ddf: dd.DataFrame) -> dd.DataFrame:
        """Process a frame; see :func:`semantic_dedup`."""
        return _dedup_frame(ddf, self.config, self.reference, "auto", None)

    def process_catalog(
        self,
        before: Catalog,
        *,
        scratch_dir: str,
        client: Client,
        device: str,
        progress: Progress | None = None,
    ) -> Ledger:
        """Process a catalog, with checkpoints in `scratch_dir`; the way that :class:`Pipeline` takes."""
        references = _references(self.reference, before)
        job = CatalogDedup(before, self.config, scratch_dir, device, references)
        run_tasks = client_runner(client, progress, device)
        removed = job.run(run_tasks)
        save_summary(job, removed, join_url(before.folder, "dedup"))
        ledger = Ledger(job)
        ledger.run(run_tasks)
        return ledger


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
        Folder or fsspec URL that all workers can write to. Each call makes a folder in it, which must stay
        as long as the result is used, and is yours to delete. By default a temporary folder of this
        machine, deleted when Python ends.
    device : {"auto", "cpu", "gpu"}
        Where.
    **parameters
        As in :class:`SemanticDedupStage`.

    Returns
    -------
    dask.dataframe.DataFrame
        The same rows with ``cluster``, ``duplicate_of``, ``duplicate_by`` and ``similarity``. Duplicates are
        still there, with the status ``duplicate``: ``ddf[ddf.status == "ok"]`` leaves them out.

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
    return _dedup_frame(ddf, stage.config, stage.reference, device, scratch_dir)


def _dedup_frame(
    ddf: dd.DataFrame, config: DedupConfig, reference: Sequence[str], device: str, scratch_dir: str | None
) -> dd.DataFrame:
    def make_job(spooled: Catalog, folder: str) -> CatalogDedup:
        return CatalogDedup(spooled, config, folder, device, _references(reference, spooled))

    return dedup_frame(
        ddf, make_job, function="semantic_dedup", needs=(schema.EMBEDDING, *config.keep_order.columns),
        adds=_added(reference), device=device, scratch_dir=scratch_dir,
    )  # fmt: skip


def _added(reference: Sequence[str]) -> tuple[str, ...]:
    return (*_ADDS, schema.DUPLICATE_IN) if reference else _ADDS


def _open_run(folder: str) -> tuple[Catalog, Manifest]:
    manifest = Manifest.load(folder)
    if manifest is None or manifest.state != "done":
        raise InputError(f"reference={folder!r} is not the output folder of a finished run")
    return Catalog(folder, manifest.n_parts), manifest


def _references(folders: Sequence[str], catalog: Catalog) -> tuple[Catalog, ...]:
    """Open the reference runs, and check that their embeddings can be compared with the catalog's."""
    references = tuple(_open_run(folder)[0] for folder in folders)
    ours = _encoders(catalog)
    for folder, reference in zip(folders, references, strict=True):
        _check_same(folder, _encoders(reference), ours)
    return references


def _check_same(folder: str, theirs: set[str], ours: set[str]) -> None:
    if len(ours | theirs) > 1:
        raise EncoderMismatchError(
            f"reference={folder!r} has embeddings of {', '.join(theirs)}, and the data set of {', '.join(ours)}"
        )


def _encoders(catalog: Catalog) -> set[str]:
    """Return who made the embeddings, from the first part that has any."""
    for number in range(catalog.n_parts):
        if schema.ENCODER not in catalog.schema.names:
            break
        names = catalog.read(number, [schema.ENCODER])[schema.ENCODER].drop_null().unique().to_pylist()
        if names:
            return set(names)
    return set()


def save_summary(job: CatalogDedup, removed: Mapping[float, int], folder: str) -> None:
    """Write the curve of what stays over eps, and the centroids, named like the scratch folder of the job."""
    name = job.scratch.rstrip("/").rsplit("/", 1)[-1].removesuffix("-scratch")
    make_folder(folder, job.catalog.storage_options)
    out = Scratch(folder, job.catalog.storage_options)
    n_rows = job.exchange.n_own_rows
    n_clusters = 0
    if job.exchange.n_buckets:
        centroids = job.exchange.centroids()
        n_clusters = len(centroids)
        write_parquet(join_url(folder, f"{name}-centroids.parquet"), pa.table({"centroid": list_array(centroids)}))
    curve = [{"eps": eps, "removed": n, "kept": n_rows - n} for eps, n in removed.items()]
    out.write_json(name, {"samples": n_rows, "n_clusters": n_clusters, "eps": job.config.eps, "curve": curve})
