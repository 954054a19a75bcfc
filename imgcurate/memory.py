"""Memory: what says that it ran out, what keeps it while a GPU works, and what glibc does with it."""

from __future__ import annotations

import collections
import ctypes
import functools
import os
from collections.abc import Iterator
from typing import Any, Final

from imgcurate.lazy import torch

__all__ = ["MAPPED_BYTES", "Holder", "is_device_error", "is_out_of_memory", "keep_freed_memory"]

# glibc's mallopt: the least block that is mapped for itself, and how much may lie free at the end of a heap, in bytes.
MAPPED_BYTES: Final = 32 * 1024**2
_MALLOPT: Final = {-3: MAPPED_BYTES, -1: 4 * MAPPED_BYTES}
# torch's allocator on the CPU, cuBLAS and cuDNN have no exception of their own for this.
_OUT_OF_MEMORY_TEXTS: Final = (
    "can't allocate memory",
    "out of memory",
    "_STATUS_ALLOC_FAILED",
    "CUDA allocation failed",
)
# What torch, DALI, CuPy and RMM call an error of the device, after which nothing in the process can use it any more.
_DEVICE_ERROR_TEXTS: Final = ("CUDA error", "cudaError", "CUDA_ERROR")
# Batches whose memory is kept while the device works on them.
_HELD: Final = 2


class Holder:
    """Keeps what is given to it until all that was queued on the GPU by then has run; nothing on a CPU.

    Kernels run long after Python has queued them. Memory that was allocated on another stream, and of which torch's
    allocator is not told (RMM's takes no notice), would be given to the next batch while they still read it. At most
    two batches are kept, so Python is never further ahead of the device. To be closed, which waits for the device.
    """

    def __init__(self, *, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._held: collections.deque[tuple[Any, Any]] = collections.deque()

    def hold(self, value: Any) -> None:
        """Keep a value."""
        if not self._on_gpu:
            return
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(torch.cuda.default_stream())
        self._held.append((done, value))
        if len(self._held) > _HELD:
            self._release_first()

    def close(self) -> None:
        """Wait for the device, and keep nothing any more."""
        while self._held:
            self._release_first()

    def _release_first(self) -> None:
        # Taken out only then: what is not in the queue is gone.
        self._held[0][0].synchronize()
        self._held.popleft()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or what it was raised from, says that memory ran out; of any library."""
    return any(
        isinstance(cause, MemoryError)
        or any(kind.__name__ == "OutOfMemoryError" for kind in type(cause).__mro__)
        or (isinstance(cause, RuntimeError) and any(text in str(cause) for text in _OUT_OF_MEMORY_TEXTS))
        for cause in _causes(error)
    )


def is_device_error(error: BaseException) -> bool:
    """Return whether an error, or what it was raised from, is one of the GPU, and not of what it was given to do."""
    return any(
        isinstance(cause, RuntimeError)
        and (type(cause).__name__ == "AcceleratorError" or any(text in str(cause) for text in _DEVICE_ERROR_TEXTS))
        for cause in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


@functools.cache
def keep_freed_memory() -> None:
    """Let a Dask worker keep the memory of arrays that it has freed for those to come, if glibc gives it.

    Dask starts workers with ``MALLOC_TRIM_THRESHOLD_=65536``, and any such setting makes glibc give each array of more
    than 128 KiB back to the system at once: the next one is fetched page by page, and a run with an encoder on a
    CPU takes half as long again. Does nothing where that is not set, and nothing where ``MALLOC_MMAP_THRESHOLD_`` is.
    """
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ or "MALLOC_MMAP_THRESHOLD_" in os.environ or os.name != "posix":
        return
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for parameter, value in _MALLOPT.items():
            mallopt(parameter, value)
