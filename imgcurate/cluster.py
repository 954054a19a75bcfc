"""A Dask client: local workers sized to the machine, one worker per GPU, or a running scheduler."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import importlib
import json
import logging
import os
import signal
import ssl
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Final

import dask
import psutil
from distributed import Client, LocalCluster
from distributed.client import FutureCancelledError
from distributed.comm import CommClosedError, connect
from distributed.security import Security
from distributed.versions import VersionMismatchWarning

from imgcurate.backend import cpu_count, get_backend
from imgcurate.errors import ClusterError, ConfigError
from imgcurate.lazy import torch
from imgcurate.liveness import known_workers

__all__ = ["cluster_device", "open_client", "tls_security"]

logger = logging.getLogger(__name__)
_GIB: Final = 1024**3
_MEMORY_PER_WORKER_BYTES: Final = 4 * _GIB
_LOOPBACK: Final = "127.0.0.1"
_MOST_WORKERS: Final = 64
_CONNECT_S: Final = 15.0
_CLOSE_S: Final = 30.0
# How often a worker looks at its stack and at its event loop, which takes 3% of a core that an encoder has for itself.
_USUAL_INTERVALS: Final = {"distributed.worker.profile.interval": "10ms", "distributed.admin.tick.interval": "20ms"}
_RARER: Final = "100ms"
_MOST_THREADS_PER_GPU: Final = 8
_MOST_DECODING_THREADS: Final = 16
_WORKERS_ENVIRONMENT: Final = "distributed.nanny.pre-spawn-environ"


@contextlib.contextmanager
def open_client(
    *,
    device: str = "auto",
    n_workers: int | None = None,
    scheduler: str | None = None,
    tasks_per_gpu: int = 1,
    dashboard_address: str | None = f"{_LOOPBACK}:0",
    security: Security | None = None,
) -> Iterator[Client]:
    """Open a Dask client, and the cluster behind it where there is none yet.

    Parameters
    ----------
    device : {"auto", "cpu", "gpu"}
        GPUs give a ``LocalCUDACluster``, one worker per GPU, with an RMM pool that cudf and CuPy
        share; the CPU a ``LocalCluster``.
    n_workers : int, optional
        Worker processes. By default one per GPU; on the CPU one per core as far as the memory
        allows 4 GiB each, fewer and wider ones on big machines.
    scheduler : str, optional
        Address of a running scheduler (``tcp://host:8786``) or path of a scheduler file; nothing
        is started then.
    tasks_per_gpu : int
        Tasks that run at the same time on one GPU. Its worker has more threads, for tasks that need no GPU.
    dashboard_address : str, optional
        Where the dashboard listens: on loopback unless told otherwise. None: no dashboard.
    security : distributed.security.Security, optional
        TLS settings for `scheduler`, see :func:`tls_security`; by default those of Dask's own configuration.

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
        If the scheduler does not answer within 15 s, does not accept the TLS settings, or is lost later.
    """
    if n_workers is not None and n_workers < 1:
        raise ConfigError(f"n_workers={n_workers} should be >= 1")
    if n_workers is not None and scheduler is None and n_workers > (most := max(_MOST_WORKERS, 8 * cpu_count())):
        raise ConfigError(f"n_workers={n_workers} processes are more than this machine can use: at most {most}")
    if scheduler is not None:
        with _connect(scheduler, security) as client:
            yield client
        return
    _check_main_guard()
    backend = get_backend(device)
    with contextlib.ExitStack() as stack:
        try:
            with _worker_environment(), _stops_deferred():
                if backend.is_gpu:
                    cluster = _cuda_cluster(n_workers, tasks_per_gpu, dashboard_address)
                else:
                    cluster = _cpu_cluster(n_workers, dashboard_address)
                stack.enter_context(_closing(cluster))
                client = stack.enter_context(_closing(Client(cluster)))
        except (RuntimeError, OSError, TimeoutError) as exc:
            raise _not_started(exc) from exc
        if dashboard_address is not None:
            logger.info("the dashboard of this run is %s", client.dashboard_link)
        try:
            yield client
        except (KeyboardInterrupt, SystemExit):
            _abandon(cluster)
            raise


def _not_started(exc: BaseException) -> ClusterError:
    return ClusterError(
        f"the workers of this machine could not be started ({_first_cause(exc)}): one died, or had no memory, "
        "disk or port; run the same command again"
    )


def _first_cause(exc: BaseException) -> str:
    """Return what an error was raised from at first, in a line."""
    while exc.__cause__ is not None:
        exc = exc.__cause__
    return " ".join(str(exc).split()) or type(exc).__name__


def _abandon(cluster: Any) -> None:
    """Kill the workers of a cluster that is closed next: what they are at is of no use, and takes them a while."""

    async def kill() -> None:
        for nanny in cluster.workers.values():
            # That they are not started again.
            nanny.close_gracefully()
            if (pid := nanny.pid) is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    with contextlib.suppress(TimeoutError, OSError, RuntimeError):
        cluster.sync(kill)


@contextlib.contextmanager
def _closing(resource: Any) -> Iterator[Any]:
    """Close a client or cluster; that workers which died do not answer must not hide why they did."""
    try:
        yield resource
    finally:
        # What the event loop could not await any more, and that a worker is slow to end, is no news now.
        silenced = [logging.getLogger(name) for name in ("tornado.application", "distributed.nanny")]
        levels = [each.level for each in silenced]
        for each in silenced:
            each.setLevel(logging.CRITICAL)
        try:
            resource.close(timeout=_CLOSE_S)
        except (TimeoutError, OSError, RuntimeError) as exc:
            logger.info("closing %s: %r", type(resource).__name__, exc)
        finally:
            for each, level in zip(silenced, levels, strict=True):
                each.setLevel(level)


def _check_main_guard() -> None:
    """Refuse to start workers from a script's top level: each would run the script again, without end."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
    path = frame.f_globals.get("__file__")
    if getattr(sys.modules.get("__main__"), "__file__", None) == "<stdin>":
        raise ConfigError("workers are processes that import this script again, which they cannot from standard input")
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


@contextlib.contextmanager
def _stops_deferred() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until the workers that are started in this context can be closed.

    What is started in it never gets Ctrl-C, which a terminal sends to all its processes: signals that a thread blocks
    are blocked in the threads and processes that it starts, also in those that come in the place of dead workers.
    """
    # Started later, by a thread that blocks it, this unblocks it there.
    resource_tracker.ensure_running()
    came: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number)) if in_main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if came:
            signal.raise_signal(signal.SIGTERM)


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
    if not known_workers(client):
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


def tls_security(ca_file: str | None, cert: str | None, key: str | None) -> Security | None:
    """Return TLS settings from files, as ``dask scheduler`` takes them; None if none is named.

    Parameters
    ----------
    ca_file : str, optional
        PEM file of the authorities that signed the certificates of scheduler and workers.
    cert, key : str, optional
        PEM files of the client's certificate and of its private key.

    Raises
    ------
    ConfigError
        If only some are named, or they cannot be used.
    """
    files = {"CA file": ca_file, "certificate": cert, "key": key}
    if not any(files.values()):
        return None
    for what, name in files.items():
        if not name:
            raise ConfigError(f"TLS needs a CA file, a certificate and a key, and no {what} is named")
        if not Path(name).is_file():
            raise ConfigError(f"there is no TLS {what} {name}")
    security = Security(require_encryption=True, tls_ca_file=ca_file, tls_client_cert=cert, tls_client_key=key)
    try:
        security.get_connection_args("client")
    except (OSError, ValueError) as exc:
        raise ConfigError(f"the TLS files {ca_file}, {cert} and {key} cannot be used: {exc}") from exc
    return security


@contextlib.contextmanager
def _connect(scheduler: str, security: Security | None) -> Iterator[Client]:
    address = _address(scheduler)
    security = security if security is not None else Security()
    with ThreadPoolExecutor(1) as pool:
        # In a thread, since a notebook's has an event loop that runs. A Client that fails goes on in the background.
        try:
            pool.submit(asyncio.run, _greet(address, security)).result()
        except Exception as exc:
            raise ClusterError(f"no Dask scheduler can be used at {scheduler}: {_why_not(exc, address)}") from exc
    with warnings.catch_warnings():
        # The versions are checked by imgcurate.preflight.
        warnings.simplefilter("ignore", VersionMismatchWarning)
        try:
            client = Client(address, timeout=f"{_CONNECT_S}s", security=security)
        except (OSError, ValueError, TimeoutError, ImportError) as exc:
            raise ClusterError(f"no Dask scheduler answers at {scheduler}: {exc}") from exc
    with client:
        try:
            yield client
        except (FutureCancelledError, CommClosedError) as exc:
            if isinstance(exc, FutureCancelledError) and "connection-lost" not in str(exc):
                raise
            raise ClusterError(
                f"the connection to the scheduler at {scheduler} is lost: what was finished is kept; "
                "when it runs again, the same run goes on"
            ) from exc


def _address(scheduler: str) -> str:
    """Return the address that is given, or that is in the file that is given."""
    if "://" in scheduler or not scheduler.endswith(".json"):
        return scheduler
    if not Path(scheduler).is_file():
        raise ClusterError(f"there is no scheduler file {scheduler}: name it, or the scheduler's address")
    try:
        return str(json.loads(Path(scheduler).read_bytes())["address"])
    except (OSError, ValueError, LookupError, TypeError) as exc:
        raise ClusterError(f"{scheduler} is not the file of a Dask scheduler: {exc!r}") from exc


async def _greet(address: str, security: Security) -> None:
    """Connect as a client does, and leave."""
    arguments = security.get_connection_args("client")
    comm = await asyncio.wait_for(connect(address, timeout=_CONNECT_S, **arguments), _CONNECT_S + 1)
    comm.abort()


def _why_not(exc: BaseException, address: str) -> str:
    """Return why a scheduler cannot be used, in words, from what Dask raises."""
    causes, cause = [exc], exc.__cause__
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__
    files = "--tls-ca-file, --tls-cert and --tls-key, or distributed.comm.tls in Dask's configuration"
    for each in causes:
        if isinstance(each, ssl.SSLCertVerificationError):
            return f"its certificate is not signed by the CA that is named here ({each.verify_message})"
        if isinstance(each, ssl.SSLError):
            return (
                f"the TLS handshake fails ({each.reason or each}): does it speak TLS, and with a CA that is named here?"
            )
    if isinstance(exc, ValueError) and "convert to SSL" in str(exc):
        # Tornado's words for a server that speaks first, as Dask's do without TLS.
        return "it does not speak TLS: its address begins with tcp://"
    if isinstance(exc, TypeError) and "ssl_context" in str(exc):
        return f"tls:// needs certificates: {files}"
    if isinstance(exc, RuntimeError) and "encryption required" in str(exc):
        return "TLS is asked for, and the address is not one of tls://"
    if any(isinstance(c, (ConnectionResetError, asyncio.IncompleteReadError)) for c in causes) or not str(exc):
        return f"it closes the connection. If it speaks TLS, its address begins with tls://, and it needs {files}"
    # The innermost says most; of a last try that the time limit ended there is none with words.
    told = [" ".join(str(c).split()) for c in causes if c is exc or isinstance(c, OSError)]
    return next((text for text in reversed(told) if text), type(exc).__name__)


def dask_setup(worker: object) -> None:
    """Let what a local worker prints come to standard error: Dask calls it as a worker starts.

    Standard output is the command's, which may promise JSON; stages of one's own, and libraries, print as they like.
    """
    del worker
    sys.stdout.flush()
    os.dup2(2, 1)


def _cpu_cluster(n_workers: int | None, dashboard_address: str | None) -> LocalCluster:
    cores = cpu_count()
    memory = psutil.virtual_memory().total
    if n_workers is None:
        n_workers = max(1, min(cores, memory // _MEMORY_PER_WORKER_BYTES))
        if n_workers > 8:
            n_workers = max(8, cores // 4)
    threads = str(max(1, cores // n_workers))
    shuffles = logging.getLogger("distributed.shuffle._scheduler_plugin")
    if shuffles.level == logging.NOTSET:
        # A warning for each shuffle that begins, and one for each that ends.
        shuffles.setLevel(logging.ERROR)
    return LocalCluster(
        n_workers=n_workers,
        threads_per_worker=1,
        memory_limit=int(0.9 * memory / n_workers),
        host=_LOOPBACK,
        dashboard_address=dashboard_address,
        preload=[__name__],
        # torch, DALI and BLAS read these when the worker starts.
        env={f"{library}_NUM_THREADS": threads for library in ("OMP", "MKL", "OPENBLAS")},
    )


@contextlib.contextmanager
def _worker_environment() -> Iterator[None]:
    """Make the workers that are started in this context, also later ones in their place, log as this process does.

    Dask sets up its logging when it is imported, so the variable has to be there before a worker's Python is. What it
    sets in this process, to hand it on, would change the memory and threads of all that is started from here later.
    Workers look at themselves less often than Dask would have them, unless the user has named another time.
    """
    level = dask.config.get("logging.distributed", None)
    more: dict[str, Any] = {"DASK_LOGGING__DISTRIBUTED": level} if isinstance(level, str) else {}
    before = dict(os.environ)
    try:
        rarer = {name: _RARER for name, usual in _USUAL_INTERVALS.items() if dask.config.get(name, usual) == usual}
        environment = {**dask.config.get(_WORKERS_ENVIRONMENT, {}), **more}
        with dask.config.set({_WORKERS_ENVIRONMENT: environment, **rarer}):
            yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _cuda_cluster(n_workers: int | None, tasks_per_gpu: int, dashboard_address: str | None) -> Any:
    dask_cuda = importlib.import_module("dask_cuda")
    cores_per_gpu = cpu_count() // (n_workers or torch.cuda.device_count())
    # Those of torch and DALI. Dask sets one, and workers count theirs by this.
    threads = {"OMP_NUM_THREADS": max(1, min(_MOST_DECODING_THREADS, cores_per_gpu // tasks_per_gpu))}
    with dask.config.set({_WORKERS_ENVIRONMENT: {**dask.config.get(_WORKERS_ENVIRONMENT, {}), **threads}}):
        try:
            return dask_cuda.LocalCUDACluster(
                n_workers=n_workers,
                # Those that have no share of the GPU read, hash and write files.
                threads_per_worker=max(tasks_per_gpu, min(_MOST_THREADS_PER_GPU, cores_per_gpu)),
                host=_LOOPBACK,
                dashboard_address=dashboard_address,
                **_rmm_options(os.environ.get("CUDA_VISIBLE_DEVICES", "")),
                enable_cudf_spill=True,
                resources={"GPU": 1},
            )
        except ValueError as exc:
            # That there are fewer GPUs than workers.
            raise ConfigError(f"n_workers={n_workers}: {exc}") from exc


def _rmm_options(devices: str) -> dict[str, Any]:
    """Return how much memory of a GPU of `devices`, as ``CUDA_VISIBLE_DEVICES`` has them, RMM gives to cudf and CuPy.

    torch and DALI have pools of their own: RMM's allocator for torch does not know on which streams a tensor is used.
    """
    # dask-cuda takes a share of the first whole GPU, and not of the part that is seen.
    shares = {"rmm_pool_size": 0.1, "rmm_maximum_pool_size": 0.6}
    return {
        **({"rmm_pool_size": "1GiB"} if devices.startswith("MIG-") else shares),
        "rmm_allocator_external_lib_list": ["cupy"],
    }
