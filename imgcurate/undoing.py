"""The rows of a finished run's catalog -> what they were before any rule decided."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgcurate import schema
from imgcurate.backend import get_backend
from imgcurate.catalog import Catalog, undecided
from imgcurate.errors import ConfigError
from imgcurate.stages.rules import AnyRule, ValueRule

__all__ = ["NOT_DECIDED", "Undo", "by_code", "read_part"]

NOT_DECIDED: Final = schema.UNREADABLE | {schema.STATUS_OK, schema.STATUS_TOO_SMALL, schema.STATUS_DUPLICATE}
"""What a sample is before any stage looks at it."""


def by_code(status: str, samples: str, folder: str) -> str:
    """Say that samples were dropped by code, which cannot be decided anew."""
    return (
        f"{samples} of {folder} were dropped as {status!r} by the code of a stage, not by a rule on a column: that "
        "cannot be decided anew without the images. Deduplication after it can change, but no threshold"
    )


@dataclass(frozen=True)
class Undo:
    """How the rows of a catalog become what they were before any rule; picklable.

    Attributes
    ----------
    rules : tuple of Rule or ValueRule
        Those of the run.
    batch_phases : frozenset of int
        The phases of per-batch stages.
    keeps : bool
        Whether samples that the code of a stage dropped in the first phase may stay so: all rules are as they were.
    """

    rules: tuple[AnyRule, ...]
    batch_phases: frozenset[int]
    keeps: bool

    def __call__(self, table: pa.Table, folder: str) -> pa.Table:
        """Return the rows of a part.

        Raises
        ------
        ConfigError
            If some were dropped by code, and may not stay so.
        """
        status = table[schema.STATUS]
        phase = table[schema.PHASE].to_numpy(zero_copy_only=False) if schema.PHASE in table.column_names else None
        decided = pc.invert(pc.is_in(status, value_set=pa.array(sorted(NOT_DECIDED), pa.string())))
        by_batch = decided.to_numpy(zero_copy_only=False)
        if phase is not None:
            by_batch &= np.isin(phase, sorted(self.batch_phases)) | np.isnan(phase.astype(float))
        ruled = by_batch & self._ruled(table)
        coded = by_batch & ~ruled
        # A run of one phase does not tell it.
        first_phase = phase == 0 if phase is not None else np.ones(len(table), bool)
        stays = coded & first_phase & self.keeps
        if (coded & ~stays).any():
            first = status[int(np.flatnonzero(coded & ~stays)[0])].as_py()
            raise ConfigError(by_code(first, "samples", folder))
        table = undecided(table)
        for name, value in ((schema.STATUS, schema.STATUS_OK), (schema.REASON, "")):
            column = pc.if_else(pa.array(ruled), value, table[name])
            table = table.set_column(table.column_names.index(name), name, column)
        return table

    def _ruled(self, table: pa.Table) -> npt.NDArray[np.bool_]:
        """Return the mask of the rows that left by a rule: it does not keep their value, and their reason tells it."""
        ruled = np.zeros(len(table), dtype=bool)
        for rule in self.rules:
            here = pc.and_(
                pc.equal(table[schema.STATUS], rule.status), pc.starts_with(table[schema.REASON], f"{rule.column} ")
            ).to_numpy(zero_copy_only=False)
            if here.any():
                here[here] = _left_by(rule, table.filter(pa.array(here)))
                ruled |= here
        return ruled


def _left_by(rule: AnyRule, rows: pa.Table) -> npt.NDArray[np.bool_]:
    """Return which of some rows, with the status of a rule and reasons that begin as its reasons do, left by it."""
    values = rows[rule.column]
    if isinstance(rule, ValueRule):
        # The reason tells the value: the list need not be there any more.
        words = (rule.reason(math.nan if value is None else value) for value in values.to_pylist())
        return np.fromiter(map(operator.eq, words, rows[schema.REASON].to_pylist()), bool, len(rows))
    # In the type of the column, as the run compared: another one rounds.
    left = np.ones(len(rows), bool)
    there = pc.is_valid(values).to_numpy()
    left[there] = ~np.asarray(
        rule.keeps(values.drop_null().combine_chunks().to_numpy(zero_copy_only=False)), dtype=bool
    )
    return left


def read_part(number: int, catalog: Catalog, names: Sequence[str], undo: Undo, device: str) -> Any:
    """Return the rows of a part as they were before any rule."""
    table = undo(catalog.read(number), catalog.folder)
    return get_backend(device).frame_from_arrow(table.select(list(names)))
