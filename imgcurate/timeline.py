"""How fast the samples of a phase were done."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from imgcurate.execution import COUNTS

if TYPE_CHECKING:
    from imgcurate.execution import Progress

__all__ = ["Timeline"]

_MOST_POINTS: Final = 120


class Timeline:
    """A :data:`imgcurate.execution.Progress` that notes when samples were done, and hands on to another.

    Parameters
    ----------
    progress : callable, optional
        The other.
    """

    def __init__(self, progress: Progress | None) -> None:
        self._progress, self._start, self._done = progress, time.perf_counter(), 0
        self._points: list[tuple[float, int]] = []

    def __call__(self, phase: str, done: int, total: int, result: dict[str, Any]) -> None:
        """Note how many samples are done."""
        self._done += sum(result.get(COUNTS, {}).values())
        self._points.append((round(time.perf_counter() - self._start, 3), self._done))
        if self._progress is not None:
            self._progress(phase, done, total, result)

    def points(self) -> list[tuple[float, int]]:
        """Return (seconds, samples done until then) in the order of time: the last ones of up to 120 equal spans."""
        if not self._points:
            return []
        span = max(self._points[-1][0] / _MOST_POINTS, 1e-9)
        last = {min(int(seconds / span), _MOST_POINTS - 1): (seconds, done) for seconds, done in self._points}
        return [last[number] for number in sorted(last)]
