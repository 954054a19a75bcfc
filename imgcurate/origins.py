"""Where the first phase of a run takes its rows from: shards, which are read, decoded and scored."""

from __future__ import annotations

import json
import logging
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import pyarrow as pa

from imgcurate.catalog import MANIFEST, Manifest
from imgcurate.errors import InputError
from imgcurate.frame import ShardGroup, frame_of_groups, groups_of
from imgcurate.inputs import describe_shards, state_of
from imgcurate.partitions import Partitions
from imgcurate.plan import Plan
from imgcurate.shards import Shard
from imgcurate.stages.reading import ImageReaderStage
from imgcurate.storage import StorageOptions, exists, is_local, local_path

__all__ = ["Origin", "ShardOrigin"]

logger = logging.getLogger(__name__)


class Origin(ABC):
    """Where the first phase of a run takes its rows from.

    Attributes
    ----------
    options : mapping or None
        fsspec options of the input shards, for the export.
    types : dict of str to pa.DataType
        Arrow types of the columns that are there besides those of the stages.
    """

    options: StorageOptions | None
    types: dict[str, pa.DataType]

    @property
    @abstractmethod
    def first(self) -> Shard | str | None:
        """The first input, or its URL."""

    @property
    @abstractmethod
    def n_parts(self) -> int:
        """Number of partitions."""

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides the results besides the stages, for the fingerprint: at least ``inputs``."""

    @property
    @abstractmethod
    def increments(self) -> list[int]:
        """As in :class:`Manifest`."""

    @property
    @abstractmethod
    def source(self) -> dict[str, Any]:
        """As in :class:`Manifest`."""

    @abstractmethod
    def arrange(self, manifest: Manifest | None) -> None:
        """Take over the order of the inputs of a run that is there, if they are among these."""

    @abstractmethod
    def inputs_now(self) -> list[dict[str, Any]]:
        """Describe the inputs as they are now."""

    def parts_of(self, inputs: Sequence[int]) -> list[int]:
        """Return the partitions that may hold something of some inputs: here, all."""
        del inputs
        return list(range(self.n_parts))

    @property
    @abstractmethod
    def reader(self) -> ImageReaderStage | None:
        """How the images of these rows are decoded; None if they are not."""

    @abstractmethod
    def frame(self, numbers: Sequence[int], device: str) -> dd.DataFrame:
        """Return the lazy frame of some partitions, before any stage."""


class ShardOrigin(Origin):
    """The shards that a pipeline names.

    Parameters
    ----------
    plan : Plan
        The pipeline.
    folder : str
        The output folder: shards in it are no inputs.

    Raises
    ------
    InputError
        If there is no shard.
    """

    def __init__(self, plan: Plan, folder: str) -> None:
        self.plan = plan
        self.options = plan.source.storage_options
        shards, self.sidecars = plan.source.find(taken=plan.types)
        self.shards = _without_output(shards, folder)
        self.types = dict(self.sidecars.types)
        self._increments = [len(self.shards)]

    @cached_property
    def _described(self) -> list[dict[str, Any]]:
        return self.inputs_now()

    def inputs_now(self) -> list[dict[str, Any]]:
        """Describe the shards as they are now."""
        described = describe_shards(self.shards, self.options, self.sidecars)
        plain: list[dict[str, Any]] = json.loads(json.dumps(described, default=str))
        return plain

    def arrange(self, manifest: Manifest | None) -> None:
        """Give the shards of an earlier run the numbers that they had, and new ones those after them."""
        known = manifest.config.get("inputs") if manifest is not None else None
        if manifest is None or not known:
            return
        places = {json.dumps(d, sort_keys=True): i for i, d in enumerate(self._described)}
        old = [places.get(json.dumps(d, sort_keys=True)) for d in known]
        if None in old:
            return
        there = set(old)
        order = [i for i in old if i is not None] + [i for i in range(len(self.shards)) if i not in there]
        self.shards = [self.shards[i] for i in order]
        self._described = [self._described[i] for i in order]
        before = manifest.increments or [len(known)]
        self._increments = [*before, *([len(order)] if len(order) > before[-1] else [])]
        self.__dict__.pop("groups", None)

    @cached_property
    def groups(self) -> list[ShardGroup]:
        """The shards of each partition; those of different increments never share one."""
        nbytes = [described.get("nbytes") for described in self._described]
        shards = [replace(s, state=state_of(d)) for s, d in zip(self.shards, self._described, strict=True)]
        return groups_of(shards, Partitions.divide(nbytes, self.plan.source.files_per_partition, self._increments))

    @property
    def first(self) -> Shard:
        """The first shard."""
        return self.shards[0]

    @property
    def n_parts(self) -> int:
        """Number of partitions."""
        return len(self.groups)

    @property
    def identity(self) -> dict[str, Any]:
        """The inputs, and the columns that are joined from beside them."""
        sidecars = [[source, name, str(type_)] for source, name, type_ in self.sidecars.columns]
        return {"sidecars": sidecars, "inputs": self._described}

    def parts_of(self, inputs: Sequence[int]) -> list[int]:
        """Return the partitions of some shards."""
        numbers = set(inputs)
        return [part for part, group in enumerate(self.groups) if any(number in numbers for number, _ in group)]

    @property
    def increments(self) -> list[int]:
        """As in :class:`Manifest`."""
        return self._increments

    @property
    def source(self) -> dict[str, Any]:
        """As in :class:`Manifest`."""
        stage = self.plan.source
        given = [stage.file_paths] if isinstance(stage.file_paths, (str, os.PathLike)) else stage.file_paths
        paths = [os.fspath(path) for path in given]
        return {
            "file_paths": [str(Path(local_path(p)).absolute()) if is_local(p) else p for p in paths],
            "files_per_partition": stage.files_per_partition,
            "sidecar_columns": stage.sidecar_columns,
            "text_columns": list(self.plan.reader.text_columns),
            "json_columns": dict(self.plan.reader.json_columns),
        }

    @property
    def reader(self) -> ImageReaderStage:
        """That of the pipeline."""
        return self.plan.reader

    def frame(self, numbers: Sequence[int], device: str) -> dd.DataFrame:
        """Return the index of some partitions."""
        return frame_of_groups(
            [self.groups[n] for n in numbers], members=self.plan.reader.members, sidecars=self.sidecars,
            device=device, storage_options=self.options,
        )  # fmt: skip


def _without_output(shards: list[Shard], folder: str) -> list[Shard]:
    """Return the inputs but for those that a pattern found in the output folder itself."""
    inside = [s.url for s in shards if f"{s.url}/".startswith(folder.rstrip("/") + "/")]
    if len(inside) == len(shards):
        raise InputError(f"the inputs lie in the output folder ({inside[0]}): name another output folder")
    if inside:
        logger.warning("%d inputs lie in the output folder and are left out: %s ...", len(inside), inside[0])
    rest = [s for s in shards if s.url not in set(inside)]
    _warn_of_runs(rest)
    return rest


def _warn_of_runs(shards: list[Shard]) -> None:
    """Say so where shards that a run has written are among other inputs: their samples are likely there twice."""
    folders = Counter(s.url.rpartition("/")[0] for s in shards if is_local(s.url) and not s.files)
    written = {f: n for f, n in folders.items() if f.endswith("/shards")}
    runs = {f: n for f, n in written.items() if exists(f"{f.removesuffix('shards')}{MANIFEST}")}
    count = sum(runs.values())
    if 0 < count < len(shards):
        logger.warning(
            "%d of %d inputs are the output of an earlier run (in %s), read beside the others: name inputs without "
            "them if that is not meant", count, len(shards), ", ".join(map(local_path, sorted(runs)[:3])),
        )  # fmt: skip
