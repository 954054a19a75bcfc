"""What a run leaves behind, for people and programs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import dask.dataframe as dd

from imgcurate import schema
from imgcurate.catalog import Catalog
from imgcurate.storage import join_url, list_files, read_bytes

__all__ = ["Result"]


@dataclass(frozen=True)
class Result:
    """What a run did.

    Attributes
    ----------
    output_dir : str
        The run's output folder.
    samples : int
        Input samples.
    counts : dict of str to int
        Samples by status; ``ok`` are those that were kept.
    shards : list of str
        URLs of the output shards, in order.
    """

    output_dir: str
    samples: int
    counts: dict[str, int]
    shards: list[str]
    _catalog: Catalog = field(repr=False)

    @property
    def kept(self) -> int:
        """Samples that were kept."""
        return self.counts.get(schema.STATUS_OK, 0)

    @property
    def catalog(self) -> dd.DataFrame:
        """The catalog as a lazy Dask DataFrame: one row per input sample."""
        return self._catalog.frame(device="cpu")

    @property
    def dedup(self) -> list[dict[str, Any]]:
        """What each dedup stage found: ``n_clusters``, ``eps``, and the ``curve`` of what stays over eps."""
        folder = join_url(self.output_dir, "dedup")
        names = list_files(folder, ".json")
        return [json.loads(read_bytes(join_url(folder, name))) for name in names]

    def accounting(self) -> str:
        """Return the line that accounts for every sample."""
        dropped = {k: v for k, v in sorted(self.counts.items()) if k != schema.STATUS_OK}
        parts = [f"{self.kept:,} kept", *(f"{v:,} {k}" for k, v in dropped.items())]
        return f"{self.samples:,} samples in = {' + '.join(parts)}"
