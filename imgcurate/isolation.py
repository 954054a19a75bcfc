"""Decode in a process of its own, which may die: who kills it is found, everything else is decoded.

A decoder that segfaults or eats all memory takes its process with it. Where that has happened to a
partition, its images are decoded here: the worker starts a *keeper*, which imports all that is
needed and forks a *decoder* from itself. Batches go to the decoder and pixels come back through
pipes. If the decoder dies, or takes too long, the keeper tells how and forks the next one; the batch
is then decoded one image at a time. The culprit is an image that kills a decoder that has decoded
nothing else before.

The pixels are those of :class:`imgcurate.decode.Decoder` on the CPU, bit for bit. A decoder may take
some GiB of memory (see :func:`memory_limit`), and is the first process that a kernel short of memory
kills. Messages are JSON and raw bytes: nothing that comes back is executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, NoReturn

import numpy as np
import psutil

from imgcurate import schema
from imgcurate.backend import Backend
from imgcurate.batches import PixelView
from imgcurate.decode import Decoded, Decoder
from imgcurate.errors import ImgcurateError
from imgcurate.lazy import torch

__all__ = ["IsolatedDecoder", "memory_limit"]

BATCH_LIMIT_S: Final = 120.0
IMAGE_LIMIT_S: Final = 60.0
_CLOSE_LIMIT_S: Final = 5.0
_BYTES_PER_PIXEL: Final = 24
_MIN_MEMORY_BYTES: Final = 2 * 1024**3
_Message = tuple[dict[str, Any], list[bytearray]]


def memory_limit(max_pixels: int) -> int:
    """Return the bytes that a decoder may take: for the largest image allowed, several copies of its pixels."""
    return min(max(_MIN_MEMORY_BYTES, _BYTES_PER_PIXEL * max_pixels), psutil.virtual_memory().total)


class IsolatedDecoder:
    """Decode as :class:`~imgcurate.decode.Decoder` does, in a process that may die.

    Parameters
    ----------
    views : sequence of PixelView
        The sizes to make.
    backend : Backend
        Where the pixels go; they are decoded on the CPU.
    batch_limit_s, image_limit_s : float
        Seconds that a batch may take before its images are tried one by one, and that an image may
        take before it is given up.
    options
        Those of :class:`~imgcurate.decode.Decoder`.

    Raises
    ------
    ImgcurateError
        If the process does not start at all.
    """

    def __init__(
        self,
        views: Sequence[PixelView],
        backend: Backend,
        *,
        batch_limit_s: float = BATCH_LIMIT_S,
        image_limit_s: float = IMAGE_LIMIT_S,
        **options: Any,
    ) -> None:
        self.views = tuple(views)
        self._device = backend.torch_device
        self._batch_limit_s, self._image_limit_s = batch_limit_s, image_limit_s
        self._settings = {"views": [dataclasses.asdict(v) for v in views], "options": options}
        self._errors: IO[bytes] | None = None
        self._keeper: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> IsolatedDecoder:
        """Return itself; the process starts with the first batch."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._keeper is not None and self._keeper.stdin is not None:
            # At the end of its input the keeper ends its decoder and itself.
            self._keeper.stdin.close()
            try:
                self._keeper.wait(_CLOSE_LIMIT_S)
            except subprocess.TimeoutExpired:
                self._keeper.kill()
                self._keeper.wait()
            for stream in (self._keeper.stdout, self._errors):
                if stream is not None:
                    stream.close()
        self._keeper = self._errors = None

    def decode(self, blobs: Sequence[bytes]) -> Decoded:
        """Decode some encoded images; one that kills the decoder has the status ``decoder_crash``."""
        decoded, _, _ = self._ask(blobs, self._batch_limit_s)
        if decoded is None:
            decoded = _joined([self._decode_alone(blob) for blob in blobs])
        images = {view: pixels.to(self._device) for view, pixels in decoded.images.items()}
        return dataclasses.replace(decoded, images=images)

    def _decode_alone(self, blob: bytes) -> Decoded:
        decoded, how, fresh = self._ask([blob], self._image_limit_s)
        if decoded is None and not fresh:
            # Something that was decoded before may have damaged the decoder: this one is not guilty yet.
            decoded, how, fresh = self._ask([blob], self._image_limit_s)
        if decoded is not None:
            return decoded
        nothing, how_nothing, _ = self._ask([b""], self._image_limit_s)
        if nothing is None:
            raise ImgcurateError(f"the isolated decoder dies ({how_nothing}) without an image: check the installation")
        return dataclasses.replace(nothing, reasons=[how], statuses=[schema.STATUS_DECODER_CRASH])

    def _ask(self, blobs: Sequence[bytes], limit_s: float) -> tuple[Decoded | None, str, bool]:
        """Return what the decoder gave, or None and how it ended, and if it was a fresh one."""
        keeper = self._start()
        assert keeper.stdin is not None  # noqa: S101 - it was asked for
        assert keeper.stdout is not None  # noqa: S101 - it was asked for
        try:
            send(keeper.stdin.fileno(), {"limit_s": limit_s}, blobs)
            answer = receive(keeper.stdout.fileno())
        except OSError:
            answer = None
        if answer is None:
            self.close()
            return None, "the decoder died on it, and its keeper too", False
        header, buffers = answer
        if "ended" in header:
            return None, header["ended"], header["fresh"]
        return _unpacked(header["fields"], buffers, self.views), "", header["fresh"]

    def _start(self) -> subprocess.Popen[bytes]:
        if self._keeper is not None:
            return self._keeper
        # What this process can import, the keeper can too, whatever folder it is started in.
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "CUDA_VISIBLE_DEVICES": "",
        }
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._keeper = subprocess.Popen(
            [sys.executable, "-P", "-m", "imgcurate.isolation"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=environment,
            start_new_session=True,  # a Ctrl-C at the terminal is not the fault of an image
        )  # fmt: skip
        assert self._keeper.stdin is not None  # noqa: S101 - it was asked for
        assert self._keeper.stdout is not None  # noqa: S101 - it was asked for
        with contextlib.suppress(OSError):
            send(self._keeper.stdin.fileno(), self._settings, [])
        if receive(self._keeper.stdout.fileno()) is None:
            self._errors.seek(0)
            said = self._errors.read().decode("utf-8", "replace").strip().splitlines()[-1:]
            self.close()
            raise ImgcurateError(f"the isolated decoder does not start: {''.join(said) or 'it says nothing'}")
        return self._keeper


def _joined(parts: Sequence[Decoded]) -> Decoded:
    """Return the results of some images as one; each field is an array, a list, or arrays by name."""

    def join(values: Sequence[Any]) -> Any:
        first = values[0]
        if isinstance(first, Mapping):
            return {name: join([v[name] for v in values]) for name in first}
        if isinstance(first, list):
            return [item for v in values for item in v]
        return torch.cat(list(values)) if isinstance(first, torch.Tensor) else np.concatenate(values)

    return Decoded(**{f.name: join([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Decoded)})


def _packed(decoded: Decoded, views: Sequence[PixelView]) -> tuple[dict[str, Any], list[Any]]:
    """Return the fields of a result as JSON, arrays as places in the list of buffers."""
    buffers: list[Any] = []

    def pack(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {"map": [[views.index(k) if isinstance(k, PixelView) else k, pack(v)] for k, v in value.items()]}
        if isinstance(value, list):
            return {"list": value}
        array = np.ascontiguousarray(value.numpy() if isinstance(value, torch.Tensor) else value)
        buffers.append(array.reshape(-1).view(np.uint8).data)
        kind = "tensor" if isinstance(value, torch.Tensor) else "array"
        return {kind: [len(buffers) - 1, array.dtype.str, list(array.shape)]}

    return {f.name: pack(getattr(decoded, f.name)) for f in dataclasses.fields(Decoded)}, buffers


def _unpacked(fields: Mapping[str, Any], buffers: Sequence[bytearray], views: Sequence[PixelView]) -> Decoded:
    def unpack(value: Any) -> Any:
        ((kind, content),) = value.items()
        if kind == "map":
            return {views[k] if isinstance(k, int) else k: unpack(v) for k, v in content}
        if kind == "list":
            return content
        number, dtype, shape = content
        array = np.frombuffer(buffers[number], dtype).reshape(shape)
        return torch.from_numpy(array) if kind == "tensor" else array

    return Decoded(**{name: unpack(value) for name, value in fields.items()})


def send(fd: int, header: Mapping[str, Any], buffers: Sequence[Any]) -> None:
    """Write a message: a header of JSON and some buffers of bytes."""
    head = json.dumps({**header, "sizes": [len(b) for b in buffers]}).encode()
    for part in (struct.pack("<Q", len(head)) + head, *buffers):
        view = memoryview(part)
        while len(view):
            view = view[os.write(fd, view) :]


def receive(fd: int) -> _Message | None:
    """Read a message; None if the other side ended, also in the middle."""
    size = _read(fd, 8)
    head = None if size is None else _read(fd, struct.unpack("<Q", size)[0])
    if head is None:
        return None
    header = json.loads(head)
    buffers = []
    for nbytes in header.pop("sizes"):
        buffer = _read(fd, nbytes)
        if buffer is None:
            return None
        buffers.append(buffer)
    return header, buffers


def _read(fd: int, nbytes: int) -> bytearray | None:
    data = bytearray(nbytes)
    view = memoryview(data)
    while len(view):
        got = os.readv(fd, [view])
        if not got:
            return None
        view = view[got:]
    return data


@dataclasses.dataclass
class _Fork:
    pid: int
    to: int
    back: int
    fresh: bool = True


def _keep() -> None:
    """Run the keeper: hand requests to a decoder, and fork another one when it ended."""
    requests, replies = os.dup(0), os.dup(1)
    # What libraries print must not get between the messages.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    first = receive(requests)
    if first is None:
        return
    settings = first[0]
    # What every decoder needs is imported before any is forked, and within the time that a start may take.
    _ = torch.__version__
    send(replies, {"ready": True}, [])
    fork: _Fork | None = None
    while (request := receive(requests)) is not None:
        fork = fork or _fork(settings, requests, replies)
        answer, how = _hand_over(fork, request, requests)
        fresh, fork.fresh = fork.fresh, False
        if answer is None:
            fork = None
            send(replies, {"ended": how, "fresh": fresh}, [])
        else:
            send(replies, {**answer[0], "fresh": fresh}, answer[1])
    if fork is not None:
        _end(fork)


def _fork(settings: Mapping[str, Any], *inherited: int) -> _Fork:
    (child_in, to), (back, child_out) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        for fd in (to, back, *inherited):
            os.close(fd)
        _serve(settings, child_in, child_out)
    os.close(child_in)
    os.close(child_out)
    return _Fork(pid, to, back)


def _hand_over(fork: _Fork, request: _Message, requests: int) -> tuple[_Message | None, str]:
    """Return the decoder's answer, or None and how it ended."""
    limit_s = request[0]["limit_s"]
    with contextlib.suppress(BrokenPipeError):
        send(fork.to, {}, request[1])
    ready = select.select([fork.back, requests], [], [], limit_s)[0]
    if requests in ready:
        _end(fork)
        sys.exit()  # the worker has gone
    answer = receive(fork.back) if ready else None
    if answer is not None:
        return answer, ""
    status = _end(fork, kill=not ready)
    if not ready:
        return None, f"the decoder took more than {limit_s:g} s on it"
    return None, f"the decoder died on it ({_how(status)})"


def _end(fork: _Fork, *, kill: bool = True) -> int:
    os.close(fork.to)
    os.close(fork.back)
    if kill:
        os.kill(fork.pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(fork.pid, 0)[1])


def _how(status: int) -> str:
    if status >= 0:
        return f"exit code {status}"
    name = signal.Signals(-status).name
    return f"{name}, perhaps out of memory" if name == "SIGKILL" else name


def _serve(settings: Mapping[str, Any], requests: int, replies: int) -> NoReturn:
    """Run a decoder, in a process that was forked for it: decode requests until there are no more."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        Path("/proc/self/oom_score_adj").write_text("1000")
        views = [PixelView(**v) for v in settings["views"]]
        decoder = Decoder(views, Backend("cpu"), **settings["options"])
        limit = _data_bytes() + memory_limit(decoder.max_pixels)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        while (request := receive(requests)) is not None:
            fields, buffers = _packed(decoder.decode([bytes(b) for b in request[1]]), views)
            send(replies, {"fields": fields}, buffers)
        code = 0
    except MemoryError:
        os.kill(os.getpid(), signal.SIGKILL)
    finally:
        os._exit(code)


def _data_bytes() -> int:
    """Return the bytes of data that this process has mapped, which RLIMIT_DATA counts."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    _keep()
