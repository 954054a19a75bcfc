"""HTTP servers on loopback, for tests: a folder of files, or a proxy, which count requests and fail on demand."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import http.server
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FAULTS = ("500", "503", "reset", "short", "stall")


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class Server:
    """A server whose answers `respond` makes, and which spoils a share of them.

    Attributes
    ----------
    respond : callable
        Takes the handler of a request, and the body of the request.
    fault_rate : float
        Share of requests to spoil, chosen by a seeded generator.
    faults : sequence of str
        Which of FAULTS are used, in turn.
    gone_after : int, optional
        After so many requests no more are answered: each connection is closed.
    latency_s : float
        Waited before each answer.
    log : list of [method, path, range, bytes of body sent]
        The requests.
    failed : dict of str to int
        Faults that were made, by kind.
    """

    respond: Callable[[http.server.BaseHTTPRequestHandler, bytes], Answer]
    fault_rate: float = 0.0
    faults: tuple[str, ...] = FAULTS
    gone_after: int | None = None
    stall_s: float = 1.5
    latency_s: float = 0.0
    seed: int = 0
    log: list[list[Any]] = field(default_factory=list)
    failed: dict[str, int] = field(default_factory=dict)

    def __enter__(self) -> Server:
        self._random, self._lock = random.Random(self.seed), threading.Lock()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Else Nagle's algorithm and delayed ACKs add 40 ms to each answer.
            disable_nagle_algorithm = True

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except (ConnectionError, TimeoutError):
                    self.close_connection = True

            def answer(self) -> None:
                server._answer(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

            def log_message(self, *args: object) -> None:
                pass

        class Http(http.server.ThreadingHTTPServer):
            request_queue_size = 64

        self._http = Http(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._http.block_on_close = False
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    @property
    def sent_bytes(self) -> int:
        """Bytes of the bodies that GET requests were answered with."""
        return sum(n for method, _, _, n in self.log if method == "GET")

    def _fault(self) -> str | None:
        with self._lock:
            if self._random.random() >= self.fault_rate:
                return None
            fault = self.faults[sum(self.failed.values()) % len(self.faults)]
            self.failed[fault] = self.failed.get(fault, 0) + 1
            return fault

    def _answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        if handler.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(handler.rfile.readline().split(b";")[0], 16):
                body += handler.rfile.read(size)
                handler.rfile.readline()
            handler.rfile.readline()
        if self.gone_after is not None and len(self.log) >= self.gone_after:
            handler.close_connection = True
            return
        fault = self._fault()
        if self.latency_s:
            time.sleep(self.latency_s)
        if fault == "stall":
            time.sleep(self.stall_s)
            handler.close_connection = True
            return
        answer = Answer(int(fault), {}, b"") if fault in ("500", "503") else self.respond(handler, body)
        self._send(handler, answer, fault)

    def _send(self, handler: http.server.BaseHTTPRequestHandler, answer: Answer, fault: str | None) -> None:
        if fault in ("reset", "short") and (handler.command == "HEAD" or not answer.body):
            handler.close_connection = True
            return
        # Counted before it is sent: who has the last bytes finds them counted.
        entry = [handler.command, handler.path, handler.headers.get("Range", ""), 0]
        self.log.append(entry)
        handler.send_response(answer.status)
        for name, value in answer.headers.items():
            handler.send_header(name, value)
        if not {"content-length", "transfer-encoding", "x-no-length"} & {n.lower() for n in answer.headers}:
            handler.send_header("Content-Length", str(len(answer.body)))
        handler.end_headers()
        body = b"" if handler.command == "HEAD" else answer.body
        if fault in ("reset", "short"):
            body = body[: len(body) // 2]
        for start in range(0, len(body), 65_536):
            entry[3] += len(body[start : start + 65_536])
            handler.wfile.write(body[start : start + 65_536])
        if fault == "reset":
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if fault in ("reset", "short") or "x-no-length" in answer.headers:
            handler.close_connection = True


@dataclass
class Files:
    """Answers with the files of a folder, as servers of different habits do.

    Attributes
    ----------
    ranges, head : bool
        Whether ranges and HEAD are answered.
    encoding : {"", "gzip", "chunked", "close"}
        How a body is sent: with its length, compressed, in chunks, or until the connection is closed.
    cut_bytes : int
        A body is cut after so many bytes, though its header promises all; 0 for never.
    etag : bool
        Whether the state of a file is told.
    """

    folder: Path
    ranges: bool = True
    head: bool = True
    encoding: str = ""
    cut_bytes: int = 0
    etag: bool = True

    def __call__(self, handler: http.server.BaseHTTPRequestHandler, body: bytes) -> Answer:
        path = handler.path.split("?")[0]
        if path.startswith("/moved/"):
            return Answer(302, {"Location": path.removeprefix("/moved")}, b"")
        if handler.command == "HEAD" and not self.head:
            return Answer(405, {}, b"")
        file = self.folder / path.lstrip("/")
        if file.name.startswith("status-"):
            return Answer(int(file.name.removeprefix("status-")), {}, b"no")
        if file.is_dir():
            links = "".join(f'<a href="{p.name}">{p.name}</a>' for p in sorted(file.iterdir()))
            return Answer(200, {"Content-Type": "text/html"}, links.encode())
        if not file.is_file():
            return Answer(404, {}, b"")
        data = file.read_bytes()
        headers = {"ETag": f'"{hashlib.md5(data).hexdigest()}"'} if self.etag else {}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
        if self.ranges and match:
            start, stop = int(match[1]), min(int(match[2]) + 1, len(data))
            if start >= len(data):
                return Answer(416, {**headers, "Content-Range": f"bytes */{len(data)}"}, b"")
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            return self._body(206, headers, data[start:stop])
        return self._body(200, headers, data)

    def _body(self, status: int, headers: dict[str, str], data: bytes) -> Answer:
        if self.encoding == "gzip":
            return Answer(status, {**headers, "Content-Encoding": "gzip"}, gzip.compress(data, 1))
        if self.encoding == "chunked":
            chunks = [data[i : i + 70_000] for i in range(0, len(data), 70_000)]
            body = b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in [*chunks, b""])
            return Answer(status, {**headers, "Transfer-Encoding": "chunked"}, body)
        if self.encoding == "close":
            return Answer(status, {**headers, "x-no-length": "1", "Connection": "close"}, data)
        if self.cut_bytes and len(data) > self.cut_bytes:
            return Answer(status, {**headers, "Content-Length": str(len(data)), "x-no-length": "1"},
                          data[: self.cut_bytes])  # fmt: skip
        return Answer(status, headers, data)


@dataclass(frozen=True)
class Proxy:
    """Answers as another server does."""

    host: str
    port: int

    def __call__(self, handler: http.server.BaseHTTPRequestHandler, body: bytes) -> Answer:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            headers = {k: v for k, v in handler.headers.items() if k.lower() not in ("transfer-encoding", "connection")}
            headers["Content-Length"] = str(len(body))
            connection.request(handler.command, handler.path, body=body, headers=headers)
            answer = connection.getresponse()
            data = answer.read()
            left_out = {"connection", "transfer-encoding", "date", *(["content-length"] * (handler.command != "HEAD"))}
            kept = {k: v for k, v in answer.getheaders() if k.lower() not in left_out}
            if answer.status == 204:
                kept["Content-Length"] = "0"
            return Answer(answer.status, kept, data)
        finally:
            connection.close()
