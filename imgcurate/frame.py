"""Shards -> Dask DataFrame: one row per sample, one partition per group of shards, nothing decoded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import dask.dataframe as dd
import pyarrow as pa

from imgcurate import schema
from imgcurate.backend import get_backend
from imgcurate.errors import ConfigError
from imgcurate.shards import index_shard
from imgcurate.storage import expand_urls, read_ahead

__all__ = ["ShardGroup", "group_shards", "index_schema", "read_group", "read_webdataset"]

ShardGroup = tuple[tuple[int, str], ...]
"""The shards of one partition: (shard number in the sorted list of inputs, URL) each."""


def read_webdataset(
    urls: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    files_per_partition: int = 1,
    text_columns: Sequence[str] = (),
    device: str = "auto",
    storage_options: Mapping[str, Any] | None = None,
) -> dd.DataFrame:
    """Read the index of WebDataset shards as a lazy Dask DataFrame.

    Parameters
    ----------
    urls : str or sequence of str
        Paths or fsspec URLs of tar shards; braces (``{00000..00099}``) and globs expand.
    files_per_partition : int
        Shards per partition.
    text_columns : sequence of str
        Members to have as string columns, by extension: ``("txt", "json")``.
    device : {"auto", "cpu", "gpu"}
        Whether partitions are cudf or pandas frames.
    storage_options : mapping, optional
        Passed to fsspec.

    Returns
    -------
    dask.dataframe.DataFrame
        The columns of :data:`imgcurate.schema.INDEX_COLUMNS` and the text columns. A sample without
        an image, or damaged with its tar, has a row too, with ``status`` and ``reason``.

    Raises
    ------
    InputError
        If a pattern matches nothing.

    Notes
    -----
    Stays lazy: not even a tar header is read before the frame is computed.
    """
    if files_per_partition < 1:
        raise ConfigError(f"files_per_partition={files_per_partition} should be >= 1")
    groups = group_shards(expand_urls(urls, storage_options), files_per_partition)
    return frame_of_groups(groups, text_columns=text_columns, device=device, storage_options=storage_options)


def frame_of_groups(
    groups: Sequence[ShardGroup],
    *,
    text_columns: Sequence[str] = (),
    device: str = "auto",
    storage_options: Mapping[str, Any] | None = None,
) -> dd.DataFrame:
    """Return the lazy frame of these partitions; see :func:`read_webdataset`."""
    backend = get_backend(device)
    return dd.from_map(
        _read_frame,
        list(groups),
        text_columns=tuple(text_columns),
        device=backend.name,
        storage_options=storage_options,
        meta=backend.meta(index_schema(text_columns)),
        enforce_metadata=False,
        label="read-webdataset",
    )


def group_shards(urls: Sequence[str], files_per_partition: int) -> list[ShardGroup]:
    """Return the shards, numbered, in groups of one partition each, in order."""
    numbered = list(enumerate(urls))
    return [tuple(numbered[i : i + files_per_partition]) for i in range(0, len(numbered), files_per_partition)]


def index_schema(text_columns: Sequence[str] = ()) -> pa.Schema:
    """Return the Arrow schema of the index frame."""
    extra = dict.fromkeys(text_columns, pa.string())
    return schema.arrow_schema([*schema.INDEX_COLUMNS, *text_columns], extra)


def read_group(
    group: ShardGroup, text_columns: Sequence[str] = (), storage_options: Mapping[str, Any] | None = None
) -> pa.Table:
    """Index the shards of one partition.

    Returns
    -------
    pa.Table
        One row per sample, in the order of the shards and of the samples in them.
    """
    out = index_schema(text_columns)
    tables = []
    for position, (number, url) in enumerate(group):
        for _, following in group[position + 1 : position + 2]:
            read_ahead(following, storage_options)
        tables.append(index_shard(url, number, storage_options=storage_options, texts=tuple(text_columns)).table)
    return pa.concat_tables([t.select(out.names).cast(out) for t in tables]).combine_chunks()


def _read_frame(
    group: ShardGroup, text_columns: Sequence[str], device: str, storage_options: Mapping[str, Any] | None
) -> Any:
    return get_backend(device).frame_from_arrow(read_group(group, text_columns, storage_options))
