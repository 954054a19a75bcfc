"""How fast shards on a server are listed and their images read, as in the first phase of a run.

The server runs on loopback in a process of its own, answers ranges, and waits before each answer, as one
that is far away. The cases, which differ in nothing but how bytes are fetched:

- ``download, then read``: a whole shard with ``fs.cat_file``, which is then read from memory;
- ``imgcurate``: ahead, in requests of up to 4 MiB, and kept on the local disk between headers and images;
- ``one request at a time``: windows of 4 MiB for the headers, then blocks of up to 16 MiB for the images, as
  imgcurate did before.

The parameters tell how often a byte was fetched, and in how many requests, one run each.

    python benchmarks/bench_remote.py --json remote.json
    python benchmarks/bench_remote.py --latency-ms 100
    python benchmarks/bench_remote.py --smoke
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import http.server
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import fsspec
from bench_index import write_shard
from harness import Case, argument_parser, compare

from imgcurate.objects import open_remote
from imgcurate.storage import Source, open_source, read_ahead, read_ranges
from imgcurate.tar import scan_tar

BATCH = 32
_runs = itertools.count()


def main() -> int:
    if sys.argv[1:2] == ["--serve"]:
        return serve(sys.argv[2], float(sys.argv[3]))
    parser = argument_parser(__doc__)
    parser.add_argument("--shards", type=int, default=4, help="shards (default: 4)")
    parser.add_argument("--samples", type=int, default=1_500, help="samples in a shard (default: 1,500)")
    parser.add_argument("--image-bytes", type=int, default=40_000, help="bytes of an image (default: 40,000)")
    parser.add_argument("--latency-ms", type=float, default=20.0, help="wait before each answer (default: 20 ms)")
    args = parser.parse_args()
    count, samples = (2, 100) if args.smoke else (args.shards, args.samples)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            write_shard(Path(folder) / f"{i:05d}.tar", samples, args.image_bytes, "ustar")
        nbytes = sum(path.stat().st_size for path in Path(folder).iterdir())
        with server(folder, args.latency_ms / 1000) as port:
            ways = {"download, then read": download, "imgcurate": stream, "one request at a time": one_by_one}
            expected = {"images": count * samples, "image_bytes": count * samples * args.image_bytes}
            runs = {name: functools.partial(run, way, port, count) for name, way in ways.items()}
            parameters = {"shards": count, "shard_bytes": nbytes // count, "image_bytes": args.image_bytes,
                          "latency_ms": args.latency_ms}  # fmt: skip
            for name, call in runs.items():
                before = counted(port)
                call()
                requests, sent = (b - a for a, b in zip(before, counted(port), strict=True))
                parameters[name] = f"{requests} requests, {sent / nbytes:.2f} bytes per byte"
            return compare(
                "remote", [Case(name, call, lambda found: found, expected) for name, call in runs.items()], args,
                baseline="download, then read", parameters=parameters, packages=["fsspec", "aiohttp"],
            )  # fmt: skip


def run(way: Callable[[Sequence[str]], Iterator[bytes]], port: int, count: int) -> dict[str, int]:
    """Read all images; under new names, so that nothing is found which an earlier run fetched."""
    number = next(_runs)
    urls = [f"http://127.0.0.1:{port}/{i:05d}.tar?run={number}" for i in range(count)]
    sizes = [len(image) for image in way(urls)]
    return {"images": len(sizes), "image_bytes": sum(sizes)}


def download(urls: Sequence[str]) -> Iterator[bytes]:
    fs = fsspec.filesystem("http")
    for url in urls:
        source = Memory(url, fs.cat_file(url))
        yield from images(source, list_images(source, 6 * 512))


def stream(urls: Sequence[str]) -> Iterator[bytes]:
    for url, following in itertools.zip_longest(urls, urls[1:]):
        if following:
            read_ahead(following)
        source = open_source(url, gap_bytes=1024 * 1024)
        ranges = list_images(source, 64 * 1024)
        source.close()
        source = open_source(url)
        yield from images(source, ranges)
        source.close()


def one_by_one(urls: Sequence[str]) -> Iterator[bytes]:
    for url in urls:
        source = Single(url)
        yield from images(source, list_images(source, 4 * 1024 * 1024))


class Memory:
    def __init__(self, url: str, data: bytes) -> None:
        self.url, self.size, self._data = url, len(data), data

    def pread(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]

    def close(self) -> None:
        pass


class Single:
    """A request for each read."""

    def __init__(self, url: str) -> None:
        self._file = open_remote(url)
        self.url, self.size = url, self._file.size

    def pread(self, offset: int, length: int) -> bytes:
        return self._file.read(offset, min(offset + length, self.size)) if offset < self.size else b""

    def close(self) -> None:
        pass


def list_images(source: Source, window_bytes: int) -> list[tuple[int, int]]:
    members = scan_tar(source, window_bytes=window_bytes).members
    return [(m.data_offset, m.size) for m in members if m.name.endswith(".jpg")]


def images(source: Source, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    for first in range(0, len(ranges), BATCH):
        yield from read_ranges(source, ranges[first : first + BATCH])


@contextmanager
def server(folder: str, latency_s: float) -> Iterator[int]:
    command = [sys.executable, __file__, "--serve", folder, str(latency_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.terminate()


def counted(port: int) -> list[int]:
    """Return the requests that were answered, and the bytes of their bodies."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/count")
    answer: list[int] = json.loads(connection.getresponse().read())
    connection.close()
    return answer


def serve(folder: str, latency_s: float) -> int:
    count = [0, 0]

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            name = self.path.split("?")[0].strip("/")
            if name == "count":
                self.reply(200, {}, json.dumps(count).encode())
                return
            time.sleep(latency_s)
            file = Path(folder) / name
            size = file.stat().st_size
            headers = {"ETag": f'"{self.path}"'}
            start, stop, status = 0, size, 200
            if match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                start, stop, status = int(match[1]), min(int(match[2]) + 1, size), 206
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
            self.send_head(status, headers, stop - start)
            with contextlib.suppress(ConnectionError), file.open("rb") as body:
                while start < stop:
                    start += os.sendfile(self.connection.fileno(), body.fileno(), start, stop - start)
            count[0] += 1
            count[1] += stop - int(match[1] if match else 0)

        def do_HEAD(self) -> None:
            self.send_head(200, {}, (Path(folder) / self.path.split("?")[0].strip("/")).stat().st_size)

        def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_head(status, headers, len(body))
            self.wfile.write(body)

        def send_head(self, status: int, headers: dict[str, str], length: int) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(length)}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.flush()

        def log_message(self, *args: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 64

        def handle_error(self, *args: object) -> None:
            """Say nothing of connections that the client closed."""

    with Server(("127.0.0.1", 0), Handler) as httpd:
        print(httpd.server_port, flush=True)
        httpd.serve_forever()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
