"""What a run leaves behind, for people and programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Final

import dask.dataframe as dd

from imgcurate import schema
from imgcurate.catalog import Catalog
from imgcurate.storage import exists, join_url, list_files, read_bytes

__all__ = ["REPORT", "Result", "html_table"]

REPORT: Final = "report.html"
"""The file of an output folder that shows what a run did."""


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as HTML, for notebooks."""
    cells = [
        "".join(f"<{tag}>{escape(c)}</{tag}>" for c in row) for tag, row in [("th", head), *(("td", r) for r in rows)]
    ]
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


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

    @property
    def report(self) -> str | None:
        """URL of the report, if there is one."""
        url = join_url(self.output_dir, REPORT)
        return url if exists(url) else None

    def as_dict(self) -> dict[str, Any]:
        """Return what the run did as plain data."""
        return {
            "output_dir": self.output_dir, "samples": self.samples, "kept": self.kept, "counts": self.counts,
            "shards": self.shards, "dedup": self.dedup, "report": self.report,
        }  # fmt: skip

    def _repr_html_(self) -> str:
        """Show the accounting in a notebook."""
        dropped = [(k, v) for k, v in sorted(self.counts.items()) if k != schema.STATUS_OK]
        rows = [("samples in", self.samples), *dropped, ("kept", self.kept)]
        return html_table(("", "samples"), [(name, f"{n:,}") for name, n in rows])

    def accounting(self) -> str:
        """Return the line that accounts for every sample."""
        dropped = {k: v for k, v in sorted(self.counts.items()) if k != schema.STATUS_OK}
        parts = [f"{self.kept:,} kept", *(f"{v:,} {k}" for k, v in dropped.items())]
        return f"{self.samples:,} samples in = {' + '.join(parts)}"
