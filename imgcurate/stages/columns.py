"""A filter on columns that are there: of sidecars, of stages, of the index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from imgcurate import schema
from imgcurate.batches import ImageBatch
from imgcurate.errors import ConfigError
from imgcurate.stages.base import ProcessingStage, Rule
from imgcurate.stages.scoring import Range, check_pair, rules_of

__all__ = ["ColumnFilterStage"]


@dataclass
class ColumnFilterStage(ProcessingStage):
    """Keep the samples whose values in columns that are there lie in given ranges.

    Columns may be those of sidecars, as img2dataset's ``similarity``, which comes as ``source_similarity`` since
    imgcurate has a column of that name itself, or those that stages before this one add, also your own. They hold
    numbers.

    Attributes
    ----------
    ranges : mapping of str to pair
        Per column the smallest and the largest value that is kept, both inclusive; None is open:
        ``{"source_similarity": (0.3, None), "punsafe": (None, 0.1)}``. A sample outside, or without a value, has the
        status ``column`` and a reason such as ``punsafe 0.42 > 0.10``.

    Raises
    ------
    ConfigError
        If a range is none.
    """

    ranges: Mapping[str, Range] = field(default_factory=dict)

    name: ClassVar[str] = schema.STATUS_COLUMN

    def __post_init__(self) -> None:
        if not isinstance(self.ranges, Mapping) or not all(isinstance(c, str) and c for c in self.ranges):
            raise ConfigError(
                f"ranges={self.ranges!r} should be a mapping of columns to pairs, as punsafe: [null, 0.1]"
            )
        for column, bounds in self.ranges.items():
            check_pair(column, bounds)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The columns."""
        return tuple(self.ranges)

    @property
    def nullable(self) -> tuple[str, ...]:  # type: ignore[override]
        """The columns: a sample without a value leaves for that."""
        return tuple(self.ranges)

    @property
    def rules(self) -> tuple[Rule, ...]:  # type: ignore[override]
        """A rule for each bound."""
        return rules_of(self.ranges, schema.STATUS_COLUMN)

    def process(self, batch: ImageBatch) -> ImageBatch:
        """Return the batch as it is: rules decide."""
        return batch
