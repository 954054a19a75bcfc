"""The progress of a run on a terminal, or in plain lines for a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from imgcurate import schema

if TYPE_CHECKING:
    from imgcurate.execution import Progress

__all__ = ["show_progress"]

_PLAIN_EVERY_S: Final = 10.0


@contextmanager
def show_progress(quiet: bool) -> Iterator[Progress | None]:
    """Yield a callback that shows one line per phase; plain lines where there is no terminal."""
    # Dask, which takes long to import, is there by the time that something runs.
    from imgcurate.execution import COUNTS

    console = Console(stderr=True)
    if quiet:
        yield None
        return
    if not console.is_terminal:
        yield _plain_progress()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn(), TextColumn("{task.fields[kept]}"))  # fmt: skip
    with Bars(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}
        seen: dict[str, list[int]] = {}

        def show(phase: str, done: int, total: int, result: dict[str, Any]) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total, kept="")
                seen[phase] = [0, 0]
            counts = result.get(COUNTS, {})
            seen[phase][0] += counts.get(schema.STATUS_OK, 0)
            seen[phase][1] += sum(counts.values())
            ok, rows = seen[phase]
            bars.update(tasks[phase], completed=done, kept=f"{ok:,} of {rows:,} ok" if rows else "")

        yield show


def _plain_progress() -> Progress:
    """Return a callback that writes a line when a phase ends, and every few seconds until then."""
    last = time.monotonic()

    def show(phase: str, done: int, total: int, result: dict[str, Any]) -> None:
        nonlocal last
        del result
        if done == total or time.monotonic() - last >= _PLAIN_EVERY_S:
            last = time.monotonic()
            print(f"{phase}: {done:,} of {total:,}", file=sys.stderr, flush=True)

    return show
