"""Run the partitions of a frame on a cluster in waves, each giving a small result.

A graph of all partitions of a big data set would burden the scheduler; a few waves in flight keep
every worker busy as well. What a task makes goes to files; only a line of JSON comes back.
"""

from __future__ import annotations

import contextlib
import json
import logging
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final

import dask.dataframe as dd
import numpy as np
import pandas as pd
from distributed import Client, Future, as_completed, futures_of
from distributed.client import ClosedClientError
from distributed.comm import CommClosedError
from distributed.scheduler import KilledWorker

from imgcurate.backend import lazy_frame
from imgcurate.errors import ClusterError, ConfigError, ImgcurateError, PartitionsError, printable
from imgcurate.filesystems import StorageError
from imgcurate.liveness import NO_WORKER_ERRORS, Liveness
from imgcurate.memory import is_device_error, is_out_of_memory, keep_freed_memory

__all__ = [
    "COUNTS",
    "RESULT_META",
    "Progress",
    "call_frame",
    "may_pass",
    "number_frame",
    "reason_of",
    "result_frame",
    "run_on_client",
    "run_waves",
    "unique_key",
]

Progress = Callable[[str, int, int, dict[str, Any]], None]
"""Called with (phase, partitions done, partitions in all, result of the last partition)."""

COUNTS: Final = "counts"
"""In the result of a partition, its rows by status."""

RESULT_META: Final = pd.DataFrame({"number": pd.Series(dtype="int64"), "result": pd.Series(dtype="str")})
_MOST_LIGHT: Final = 32
_MIN_WAVE: Final = 32
_GRAPHS_HELD: Final = 8
# So many suspects in a row, or two for each thread if that is more, make one ask whether anything still works.
_MIN_IN_A_ROW: Final = 8
_PROBES: Final = 3
_RUNS_ALONE: Final = 2
_MAX_ALONE_IN_A_ROW: Final = 8
_FETCHES: Final = 3
_FETCH_S: Final = 30.0
_REASON_CHARACTERS: Final = 500
logger = logging.getLogger(__name__)


def result_frame(number: int, result: dict[str, Any]) -> pd.DataFrame:
    """Return what a task sends back: its partition's number and a small result."""
    return pd.DataFrame({"number": np.array([number]), "result": [json.dumps(result)]})


def number_frame(numbers: Sequence[int]) -> dd.DataFrame:
    """Return a frame of the given partition numbers, one per partition, to go beside another frame."""
    meta = pd.DataFrame({"number": pd.Series(dtype="int64")})
    return lazy_frame(_one_number, list(numbers), once=unique_key(), meta=meta, label="number")


def unique_key() -> str:
    """Return what makes the keys of a graph its own.

    Dask remembers a task that failed by its key as long as anybody holds its future, such as the
    traceback of the last error in a notebook: the same work again would fail without being tried.
    """
    return uuid.uuid4().hex


def _one_number(number: int, once: str) -> pd.DataFrame:
    del once
    return pd.DataFrame({"number": np.array([number])})


def call_frame(
    function: Callable[..., dict[str, Any]], numbers: Sequence[int], items: Sequence[Any], **kwargs: Any
) -> dd.DataFrame:
    """Return a frame whose partitions are ``function(item, **kwargs)``, for :func:`run_waves`."""
    return lazy_frame(
        _call, list(numbers), list(items), function=function, kwargs=kwargs, once=unique_key(),
        meta=RESULT_META, label=getattr(function, "__name__", "work").strip("_"),
    )  # fmt: skip


def _call(
    number: int, item: Any, function: Callable[..., dict[str, Any]], kwargs: dict[str, Any], once: str
) -> pd.DataFrame:
    del once
    keep_freed_memory()
    return result_frame(number, function(item, **kwargs))


def run_waves(
    client: Client,
    build: Callable[[list[Any]], dd.DataFrame],
    numbers: Iterable[int] | Iterable[Sequence[int]],
    *,
    phase: str,
    resources: dict[str, float] | None = None,
    progress: Progress | None = None,
    max_failed: int = 0,
    failed: dict[int, str] | None = None,
) -> dict[int, dict[str, Any]]:
    """Run partitions on the cluster, a few waves at a time.

    A partition is *suspect* if its workers died again and again, or it raised an error that may pass (see
    :func:`may_pass`): a worker that dies takes those along that merely waited there. Suspects are put aside until
    all others are done, and then run one by one, with nothing else on the cluster.

    Parameters
    ----------
    client : distributed.Client
        The cluster.
    build : callable
        Takes partition numbers and returns a frame with one partition for each, in this order, whose rows are
        those of :func:`result_frame`. If `numbers` are bundles it takes some of these, and one partition
        has the rows of a bundle.
    numbers : iterable of int, or of sequences of int
        The partitions to run; those that one task is to do are a *bundle*. If a bundle fails its partitions
        run alone.
    phase : str
        Named in progress and errors.
    resources : dict, optional
        Dask resources that each partition takes, such as ``{"GPU": 0.5}``.
    progress : callable, optional
        Called as each partition ends well.
    max_failed : int
        How many partitions may fail; needs `failed`.
    failed : dict of int to str, optional
        Is filled with the partitions that failed for good, and why, in one line; what it holds before does not count.
        Without it no partition may fail, and the error of the first one is raised.

    Returns
    -------
    dict of int to dict
        The result of each partition that did not fail.

    Raises
    ------
    PartitionsError
        If `failed` is given and more than `max_failed` partitions failed for good: at the end if they were suspects,
        else at once. It ends sooner too where nothing works any more: many suspects in a row, and the first of
        them fail alone as well.
    ClusterError
        If the scheduler or all workers that can run a partition are gone, or, without `failed`, a partition kills
        its worker also when it runs alone.
    Exception
        What a task raised, if no partition may fail. The partitions that are not done are cancelled.
    """
    waves = _Waves(client, build, phase, resources, progress)
    waves.allow(max_failed if failed is not None else 0, failed)
    try:
        return waves.run(list(numbers))
    except BaseException:
        waves.cancel()
        raise


def run_on_client(
    phase: str,
    function: Callable[[int], dict[str, Any]],
    numbers: Sequence[int],
    *,
    client: Client,
    resources: dict[str, float] | None = None,
    progress: Progress | None = None,
    light: bool = False,
) -> dict[int, dict[str, Any]]:
    """Run ``function(number)`` for each number on the cluster; see :func:`run_waves`.

    Work that is `light`, such as counting the rows of a part, is done for up to 32 numbers by one task: a task
    costs about a millisecond of the scheduler.
    """
    todo = list(numbers)
    size = min(_MOST_LIGHT, len(todo) // (4 * max(1, sum(client.nthreads().values())))) if light else 1
    if size <= 1:
        return run_waves(
            client, lambda n: call_frame(function, n, n), todo, phase=phase, resources=resources, progress=progress
        )
    return run_waves(
        client, partial(_bundle_frame, function), [todo[i : i + size] for i in range(0, len(todo), size)],
        phase=phase, resources=resources, progress=progress,
    )  # fmt: skip


def _bundle_frame(function: Callable[[int], dict[str, Any]], bundles: list[list[int]]) -> dd.DataFrame:
    return lazy_frame(
        _run_bundle, bundles, function=function, once=unique_key(), meta=RESULT_META, label="bundle"
    )  # fmt: skip


def _run_bundle(numbers: Sequence[int], function: Callable[[int], dict[str, Any]], once: str) -> pd.DataFrame:
    del once
    keep_freed_memory()
    return pd.concat([result_frame(number, function(number)) for number in numbers])


def may_pass(error: BaseException) -> bool:
    """Return whether what a task raised may be otherwise the next time: storage, network, memory, a dead worker."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConfigError):
            return False
        if isinstance(cause, (OSError, StorageError, KilledWorker)):
            return True
        cause = cause.__cause__
    return is_out_of_memory(error)


def reason_of(error: BaseException) -> str:
    """Return why something failed, in one line."""
    if isinstance(error, KilledWorker):
        return "the workers that ran it died again and again (out of memory, or a crash in a model or stage)"
    text = " ".join(str(error).split())[:_REASON_CHARACTERS]
    return printable(text if isinstance(error, ImgcurateError) and text else f"{type(error).__name__}: {text}")


_Outcome = dict[int, dict[str, Any]] | BaseException


class _Waves:
    """The partitions of one phase: what is in flight, done, suspect and failed."""

    def __init__(
        self,
        client: Client,
        build: Callable[[list[Any]], dd.DataFrame],
        phase: str,
        resources: dict[str, float] | None,
        progress: Progress | None,
    ) -> None:
        self._client, self._build, self._phase, self._progress = client, build, phase, progress
        self._resources = resources
        self._liveness = Liveness(client, phase, resources)
        self._done: as_completed = as_completed(loop=client.loop)
        self._pending: dict[Future, tuple[int, ...]] = {}
        self._graphs: deque[tuple[dd.DataFrame, dd.DataFrame]] = deque(maxlen=_GRAPHS_HELD)
        self._fetches: Counter[Future] = Counter()
        self._results: dict[int, dict[str, Any]] = {}
        self._suspects: dict[int, BaseException] = {}
        self._failed: dict[int, str] = {}
        self._first: BaseException | None = None
        self._in_a_row = self._total = 0
        self._bundled = False
        self.allow(0, None)

    def allow(self, max_failed: int, report: dict[int, str] | None) -> None:
        """Say how many partitions may fail, and where that is told."""
        self._max_failed, self._report = max_failed, report

    def run(self, numbers: list[Any]) -> dict[int, dict[str, Any]]:
        """Run the partitions and return their results."""
        self._bundled = bool(numbers) and not isinstance(numbers[0], int)
        bundles = [tuple(n) if self._bundled else (n,) for n in numbers]
        self._total = sum(map(len, bundles))
        self._liveness.check()
        threads = self._threads()
        wave, most_in_a_row = max(_MIN_WAVE, 8 * threads), max(_MIN_IN_A_ROW, 2 * threads)
        todo = deque(bundles)
        while todo or self._pending:
            if todo and self._in_a_row >= most_in_a_row and self._is_too_many():
                # Before more work is done in vain: does anything still work?
                self._drain()
                self._in_a_row = 0
                if not self._run_suspects(_PROBES, until_done=True):
                    self._give_up_suspects()
                    raise self._error(complete=False)
            elif todo and len(self._pending) <= wave:
                self._submit([todo.popleft() for _ in range(min(wave, len(todo)))])
            else:
                self._take(*self._next())
        self._run_suspects(_MAX_ALONE_IN_A_ROW)
        self._give_up_suspects()
        if len(self._failed) > self._max_failed:
            raise self._error()
        return self._results

    def cancel(self) -> None:
        """Cancel what is in flight, as far as the cluster is still there."""
        if self._client.status == "running":
            with contextlib.suppress(OSError, RuntimeError):
                self._client.cancel(list(self._pending), force=True)

    def _threads(self) -> int:
        try:
            return sum(self._client.nthreads().values())
        except (OSError, AttributeError) as exc:
            raise self._liveness.lost(exc) from exc

    def _is_too_many(self) -> bool:
        return len(self._failed) + len(self._suspects) > self._max_failed

    def _submit(self, bundles: list[tuple[int, ...]]) -> None:
        built = self._build([list(b) if self._bundled else b[0] for b in bundles])
        graph = built.optimize()
        # A scheduler in this process reads the graph in a thread of its own, and looks its expressions up among
        # those that live here: were they freed meanwhile, it would not find them (dask 2026.7).
        self._graphs.append((built, graph))
        try:
            frame = self._client.persist(graph, resources=self._resources)
        except (CommClosedError, ClosedClientError) as exc:
            raise self._liveness.lost(exc) from exc
        # The keys of a frame are (name, position of the partition).
        futures = sorted(futures_of(frame), key=lambda future: future.key[1])
        self._pending.update(zip(futures, bundles, strict=True))
        self._done.update(futures)

    def _next(self) -> tuple[tuple[int, ...], _Outcome]:
        """Wait for a bundle to end; return its numbers, and their results or what it raised."""
        while True:
            while not self._done.has_ready():
                self._liveness.check()
                with self._done.thread_condition:
                    self._done.thread_condition.wait(timeout=0.1)
            future = next(self._done)
            outcome = self._outcome(future)
            if outcome is None:
                self._done.add(future)
                continue
            numbers = self._pending.pop(future)
            future.release()
            self._liveness.alive()
            return numbers, outcome

    def _outcome(self, future: Future) -> _Outcome | None:
        """Return the result of a future or what its task raised; None if it has to be waited for again."""
        if future.status in ("lost", "pending"):
            # The worker died before the result was here: the scheduler has it made again.
            return None
        try:
            frame = future.result(timeout=_FETCH_S)
            pairs = zip(frame["number"].tolist(), frame["result"].tolist(), strict=True)
            result = {number: json.loads(text) for number, text in pairs}
        except KeyboardInterrupt:
            raise
        except BaseException as exc:
            if isinstance(exc, NO_WORKER_ERRORS):
                raise self._liveness.unplaced(exc) from exc
            if future.status == "error":
                return exc
            if future.cancelled() or self._client.status != "running":
                raise self._liveness.lost(exc) from exc
            if not isinstance(exc, OSError):
                raise
            self._fetches[future] += 1
            return exc if self._fetches[future] > _FETCHES else None
        return result

    def _take(self, numbers: tuple[int, ...], outcome: _Outcome) -> None:
        """Take note of how a bundle ended whose partitions did not run alone."""
        if isinstance(outcome, dict):
            for number, result in outcome.items():
                self._finish(number, result)
        elif may_pass(outcome) or (len(numbers) > 1 and self._max_failed):
            level = logging.INFO if self._suspects else logging.WARNING
            logger.log(level, "%s: partition %d is tried again later: %s", self._phase, numbers[0], reason_of(outcome))
            self._suspects.update(dict.fromkeys(numbers, outcome))
            self._in_a_row += 1
        else:
            self._fail(numbers[0], outcome)

    def _finish(self, number: int, result: dict[str, Any]) -> None:
        self._in_a_row = 0
        self._results[number] = result
        if self._progress:
            self._progress(self._phase, len(self._results), self._total, result)

    def _fail(self, number: int, error: BaseException, note: str = "") -> None:
        """Take note of a partition that failed for good; end the run if that is a fault of a stage or of parameters.

        And of a GPU, with which a worker can do nothing any more: all that it is given would fail.
        """
        if not may_pass(error) and (self._max_failed == 0 or is_device_error(error)):
            raise error
        self._first = self._first or error
        self._failed[number] = reason_of(error) + note
        if self._report is not None:
            self._report[number] = self._failed[number]
        if not may_pass(error) and len(self._failed) > self._max_failed:
            raise self._error(complete=False)

    def _give_up_suspects(self) -> None:
        """Count the suspects that are left as failed: so many others failed alone that these would as well."""
        for number, error in self._suspects.items():
            self._fail(number, error, " (not tried alone)")
        self._suspects.clear()

    def _drain(self) -> None:
        while self._pending:
            self._take(*self._next())

    def _run_suspects(self, most: int, *, until_done: bool = False) -> bool:
        """Run suspects one by one, alone; return whether the last of them succeeded.

        Parameters
        ----------
        most : int
            Stop after so many in a row have failed.
        until_done : bool
            Stop after the first that succeeds.
        """
        in_a_row = 0
        for number in sorted(self._suspects):
            if in_a_row == most:
                break
            outcome = self._run_alone(number)
            del self._suspects[number]
            if isinstance(outcome, dict):
                in_a_row = 0
                self._finish(number, outcome[number])
                if until_done:
                    break
            else:
                in_a_row += 1
                self._fail(number, outcome)
        return in_a_row == 0

    def _run_alone(self, number: int) -> _Outcome:
        for _ in range(_RUNS_ALONE):
            self._submit([(number,)])
            _, outcome = self._next()
            # One that killed all these workers alone is to blame: others would die as well.
            if isinstance(outcome, (dict, KilledWorker)) or not may_pass(outcome):
                break
        return outcome

    def _error(self, *, complete: bool = True) -> BaseException:
        """Return the error of a run in which more partitions failed than may."""
        error: ClusterError
        if self._report is not None:
            error = PartitionsError(self._phase, self._failed, self._total, complete)
        elif isinstance(self._first, KilledWorker):
            error = ClusterError(
                f"{self._phase}: a partition killed its worker again and again (out of memory, or a crash in a model "
                "or stage); what was finished is kept: run again to go on, with fewer workers or files per partition"
            )
        else:
            assert self._first is not None  # noqa: S101 - set with the first that failed
            return self._first
        error.__cause__ = self._first
        return error
