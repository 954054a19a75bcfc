"""Write the kept samples as WebDataset shards."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import dask
import dask.dataframe as dd
import pyarrow as pa

from imgcurate import schema
from imgcurate.backend import Backend
from imgcurate.catalog import Catalog
from imgcurate.errors import ConfigError
from imgcurate.execution import call_frame
from imgcurate.export import OutputShard, kept_counts, plan_shards, write_shard
from imgcurate.models.weights import absolute_path
from imgcurate.stages.base import DatasetStage, check_count
from imgcurate.stages.executor import frame_types
from imgcurate.storage import StorageOptions, check_output, clear_away, exclusive, join_url, list_files, make_folder

__all__ = ["ImageWriterStage", "write_webdataset"]

_NEEDS = (schema.UID, schema.SHARD, schema.KEY, schema.SPANS, schema.STATUS)


@dataclass(frozen=True)
class ImageWriterStage(DatasetStage):
    """Write the kept samples as ``00000.tar``, ``00001.tar`` ..., each with a Parquet sidecar.

    Whole samples are copied from the input shards bit for bit, captions and metadata included.

    Attributes
    ----------
    output_dir : str, optional
        The run's output folder; shards go to its ``shards`` folder. ``Pipeline.run(output_dir)``
        takes precedence.
    images_per_tar : int
        Samples per shard.
    """

    output_dir: str | None = None
    images_per_tar: int = 1000

    name: ClassVar[str] = "ImageWriterStage"
    needs: ClassVar[tuple[str, ...]] = _NEEDS

    def __post_init__(self) -> None:
        check_count("images_per_tar", self.images_per_tar)

    def process_dataset(self, ddf: dd.DataFrame) -> dd.DataFrame:
        """Write the frame's kept samples and return the frame as it came.

        Inside a pipeline the catalog is written from instead, shard by shard.
        """
        if self.output_dir is None:
            raise ConfigError("stage ImageWriterStage: output_dir is not set")
        write_webdataset(ddf, join_url(self.output_dir, "shards"), images_per_tar=self.images_per_tar)
        return ddf


def write_webdataset(
    ddf: dd.DataFrame,
    output_dir: str,
    *,
    images_per_tar: int = 1000,
    storage_options: StorageOptions | None = None,
    read_options: StorageOptions | None = None,
) -> list[dict[str, Any]]:
    """Write the rows of a frame that are ``ok`` as WebDataset shards.

    Parameters
    ----------
    ddf : dask.dataframe.DataFrame
        From :func:`read_webdataset` or a function of this family, filtered at will.
    output_dir : str
        Folder for ``00000.tar`` and ``00000.parquet`` ...; must hold no shards yet.
    images_per_tar : int
        Samples per shard.
    storage_options, read_options : mapping, optional
        fsspec options of the output folder and of the input shards.

    Returns
    -------
    list of dict
        ``name``, ``samples`` and ``nbytes`` of each shard.

    Raises
    ------
    ConfigError
        If a column that is needed was dropped from the frame, or the folder holds shards already.
    StorageError
        If the output cannot be written.

    Notes
    -----
    Computes the frame once, on the current Dask client or scheduler; rows wait in a scratch folder
    in `output_dir`, without embeddings.
    """
    check_count("images_per_tar", images_per_tar)
    if not isinstance(ddf, dd.DataFrame):
        raise ConfigError(
            f"write_webdataset takes a Dask DataFrame, not {type(ddf).__name__}: leave out compute(), or filter the "
            "Dask frame, as by ddf[ddf.uid.isin(frame.uid)]"
        )
    output_dir = absolute_path(output_dir) or ""
    check_output(output_dir)
    missing = [c for c in _NEEDS if c not in ddf.columns]
    if missing:
        raise ConfigError(f"write_webdataset needs the column {missing[0]!r}, which the frame does not have")
    columns = [c for c in ddf.columns if c != schema.EMBEDDING]
    types = frame_types(ddf)
    out = schema.arrow_schema(columns, types)
    scratch = Catalog(
        join_url(output_dir, f".scratch-{uuid.uuid4().hex[:12]}"),
        ddf.npartitions,
        storage_options=storage_options,
    )
    make_folder(output_dir, storage_options)
    with exclusive(output_dir):
        if list_files(output_dir, ".tar", storage_options):
            raise ConfigError(f"{output_dir} holds shards already: name another folder, or remove them")
        return _write(ddf, scratch, out, images_per_tar, storage_options, read_options)


def _write(
    ddf: dd.DataFrame,
    scratch: Catalog,
    out: pa.Schema,
    images_per_tar: int,
    storage_options: Mapping[str, Any] | None,
    read_options: Mapping[str, Any] | None,
) -> list[dict[str, Any]]:
    output_dir = scratch.folder.rpartition("/")[0]
    scratch.make_folders()
    try:
        parts = ddf[out.names].to_delayed()
        spool = dask.delayed(_spool, pure=False)
        kept = dask.compute(*(spool(part, i, scratch, out) for i, part in enumerate(parts)))
        shards = plan_shards(kept, images_per_tar)
        return _write_all(shards, scratch, output_dir, read_options)
    finally:
        clear_away(scratch.folder, storage_options)


def _spool(frame: Any, number: int, scratch: Catalog, out: pa.Schema) -> int:
    backend = Backend("cpu" if type(frame).__module__.startswith("pandas") else "gpu")
    table = backend.frame_to_arrow(frame, out)
    scratch.write_part(number, table)
    return kept_counts(table).get(schema.STATUS_OK, 0)


def _write_all(
    shards: Sequence[OutputShard], scratch: Catalog, output_dir: str, read_options: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    if not shards:
        return []
    numbers = [s.number for s in shards]
    frame = call_frame(
        write_shard, numbers, shards, catalog=scratch, folder=output_dir, read_options=read_options
    ).compute()
    return [json.loads(r) for r in frame.sort_values("number")["result"]]
