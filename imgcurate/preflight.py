"""Checks before a run on workers that somebody else started: one software, the same inputs, one output folder.

What would otherwise end a run after hours, or change its result, is said before any work is done: in one
message, in which workers with the same fault are counted together.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from distributed import Client
from distributed.versions import get_versions

from imgcurate.errors import ClusterError, ImgcurateError
from imgcurate.filesystems import shown_url
from imgcurate.folders import file_url
from imgcurate.liveness import known_workers
from imgcurate.shards import Shard
from imgcurate.stages.base import Stage
from imgcurate.storage import (
    StorageError,
    StorageOptions,
    atomic_write,
    exclusive,
    is_local,
    join_url,
    local_path,
    make_folder,
    open_source,
    read_bytes,
    remove,
)

__all__ = ["check_stages", "check_storage", "check_versions"]

logger = logging.getLogger(__name__)

# Each name of what is compared, with the packages that provide it; of several builds one is installed.
_DECIDING: Final[Mapping[str, tuple[str, ...]]] = {
    **{p: (p,) for p in ("imgcurate", "dask", "distributed", "numpy", "torch", "open_clip_torch", "pillow")},
    "DALI": ("nvidia-dali-cuda120", "nvidia-dali-cuda130"),
}
_OTHERS: Final[Mapping[str, tuple[str, ...]]] = {
    **{p: (p,) for p in ("pandas", "pyarrow", "scikit-learn")},
    **{p: (p, f"{p}-cu12", f"{p}-cu13") for p in ("cudf", "cuml")},
    "cupy": ("cupy", "cupy-cuda12x", "cupy-cuda13x"),
}
_SCHEDULER: Final = "the scheduler"
_PACKAGES: Final = tuple(p for names in ({**_DECIDING, **_OTHERS}).values() for p in names)
# It does no work, but reads the graph, which names functions of imgcurate.
_ON_SCHEDULER: Final = ("python", "imgcurate", "dask", "distributed")
_THERE_ON_SCHEDULER: Final = ("numpy", "pandas", "pyarrow", "pillow")
# A client may do without what only workers compute with.
_WORKERS_ALONE: Final = frozenset({"DALI", "cudf", "cuml", "cupy"})

_SILENT_S: Final = 30.0
_STORAGE_LIMIT_S: Final = 25.0
# Network filesystems may show a new file late.
_LATE_S: Final = 5.0
_AT_ONCE: Final = 64
_NAMED: Final = 4
_HEAD_BYTES: Final = 64
_REPR: Final = re.compile(r"""(\w+)\((["'])(.*)\2,?\)""")


def check_versions(client: Client) -> None:
    """Refuse a cluster whose software is not that of this process.

    Parameters
    ----------
    client : distributed.Client
        A connected client.

    Raises
    ------
    ClusterError
        If there is no worker, one does not answer within 30 s, or the scheduler or a worker has another
        Python (3.x), or another version of a package that decides results. Other packages that differ
        are a warning.

    Notes
    -----
    The versions are those of installed distributions; nothing is imported for it. Workers that join later
    are not checked.
    """
    here = _versions(get_versions(_PACKAGES))
    answers = _ask(client, list(known_workers(client)), get_versions, _PACKAGES)
    if not answers:
        raise ClusterError("the scheduler has no workers: start some, then try again")
    silent = {w: a for w, a in answers.items() if isinstance(a, Exception)}
    there = {w: _versions(a) for w, a in answers.items() if w not in silent}
    wanted = {**_most_common(there.values()), **here}
    errors, warnings = _Faults(), _Faults()
    for worker, answer in silent.items():
        errors.add(_words(answer), worker)
    for worker, found in there.items():
        for name, differs in _differences(wanted, found).items():
            (warnings if name in _OTHERS else errors).add(differs, worker)
    scheduler = _scheduler_versions(client)
    for name, differs in _differences(here, scheduler).items():
        if name in _ON_SCHEDULER or (name in _THERE_ON_SCHEDULER and name not in scheduler):
            errors.add(differs, _SCHEDULER)
    if warnings:
        logger.warning("the workers' software differs from the client's: %s", warnings.told({}))
    if errors:
        message = errors.told(_hosts(client, list(there)))
        raise ClusterError(
            f"the cluster cannot be used: {message}. Scheduler, workers and client need the same software: "
            "install the versions of the client everywhere, then start scheduler and workers again"
        )


def check_stages(client: Client, stages: Iterable[Stage]) -> None:
    """Refuse a cluster that cannot import the stages of the user's own.

    Parameters
    ----------
    client : distributed.Client
        A connected client.
    stages : iterable of Stage
        What is to run; imgcurate's own are not tried.

    Raises
    ------
    ClusterError
        If the scheduler or a worker cannot.
    """
    faults = _Faults()
    workers: list[str] = []
    for stage in stages:
        kind = type(stage)
        if kind.__module__.startswith("imgcurate."):
            continue
        workers = workers or list(known_workers(client))
        # They load it with the call.
        answers = _ask(client, workers, _ignore, stage)
        answers[_SCHEDULER] = client.sync(_on_scheduler, client, _ignore, stage)
        for who, answer in answers.items():
            # A worker that is slow to answer will load it when it is asked to run it.
            if isinstance(answer, Exception) and not isinstance(answer, (TimeoutError, OSError)):
                faults.add(f"stage {kind.__module__}.{kind.__qualname__} is not loaded ({_words(answer)})", who)
    if faults:
        raise ClusterError(
            f"the cluster cannot be used: {faults.told(_hosts(client, workers))}. The modules of your own stages must "
            "be importable where scheduler and workers run: install them there, or name their folder in PYTHONPATH"
        )


def _ignore(loaded: object) -> None:
    del loaded


def check_storage(
    client: Client, folder: str, first: Shard | str | None, storage_options: StorageOptions | None = None
) -> None:
    """Refuse workers that cannot read the inputs, or do not write to the output folder of this process.

    Each worker reads the beginning of the first input and a file that is made in the output folder, and
    writes an answer there, which must be seen here. All these files are removed again; what a killed process
    left of them goes with :func:`imgcurate.storage.remove_temporary_files`.

    Parameters
    ----------
    client : distributed.Client
        A connected client.
    folder : str
        The output folder, an absolute path or fsspec URL; made if it is not there.
    first : Shard or str, optional
        The first input. What this process cannot read either is not a fault of the workers.
    storage_options : mapping, optional
        Passed to fsspec for the input.

    Raises
    ------
    ClusterError
        If a worker cannot, or does not answer within 30 s.
    StorageError
        If this process cannot write to the folder, or another run does.
    """
    url = _url(first)
    try:
        head = _head(url, storage_options) if url else None
    except ImgcurateError:
        head = None
    made = is_local(folder) and not Path(local_path(folder)).exists()
    make_folder(folder)
    try:
        with exclusive(folder), _token(folder) as token:
            faults, hosts = _try_storage(client, token, url if head else "", head, storage_options)
        if faults:
            raise ClusterError(f"workers cannot be used: {faults.told(hosts)}")
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                Path(local_path(folder)).rmdir()
        raise


class _Faults:
    """What is wrong, in words, and with whom."""

    def __init__(self) -> None:
        self._who: dict[str, list[str]] = {}

    def __bool__(self) -> bool:
        return bool(self._who)

    def add(self, what: str, who: str) -> None:
        self._who.setdefault(what, []).append(who)

    def told(self, hosts: Mapping[str, str]) -> str:
        """Return one line: each fault once, with the first of those that have it and their number."""
        lines = []
        for what, everyone in self._who.items():
            names = [f"{w} (host {hosts[w]})" if w in hosts else w for w in everyone[:_NAMED]]
            more = len(everyone) - len(names)
            kind = "processes" if _SCHEDULER in everyone else "workers"
            count = f"{len(everyone)} {kind}: " if len(everyone) > 1 else ""
            lines.append(f"{what}: {count}{', '.join(names)}{f' and {more} more' if more else ''}")
        return "; ".join(lines)


def _ask(client: Client, workers: Sequence[str], function: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """Call a function on workers: address -> what it returns, or the exception that says why nothing came."""
    answers: dict[str, Any] = client.sync(_gather, client, workers, function, args)
    return answers


async def _gather(
    client: Client, workers: Sequence[str], function: Callable[..., Any], args: Sequence[Any]
) -> dict[str, Any]:
    # One by one: a call to all would wait for the one that is silent, and not say which.
    places = asyncio.Semaphore(_AT_ONCE)

    async def ask(worker: str) -> Any:
        async with places:
            try:
                call = client.run(function, *args, workers=[worker], on_error="return")
                return (await asyncio.wait_for(call, _SILENT_S))[worker]
            except Exception as exc:  # noqa: BLE001 - whatever it is, this worker cannot be used
                return exc

    return dict(zip(workers, await asyncio.gather(*map(ask, workers)), strict=True))


async def _on_scheduler(client: Client, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function on the scheduler: return what it returns, or the exception that says why nothing came."""
    try:
        return await asyncio.wait_for(client.run_on_scheduler(function, *args), _SILENT_S)
    except Exception as exc:  # noqa: BLE001 - whatever it is, the scheduler cannot be used
        return exc


def _scheduler_versions(client: Client) -> dict[str, str]:
    answer = client.sync(_on_scheduler, client, get_versions, _PACKAGES)
    if isinstance(answer, Exception):
        raise ClusterError(f"the scheduler does not tell its versions: {_words(answer)}") from answer
    return _versions(answer)


def _words(exc: Exception) -> str:
    """Return why a worker did not answer."""
    # Dask makes an Exception with the words of it of what a worker cannot unpickle.
    if "No module named 'imgcurate" in str(exc):
        return "imgcurate is missing or older than the client's"
    if isinstance(exc, (TimeoutError, OSError)):
        return f"no answer within {_SILENT_S:.0f} s"
    words = " ".join(str(exc).split())
    if type(exc) is Exception and (raised := _REPR.fullmatch(words)):
        return f"{raised[1]}: {raised[3]}"
    return f"{type(exc).__name__}: {words}"


def _hosts(client: Client, workers: Sequence[str]) -> dict[str, str]:
    return {w: a for w, a in _ask(client, workers, socket.gethostname).items() if isinstance(a, str)}


def _versions(answer: Mapping[str, Any]) -> dict[str, str]:
    """Return the version of each thing that is installed, as far as it has to be the same."""
    packages = answer["packages"]
    found = {"python": ".".join(packages["python"].split(".")[:2])}
    for name, builds in {**_DECIDING, **_OTHERS}.items():
        version = next((packages[b] for b in builds if packages.get(b)), None)
        if version is not None:
            # 2.15.0+cu130 is 2.15.0 for another CUDA.
            version = version.partition("+")[0]
            found[name] = ".".join(version.split(".")[:2]) if name == "DALI" else version
    return found


def _most_common(found: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Return the versions that most workers have of what a client may do without."""
    common: dict[str, str] = {}
    everyone = list(found)
    for name in _WORKERS_ALONE:
        versions = sorted(f[name] for f in everyone if name in f)
        if versions:
            common[name] = max(versions, key=versions.count)
    return common


def _differences(wanted: Mapping[str, str], found: Mapping[str, str]) -> dict[str, str]:
    """Return what differs, in words by name."""
    return {
        name: f"{name} {found[name]} instead of {version}" if name in found else f"{name} {version} is not installed"
        for name, version in wanted.items()
        if found.get(name) != version
    }


def _url(first: Shard | str | None) -> str:
    if isinstance(first, Shard):
        return file_url(first.url, first.files[0]) if first.files else first.url
    return first or ""


def _head(url: str, storage_options: StorageOptions | None) -> tuple[int, bytes]:
    """Return the size of a file and its first bytes."""
    source = open_source(url, storage_options)
    try:
        return source.size, source.pread(0, min(_HEAD_BYTES, source.size))
    finally:
        source.close()


@contextlib.contextmanager
def _token(folder: str) -> Iterator[str]:
    """Make a file in the folder that nobody else has, and remove it."""
    token = join_url(folder, f".preflight-{uuid.uuid4().hex}.tmp")
    _write(token, token)
    try:
        yield token
    finally:
        remove(token)


def _try_storage(
    client: Client, token: str, url: str, head: tuple[int, bytes] | None, storage_options: StorageOptions | None
) -> tuple[_Faults, dict[str, str]]:
    """Let each worker read and write; return what is wrong, and the host of each worker."""
    faults, hosts = _Faults(), {}
    answers = _ask(client, list(known_workers(client)), _answer, token, url, storage_options)
    unseen, deadline = [], time.monotonic() + _LATE_S
    for worker, answer in answers.items():
        if isinstance(answer, Exception):
            faults.add(_words(answer), worker)
            continue
        hosts[worker] = answer["host"]
        if answer["input"] is not None and answer["input"] != head:
            faults.add(_input_fault(url, answer["input"]), worker)
        out = answer["output"]
        if out is None and _why_not_there(_answer_file(token, worker), worker, deadline) is not None:
            out = "what a worker writes to it is not seen by the client"
            unseen.append(worker)
        if out is not None:
            faults.add(_output_fault(token, out), worker)
        remove(_answer_file(token, worker))
    if unseen:
        _ask(client, unseen, _remove_answer, token)
    return faults, hosts


def _input_fault(url: str, got: object) -> str:
    name = shown_url(url)
    if isinstance(got, str):
        return f"{got}: the inputs must be where all workers can read them under the same name"
    return f"{name} is another file than the client's: the inputs must be on storage that all workers share"


def _output_fault(token: str, why: str) -> str:
    name = shown_url(_folder(token))
    return f"the output {name} is not usable ({why}): it must be a folder that all workers share, or a URL"


async def _answer(token: str, url: str, storage_options: StorageOptions | None, dask_worker: Any) -> dict[str, Any]:
    """Read the input and the token, and write an answer; runs on a worker.

    In a thread, for storage that hangs must not take the worker's event loop with it.
    """
    work = asyncio.to_thread(_answer_now, token, url, storage_options, dask_worker.address)
    try:
        return await asyncio.wait_for(work, _STORAGE_LIMIT_S)
    except TimeoutError:
        late = f"reading and writing takes more than {_STORAGE_LIMIT_S:.0f} s"
        return {"host": socket.gethostname(), "input": None, "output": late}


def _answer_now(token: str, url: str, storage_options: StorageOptions | None, address: str) -> dict[str, Any]:
    answer: dict[str, Any] = {"host": socket.gethostname(), "input": None, "output": None}
    try:
        answer["input"] = _head(url, storage_options) if url else None
    except Exception as exc:  # noqa: BLE001 - told by the client
        answer["input"] = _line(exc)
    file = _answer_file(token, address)
    try:
        answer["output"] = _why_not_there(token, token, time.monotonic() + _LATE_S)
        if answer["output"] is None:
            _write(file, address)
    except Exception as exc:  # noqa: BLE001 - told by the client
        answer["output"] = _line(exc).replace(file, _folder(token))
    return answer


async def _remove_answer(token: str, dask_worker: Any) -> None:
    """Remove an answer that the client does not see; runs on a worker."""
    await asyncio.to_thread(remove, _answer_file(token, dask_worker.address))


def _answer_file(token: str, address: str) -> str:
    return f"{token.removesuffix('.tmp')}-{hashlib.sha256(address.encode()).hexdigest()[:16]}.tmp"


def _write(url: str, text: str) -> None:
    with atomic_write(url) as out:
        out.write(text.encode())


def _folder(token: str) -> str:
    return token.rpartition("/")[0]


def _why_not_there(url: str, text: str, deadline: float) -> str | None:
    """Return why a file with this content is not there, nor comes until a time; None if it is there."""
    while True:
        try:
            if read_bytes(url) == text.encode():
                return None
            why = "a file in it has another content than was written"
        except StorageError as exc:
            missing = isinstance(exc.__cause__, FileNotFoundError)
            why = "what the client writes to it is not there" if missing else _line(exc)
        if time.monotonic() > deadline:
            return why
        time.sleep(0.2)


def _line(exc: Exception) -> str:
    text = " ".join(str(exc).split())
    return text if isinstance(exc, ImgcurateError) else f"{type(exc).__name__}: {text}"
