"""What is in shards, without decoding an image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import pyarrow.compute as pc

from imgcurate import schema
from imgcurate.inputs import describe_shards, find_shards
from imgcurate.shards import Shard, index_shard

__all__ = ["Inspection", "ShardInspection", "inspect_shards"]

_THREADS: Final = 8


@dataclass(frozen=True)
class ShardInspection:
    """What is in one shard.

    Attributes
    ----------
    url : str
        The shard; of files of a folder the folder, and which.
    samples, ok, members : int
        Samples; those with an image and without damage; members that belong to a sample.
    nbytes : int
        Size of the shard.
    extensions : dict of str to int
        Members by extension.
    problems : dict of str to int
        Problems by kind.
    details : list of str
        One line per problem: shard, byte offset, kind, words.
    """

    url: str
    samples: int
    ok: int
    members: int
    nbytes: int
    extensions: dict[str, int]
    problems: dict[str, int]
    details: list[str]


@dataclass(frozen=True)
class Inspection:
    """What is in several shards.

    Attributes
    ----------
    shards : list of ShardInspection
        One for each shard, in the order of the shard numbers.
    """

    shards: list[ShardInspection] = field(default_factory=list)

    @property
    def extensions(self) -> dict[str, int]:
        """Members by extension, most frequent first."""
        total: Counter[str] = Counter()
        for shard in self.shards:
            total.update(shard.extensions)
        return dict(total.most_common())

    @property
    def problems(self) -> dict[str, int]:
        """Problems by kind, most frequent first."""
        total: Counter[str] = Counter()
        for shard in self.shards:
            total.update(shard.problems)
        return dict(total.most_common())

    @property
    def details(self) -> list[str]:
        """One line per problem: shard, byte offset, kind, words."""
        return [line for shard in self.shards for line in shard.details]

    def summary(self) -> str:
        """Return the totals in one line."""
        samples, ok = sum(s.samples for s in self.shards), sum(s.ok for s in self.shards)
        members, nbytes = sum(s.members for s in self.shards), sum(s.nbytes for s in self.shards)
        return (
            f"{len(self.shards):,} shards, {samples:,} samples ({ok:,} with an image), {members:,} members, "
            f"{nbytes:,} bytes, {len(self.details):,} problems"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return {
            "shards": [asdict(s) for s in self.shards],
            "samples": sum(s.samples for s in self.shards),
            "ok": sum(s.ok for s in self.shards),
            "members": sum(s.members for s in self.shards),
            "nbytes": sum(s.nbytes for s in self.shards),
            "extensions": self.extensions,
            "problems": self.problems,
        }


def inspect_shards(inputs: str | Sequence[str], *, storage_options: Mapping[str, Any] | None = None) -> Inspection:
    """Index shards and report what is in them.

    Parameters
    ----------
    inputs : str or sequence of str
        Paths, fsspec URLs or patterns of tars, tables and folders; see :mod:`imgcurate.inputs`.
    storage_options : mapping, optional
        Passed to fsspec.

    Raises
    ------
    InputError
        If an input does not exist.
    """
    shards = find_shards(inputs, storage_options)
    describe_shards(shards, storage_options)
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda item: _inspect(item[1], item[0], storage_options), enumerate(shards))
        return Inspection(list(found))


def _inspect(shard: Shard, number: int, storage_options: Mapping[str, Any] | None) -> ShardInspection:
    index = index_shard(shard, number, storage_options=storage_options)
    url = f"{shard.url}/{shard.files[0]} ..." if shard.files else shard.url
    extensions = Counter(index.table[schema.MEMBERS].combine_chunks().flatten().to_pylist())
    is_image = pc.equal(index.table[schema.STATUS], schema.STATUS_OK)
    empty = index.table.filter(pc.and_(is_image, pc.equal(index.table[schema.NBYTES], 0)))
    problems = [(p.offset, p.kind, p.detail) for p in index.problems]
    rows = zip(empty[schema.OFFSET].to_pylist(), empty[schema.KEY].to_pylist(), strict=True)
    problems += [(offset, "empty image", f"{key} has 0 bytes") for offset, key in rows]
    return ShardInspection(
        url=url,
        samples=len(index.table),
        ok=pc.sum(is_image).as_py() or 0,
        members=sum(extensions.values()),
        nbytes=index.nbytes,
        extensions=dict(extensions.most_common()),
        problems=dict(Counter(kind for _, kind, _ in problems).most_common()),
        details=[f"{url} at byte {offset:,}: {kind}: {detail}" for offset, kind, detail in problems],
    )
