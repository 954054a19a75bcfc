"""The progress of a run on a terminal, in a notebook, or in plain lines for a log."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

from imgcurate import schema
from imgcurate.errors import ConfigError

if TYPE_CHECKING:
    from imgcurate.execution import Progress

__all__ = ["progress_or_auto", "show_progress"]

_PLAIN_EVERY_S: Final = 10.0
_NOTEBOOK_EVERY_S: Final = 0.5
_WORTH_A_LINE_S: Final = 2.0
_BESIDE_BARS: Final = 74


@contextmanager
def progress_or_auto(progress: Progress | Literal["auto"] | None) -> Iterator[Progress | None]:
    """Yield a callback as it is given; for ``"auto"`` one that shows progress on a terminal or in a notebook."""
    if progress != "auto":
        yield progress
    elif (console := Console(stderr=True)).is_jupyter:
        yield _InNotebook()
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
        _check_log(log)
        try:
            file = Path(log).open("a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed below
        except OSError as exc:
            raise ConfigError(f"cannot write the log {log}: {exc.strerror or exc}") from exc
        with file:
            yield _Logged(file, show)


def _check_log(log: str) -> None:
    """Refuse to write behind what is no log."""
    with contextlib.suppress(OSError), Path(log).open("rb") as file:
        if file.read(1) not in (b"", b"{"):
            raise ConfigError(f"{log} is there already, and is no log of JSON lines: name another file")


class _Logged:
    """A :data:`imgcurate.execution.Progress` that writes a line for each partition, and hands on to a display."""

    def __init__(self, file: IO[str], show: _Display | None) -> None:
        self._file, self._show = file, show
        if show is not None:
            self.within = show.within

    def __call__(self, phase: str, done: int, total: int, result: dict[str, Any]) -> None:
        from imgcurate.execution import COUNTS

        now = dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "phase": phase, "done": done, "total": total, "counts": result.get(COUNTS, {})}
        self._file.write(json.dumps(line) + "\n")
        if self._show is not None:
            self._show(phase, done, total, result)


@contextmanager
def _shown(quiet: bool) -> Iterator[_Display | None]:
    console = Console(stderr=True)
    if quiet:
        yield None
    elif not console.is_terminal:
        yield _PlainLines()
    else:
        with _Bars(*_columns(console.width), console=console) as bars:
            yield _OnTerminal(bars)


class _Display(ABC):
    """What shows progress: a :data:`imgcurate.execution.Progress` that may hear how far partitions in work are."""

    def __init__(self) -> None:
        self._tally, self._done = _Tally(), dict[str, int]()
        self._parts, self._samples = 0.0, 0

    def __call__(self, phase: str, done: int, total: int, result: dict[str, Any]) -> None:
        """Show that a partition has ended."""
        # Dask, which takes long to import, is there by the time that something runs.
        from imgcurate.execution import COUNTS

        counts = result.get(COUNTS, {})
        # Of those in work there is one less until they are heard of again.
        self._parts, self._samples = max(self._parts - 1, 0), max(self._samples - sum(counts.values()), 0)
        if phase not in self._done or done == total:
            self._parts, self._samples = 0.0, 0
        self._done[phase] = done
        self._show(phase, min(done + self._parts, total), total, self._tally.words(phase, counts, self._samples))

    def within(self, phase: str, total: int, parts: float, samples: int) -> None:
        """Show how far the partitions in work are, which come to `parts` and have so many `samples` done."""
        self._parts, self._samples = parts, samples
        done = min(self._done.setdefault(phase, 0) + parts, total)
        self._show(phase, done, total, self._tally.words(phase, {}, samples))

    @abstractmethod
    def _show(self, phase: str, done: float, total: int, words: str) -> None:
        """Show how far a phase is, with words on its samples."""


class _Bars(Bars):
    """Bars, a line for each phase, and below them what the samples of the last one have come to."""

    words = ""

    def get_renderables(self) -> Iterator[Any]:
        """Yield the bars, and the words."""
        yield self.make_tasks_table(self.tasks)
        if self.words:
            yield Text(self.words, no_wrap=True, overflow="ellipsis")


def _columns(width: int) -> list[ProgressColumn]:
    """Return the columns for so many characters: where there is little room the bars give way, and then the names."""
    of_names = Column(no_wrap=True, overflow="ellipsis")
    name = TextColumn("{task.description}", table_column=of_names)
    bar = BarColumn(bar_width=min(max(width - _BESIDE_BARS, 4), 40))
    numbers = MofNCompleteColumn(table_column=Column(no_wrap=True, justify="right"))
    times = [kind(table_column=Column(no_wrap=True, min_width=7)) for kind in (TimeElapsedColumn, TimeRemainingColumn)]
    return [name, bar, numbers, *times]


class _OnTerminal(_Display):
    """Show bars."""

    def __init__(self, bars: _Bars) -> None:
        super().__init__()
        self._bars, self._tasks = bars, dict[str, Any]()

    def _show(self, phase: str, done: float, total: int, words: str) -> None:
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(phase, total=total)
        self._bars.words = words or self._bars.words
        self._bars.update(self._tasks[phase], completed=done)


class _InNotebook(_Display):
    """Keep one output of a notebook's cell up to date, a line for each phase."""

    def __init__(self) -> None:
        super().__init__()
        import IPython.display

        self._lines, self._last = dict[str, str](), 0.0
        self._handle: Any = IPython.display.display({"text/plain": "starting"}, raw=True, display_id=True)  # type: ignore[no-untyped-call]

    def _show(self, phase: str, done: float, total: int, words: str) -> None:
        self._lines[phase] = _line(phase, done, total, words)
        if done == total or time.monotonic() - self._last >= _NOTEBOOK_EVERY_S:
            self._last = time.monotonic()
            self._handle.update({"text/plain": "\n".join(self._lines.values())}, raw=True)


class _PlainLines(_Display):
    """Write a line when a phase ends that took its time, and every few seconds until then."""

    def __init__(self) -> None:
        super().__init__()
        self._last = time.monotonic()

    def _show(self, phase: str, done: float, total: int, words: str) -> None:
        now = time.monotonic()
        ends = done >= total and (words or now - self._last >= _WORTH_A_LINE_S)
        if ends or now - self._last >= _PLAIN_EVERY_S:
            self._last = now
            print(_line(phase, done, total, words), file=sys.stderr, flush=True)


def _line(phase: str, done: float, total: int, words: str) -> str:
    return f"{phase}: {int(done):,} of {total:,}{f' ({words})' if words else ''}"


class _Tally:
    """What the partitions of a phase have come to."""

    def __init__(self) -> None:
        self._phase, self._ok, self._rows, self._errors = "", 0, 0, 0
        self._begun = self._last = time.monotonic()

    def words(self, phase: str, counts: dict[str, int], within: int = 0) -> str:
        """Add a partition; say how many samples are done, what became of them, and how fast it goes.

        So many are done `within` partitions that have not ended.
        """
        if phase != self._phase:
            # A phase begins where the last one ended.
            self._phase, self._ok, self._rows, self._errors, self._begun = phase, 0, 0, 0, self._last
        self._last = time.monotonic()
        self._ok += counts.get(schema.STATUS_OK, 0)
        self._rows += sum(counts.values())
        self._errors += sum(n for status, n in counts.items() if status in schema.UNREADABLE)
        if not self._rows + within:
            return ""
        rate = (self._rows + within) / max(self._last - self._begun, 1e-3)
        share = f", {100 * self._ok / self._rows:.1f}% ok" if self._rows else ""
        errors = f", {self._errors:,} errors" if self._errors else ""
        return f"{self._rows + within:,} samples{share}{errors}, {rate:,.{0 if rate >= 10 else 1}f}/s"
