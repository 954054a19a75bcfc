"""Pictures of samples as the pages show them, and what makes a page safe and whole."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, Final

import jinja2
import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from imgcurate import schema
from imgcurate.errors import printable
from imgcurate.report import findings
from imgcurate.report.sample import CatalogSample
from imgcurate.report.thumbnails import thumbnails
from imgcurate.storage import StorageOptions

__all__ = ["Album", "Picture", "content_policy", "page_of", "unsafe"]

_SIDE: Final = 112
_UNSAFE: Final = 0.5


@dataclass(frozen=True)
class Picture:
    """A sample as the page shows it."""

    key: str
    shard: str
    uri: str
    note: str
    kept: bool
    reason: str
    blurred: bool


class Album:
    """The pictures of a page, made all at once."""

    def __init__(
        self, sample: CatalogSample, *, show_nsfw: bool = False, storage_options: StorageOptions | None = None
    ) -> None:
        self._sample, self._options = sample, storage_options
        self._blurred = unsafe(sample) & (not show_nsfw)
        self._wanted: set[int] = set()
        self._rows: dict[int, Picture] = {}

    def add(self, rows: Iterable[int]) -> None:
        """Ask for pictures of some rows."""
        self._wanted.update(rows)

    def develop(self) -> None:
        """Make the pictures that were asked for."""
        rows = sorted(self._wanted)
        uris = thumbnails(self._sample, rows, _SIDE, storage_options=self._options)
        names = (schema.KEY, schema.SHARD, schema.STATUS, schema.REASON)
        for row, key, shard, status, reason in zip(rows, *(self._sample.values(c, rows) for c in names), strict=True):
            kept = status == schema.STATUS_OK
            words = "kept" if kept else f"{status}: {reason}"
            self._rows[row] = Picture(
                printable(str(key)), printable(str(shard)), uris.get(row, ""), "", kept, printable(words),
                bool(self._blurred[row]),
            )  # fmt: skip

    def pictures(self, examples: findings.Examples) -> list[Picture]:
        """Return the pictures of examples, with a note on each."""
        return [self.one(row, note) for row, note in zip(examples.rows, examples.notes, strict=True)]

    def one(self, row: int, note: str = "") -> Picture:
        """Return the picture of a row."""
        return replace(self._rows[row], note=printable(note))


def unsafe(sample: CatalogSample) -> npt.NDArray[np.bool_]:
    """Return the mask of the samples that are likely not safe for work; NaN is not known."""
    return sample.numbers(schema.NSFW_SCORE) >= _UNSAFE


def content_policy(scripts: Sequence[str]) -> str:
    """Return a Content-Security-Policy by which these scripts and no others run, and nothing is fetched."""
    digests = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts
    )
    return (
        f"default-src 'none'; script-src {digests}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def page_of(template: str, **values: Any) -> str:
    """Return a page: all that is put in is escaped, and a value that is missing is an error."""
    folder = resources.files(__package__)
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text()),
    )
    style = Markup(folder.joinpath("page.css").read_text())  # noqa: S704 - ours
    return environment.get_template(template).render(style=style, **values)
