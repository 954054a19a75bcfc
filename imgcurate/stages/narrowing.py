"""From a stage on, batches of the samples alone that no stage before it has dropped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from imgcurate.batches import ImageBatch, on_host
from imgcurate.stages.base import ProcessingStage

__all__ = ["Narrowing", "first_that_skips"]

_Positions = npt.NDArray[np.int64]


def first_that_skips(stages: Sequence[ProcessingStage]) -> int:
    """Return the number of the first stage that dropped samples do not come to; how many there are if it is none."""
    return next((k for k, stage in enumerate(stages) if stage.skip_dropped), len(stages))


class Narrowing:
    """Gathers what is left of batches until there is a whole one.

    Parameters
    ----------
    stages : sequence of ProcessingStage
        Those that have seen the batches.
    types : mapping of str to pa.DataType
        Of the columns that rules are about: as the catalog will hold them, so that a rule decides here as there.
    size : int
        Samples of a whole batch.
    """

    def __init__(self, stages: Sequence[ProcessingStage], types: Mapping[str, pa.DataType], size: int) -> None:
        self._stages, self._types, self._size = stages, types, size
        self._waiting: list[tuple[_Positions, ImageBatch]] = []

    def add(
        self, positions: _Positions, batch: ImageBatch, dropped: Sequence[Any]
    ) -> Iterator[tuple[_Positions, ImageBatch]]:
        """Add a batch, of which the masks `dropped` say what stages have dropped; yield whole ones."""
        index = np.flatnonzero(self._kept(batch, dropped))
        if len(index) == len(batch) and not self._waiting:
            yield positions, batch
            return
        if len(index):
            self._waiting.append((positions[index], batch.take(index)))
        while sum(len(p) for p, _ in self._waiting) >= self._size:
            yield self._next(self._size)

    def rest(self) -> Iterator[tuple[_Positions, ImageBatch]]:
        """Yield what is less than a whole batch."""
        if self._waiting:
            yield self._next(self._size)

    def _next(self, size: int) -> tuple[_Positions, ImageBatch]:
        positions = np.concatenate([p for p, _ in self._waiting])
        batch = ImageBatch.concat([b for _, b in self._waiting])
        self._waiting = [(positions[size:], batch.part(size, len(batch)))] if len(batch) > size else []
        return positions[:size], batch.part(0, min(size, len(batch)))

    def _kept(self, batch: ImageBatch, dropped: Sequence[Any]) -> npt.NDArray[np.bool_]:
        kept = np.ones(len(batch), bool)
        for mask in dropped:
            kept &= ~on_host(mask).astype(bool)
        for rule in (rule for stage in self._stages for rule in stage.rules):
            values = batch[rule.column]
            column = pa.array(
                values if isinstance(values, (pd.Series, list, tuple)) else on_host(values), from_pandas=True
            )
            if rule.column in self._types:
                column = column.cast(self._types[rule.column])
            valid = pc.is_valid(column).to_numpy(zero_copy_only=False)
            good = np.full(len(batch), rule.keeps_missing)
            good[valid] = rule.keeps(column.drop_null().to_numpy(zero_copy_only=False))
            kept &= good
        return kept
