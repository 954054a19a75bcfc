"""Run the partitions of a frame on a cluster in waves, each giving a small result.

A graph of all partitions of a big data set would burden the scheduler; a few waves in flight keep
every worker busy as well. What a task makes goes to files; only a line of JSON comes back.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import dask.dataframe as dd
import pandas as pd
from distributed import Client, Future, as_completed, futures_of
from distributed.scheduler import KilledWorker

from imgcurate.errors import ClusterError

__all__ = ["RESULT_META", "Progress", "call_frame", "number_frame", "result_frame", "run_on_client", "run_waves"]

Progress = Callable[[str, int, int, dict[str, Any]], None]
"""Called with (phase, partitions done, partitions in all, result of the last partition)."""

RESULT_META: Final = pd.DataFrame({"number": pd.Series(dtype="int64"), "result": pd.Series(dtype="str")})
_MIN_WAVE: Final = 32
logger = logging.getLogger(__name__)


def result_frame(number: int, result: dict[str, Any]) -> pd.DataFrame:
    """Return what a task sends back: its partition's number and a small result."""
    return pd.DataFrame({"number": [number], "result": [json.dumps(result)]}).astype(RESULT_META.dtypes)


def number_frame(numbers: Sequence[int]) -> dd.DataFrame:
    """Return a frame of the given partition numbers, one per partition, to go beside another frame."""
    meta = pd.DataFrame({"number": pd.Series(dtype="int64")})
    return dd.from_map(_one_number, list(numbers), once=_once(), meta=meta, enforce_metadata=False, label="number")


def _once() -> str:
    """Return what makes the keys of a graph its own.

    Dask remembers a task that failed by its key as long as anybody holds its future, such as the
    traceback of the last error in a notebook: the same work again would fail without being tried.
    """
    return uuid.uuid4().hex


def _one_number(number: int, once: str) -> pd.DataFrame:
    del once
    return pd.DataFrame({"number": [number]})


def call_frame(
    function: Callable[..., dict[str, Any]], numbers: Sequence[int], items: Sequence[Any], **kwargs: Any
) -> dd.DataFrame:
    """Return a frame whose partitions are ``function(item, **kwargs)``, for :func:`run_waves`."""
    return dd.from_map(
        _call, list(numbers), list(items), function=function, kwargs=kwargs, once=_once(),
        meta=RESULT_META, enforce_metadata=False, label=function.__name__.strip("_"),
    )  # fmt: skip


def _call(
    number: int, item: Any, function: Callable[..., dict[str, Any]], kwargs: dict[str, Any], once: str
) -> pd.DataFrame:
    del once
    return result_frame(number, function(item, **kwargs))


def run_waves(
    client: Client,
    build: Callable[[list[int]], dd.DataFrame],
    numbers: Iterable[int],
    *,
    phase: str,
    resources: dict[str, float] | None = None,
    progress: Progress | None = None,
) -> dict[int, dict[str, Any]]:
    """Run partitions on the cluster, a few waves at a time.

    Parameters
    ----------
    client : distributed.Client
        The cluster.
    build : callable
        Takes partition numbers and returns a frame with one partition for each, whose rows are those
        of :func:`result_frame`.
    numbers : iterable of int
        The partitions to run.
    phase : str
        Named in progress and errors.
    resources : dict, optional
        Dask resources that each partition takes, such as ``{"GPU": 0.5}``.
    progress : callable, optional
        Called as each partition ends.

    Returns
    -------
    dict of int to dict
        The result of each partition.

    Raises
    ------
    ClusterError
        If a partition killed its worker again and again.
    Exception
        What a task raised; the partitions that are not done are cancelled.
    """
    todo = list(numbers)
    wave = max(_MIN_WAVE, 8 * max(1, sum(client.nthreads().values())))
    results: dict[int, dict[str, Any]] = {}
    waiting: as_completed = as_completed()
    submitted, pending = 0, set[Future]()

    def submit() -> None:
        nonlocal submitted
        batch = todo[submitted : submitted + wave]
        submitted += len(batch)
        frame = client.persist(build(batch).optimize(), resources=resources)
        futures = futures_of(frame)
        pending.update(futures)
        waiting.update(futures)

    try:
        while len(results) < len(todo):
            if submitted < len(todo) and len(pending) <= wave:
                submit()
                continue
            future = next(waiting)
            pending.discard(future)
            row = _result_of(future, phase).iloc[0]
            future.release()
            results[int(row["number"])] = json.loads(row["result"])
            if progress:
                progress(phase, len(results), len(todo), results[int(row["number"])])
    except BaseException:
        client.cancel(list(pending), force=True)
        raise
    return results


def run_on_client(
    phase: str,
    function: Callable[[int], dict[str, Any]],
    numbers: Sequence[int],
    *,
    client: Client,
    progress: Progress | None = None,
) -> dict[int, dict[str, Any]]:
    """Run ``function(number)`` for each number on the cluster; see :func:`run_waves`."""
    return run_waves(client, lambda n: call_frame(function, n, n), list(numbers), phase=phase, progress=progress)


def _result_of(future: Future, phase: str) -> pd.DataFrame:
    try:
        frame: pd.DataFrame = future.result()
    except KilledWorker as exc:
        raise ClusterError(
            f"{phase}: a partition killed its worker again and again (out of memory, or a crash in a "
            "model or stage); what was finished is kept: run again to go on, with fewer workers or files per partition"
        ) from exc
    return frame
