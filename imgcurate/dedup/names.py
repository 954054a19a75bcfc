"""How samples are named in the reasons of duplicates."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imgcurate import schema
from imgcurate.errors import printable

__all__ = ["sample_names", "shard_names"]


def sample_names(table: pa.Table, alike: Mapping[str, str]) -> npt.NDArray[Any]:
    """Return how samples are named in words: ``<shard stem>/<key>``, more of the shard's path if it is in `alike`.

    A key without a shard is the name as it is: then it is the id of a row, which must come back unchanged.
    """
    shards, keys = table[schema.SHARD].to_pylist(), table[schema.KEY].to_pylist()
    stems = {s: printable(alike.get(s, _stem(s))) for s in set(shards)}
    names = np.empty(len(keys), dtype=object)
    names[:] = [f"{stems[s]}/{printable(k)}" if s else k for s, k in zip(shards, keys, strict=True)]
    return names


def _stem(url: str) -> str:
    return url.rsplit("/", 1)[-1].split(".", 1)[0]


def shard_names(urls: Iterable[str]) -> dict[str, str]:
    """Return, for the shards that share a stem, as much of the end of each path as tells them apart."""
    names: dict[str, str] = {}
    groups = [list(urls)]
    depth = 0
    while groups:
        by_name: dict[str, list[str]] = defaultdict(list)
        for url in itertools.chain.from_iterable(groups):
            parts = url.split("/")
            # Shards of one folder whose names differ behind the dot.
            whole = depth >= len(parts)
            by_name[url if whole else "/".join([*parts[-depth - 1 : -1], _stem(url)])].append(url)
        names |= {group[0]: name for name, group in by_name.items() if len(group) == 1 and depth}
        groups = [group for group in by_name.values() if len(group) > 1]
        depth += 1
    return names
