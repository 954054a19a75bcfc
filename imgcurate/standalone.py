"""Deduplication of embeddings alone, without images: files of ids and vectors -> which ids stay.

::

    OUT/kept.parquet       id
    OUT/removed.parquet    id, duplicate_of, similarity (and duplicate_in with a reference)
    OUT/dedup/             centroids, and how many rows stay for which eps
    OUT/manifest.json      what ran, on what, and how it ended
    OUT/checkpoint/        until the run is done
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from distributed import Client
from distributed.security import Security

from imgcurate import schema
from imgcurate.backend import get_backend
from imgcurate.catalog import Manifest, fingerprint, part_name, read_parquet, write_parquet
from imgcurate.cluster import cluster_device, open_client
from imgcurate.dedup.catalog import CatalogDedup
from imgcurate.dedup.config import DedupConfig
from imgcurate.dedup.exchange import TaskRunner
from imgcurate.dedup.vector_files import VectorFiles, find_vectors
from imgcurate.dedup.vectors import unified_type
from imgcurate.errors import CatalogError, ConfigError, ImgcurateError, InputError
from imgcurate.execution import Progress
from imgcurate.outputs import find_run, open_run, warn_of_lost
from imgcurate.preflight import check_storage, check_versions
from imgcurate.progress import progress_or_auto
from imgcurate.stages.dedup_frames import client_runner
from imgcurate.stages.deduplication import save_summary
from imgcurate.storage import (
    StorageOptions,
    atomic_write,
    check_output,
    check_shared,
    clear_away,
    exclusive,
    is_local,
    join_url,
    list_files,
    local_path,
    make_folder,
    read_bytes,
    remove_temporary_files,
)
from imgcurate.success import Success, file_digest

__all__ = ["DedupedEmbeddings", "dedup_embeddings"]

KEPT: Final = "kept"
REMOVED: Final = "removed"
_WORK: Final = "checkpoint/dedup-scratch/exchange"
_PACKAGES: Final = ("numpy", "scikit-learn")


@dataclass(frozen=True)
class DedupedEmbeddings:
    """What a deduplication of embeddings did.

    Attributes
    ----------
    output_dir : str
        Its folder, with ``kept.parquet`` and ``removed.parquet``.
    rows, kept, removed : int
        Rows in all, those that stay, those that go.
    """

    output_dir: str
    rows: int
    kept: int
    removed: int

    @property
    def summary(self) -> dict[str, Any]:
        """``samples``, ``n_clusters``, ``eps``, and the ``curve`` of what stays over eps."""
        content: dict[str, Any] = json.loads(read_bytes(join_url(self.output_dir, "dedup", "dedup.json")))
        return content

    def as_dict(self) -> dict[str, Any]:
        """Return what it did as plain data."""
        return {**asdict(self), "dedup": self.summary}

    def accounting(self) -> str:
        """Return the line that accounts for every row, after those of other eps if any were asked for."""
        summary = self.summary
        others = [point for point in summary.get("curve", []) if point["eps"] != summary["eps"]]
        lines = [f"eps {point['eps']:g} would keep {point['kept']:,}" for point in others]
        return "\n".join([*lines, f"{self.rows:,} rows in = {self.kept:,} kept + {self.removed:,} duplicate"])


def dedup_embeddings(
    inputs: str | Sequence[str],
    output_dir: str,
    *,
    id_field: str = "id",
    embedding_field: str = "embedding",
    eps: float = 0.05,
    reference: Sequence[str] = (),
    storage_options: StorageOptions | None = None,
    client: Client | None = None,
    scheduler: str | None = None,
    security: Security | None = None,
    device: str = "auto",
    n_workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | Literal["auto"] | None = "auto",
    **parameters: Any,
) -> DedupedEmbeddings:
    """Find semantic duplicates among embeddings in files, of any source.

    Parameters
    ----------
    inputs : str or sequence of str
        Parquet files with a column of ids and a column of lists of numbers, folders of such, folders of
        clip-retrieval, npy files; paths, URLs, globs, braces.
    output_dir : str
        Folder or fsspec URL for the result; if it holds the same run, only what is missing is done.
    id_field, embedding_field : str
        Columns. Ids are integers, strings or bytes, not null; they may repeat, for rows are what is compared.
    eps : float
        Rows are duplicates where their cosine similarity is >= 1 - eps.
    reference : sequence of str
        Inputs of the same kind whose rows stay in any case; ``duplicate_in`` then names the one that
        holds the row of ``duplicate_of``, and is null where that is a row of `inputs`.
    storage_options : mapping, optional
        Passed to fsspec for the inputs.
    client, scheduler, security, device, n_workers, overwrite, progress
        As in :meth:`Pipeline.run`.
    **parameters
        As in :class:`imgcurate.dedup.DedupConfig`. Ties go to the smaller id; of texts and bytes to any, but
        always to the same one. ``uid`` in ``keep_by`` is the number of a row, of files in the order of their URLs.

    Returns
    -------
    DedupedEmbeddings
        How many rows stay and go, and where it is written.

    Raises
    ------
    ConfigError
        If a parameter is wrong, or `output_dir` holds something else.
    InputError
        If an input does not exist, or cannot be read: the message names file and row.
    ClusterError
        If the given cluster cannot be used: see :mod:`imgcurate.preflight`.

    Notes
    -----
    Rows without an embedding, of zeros, or with a value that is not finite stay, and are nobody's
    duplicate. Memory is that of a part (128 MiB of embeddings) and of a bucket per worker, however large
    the files and their row groups are.
    """
    config = _config(eps, reference, parameters)
    find = partial(
        find_vectors, id_field=id_field, embedding_field=embedding_field, input_options=storage_options
    )  # fmt: skip
    check_output(output_dir)
    folder = str(Path(local_path(output_dir)).absolute()) if is_local(output_dir) else output_dir
    columns = config.keep_order.columns
    files = find(inputs, columns=[c for c in columns if c != schema.UID], output=folder)
    references = tuple(find(r) for r in reference)
    files, references = _alike(files, references)
    files, references = files.pinned(), tuple(other.pinned() for other in references)
    run = _Run(files, references, tuple(reference), config, folder)
    with contextlib.ExitStack() as stack:
        if client is None and scheduler is None:
            run.device = get_backend(device).name
            if (finished := run.finished(overwrite=overwrite)) is not None:
                return finished
            check_shared(folder)
            client = stack.enter_context(open_client(device=run.device, n_workers=n_workers))
        else:
            client = client or stack.enter_context(open_client(scheduler=scheduler, security=security))
            check_versions(client)
            run.device = cluster_device(client, device)
            if (finished := run.finished(overwrite=overwrite)) is not None:
                return finished
            check_storage(client, folder, files.parts[0].url if files.parts else None, storage_options)
        show = stack.enter_context(progress_or_auto(progress))
        return run.execute(client_runner(client, show, run.device), overwrite=overwrite)


def _config(eps: float, reference: Sequence[str], parameters: dict[str, Any]) -> DedupConfig:
    for name, value in (("keep_by", parameters.get("keep_by", ())), ("reference", reference)):
        if isinstance(value, str):
            raise ConfigError(f"{name}={value!r} should be a sequence of strings")
    try:
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in parameters.items()}
        config = DedupConfig(eps=eps, **given)
    except TypeError as exc:
        raise ConfigError(f"dedup_embeddings: {exc}") from exc
    if config.only_reference and not reference:
        raise ConfigError("only_reference=True needs a reference: files with embeddings of the same kind")
    return config


def _alike(files: VectorFiles, references: tuple[VectorFiles, ...]) -> tuple[VectorFiles, tuple[VectorFiles, ...]]:
    """Return all with one type of ids, which ``duplicate_of`` takes; refuse references that cannot be compared."""
    for other in references:
        if files.dim and other.dim and files.dim != other.dim:
            raise InputError(
                f"reference={other.folder!r} has embeddings of {other.dim} values, and the input of {files.dim}"
            )
    types = {each.folder: each.id_type for each in (*references, files)}
    id_type = unified_type(files.id_field, types)
    return replace(files, id_type=id_type), tuple(replace(other, id_type=id_type) for other in references)


@dataclass
class _Run:
    """One execution; ``device`` is set before it begins."""

    files: VectorFiles
    references: tuple[VectorFiles, ...]
    reference_names: tuple[str, ...]
    config: DedupConfig
    folder: str
    device: str = "cpu"
    _described: dict[str, Any] = field(default_factory=dict)

    def finished(self, *, overwrite: bool) -> DedupedEmbeddings | None:
        """Return the result of the same run if it is done already; refuse another one's folder."""
        manifest = find_run(self.folder, self._identity, work=_WORK, overwrite=overwrite)
        if manifest is None or manifest.state != "done" or manifest.fingerprint != fingerprint(self._identity):
            return None
        return None if warn_of_lost(self.folder) else self._result(manifest)

    def execute(self, run_tasks: TaskRunner, *, overwrite: bool) -> DedupedEmbeddings:
        """Do what is missing of the run, and return its result."""
        identity = self._identity
        make_folder(self.folder)
        with exclusive(self.folder):
            manifest = open_run(self.folder, identity, self.files.n_parts, work=_WORK, overwrite=overwrite)
            if manifest.state != "done" or Success.lost_from(self.folder):
                Success.withdraw(self.folder)
                manifest.state = "running"
                manifest.save(self.folder)
                self._dedup(manifest, run_tasks)
            return self._result(manifest)

    def _dedup(self, manifest: Manifest, run_tasks: TaskRunner) -> None:
        scratch = join_url(self.folder, "checkpoint", "dedup-scratch")
        job = CatalogDedup(self.files, self.config, scratch, self.device, self.references)
        removed = job.run(run_tasks)
        save_summary(job, removed, join_url(self.folder, "dedup"))
        parts = {name: join_url(self.folder, "checkpoint", name) for name in (KEPT, REMOVED)}
        for url in parts.values():
            make_folder(url)
        writer = _Writer(job, self.files, self.references, self.reference_names, parts)
        counts = run_tasks("write", writer.write, range(self.files.n_parts))
        gone, rows = sum(c["removed"] for c in counts.values()), self.files.n_rows
        if gone != removed[self.config.eps]:
            raise CatalogError(
                f"{removed[self.config.eps]} rows were to go and {gone} have gone: please report this bug"
            )
        if manifest.config["inputs"] != self._inputs():
            manifest.state = "clearing"
            manifest.save(self.folder)
            raise ImgcurateError("an input changed while the run was going on: run again with --overwrite")
        for name, url in parts.items():
            _join_parts(join_url(self.folder, f"{name}.parquet"), url, self.files.n_parts, writer.schemas[name])
        manifest.samples = rows
        manifest.counts = {schema.STATUS_OK: rows - gone, schema.STATUS_DUPLICATE: gone}
        summaries = list_files(join_url(self.folder, "dedup"), "")
        names = [*(f"{name}.parquet" for name in parts), *(f"dedup/{name}" for name in summaries)]
        files = {name: file_digest(join_url(self.folder, name)) for name in sorted(names)}
        Success(manifest.fingerprint, rows, manifest.counts, files).save(self.folder)
        manifest.state = "done"
        manifest.save(self.folder)
        clear_away(join_url(self.folder, "checkpoint"))
        remove_temporary_files(self.folder)

    @property
    def _identity(self) -> dict[str, Any]:
        """All that decides the result, as JSON gives it back."""
        if not self._described:
            content = {
                "imgcurate": importlib.metadata.version("imgcurate"), "device": self.device,
                "dedup": dataclasses.asdict(self.config),
                "id_field": self.files.id_field, "embedding_field": self.files.embedding_field,
                "references": list(self.reference_names), "inputs": self._inputs(),
                "versions": {p: importlib.metadata.version(p) for p in _PACKAGES},
            }  # fmt: skip
            self._described = json.loads(json.dumps(content))
        return self._described

    def _inputs(self) -> list[dict[str, Any]]:
        return [f for files in (self.files, *self.references) for f in files.files()]

    def _result(self, manifest: Manifest) -> DedupedEmbeddings:
        counts = manifest.counts
        return DedupedEmbeddings(
            self.folder, manifest.samples, counts[schema.STATUS_OK], counts[schema.STATUS_DUPLICATE]
        )  # fmt: skip


@dataclass(frozen=True)
class _Writer:
    """Writes who stays and who goes, part by part; picklable, so that tasks carry it."""

    job: CatalogDedup
    files: VectorFiles
    references: tuple[VectorFiles, ...]
    reference_names: tuple[str, ...]
    folders: dict[str, str]

    @property
    def schemas(self) -> dict[str, pa.Schema]:
        """The columns of the two files."""
        id_ = ("id", self.files.id_type)
        removed = [id_, (schema.DUPLICATE_OF, self.files.id_type), (schema.SIMILARITY, pa.float64())]
        if self.references:
            removed.append((schema.DUPLICATE_IN, pa.string()))
        return {KEPT: pa.schema([id_]), REMOVED: pa.schema(removed)}

    def write(self, number: int) -> dict[str, Any]:
        """Write a part of each."""
        decided = self.job.decided(number)
        goes = decided.goes
        ids = self.files.ids(number)
        removed = [
            ids.filter(pa.array(goes)),
            self.files.ids_from_keys(decided.keeper_name[goes].tolist()),
            pa.array(decided.similarity[goes]),
        ]
        if self.references:
            where: list[str | None] = [None] * int(goes.sum())
            for at, index in zip(decided.by_reference[goes].nonzero()[0], decided.reference_index, strict=True):
                where[at] = self.reference_names[index]
            removed.append(pa.array(where, pa.string()))
        tables = {KEPT: [ids.filter(pa.array(~goes))], REMOVED: removed}
        for name, columns in self.schemas.items():
            write_parquet(join_url(self.folders[name], part_name(number)), pa.table(tables[name], schema=columns))
        return {"kept": int((~goes).sum()), "removed": int(goes.sum())}


def _join_parts(url: str, folder: str, n_parts: int, columns: pa.Schema) -> None:
    """Write the parts of a folder as one file, a row group or more for each that has rows."""
    with atomic_write(url) as out, pq.ParquetWriter(out, columns, compression="zstd") as writer:
        for number in range(n_parts):
            table = read_parquet(join_url(folder, part_name(number)))
            if len(table):
                writer.write_table(table.cast(columns))
