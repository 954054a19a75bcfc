"""Files by URL: expand patterns, read byte ranges, write atomically. Everything goes through fsspec.

A plain path or ``file://`` URL takes a short way through the operating system; every other protocol
is an fsspec filesystem, read as :mod:`imgcurate.remote` says.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Final, Protocol

from imgcurate.errors import ConfigError, InputError
from imgcurate.filesystems import StorageError, StorageOptions, filesystem, protocol_of, retry, shown_url
from imgcurate.objects import open_remote
from imgcurate.remote import GAP_BYTES, RemoteSource
from imgcurate.remote import read_ahead as read_remote_ahead
from imgcurate.spool import temporary_file

__all__ = [
    "Source",
    "StorageError",
    "StorageOptions",
    "atomic_write",
    "check_output",
    "check_page",
    "check_shared",
    "clear_away",
    "exclusive",
    "exists",
    "file_size",
    "free_bytes",
    "is_folder",
    "is_local",
    "join_url",
    "list_files",
    "list_tree",
    "local_path",
    "make_folder",
    "modified",
    "open_source",
    "read_ahead",
    "read_bytes",
    "read_ranges",
    "remove",
    "remove_temporary_files",
    "remove_tree",
]

logger = logging.getLogger(__name__)

_MAX_BLOCK_BYTES: Final = 16 * 1024 * 1024
_DELETIONS: Final = 3
# There a folder is but the beginning of names; fsspec would make a bucket, which nobody asked for.
_STORES_WITHOUT_FOLDERS: Final = frozenset({"s3", "s3a", "gs", "gcs"})


class Source(Protocol):
    """A file of known size of which byte ranges can be read.

    Attributes
    ----------
    url : str
        Where it lies.
    size : int
        Its length in bytes.
    """

    url: str
    size: int

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`, fewer only where the file ends."""
        ...

    def close(self) -> None:
        """Release what is held."""
        ...


class LocalSource:
    """A file of the operating system, read with ``pread``."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self._fd = os.open(local_path(url), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as exc:
            raise StorageError(f"cannot read {url}: {exc.strerror}") from exc
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise StorageError(f"cannot read {url}: it is no regular file")
        self.size = status.st_size

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`, fewer only where the file ends."""
        try:
            data = os.pread(self._fd, length, offset)
            if len(data) < length and offset + len(data) < self.size:
                chunks = [data]
                while data and sum(map(len, chunks)) < length:
                    data = os.pread(self._fd, length - sum(map(len, chunks)), offset + sum(map(len, chunks)))
                    chunks.append(data)
                data = b"".join(chunks)
        except OSError as exc:
            raise StorageError(f"cannot read {self.url} at byte {offset}: {exc.strerror}") from exc
        return data

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        """Read from `offset` into a buffer and return the number of bytes, fewer only where the file ends."""
        done = 0
        try:
            while done < len(buffer) and (n := os.preadv(self._fd, [buffer[done:]], offset + done)):
                done += n
        except OSError as exc:
            raise StorageError(f"cannot read {self.url} at byte {offset}: {exc.strerror}") from exc
        return done

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def open_source(url: str, storage_options: StorageOptions | None = None, *, gap_bytes: int = GAP_BYTES) -> Source:
    """Open a file for ranged reads.

    Parameters
    ----------
    gap_bytes : int
        Of a remote file, what lies between two reads and is no longer is fetched with them.

    Raises
    ------
    StorageError
        If it cannot be opened.
    """
    return LocalSource(url) if is_local(url) else RemoteSource(url, storage_options, gap_bytes=gap_bytes)


def read_ahead(url: str, storage_options: StorageOptions | None = None) -> None:
    """Begin to fetch a file that will be opened soon, if it is a remote one; returns at once, and never fails."""
    if not is_local(url):
        read_remote_ahead(url, storage_options)


def is_local(url: str) -> bool:
    """Return whether `url` is a path of this machine."""
    return "://" not in url or url.startswith(("file://", "local://"))


def local_path(url: str) -> str:
    """Return the path behind a local URL."""
    return url.split("://", 1)[1] if "://" in url else url


def join_url(base: str, *parts: str) -> str:
    """Join path components to a URL or path."""
    return "/".join([base.rstrip("/") if base != "/" else "", *parts])


def exists(url: str, storage_options: StorageOptions | None = None) -> bool:
    """Return whether a file or folder exists."""
    if is_local(url):
        return Path(local_path(url)).exists()
    fs, path = filesystem(url, storage_options)
    fs.invalidate_cache()
    return bool(retry(lambda: fs.exists(path), f"cannot look up {url}"))


def file_size(url: str, storage_options: StorageOptions | None = None) -> int:
    """Return the length of a file in bytes.

    Raises
    ------
    InputError
        If there is no such file.
    """
    try:
        if is_local(url):
            path = Path(local_path(url))
            if path.is_dir():
                raise InputError(f"{url} is a folder: expected a tar shard; '{url}/*.tar' names all in it")
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{url} is no regular file: expected a tar shard")
            return status.st_size
        file = open_remote(url, storage_options)
        # Some servers tell the length of a file with its bytes alone.
        return file.size if file.size >= 0 else RemoteSource(url, storage_options).size
    except FileNotFoundError as exc:
        raise InputError(f"no such input: {url}") from exc
    except (OSError, ValueError) as exc:
        if isinstance(exc, InputError):
            raise
        # No permission, a loop of links, a name that is too long or holds a zero byte.
        raise InputError(f"cannot read {url}: {getattr(exc, 'strerror', None) or exc}") from exc
    except StorageError as exc:
        if isinstance(exc.__cause__, FileNotFoundError):
            raise InputError(f"no such input: {shown_url(url)}") from exc
        raise


def list_files(folder: str, suffix: str, storage_options: StorageOptions | None = None) -> list[str]:
    """Return the names (not URLs) of the files in `folder` that end with `suffix`, sorted."""
    if is_local(folder):
        path = Path(local_path(folder))
        return sorted(p.name for p in path.iterdir() if p.name.endswith(suffix)) if path.is_dir() else []
    fs, path_ = filesystem(folder, storage_options)
    try:
        fs.invalidate_cache()
        found = retry(lambda: fs.ls(path_, detail=False), f"cannot list {folder}")
    except StorageError as exc:
        if isinstance(exc.__cause__, FileNotFoundError):
            return []
        raise
    # Some programs mark a folder with an object whose name ends with a slash.
    names = (str(f).rsplit("/", 1)[-1] for f in found)
    return sorted(name for name in names if name and name.endswith(suffix))


def is_folder(url: str, storage_options: StorageOptions | None = None) -> bool:
    """Return whether `url` is a folder; a web server has none."""
    if is_local(url):
        # os.path says no of names that no file can have, where pathlib raises.
        return os.path.isdir(local_path(url))  # noqa: PTH112
    if url.startswith("http"):
        return False
    fs, path = filesystem(url, storage_options)
    return bool(retry(lambda: fs.isdir(path), f"cannot look up {url}"))


def list_tree(folder: str, storage_options: StorageOptions | None = None) -> dict[str, int]:
    """Return the files below a remote folder, by their path in it, with their sizes; without hidden folders."""
    fs, path = filesystem(folder, storage_options)
    fs.invalidate_cache()
    found = retry(lambda: fs.find(path, detail=True), f"cannot list {folder}")
    prefix = path.rstrip("/") + "/"
    sizes = {str(name).removeprefix(prefix): int(info.get("size") or 0) for name, info in sorted(found.items())}
    return {name: size for name, size in sizes.items() if "/." not in f"/{name.rpartition('/')[0]}"}


def check_output(url: str) -> None:
    """Refuse an output folder that nothing can be written to, before it is asked for what is there.

    Raises
    ------
    ConfigError
        If it is on a web server.
    """
    if protocol_of(url) in ("http", "https"):
        raise ConfigError(f"{shown_url(url)}: HTTP servers are read from, not written to: name another output folder")


def check_page(url: str) -> None:
    """Refuse to write a page in the place of a file that is none.

    Raises
    ------
    ConfigError
        If there is such a file.
    """
    if not exists(url):
        return
    if is_folder(url):
        raise ConfigError(f"{url} is a folder: name a file for the page")
    source = open_source(url)
    try:
        head = source.pread(0, 256).lstrip().lower()
    finally:
        source.close()
    if head and not head.startswith((b"<!doctype html", b"<html")):
        raise ConfigError(f"{url} is there already, and is no page: name another file")


def check_shared(url: str) -> None:
    """Refuse an output folder that worker processes cannot write to.

    Raises
    ------
    ConfigError
        If it is in the memory of this process.
    """
    if protocol_of(url) == "memory":
        raise ConfigError(
            f"{url} is in the memory of this process, and what worker processes write there is lost with them: name "
            "another output folder"
        )


def make_folder(url: str, storage_options: StorageOptions | None = None) -> None:
    """Make a folder and its parents; does nothing where they exist or the store has no folders."""
    if is_local(url):
        try:
            Path(local_path(url)).mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise StorageError(f"cannot make the folder {url}: {exc.strerror or exc}") from exc
        return
    check_output(url)
    fs, path = filesystem(url, storage_options)
    if protocol_of(url) not in _STORES_WITHOUT_FOLDERS:
        retry(lambda: fs.makedirs(path, exist_ok=True), f"cannot make the folder {url}")


def read_bytes(url: str, storage_options: StorageOptions | None = None) -> bytes:
    """Return a whole (small) file."""
    source = open_source(url, storage_options)
    try:
        return source.pread(0, source.size)
    finally:
        source.close()


def read_ranges(source: Source, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Read byte ranges (offset, length), joining neighbours into one request."""
    blobs: list[bytes] = []
    first = 0
    while first < len(ranges):
        begin, end = ranges[first][0], sum(ranges[first])
        last = first + 1
        while last < len(ranges):
            offset, length = ranges[last]
            if not end <= offset <= end + GAP_BYTES or offset + length - begin > _MAX_BLOCK_BYTES:
                break
            end = offset + length
            last += 1
        block = source.pread(begin, end - begin)
        if len(block) < end - begin:
            raise StorageError(
                f"{source.url} ends at byte {begin + len(block):,}, before {end:,}: it changed since it was indexed"
            )
        blobs.extend(block[o - begin : o - begin + n] for o, n in ranges[first:last])
        first = last
    return blobs


def remove(url: str, storage_options: StorageOptions | None = None) -> None:
    """Delete a file; does nothing if there is none."""
    if is_local(url):
        Path(local_path(url)).unlink(missing_ok=True)
        return
    fs, path = filesystem(url, storage_options)
    _remove(lambda: fs.rm_file(path), url)


def remove_tree(url: str, storage_options: StorageOptions | None = None) -> None:
    """Delete a folder and all in it; does nothing if there is none.

    Raises
    ------
    StorageError
        If something of it cannot be deleted.
    """
    if is_local(url):
        folder = local_path(url)
        for attempt in range(_DELETIONS):
            if attempt:
                # What a process that is being killed still writes there is met again.
                time.sleep(0.1)
            shutil.rmtree(folder, ignore_errors=True)
            if not os.path.lexists(folder):
                return
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            return
        except OSError as exc:
            raise StorageError(f"cannot delete {exc.filename or folder}: {exc.strerror or exc}") from exc
        return
    fs, path = filesystem(url, storage_options)
    fs.invalidate_cache()
    _remove(lambda: fs.rm(path, recursive=True), url)


def clear_away(url: str, storage_options: StorageOptions | None = None) -> None:
    """Delete a folder that nobody looks at any more; what of it cannot be deleted stays, with a warning."""
    try:
        remove_tree(url, storage_options)
    except StorageError as exc:
        logger.warning("%s: it is not needed any more, and stays", exc)


def _remove(call: Callable[[], None], url: str) -> None:
    try:
        retry(call, f"cannot remove {url}")
    except StorageError as exc:
        if not isinstance(exc.__cause__, FileNotFoundError):
            raise


@contextlib.contextmanager
def atomic_write(url: str, storage_options: StorageOptions | None = None) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears under its name whole or not at all.

    On local disks the bytes go to a temporary name in the same folder, are flushed to the disk and
    renamed. For other stores they go to an anonymous file on the local disk, which is uploaded when it is
    complete, and again if that fails: an object appears when its upload is complete. After an error
    nothing is left behind.

    Raises
    ------
    StorageError
        If the file cannot be written (no space, no permission).
    """
    if not is_local(url):
        fs, path = filesystem(url, storage_options)
        with temporary_file() as file:
            try:
                yield file
                file.flush()
            except OSError as exc:
                raise StorageError(f"cannot write {shown_url(url)}: {exc.strerror or exc}") from exc
            # A file without a name can be opened anew, for each try, under this one.
            name = f"/proc/self/fd/{file.fileno()}"
            retry(lambda: fs.put_file(name, path), f"cannot write {url}")
        return
    target = Path(local_path(url))
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(target)
    except OSError as exc:
        raise StorageError(f"cannot write {url}: {exc.strerror or exc}") from exc
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive(folder: str) -> Iterator[None]:
    """Hold a local folder for one process; another one that wants it gets an error, also after a crash of ours.

    Raises
    ------
    StorageError
        If another process holds it.
    """
    if not is_local(folder):
        yield
        return
    descriptor = os.open(local_path(folder), os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise StorageError(f"another run is writing to {folder}: wait until it ends") from exc
        except OSError as exc:
            logger.info("%s cannot be locked: %s", folder, exc)
        yield
    finally:
        os.close(descriptor)


def remove_temporary_files(folder: str) -> None:
    """Delete what processes that were killed left of :func:`atomic_write` in a local folder and below."""
    if is_local(folder):
        for path in Path(local_path(folder)).rglob(".*.tmp"):
            path.unlink(missing_ok=True)


def modified(url: str, storage_options: StorageOptions | None = None) -> str:
    """Return what tells one state of a file from another: its time of change, or its ETag; '' if unknown."""
    if is_local(url):
        return str(Path(local_path(url)).stat().st_mtime_ns)
    return open_remote(url, storage_options).modified


def free_bytes(url: str) -> int | None:
    """Return the free space of the disk that holds a local path, in bytes; None for other stores."""
    if not is_local(url):
        return None
    path = Path(local_path(url)).absolute()
    while not path.exists():
        path = path.parent
    stats = os.statvfs(path)
    return stats.f_bavail * stats.f_frsize
