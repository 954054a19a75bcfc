"""Shards -> Dask DataFrame: one row per sample, one partition per group of shards, nothing decoded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import dask.dataframe as dd
import pyarrow as pa

from imgcurate import schema
from imgcurate.backend import get_backend, lazy_frame
from imgcurate.errors import ConfigError
from imgcurate.inputs import check_unchanged, find_shards
from imgcurate.members import NO_MEMBERS, MemberColumns
from imgcurate.partitions import Partitions
from imgcurate.shards import Shard, index_shard
from imgcurate.sidecars import NO_SIDECARS, SidecarColumns, Sidecars, find_sidecars
from imgcurate.storage import read_ahead

__all__ = ["ShardGroup", "frame_of_groups", "groups_of", "index_schema", "read_group", "read_webdataset"]

ShardGroup = tuple[tuple[int, Shard], ...]
"""The shards of one partition: (number in the sorted list of inputs, shard) each."""


def read_webdataset(
    urls: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    files_per_partition: int = 1,
    text_columns: Sequence[str] = (),
    json_columns: Mapping[str, str] | None = None,
    sidecar_columns: SidecarColumns = "auto",
    device: str = "auto",
    storage_options: Mapping[str, Any] | None = None,
) -> dd.DataFrame:
    """Read the index of shards, tables of images and folders as a lazy Dask DataFrame.

    Parameters
    ----------
    urls : str or sequence of str
        Paths or fsspec URLs of tars, Parquet or Arrow files with a column of images, folders of either or
        of images; braces (``{00000..00099}``) and globs expand. See :mod:`imgcurate.inputs`.
    files_per_partition : int
        Shards per partition.
    text_columns : sequence of str
        Members to have as string columns, by extension: ``("txt", "json")``.
    json_columns : mapping of str to str, optional
        Keys of the objects in members ``.json`` to have as columns, and what they hold: ``{"pwatermark": "number"}``;
        see :class:`ImageReaderStage`.
    sidecar_columns : "auto" or sequence of str
        Columns of the Parquet files beside tars, as img2dataset writes them, to join by key: ``("url",
        "caption")``. ``"auto"`` takes all if the first shards have one. See :mod:`imgcurate.sidecars`.
    device : {"auto", "cpu", "gpu"}
        Whether partitions are cudf or pandas frames.
    storage_options : mapping, optional
        Passed to fsspec.

    Returns
    -------
    dask.dataframe.DataFrame
        The columns of :data:`imgcurate.schema.INDEX_COLUMNS`, of texts and of sidecars. A sample without
        an image, or damaged with its tar, has a row too, with ``status`` and ``reason``.

    Raises
    ------
    ConfigError
        If the columns are not what they should be.
    InputError
        If a pattern matches nothing, or names something of an unknown kind.

    Notes
    -----
    Stays lazy: not even a tar header is read before the frame is computed, but for the columns of tables
    and sidecars.
    """
    if files_per_partition < 1:
        raise ConfigError(f"files_per_partition={files_per_partition} should be >= 1")
    members = MemberColumns.of(text_columns, json_columns)
    shards = find_shards(urls, storage_options)
    sidecars = find_sidecars(shards, sidecar_columns, storage_options, taken=members.types)
    groups = groups_of(shards, Partitions.divide([None] * len(shards), files_per_partition))
    return frame_of_groups(groups, members=members, sidecars=sidecars, device=device, storage_options=storage_options)


def frame_of_groups(
    groups: Sequence[ShardGroup],
    *,
    members: MemberColumns = NO_MEMBERS,
    sidecars: Sidecars = NO_SIDECARS,
    device: str = "auto",
    storage_options: Mapping[str, Any] | None = None,
) -> dd.DataFrame:
    """Return the lazy frame of these partitions; see :func:`read_webdataset`."""
    backend = get_backend(device)
    return lazy_frame(
        _read_frame,
        list(groups),
        members=members,
        sidecars=sidecars,
        device=backend.name,
        storage_options=storage_options,
        meta=backend.meta(index_schema(members, sidecars)),
        label="read-webdataset",
    )


def groups_of(shards: Sequence[Shard], partitions: Partitions) -> list[ShardGroup]:
    """Return the shards of each partition, with their numbers."""
    return [tuple((number, shards[number]) for number in numbers) for numbers in partitions]


def index_schema(members: MemberColumns = NO_MEMBERS, sidecars: Sidecars = NO_SIDECARS) -> pa.Schema:
    """Return the Arrow schema of the index frame."""
    extra = members.types | sidecars.types
    return schema.arrow_schema([*schema.INDEX_COLUMNS, *extra], extra)


def read_group(
    group: ShardGroup,
    members: MemberColumns = NO_MEMBERS,
    storage_options: Mapping[str, Any] | None = None,
    sidecars: Sidecars = NO_SIDECARS,
) -> pa.Table:
    """Index the shards of one partition.

    Returns
    -------
    pa.Table
        One row per sample, in the order of the shards and of the samples in them.
    """
    out = index_schema(members, sidecars)
    tables = []
    for position, (number, shard) in enumerate(group):
        for _, following in group[position + 1 : position + 2]:
            if not following.files:
                read_ahead(following.url, storage_options)
        check_unchanged(shard, storage_options)
        index = index_shard(shard, number, storage_options=storage_options, columns=members)
        tables.append(sidecars.join(index.table, shard, storage_options))
    return pa.concat_tables([t.select(out.names).cast(out) for t in tables]).combine_chunks()


def _read_frame(
    group: ShardGroup,
    members: MemberColumns,
    sidecars: Sidecars,
    device: str,
    storage_options: Mapping[str, Any] | None,
) -> Any:
    return get_backend(device).frame_from_arrow(read_group(group, members, storage_options, sidecars))
