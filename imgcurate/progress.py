"""The progress of a run on a terminal, in a notebook, or in plain lines for a log."""

from __future__ import annotations

import datetime as dt
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from imgcurate import schema
from imgcurate.errors import ConfigError

if TYPE_CHECKING:
    from imgcurate.execution import Progress

__all__ = ["progress_or_auto", "show_progress"]

_PLAIN_EVERY_S: Final = 10.0
_NOTEBOOK_EVERY_S: Final = 0.5


@contextmanager
def progress_or_auto(progress: Progress | Literal["auto"] | None) -> Iterator[Progress | None]:
    """Yield a callback as it is given; for ``"auto"`` one that shows progress on a terminal or in a notebook."""
    if progress != "auto":
        yield progress
    elif (console := Console(stderr=True)).is_jupyter:
        yield _notebook_progress()
    else:
        with _shown(quiet=not console.is_terminal) as show:
            yield show


@contextmanager
def show_progress(quiet: bool, log: str | None = None) -> Iterator[Progress | None]:
    """Yield a callback that shows one line per phase; plain lines where there is no terminal.

    Parameters
    ----------
    quiet : bool
        Show nothing.
    log : str, optional
        A file that gets a line of JSON for each partition that ends: ``time``, ``phase``, ``done``, ``total``,
        ``counts``. What is in it stays.

    Raises
    ------
    ConfigError
        If the file cannot be written.
    """
    with _shown(quiet) as show:
        if log is None:
            yield show
            return
        try:
            file = Path(log).open("a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed below
        except OSError as exc:
            raise ConfigError(f"cannot write the log {log}: {exc.strerror or exc}") from exc
        with file:
            yield _logged(file, show)


def _logged(file: IO[str], show: Progress | None) -> Progress:
    from imgcurate.execution import COUNTS

    def write(phase: str, done: int, total: int, result: dict[str, Any]) -> None:
        now = dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "phase": phase, "done": done, "total": total, "counts": result.get(COUNTS, {})}
        file.write(json.dumps(line) + "\n")
        if show is not None:
            show(phase, done, total, result)

    return write


@contextmanager
def _shown(quiet: bool) -> Iterator[Progress | None]:
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
        tally = _Tally()

        def show(phase: str, done: int, total: int, result: dict[str, Any]) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total, kept="")
            bars.update(tasks[phase], completed=done, kept=tally.words(phase, result.get(COUNTS, {})))

        yield show


def _notebook_progress() -> Progress:
    """Return a callback that keeps one output of a notebook's cell up to date, a line for each phase."""
    import IPython.display

    from imgcurate.execution import COUNTS

    lines: dict[str, str] = {}
    last, tally = 0.0, _Tally()
    handle: Any = IPython.display.display({"text/plain": "starting"}, raw=True, display_id=True)  # type: ignore[no-untyped-call]

    def show(phase: str, done: int, total: int, result: dict[str, Any]) -> None:
        nonlocal last
        words = tally.words(phase, result.get(COUNTS, {}))
        lines[phase] = _line(phase, done, total, words)
        if done == total or time.monotonic() - last >= _NOTEBOOK_EVERY_S:
            last = time.monotonic()
            handle.update({"text/plain": "\n".join(lines.values())}, raw=True)

    return show


def _line(phase: str, done: int, total: int, words: str) -> str:
    return f"{phase}: {done:,} of {total:,}{f' ({words})' if words else ''}"


class _Tally:
    """What the partitions of a phase have come to."""

    def __init__(self) -> None:
        self._phase, self._ok, self._rows, self._errors = "", 0, 0, 0
        self._begun = self._last = time.monotonic()

    def words(self, phase: str, counts: dict[str, int]) -> str:
        """Add a partition; say how many samples are done, what became of them, and how fast it goes."""
        if phase != self._phase:
            # A phase begins where the last one ended.
            self._phase, self._ok, self._rows, self._errors, self._begun = phase, 0, 0, 0, self._last
        self._last = time.monotonic()
        self._ok += counts.get(schema.STATUS_OK, 0)
        self._rows += sum(counts.values())
        self._errors += sum(n for status, n in counts.items() if status in schema.UNREADABLE)
        if not self._rows:
            return ""
        share, seconds = self._ok / self._rows, max(self._last - self._begun, 1e-3)
        errors = f", {self._errors:,} errors" if self._errors else ""
        return f"{self._rows:,} samples, {100 * share:.1f}% ok{errors}, {self._rows / seconds:,.0f}/s"


def _plain_progress() -> Progress:
    """Return a callback that writes a line when a phase ends, and every few seconds until then."""
    from imgcurate.execution import COUNTS

    last, tally = time.monotonic(), _Tally()

    def show(phase: str, done: int, total: int, result: dict[str, Any]) -> None:
        nonlocal last
        words = tally.words(phase, result.get(COUNTS, {}))
        if done == total or time.monotonic() - last >= _PLAIN_EVERY_S:
            last = time.monotonic()
            print(_line(phase, done, total, words), file=sys.stderr, flush=True)

    return show
