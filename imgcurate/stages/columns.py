"""A filter on columns that are there: of sidecars, of members, of stages, of the index."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from imgcurate import schema
from imgcurate.batches import ImageBatch
from imgcurate.errors import ConfigError, InputError
from imgcurate.models.weights import absolute_path
from imgcurate.stages.base import ProcessingStage
from imgcurate.stages.rules import AnyRule, ValueRule
from imgcurate.stages.scoring import Range, check_pair, rules_of
from imgcurate.storage import exists, is_folder
from imgcurate.success import file_digest

__all__ = ["LISTS_SHA256", "ColumnFilterStage"]

LISTS_SHA256: Final = "lists_sha256"
"""What a run records the checksums of lists as."""

Values = Sequence[str | int | bool] | str


@dataclass
class ColumnFilterStage(ProcessingStage):
    """Keep the samples whose values in columns that are there lie in given ranges, or are among given values.

    Columns may be those of sidecars, as img2dataset's ``similarity``, which comes as ``source_similarity`` since
    imgcurate has a column of that name itself, of members (``json_columns`` of the reader), of the index, as ``key``,
    or those that stages before this one add, also your own.

    Attributes
    ----------
    ranges : mapping of str to pair
        Per column of numbers the smallest and the largest value that is kept, both inclusive; None is open:
        ``{"source_similarity": (0.3, None), "punsafe": (None, 0.1)}``. A sample outside, or without a value, has the
        status ``column`` and a reason such as ``punsafe 0.42 > 0.10``.
    is_in : mapping of str to (sequence or str)
        Per column of text, whole numbers or booleans the values that are kept: ``{"license": ["cc0", "cc-by"]}``; or a
        file that lists them, ``{"key": "wanted.parquet"}``: Parquet or CSV with a column of that name, or with one
        column alone, or text with a value in each line. A sample without a value leaves.
    is_not_in : mapping of str to (sequence or str)
        Per column the values that are left out, in the same way: ``{"url": "opted-out.txt"}``. A sample without a value
        stays.

    Raises
    ------
    ConfigError
        If one is not what it should be.
    InputError
        Before the run starts, if a list does not exist; when it is read, if it cannot be understood.

    Notes
    -----
    A list is read once per worker process, and takes 16 bytes there for each of its values, whatever their length; some
    100 while it is read.
    """

    ranges: Mapping[str, Range] = field(default_factory=dict)
    is_in: Mapping[str, Values] = field(default_factory=dict)
    is_not_in: Mapping[str, Values] = field(default_factory=dict)

    name: ClassVar[str] = schema.STATUS_COLUMN

    def __post_init__(self) -> None:
        if not isinstance(self.ranges, Mapping) or not all(isinstance(c, str) and c for c in self.ranges):
            raise ConfigError(
                f"ranges={self.ranges!r} should be a mapping of columns to pairs, as punsafe: [null, 0.1]"
            )
        for column, bounds in self.ranges.items():
            check_pair(column, bounds)
        self._sha256: dict[str, str] = {}
        self.is_in, self.is_not_in = _checked("is_in", self.is_in), _checked("is_not_in", self.is_not_in)
        _ = self.rules

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The columns."""
        return tuple(dict.fromkeys((*self.ranges, *self.is_in, *self.is_not_in)))

    @property
    def nullable(self) -> tuple[str, ...]:  # type: ignore[override]
        """The columns: rules say what becomes of a sample without a value."""
        return self.needs

    @property
    def rules(self) -> tuple[AnyRule, ...]:  # type: ignore[override]
        """A rule for each bound, and each collection of values."""
        found: list[AnyRule] = [*rules_of(self.ranges, schema.STATUS_COLUMN)]
        for among, by_column in ((True, self.is_in), (False, self.is_not_in)):
            for column, values in by_column.items():
                sha256 = self._sha256.get(values) if isinstance(values, str) else None
                found.append(ValueRule(column, values, schema.STATUS_COLUMN, among, sha256))
        return tuple(found)

    @property
    def _files(self) -> Iterator[str]:
        return (values for values in (*self.is_in.values(), *self.is_not_in.values()) if isinstance(values, str))

    def check(self, encoder: str | None) -> None:
        """Refuse lists that do not exist."""
        for url in self._files:
            if not exists(url) or is_folder(url):
                raise InputError(f"there is no list {url}: name a file of values, or write values in brackets: [cc0]")

    def fingerprint(self) -> dict[str, Any]:
        """Return the checksums of the lists, which from now on have to be as they are now."""
        self._sha256 = {url: file_digest(url).sha256 for url in self._files}
        return {LISTS_SHA256: self._sha256} if self._sha256 else {}

    def with_checksums(self, sha256: Mapping[str, str]) -> ColumnFilterStage:
        """Return the stage with lists of these checksums, as a run recorded them."""
        stage = copy.copy(self)
        stage._sha256 = dict(sha256)
        return stage

    def process(self, batch: ImageBatch) -> ImageBatch:
        """Return the batch as it is: rules decide."""
        return batch


def _checked(name: str, by_column: Any) -> dict[str, Values]:
    """Return the values by column, with the paths of lists as workers find them."""
    if not isinstance(by_column, Mapping) or not all(isinstance(c, str) and c for c in by_column):
        raise ConfigError(f"{name}={by_column!r} should be a mapping of columns to values, as license: [cc0]")
    for column, values in by_column.items():
        if not isinstance(values, (str, list, tuple)) or not values:
            raise ConfigError(
                f"{name}: {column} should be some values, as [cc0, cc-by], or a file of them, not {values!r}"
            )
    return {c: (absolute_path(v) or v) if isinstance(v, str) else list(v) for c, v in by_column.items()}
