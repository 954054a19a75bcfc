"""Files of S3, of HTTP servers and of any other fsspec filesystem: their size and state, and ranges of their bytes.

What S3 and HTTP servers answer is compared with what was seen when the file was opened: where its size or
its ETag is another one, the file changed, and bytes of two states are never mixed. An answer that ends
early is gone on with where it ended.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import IO, Any, Final

from fsspec.asyn import sync

from imgcurate.errors import ConfigError
from imgcurate.filesystems import (
    StatusError,
    StorageError,
    StorageOptions,
    filesystem,
    protocol_of,
    retry,
    shown_url,
)
from imgcurate.spool import check_room

__all__ = ["RemoteFile", "open_remote"]

_CHUNK_BYTES: Final = 256 * 1024
_PROGRESS_BYTES: Final = 64 * 1024
_VERSION_KEYS: Final = ("ETag", "etag", "md5Hash", "generation", "content_md5")
_CONTENT_RANGE: Final = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)")
_RETRY_AFTER: Final = re.compile(r"\d{1,4}")


class RemoteFile:
    """A file of an fsspec filesystem.

    Attributes
    ----------
    url : str
        Where it lies.
    size : int
        Its length in bytes; -1 as long as the server does not tell.
    version : str
        What tells one state of the file from another, such as its ETag; '' if there is nothing.
    modified : str
        The same, or else the time of its last change.
    has_ranges : bool
        Whether the server gives parts of the file; else it is fetched whole.
    closed : bool
        Whether nobody waits for its bytes any more.
    """

    def __init__(self, url: str, storage_options: StorageOptions | None) -> None:
        self.url, self.size, self.version, self.modified = url, -1, "", ""
        self.has_ranges, self.closed = True, False
        self._fs, self._path = filesystem(url, storage_options)
        retry(self._look, f"cannot read {url}")

    def read(self, start: int, stop: int) -> bytes:
        """Return bytes `start` to `stop`, all of them.

        Raises
        ------
        StorageError
            If they cannot be read, or the file is no longer what it was when it was opened.
        """
        data = bytearray()

        def go_on() -> None:
            self._append(start + len(data), stop, data)
            if len(data) < stop - start:
                raise OSError(f"short read: {len(data):,} of {stop - start:,} bytes")

        retry(
            go_on, f"cannot read {self.url} at byte {start}",
            progress=lambda: len(data) // _PROGRESS_BYTES, wanted=lambda: not self.closed,
        )  # fmt: skip
        return bytes(data)

    def download(self, file: IO[bytes]) -> None:
        """Write all bytes to an empty file."""
        for start in range(0, self.size, _CHUNK_BYTES):
            file.write(self.read(start, min(start + _CHUNK_BYTES, self.size)))

    def _look(self) -> None:
        info = self._fs.info(self._path)
        if info.get("type") == "directory":
            raise IsADirectoryError("it is a folder")
        if info.get("size") is None:
            raise StorageError(f"cannot read {shown_url(self.url)}: the server does not tell its size")
        self.size = int(info["size"])
        self.version = str(next((info[k] for k in _VERSION_KEYS if info.get(k)), ""))
        self.modified = self.version or str(info.get("LastModified") or info.get("mtime") or "")

    def _append(self, start: int, stop: int, data: bytearray) -> None:
        """Ask for a range and append what comes, also if it ends early."""
        found = self._fs.cat_file(self._path, start=start, end=stop)
        if len(found) == self.size > stop - start:
            # A filesystem that does not know ranges returns the whole file.
            found = found[start:stop]
        data += found[: stop - start]

    def _check(self, size: int | None, version: str | None) -> None:
        """Refuse an answer about another state of the file."""
        if size is not None and size != self.size:
            raise self._changed(f"it had {self.size:,} bytes and has {size:,}")
        if version and self.version and version != self.version:
            raise self._changed(f"it was {self.version} and is {version}")

    def _changed(self, how: str) -> StorageError:
        return StorageError(f"{shown_url(self.url)} changed while it was read ({how}): run again when it is complete")


class _S3File(RemoteFile):
    """An object of S3: as fsspec reads it, but the answers' headers are looked at."""

    def _append(self, start: int, stop: int, data: bytearray) -> None:
        sync(self._fs.loop, self._get, start, stop, data)

    async def _get(self, start: int, stop: int, data: bytearray) -> None:
        bucket, key, version = self._fs.split_path(self._path)
        which = {"VersionId": version} if version else {}
        answer = await self._fs._call_s3(
            "get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}", **which
        )
        body = answer["Body"]
        try:
            self._check(_total(answer.get("ContentRange", "")), answer.get("ETag"))
            while chunk := await body.read(_CHUNK_BYTES):
                data += chunk
        finally:
            body.close()


class _HttpFile(RemoteFile):
    """A file of an HTTP server, of which nothing is believed but what comes with its bytes.

    HEAD is not used: servers forbid it, and answer it with other lengths than they send.
    """

    def _look(self) -> None:
        sync(self._fs.loop, self._probe)

    async def _probe(self) -> None:
        async with self._ask("bytes=0-0", fine=(200, 206, 416)) as answer:
            headers = answer.headers
            self._version_header = "ETag" if "ETag" in headers else "Last-Modified"
            self.version = self.modified = headers.get(self._version_header, "")
            total = _total(headers.get("Content-Range", ""))
            if answer.status == 206 and total is not None:
                self.size = total
            elif answer.status == 416:
                if total != 0:
                    raise StatusError(416, "range not satisfiable")
                self.size = 0
            else:
                self._expect_whole(headers)
            # What is left of a body that was not asked for is not waited for.
            answer.close()

    def _expect_whole(self, headers: Mapping[str, str]) -> None:
        """Note that the file comes whole, and how long it is, if the headers tell."""
        self.has_ranges = False
        if headers.get("Content-Encoding", "identity") not in ("", "identity"):
            return
        if "Content-Length" in headers:
            self.size = int(headers["Content-Length"])
        elif headers.get("Transfer-Encoding", "").lower() != "chunked":
            raise StorageError(f"cannot read {shown_url(self.url)}: the server does not tell its size")

    def _append(self, start: int, stop: int, data: bytearray) -> None:
        sync(self._fs.loop, self._get, start, stop, data)

    async def _get(self, start: int, stop: int, data: bytearray) -> None:
        async with self._ask(f"bytes={start}-{stop - 1}", fine=(200, 206, 416)) as answer:
            match = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            self._check(_total(match.group(0)) if match else None, answer.headers.get(self._version_header))
            if answer.status == 416:
                raise self._changed(f"it had {self.size:,} bytes and has fewer")
            if answer.status == 200:
                skip = start
            elif match is None or match.group(1) is None or int(match.group(1)) != start:
                raise OSError(f"asked for byte {start}, the server answers {answer.headers.get('Content-Range')!r}")
            else:
                skip = 0
            await self._take(answer, skip, stop - start, data)

    async def _take(self, answer: Any, skip: int, length: int, data: bytearray) -> None:
        """Append `length` bytes of a body, but for its first `skip` ones."""
        room = length
        async for chunk in answer.content.iter_chunked(_CHUNK_BYTES):
            chunk, skip = chunk[skip:], max(0, skip - len(chunk))
            data += chunk[:room]
            room -= len(chunk[:room])
            if not room:
                # Of a whole file in place of a range, the rest is not wanted.
                answer.close()
                return

    def download(self, file: IO[bytes]) -> None:
        """Write all bytes to an empty file."""

        def fetch() -> None:
            file.seek(0)
            file.truncate()
            sync(self._fs.loop, self._get_whole, file)

        retry(fetch, f"cannot read {self.url}", wanted=lambda: not self.closed)

    async def _get_whole(self, file: IO[bytes]) -> None:
        async with self._ask(None, fine=(200,)) as answer:
            self._check(None, answer.headers.get(self._version_header))
            async for chunk in answer.content.iter_chunked(_CHUNK_BYTES):
                check_room(file.fileno())
                file.write(chunk)
        if self.size >= 0 and file.tell() != self.size:
            raise OSError(f"short read: {file.tell():,} of {self.size:,} bytes")

    @asynccontextmanager
    async def _ask(self, byte_range: str | None, fine: tuple[int, ...]) -> AsyncIterator[Any]:
        session = await self._fs.set_session()
        kwargs = dict(self._fs.kwargs)
        # Compressed, a range would be one of other bytes.
        headers = {**(kwargs.pop("headers", None) or {}), "Accept-Encoding": "identity"}
        if byte_range:
            headers["Range"] = byte_range
        async with session.get(self._fs.encode_url(self._path), headers=headers, **kwargs) as answer:
            if answer.status not in fine:
                if answer.status in (404, 410):
                    raise FileNotFoundError(self.url)
                wait = answer.headers.get("Retry-After", "")
                pause_s = float(wait) if _RETRY_AFTER.fullmatch(wait) else 0.0
                raise StatusError(answer.status, answer.reason or "", pause_s)
            yield answer


def _total(content_range: str) -> int | None:
    """Return the length of a file, as the header of a range tells it; None if it does not."""
    match = _CONTENT_RANGE.fullmatch(content_range)
    return int(match.group(2)) if match and match.group(2) != "*" else None


_KINDS: Final[Mapping[str, Callable[[str, StorageOptions | None], RemoteFile]]] = {
    "s3": _S3File, "s3a": _S3File, "http": _HttpFile, "https": _HttpFile,
}  # fmt: skip


def open_remote(url: str, storage_options: StorageOptions | None = None) -> RemoteFile:
    """Look at a file of a store or a server.

    Raises
    ------
    StorageError
        If it is not there, or cannot be reached; its cause says which.
    ConfigError
        If the options or the address are wrong.
    """
    try:
        return _KINDS.get(protocol_of(url), RemoteFile)(url, storage_options)
    except ImportError as exc:
        raise ConfigError(f"{shown_url(url)}: {exc}") from exc
