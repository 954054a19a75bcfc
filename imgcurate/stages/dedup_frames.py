"""What all dedup stages share: from a frame or a catalog, through a job, to a frame with decisions."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Final

import dask
import dask.dataframe as dd
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from distributed import Client

from imgcurate import schema
from imgcurate.backend import Backend, get_backend, lazy_frame
from imgcurate.catalog import Catalog
from imgcurate.dedup.exchange import REFERENCE_SHIFT, TaskRunner
from imgcurate.dedup.verdicts import DedupJob, Ledger
from imgcurate.errors import ConfigError
from imgcurate.execution import Progress, run_on_client
from imgcurate.liveness import gpu_share
from imgcurate.models.weights import absolute_path
from imgcurate.stages.executor import frame_types
from imgcurate.storage import join_url

__all__ = ["client_runner", "dedup_frame", "run_here"]

_GPU_SHARE: Final = 0.25


def dedup_frame(
    ddf: dd.DataFrame,
    make_job: Callable[[Catalog, str], DedupJob],
    *,
    function: str,
    needs: Sequence[str],
    adds: Sequence[str],
    device: str,
    scratch_dir: str | None,
) -> dd.DataFrame:
    """Run a job over a frame.

    Parameters
    ----------
    ddf : dask.dataframe.DataFrame
        The samples; it is computed once and stored in `scratch_dir`.
    make_job : callable
        Takes the stored frame and a folder.
    function : str
        Who asks, for messages.
    needs, adds : sequence of str
        Columns, besides those by which samples are named.
    device : {"auto", "cpu", "gpu"}
        Where.
    scratch_dir : str, optional
        Folder or fsspec URL that all workers can write to; by default a temporary one of this machine.

    Raises
    ------
    ConfigError
        If a column is missing, or a uid stands in several rows.
    """
    if not isinstance(ddf, dd.DataFrame):
        raise ConfigError(
            f"{function} takes a Dask DataFrame, as of read_webdataset or embed, not {type(ddf).__name__}"
        )
    for column in (schema.UID, schema.SHARD, schema.KEY, schema.STATUS, schema.REASON, *needs):
        if column not in ddf.columns:
            raise ConfigError(f"{function} needs the column {column!r}, and the frame has {', '.join(ddf.columns)}")
    scratch_dir = absolute_path(scratch_dir)
    if scratch_dir is None:
        scratch_dir = tempfile.mkdtemp(prefix="imgcurate-dedup-")
        atexit.register(shutil.rmtree, scratch_dir, ignore_errors=True)
    # A folder of its own for each call: what another one left there has other rows or parameters.
    scratch_dir = join_url(scratch_dir, f"dedup-{uuid.uuid4().hex[:12]}")
    types = frame_types(ddf)
    spooled = Catalog(join_url(scratch_dir, "frame"), ddf.npartitions)
    spooled.make_folders()
    out = schema.arrow_schema(types, types)
    spool = dask.delayed(_spool, pure=False)
    uids = dask.compute(*(spool(part, i, spooled, out) for i, part in enumerate(ddf[out.names].to_delayed())))
    _check_distinct(function, uids)
    job = make_job(spooled, join_url(scratch_dir, "dedup"))
    job.run(run_here)
    ledger = Ledger(job)
    ledger.run(run_here)
    kept = [c for c in out.names if c not in adds]
    return _decided_frame(ledger, device, [*kept, *adds])


def _decided_frame(ledger: Ledger, device: str, columns: Sequence[str]) -> dd.DataFrame:
    """Return the lazy frame of a job that has run: some columns, a partition per part."""
    job = ledger.job
    types = {f.name: f.type for f in job.catalog.schema}
    out = schema.arrow_schema(columns, types | {c: schema.arrow_type(c) for c in columns if c in schema.COLUMNS})
    backend = get_backend(device)
    return lazy_frame(
        _decided_part, list(range(job.catalog.n_parts)), ledger=ledger, out=out, device=backend.name,
        meta=backend.meta(out), label="dedup",
    )  # fmt: skip


def client_runner(client: Client, progress: Progress | None, device: str = "cpu") -> TaskRunner:
    """Return what runs the steps of a job on a cluster; on the device ``gpu`` those that compute take a share."""
    share = gpu_share(client, _GPU_SHARE) if device == "gpu" else None

    def run_tasks(
        step: str,
        function: Callable[[int], dict[str, Any]],
        numbers: Sequence[int],
        *,
        light: bool = False,
        on_device: bool = False,
    ) -> dict[int, dict[str, Any]]:
        return run_on_client(
            f"dedup: {step}", function, numbers, client=client, resources=share if on_device else None,
            progress=progress, light=light,
        )  # fmt: skip

    return run_tasks


def run_here(
    step: str,
    function: Callable[[int], dict[str, Any]],
    numbers: Sequence[int],
    *,
    light: bool = False,
    on_device: bool = False,
) -> dict[int, dict[str, Any]]:
    """Run a step on whatever Dask computes on: the current client, or threads."""
    del step, light, on_device
    task = dask.delayed(function, pure=False)
    return dict(zip(numbers, dask.compute(*(task(n) for n in numbers)), strict=True))


def _spool(frame: Any, number: int, catalog: Catalog, out: pa.Schema) -> npt.NDArray[np.int64]:
    backend = Backend("cpu" if type(frame).__module__.startswith("pandas") else "gpu")
    try:
        table = backend.frame_to_arrow(frame, out)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as exc:
        raise ConfigError(f"a column of the frame does not hold what it should: {exc}") from exc
    catalog.write_part(number, table)
    uids: npt.NDArray[np.int64] = table[schema.UID].to_numpy()
    return uids


def _check_distinct(function: str, uids: Sequence[npt.NDArray[np.int64]]) -> None:
    """Refuse a frame in which samples stand more than once: by their uid they are named, kept and dropped."""
    ordered = np.sort(np.concatenate([*uids, np.empty(0, np.int64)]))
    if len(ordered) and not (ordered[0] >= 0 and ordered[-1] < 1 << REFERENCE_SHIFT):
        wrong = ordered[0] if ordered[0] < 0 else ordered[-1]
        raise ConfigError(f"{function}: uid {wrong} is not one: expected 0 to 2^{REFERENCE_SHIFT} - 1")
    if (twice := ordered[1:][ordered[1:] == ordered[:-1]]).size:
        raise ConfigError(
            f"{function}: uid {twice[0]} stands in several rows of the frame: each sample should be there once "
            "(of frames of several read_webdataset, numbers begin anew: read them by one call)"
        )


def _decided_part(number: int, ledger: Ledger, out: pa.Schema, device: str) -> Any:
    return get_backend(device).frame_from_arrow(ledger.table(number, out.names).cast(out))
