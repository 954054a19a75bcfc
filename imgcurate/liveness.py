"""Tell whether work on a cluster can still go on, while its results are waited for.

Dask itself waits for ever for workers to come, and tells a client that lost its scheduler by cancelled futures.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any, Final

from distributed import Client, SpecCluster
from distributed.client import FutureCancelledError
from distributed.scheduler import NoValidWorkerError, NoWorkerError

from imgcurate.errors import ClusterError

__all__ = ["NO_WORKER_ERRORS", "Liveness", "gpu_share", "known_workers"]

NO_WORKER_ERRORS: Final = (NoValidWorkerError, NoWorkerError)
"""What a task ends in that found no worker, if the scheduler is set up so (``no-workers-timeout``)."""

NO_WORKER_S: float = 120.0
"""So long there may be no worker that could run a partition: a nanny, or an autoscaler, needs time to start one."""

SILENCE_S: float = 300.0
"""So long the scheduler may not answer."""

_LOOK_EVERY_S: Final = 10.0
_ANSWER_S: Final = 30.0
_KEPT: Final = "what was finished is kept"
logger = logging.getLogger(__name__)


def known_workers(client: Client, timeout: float | None = None) -> dict[str, Any]:
    """Return what the scheduler knows of each worker, by address, if it answers within so many seconds.

    ``client.scheduler_info()`` is not asked: now and then it has no workers, when what the client fetches every two
    seconds, which is without workers, comes between its question and its answer.
    """
    identity: dict[str, Any] = client.sync(client.scheduler.identity, n_workers=-1, callback_timeout=timeout)
    return dict(identity["workers"])


def gpu_share(client: Client, share: float) -> dict[str, float] | None:
    """Return the Dask resources of a task that takes a share of a GPU; None where workers have not declared any.

    Parameters
    ----------
    client : distributed.Client
        A connected client.
    share : float
        In (0, 1]: 0.5 lets two such tasks run at once on each GPU.
    """
    workers = known_workers(client).values()
    return {"GPU": share} if workers and all("GPU" in w["resources"] for w in workers) else None


class Liveness:
    """Watch over the scheduler and the workers that a phase needs.

    Parameters
    ----------
    client : distributed.Client
        The cluster.
    phase : str
        Named in errors.
    resources : mapping, optional
        Dask resources that each partition takes.
    """

    def __init__(self, client: Client, phase: str, resources: Mapping[str, float] | None = None) -> None:
        self._client, self._phase, self._resources = client, phase, dict(resources or {})
        self._address = client.scheduler.address if client.scheduler else "an address no longer known"
        self.alive()

    def alive(self) -> None:
        """Take note that a partition ended, so that a worker and the scheduler are there."""
        self._looked = self._fit_seen = self._heard = time.monotonic()

    def check(self) -> None:
        """Look at the cluster, if it is time to; call it now and then while nothing ends.

        Raises
        ------
        ClusterError
            If the connection to the scheduler is lost or it has not answered for :data:`SILENCE_S`, or
            for :data:`NO_WORKER_S` there has been no worker that could run a partition.
        """
        if self._client.status != "running":
            raise self.lost()
        now = time.monotonic()
        if now - self._looked < min(_LOOK_EVERY_S, NO_WORKER_S / 4, SILENCE_S / 4):
            return
        workers = self._workers()
        self._looked = now = time.monotonic()
        if workers is None:
            if now - self._heard > SILENCE_S:
                raise ClusterError(
                    f"{self._phase}: the scheduler at {self._address} has not answered for {SILENCE_S:.0f} s; "
                    f"{_KEPT}: run again to go on"
                )
            return
        self._heard = now
        self._revive()
        if any(self._is_fit(worker) for worker in workers.values()):
            self._fit_seen = now
        elif now - self._fit_seen > NO_WORKER_S:
            raise ClusterError(f"{self._phase}: {self._why_none(workers)}")

    def _revive(self) -> None:
        """Let this process's own cluster start workers in place of those that it has given up.

        It does so with a worker that is not there a while after it died, also if its nanny has just started it
        again and it died once more.
        """
        cluster = self._client.cluster
        if isinstance(cluster, SpecCluster) and len(cluster.workers) < len(cluster.worker_spec):
            logger.info("%s: %d workers have gone for good: starting others", self._phase,
                        len(cluster.worker_spec) - len(cluster.workers))  # fmt: skip
            cluster.scale(len(cluster.worker_spec))

    def lost(self, error: BaseException | None = None) -> ClusterError:
        """Return the error for futures that were cancelled, or a client that is not connected any more."""
        reason = error.reason if isinstance(error, FutureCancelledError) else "scheduler-connection-lost"
        if self._client.status == "running" and reason != "scheduler-connection-lost":
            return ClusterError(
                f"{self._phase}: the scheduler at {self._address} cancelled the work ({reason}); {_KEPT}: "
                "run again to go on"
            )
        return ClusterError(
            f"{self._phase}: the connection to the scheduler at {self._address} was lost; {_KEPT}: run again to go on"
        )

    def unplaced(self, error: BaseException) -> ClusterError:
        """Return the error for a task that ended in one of :data:`NO_WORKER_ERRORS`."""
        text = " ".join(str(error).split())
        return ClusterError(f"{self._phase}: {text}; {_KEPT}: start workers, then run again to go on")

    def _workers(self) -> dict[str, Any] | None:
        """Return the workers as the scheduler describes them; None if it does not answer."""
        timeout = min(_ANSWER_S, SILENCE_S / 4)
        try:
            return known_workers(self._client, timeout)
        except (OSError, RuntimeError, AttributeError) as exc:
            # The client may be closing, and have no scheduler any more: the next look tells.
            logger.info("%s: the scheduler does not answer: %r", self._phase, exc)
            return None

    def _is_fit(self, worker: Mapping[str, Any]) -> bool:
        running = worker["metrics"].get("task_counts", {})
        at_work = worker["status"] == "running" or running.get("executing", 0) or running.get("long-running", 0)
        return bool(at_work) and self._has_resources(worker)

    def _has_resources(self, worker: Mapping[str, Any]) -> bool:
        return all(worker["resources"].get(name, 0) >= amount for name, amount in self._resources.items())

    def _why_none(self, workers: Mapping[str, Any]) -> str:
        since = f"for {NO_WORKER_S:.0f} s"
        if not workers:
            return (
                f"the scheduler at {self._address} has had no worker {since}; {_KEPT}: start workers, then run again "
                "to go on"
            )
        if not any(self._has_resources(worker) for worker in workers.values()):
            wanted = ", ".join(f"{name}={amount:g}" for name, amount in self._resources.items())
            flags = " ".join(f"{name}=1" for name in self._resources)
            return (
                f"none of the {len(workers)} workers at {self._address} has declared the resources that a partition "
                f"takes ({wanted}) {since}; {_KEPT}: start workers with --resources '{flags}', then run again to go on"
            )
        return (
            f"no worker at {self._address} has taken up work {since}, being short of memory (status "
            f"{', '.join(sorted({w['status'] for w in workers.values()}))}); {_KEPT}: run again to go on, with fewer "
            "workers or files per partition"
        )
