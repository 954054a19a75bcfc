"""A Dask client: local workers sized to the machine, one worker per GPU, or a running scheduler."""

from __future__ import annotations

import ast
import contextlib
import importlib
import logging
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import dask
import psutil
from distributed import Client, LocalCluster

from imgcurate.backend import cpu_count, get_backend
from imgcurate.errors import ClusterError, ConfigError

__all__ = ["cluster_device", "open_client"]

logger = logging.getLogger(__name__)
_GIB: Final = 1024**3
_MEMORY_PER_WORKER_BYTES: Final = 4 * _GIB
_LOOPBACK: Final = "127.0.0.1"


@contextlib.contextmanager
def open_client(
    *,
    device: str = "auto",
    n_workers: int | None = None,
    scheduler: str | None = None,
    tasks_per_gpu: int = 1,
    dashboard_address: str | None = f"{_LOOPBACK}:0",
    security: Any = None,
) -> Iterator[Client]:
    """Open a Dask client, and the cluster behind it where there is none yet.

    Parameters
    ----------
    device : {"auto", "cpu", "gpu"}
        GPUs give a ``LocalCUDACluster``, one worker per GPU, with an RMM pool that torch and CuPy
        share; the CPU a ``LocalCluster``.
    n_workers : int, optional
        Worker processes. By default one per GPU; on the CPU one per core as far as the memory
        allows 4 GiB each, fewer and wider ones on big machines.
    scheduler : str, optional
        Address of a running scheduler (``tcp://host:8786``) or path of a scheduler file; nothing
        is started then.
    tasks_per_gpu : int
        Tasks that run at the same time on one GPU.
    dashboard_address : str, optional
        Where the dashboard listens: on loopback unless told otherwise. None: no dashboard.
    security : distributed.security.Security, optional
        TLS settings for `scheduler`.

    Yields
    ------
    distributed.Client
        Closed, with what was started, when the context ends.

    Raises
    ------
    ConfigError
        If `n_workers` is not positive, or a script calls this without ``if __name__ == "__main__":``.
    DeviceError
        If a GPU is asked for and is not usable here.
    ClusterError
        If the scheduler does not answer.
    """
    if n_workers is not None and n_workers < 1:
        raise ConfigError(f"n_workers={n_workers} should be >= 1")
    if scheduler is not None:
        with _connect(scheduler, security) as client:
            yield client
        return
    _check_main_guard()
    backend = get_backend(device)
    with _logging_alike():
        if backend.is_gpu:
            cluster = _cuda_cluster(n_workers, tasks_per_gpu, dashboard_address)
        else:
            cluster = _cpu_cluster(n_workers, dashboard_address)
    with _closing(cluster), _closing(Client(cluster)) as client:
        client.run(_ignore_interrupts)
        yield client


@contextlib.contextmanager
def _closing(resource: Any) -> Iterator[Any]:
    """Close a client or cluster; that workers which died do not answer must not hide why they did."""
    try:
        yield resource
    finally:
        try:
            resource.close()
        except (TimeoutError, OSError, RuntimeError) as exc:
            logger.info("closing %s: %r", type(resource).__name__, exc)


def _check_main_guard() -> None:
    """Refuse to start workers from a script's top level: each would run the script again, without end."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
    path = frame.f_globals.get("__file__")
    if frame.f_code.co_name != "<module>" or frame.f_globals.get("__name__") != "__main__" or not path:
        return
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    for node in tree.body:
        if node.lineno <= frame.f_lineno <= (node.end_lineno or node.lineno):
            names = (
                {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)} if isinstance(node, ast.If) else set()
            )
            if "__name__" not in names:
                raise ConfigError(
                    f"{path}, line {frame.f_lineno}: workers are processes that import this script again, so what "
                    'starts them must stand under: if __name__ == "__main__":'
                )


def _ignore_interrupts() -> None:
    """Leave Ctrl-C, which a terminal sends to all its processes, to the client: it ends the workers."""
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def cluster_device(client: Client, device: str) -> str:
    """Return ``cpu`` or ``gpu`` for the workers of a cluster.

    Parameters
    ----------
    client : distributed.Client
        A connected client.
    device : {"auto", "cpu", "gpu"}
        What was asked for; ``auto`` is decided by the workers, which must agree.

    Raises
    ------
    DeviceError
        If ``gpu`` is asked for and a worker has none.
    ClusterError
        If there is no worker, or some have a usable GPU and others not.
    """
    if not client.scheduler_info(n_workers=-1)["workers"]:
        raise ClusterError("the scheduler has no workers: start some, then try again")
    if device == "cpu":
        return "cpu"
    found: dict[str, str] = client.run(_worker_device, device)
    kinds = set(found.values())
    if len(kinds) > 1:
        without = next(address for address, kind in found.items() if kind == "cpu")
        raise ClusterError(f"some workers have a usable GPU and others not ({without}): name --device cpu or gpu")
    return kinds.pop()


def _worker_device(device: str) -> str:
    return get_backend(device).name


@contextlib.contextmanager
def _connect(scheduler: str, security: Any) -> Iterator[Client]:
    where: dict[str, Any] = {"address": scheduler}
    if "://" not in scheduler and scheduler.endswith(".json"):
        if not Path(scheduler).is_file():
            raise ClusterError(f"there is no scheduler file {scheduler}: name it, or the scheduler's address")
        where = {"scheduler_file": scheduler}
    try:
        client = Client(**where, timeout="15s", security=security)
    except (OSError, ValueError, TimeoutError) as exc:
        raise ClusterError(f"no Dask scheduler answers at {scheduler}: {exc}") from exc
    with client:
        yield client


def _cpu_cluster(n_workers: int | None, dashboard_address: str | None) -> LocalCluster:
    cores = cpu_count()
    memory = psutil.virtual_memory().total
    if n_workers is None:
        n_workers = max(1, min(cores, memory // _MEMORY_PER_WORKER_BYTES))
        if n_workers > 8:
            n_workers = max(8, cores // 4)
    threads = str(max(1, cores // n_workers))
    return LocalCluster(
        n_workers=n_workers,
        threads_per_worker=1,
        memory_limit=int(0.9 * memory / n_workers),
        host=_LOOPBACK,
        dashboard_address=dashboard_address,
        # torch, DALI and BLAS read these when the worker starts.
        env={f"{library}_NUM_THREADS": threads for library in ("OMP", "MKL", "OPENBLAS")},
    )


def _logging_alike() -> Any:
    """Make the workers that are started in this context, also later ones in their place, log as this process does.

    Dask sets up its logging when it is imported, so the variable has to be there before a worker's Python starts.
    """
    key, level = "distributed.nanny.pre-spawn-environ", dask.config.get("logging.distributed", None)
    more = {"DASK_LOGGING__DISTRIBUTED": level} if isinstance(level, str) else {}
    return dask.config.set({key: {**dask.config.get(key, {}), **more}})


def _cuda_cluster(n_workers: int | None, tasks_per_gpu: int, dashboard_address: str | None) -> Any:
    dask_cuda = importlib.import_module("dask_cuda")
    return dask_cuda.LocalCUDACluster(
        n_workers=n_workers,
        threads_per_worker=tasks_per_gpu,
        host=_LOOPBACK,
        dashboard_address=dashboard_address,
        # DALI has a pool of its own, so RMM starts with less than half of the memory.
        rmm_pool_size=0.4,
        rmm_allocator_external_lib_list=["torch", "cupy"],
        enable_cudf_spill=True,
        resources={"GPU": 1},
    )
