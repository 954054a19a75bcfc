"""Which inputs make which partition: the unit of work, of retry and of the checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["Partitions"]

# By these a run finds its parts again: other values are another format of the manifest.
_TINY_BYTES: Final = 8 * 1024**2
_MOST_TINY: Final = 64
_LEAST_PARTITIONS: Final = 64


@dataclass(frozen=True)
class Partitions:
    """How the inputs of a run are divided into the parts of its catalog.

    Attributes
    ----------
    starts : tuple of int
        The number of the first input of each part.
    n_inputs : int
        Inputs in all.
    """

    starts: tuple[int, ...]
    n_inputs: int

    @staticmethod
    def divide(
        nbytes: Sequence[int | None], files_per_partition: int | None, increments: Sequence[int] = ()
    ) -> Partitions:
        """Divide inputs, in order.

        Parameters
        ----------
        nbytes : sequence of int or None
            Size of each input in bytes; None where that is not known.
        files_per_partition : int, optional
            Inputs of a part; the last one of an increment may have fewer. By default each is a part of its own, but
            tiny neighbours share one, up to 8 MiB, 64 files and a 64th of the files of the increment.
        increments : sequence of int, optional
            Inputs in all each time that a run began or grew; no part holds inputs of two of them.

        Raises
        ------
        ValueError
            If `increments` do not grow, or are of more inputs than there are.
        """
        if list(increments) != sorted({*increments}) or (increments and increments[-1] > len(nbytes)):
            raise ValueError(f"increments={list(increments)} of {len(nbytes)} inputs")
        starts: list[int] = []
        begin = 0
        for end in [*increments, len(nbytes)]:
            if files_per_partition is None:
                starts += _by_size(nbytes, begin, end)
            else:
                starts += range(begin, end, files_per_partition)
            begin = end
        return Partitions(tuple(starts), len(nbytes))

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[range]:
        """Yield the numbers of the inputs of each part."""
        for start, stop in itertools.pairwise((*self.starts, self.n_inputs)):
            yield range(start, stop)

    def part_of(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the part of each input; -1 for numbers that no input has."""
        known = (numbers >= 0) & (numbers < self.n_inputs)
        return np.where(known, np.searchsorted(self._starts, numbers, side="right") - 1, -1)

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        return np.array(self.starts, np.int64)


def _by_size(nbytes: Sequence[int | None], begin: int, end: int) -> Iterator[int]:
    most = min(_MOST_TINY, (end - begin) // _LEAST_PARTITIONS)
    files = room = 0
    for number in range(begin, end):
        size = nbytes[number]
        if size is None:
            size = _TINY_BYTES
        if files == 0 or files >= most or size > room:
            yield number
            files, room = 0, _TINY_BYTES
        files += 1
        room -= size
