"""Counters for Prometheus, on the ``/metrics`` page that every Dask worker has: what it has done.

=============================  ==========================  ================================================
name                           labels                      what
=============================  ==========================  ================================================
``imgcurate_partitions_total`` ``work``                    partitions done: ``make``, ``decide``, ``write``
``imgcurate_samples_total``    ``work``, ``status``        their samples, by status
``imgcurate_seconds_total``    ``work``                    seconds that tasks were at it
=============================  ==========================  ================================================

Without ``prometheus_client`` (``pip install 'imgcurate[metrics]'``) nothing is counted, and Dask's page is empty.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["Work", "counted"]


class Work:
    """What a task has done; set :attr:`counts` before it ends."""

    counts: Mapping[str, int] = {}


@contextlib.contextmanager
def counted(work: str) -> Iterator[Work]:
    """Count a partition, its samples by status and the seconds that it took, if it ends well."""
    done, start = Work(), time.perf_counter()
    yield done
    if (counters := _counters()) is None:
        return
    partitions, samples, seconds = counters
    partitions.labels(work).inc()
    seconds.labels(work).inc(time.perf_counter() - start)
    for status, count in done.counts.items():
        samples.labels(work, status).inc(count)


@functools.cache
def _counters() -> tuple[Any, Any, Any] | None:
    """Return the counters of this process, in the registry that Dask's page shows."""
    try:
        from prometheus_client import Counter
    except ImportError:
        return None
    return (
        Counter("imgcurate_partitions", "Partitions done", ["work"]),
        Counter("imgcurate_samples", "Samples in partitions done", ["work", "status"]),
        Counter("imgcurate_seconds", "Seconds that tasks took", ["work"]),
    )
