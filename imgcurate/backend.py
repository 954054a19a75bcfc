"""The one place that knows whether a GPU is there and which libraries stand for which.

========================  ==================  =======================
what                      ``cpu``             ``gpu``
========================  ==================  =======================
frames                    pandas              cudf
arrays                    NumPy               CuPy
k-means                   scikit-learn        cuML
image decoding            DALI ``cpu``        DALI ``mixed``
torch device              ``cpu``             ``cuda:0``
========================  ==================  =======================

A worker of a ``LocalCUDACluster`` sees its own GPU as device 0, so there is never an index to pass.
Only this module and :mod:`imgcurate.cluster` import cudf, cupy, cuml or dask_cuda.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import importlib.util
import numbers
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import dask
import dask.dataframe as dd
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from imgcurate import schema
from imgcurate.errors import ConfigError, DeviceError
from imgcurate.lazy import torch
from imgcurate.memory import Holder

__all__ = [
    "DEVICES",
    "Backend",
    "array_from_list_column",
    "check_batch_size",
    "cpu_count",
    "get_backend",
    "lazy_frame",
    "list_array",
    "spread_rows",
    "why_no_gpu",
]

Device = Literal["auto", "cpu", "gpu"]
Floats = npt.NDArray[np.float32]
_GPU_DEVICES: Final = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvhost-ctrl-gpu", "/dev/nvgpu")
DEVICES: Final = ("auto", "cpu", "gpu")
_INIT_ROWS_PER_CLUSTER: Final = 8
_LARGEST_BATCH: Final = 65_536
# Tasks of dedup share a GPU by four; one that finds most of it free may take more.
_RESIDENT_SHARE: Final = 0.15
_RESIDENT_SHARE_ALONE: Final = 0.4
_RESIDENT_SHARE_OF_FREE: Final = 0.6
_CARRIED_ROWS: Final = 262_144
_CPU_BATCH: Final = 32
_GPU_BATCH: Final = 256
_GPU_LIBRARIES: Final = ("cudf", "cupy", "cuml")


@dataclass(frozen=True, slots=True)
class Backend:
    """The libraries that do the work on one kind of device.

    Attributes
    ----------
    name : {"cpu", "gpu"}
        The kind of device.
    """

    name: Literal["cpu", "gpu"]

    @property
    def is_gpu(self) -> bool:
        """Whether work runs on a GPU."""
        return self.name == "gpu"

    @property
    def xp(self) -> Any:
        """The array module: ``numpy`` or ``cupy``."""
        return importlib.import_module("cupy") if self.is_gpu else np

    @property
    def torch_device(self) -> str:
        """The device string for torch."""
        return "cuda:0" if self.is_gpu else "cpu"

    @property
    def dali_decoder(self) -> dict[str, Any]:
        """The options of DALI's image decoder that decide where it decodes.

        On a GPU with a JPEG engine that takes all that it can: by default DALI gives it a part of each batch, and the
        pixels of an image would depend on its place there.
        """
        return {"device": "mixed", "hw_decoder_load": 1.0} if self.is_gpu else {"device": "cpu"}

    @property
    def dali_device_id(self) -> int | None:
        """The ``device_id`` of a DALI pipeline; None builds a CPU-only pipeline."""
        return 0 if self.is_gpu else None

    def stream(self) -> Any:
        """Return a new CUDA stream; None on the CPU."""
        return torch.cuda.Stream() if self.is_gpu else None  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        """Let torch work on a stream in this context, and wait for it at the end; nothing on the CPU."""
        if stream is None:
            yield
            return
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()

    def copies(self, outputs: Sequence[Any], stream: Any) -> list[torch.Tensor]:
        """Return outputs of DALI on a GPU as tensors whose memory is not DALI's, ready for any thread.

        They are made on `stream`: on that of the stages they would wait for all that is computed there, and Python
        with them. Who works on them on another stream has to keep them until that is done: see :meth:`holder`.
        """
        with self.on(stream):
            return [torch.utils.dlpack.from_dlpack(out.as_tensor()).clone() for out in outputs]

    def holder(self) -> Holder:
        """Return what keeps the memory of batches while the device works on them."""
        return Holder(on_gpu=self.is_gpu)

    def to_host(self, array: Any) -> npt.NDArray[Any]:
        """Return `array` (NumPy, CuPy or torch) as a NumPy array on the host."""
        if hasattr(array, "detach"):
            array = array.detach().cpu().numpy()
        elif hasattr(array, "get") and not isinstance(array, np.ndarray):
            array = array.get()
        return np.asarray(array)

    def batch_size(self, asked: int | Literal["auto"]) -> int:
        """Return how many images to work on at once: what is asked for, or with ``auto`` what keeps the device busy."""
        if asked != "auto":
            return asked
        return _GPU_BATCH if self.is_gpu else _CPU_BATCH

    @property
    def host_threads(self) -> int:
        """Threads for NumPy beside a GPU; on a CPU, whose workers have a core each, one."""
        return torch.get_num_threads() if self.is_gpu else 1

    @property
    def product_dtype(self) -> npt.DTypeLike:
        """Type of values whose products only pick candidates: half precision on a GPU, which sums in float32."""
        return np.float16 if self.is_gpu else np.float32

    def product_operand(self, array: Any) -> Any:
        """Return an array on the device as :attr:`product_dtype`."""
        return self.asarray(array).astype(self.product_dtype, copy=False)

    def resident_operand(self, array: npt.NDArray[Any]) -> Any:
        """Return :meth:`product_operand` of a whole array, if a GPU has room for it beside what else is done there."""
        if not self.is_gpu:
            return None
        free, total = self.xp.cuda.runtime.memGetInfo()
        nbytes = array.size * np.dtype(self.product_dtype).itemsize
        if nbytes > max(_RESIDENT_SHARE * total, min(_RESIDENT_SHARE_ALONE * total, _RESIDENT_SHARE_OF_FREE * free)):
            return None
        try:
            operand = self.xp.empty(array.shape, self.product_dtype)
            for start in range(0, len(array), _CARRIED_ROWS):
                # The whole in float32 would need twice the room.
                operand[start : start + _CARRIED_ROWS] = self.asarray(array[start : start + _CARRIED_ROWS])
        except MemoryError:
            # Others were faster.
            return None
        return operand

    def asarray(self, array: npt.NDArray[Any]) -> Any:
        """Return a host array as an array of :attr:`xp`; no copy on the CPU."""
        return self.xp.asarray(array)

    def largest(self, values: Any, n: int) -> Any:
        """Return where the `n` largest values of each row of a matrix are, in any order: shape (rows, n)."""
        if not self.is_gpu:
            k = values.shape[1]
            return np.argpartition(values, k - n, axis=1)[:, k - n :]
        # CuPy's argpartition sorts whole rows where it looks for the end of long ones.
        return self.xp.from_dlpack(torch.topk(torch.utils.dlpack.from_dlpack(values), n, dim=1, sorted=False).indices)

    def frame_from_arrow(self, table: pa.Table) -> Any:
        """Return a pandas or cudf frame that holds an Arrow table without loss."""
        if self.is_gpu:
            return importlib.import_module("cudf").DataFrame.from_arrow(table)
        columns: dict[str, Any] = {}
        for field in table.schema:
            dtype: Any = schema.pandas_dtype(field.name, field.type)
            column = table.column(field.name)
            if isinstance(dtype, pd.api.extensions.ExtensionDtype):
                columns[field.name] = dtype.__from_arrow__(column)  # type: ignore[attr-defined]
            else:
                columns[field.name] = column.to_numpy(zero_copy_only=False).astype(dtype, copy=True)
        return pd.DataFrame(columns, copy=False)

    def frame_to_arrow(self, frame: Any, schema_: pa.Schema) -> pa.Table:
        """Return a pandas or cudf frame as an Arrow table of exactly `schema_`."""
        if not isinstance(frame, pd.DataFrame):
            return frame.to_arrow(preserve_index=False).select(schema_.names).cast(schema_)
        return pa.Table.from_pandas(frame[schema_.names], schema=schema_, preserve_index=False).replace_schema_metadata(
            None
        )

    def meta(self, schema_: pa.Schema) -> Any:
        """Return the empty frame that Dask takes as ``meta`` for `schema_`."""
        meta = schema.make_meta(schema_)
        return self.frame_from_arrow(schema_.empty_table()) if self.is_gpu else meta

    def free_memory(self) -> None:
        """Give back what nobody uses any more: objects in cycles, and the blocks that torch, CuPy and DALI keep."""
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()
            self.xp.get_default_memory_pool().free_all_blocks()
            if (dali := sys.modules.get("nvidia.dali.backend")) is not None:
                dali.ReleaseUnusedMemory()

    def fit_kmeans(
        self,
        x: npt.NDArray[np.float32],
        n_clusters: int,
        *,
        init: Any = "k-means++",
        n_init: int = 1,
        max_iter: int = 100,
        tol: float = 1e-4,
        random_state: int = 42,
        oversampling_factor: float = 2.0,
    ) -> npt.NDArray[np.float32]:
        """Fit k-means and return the centroids.

        Parameters
        ----------
        x : ndarray of shape (n_samples, d)
            float32 rows on the host, in random order.
        n_clusters : int
            Number of centroids, at most ``n_samples``.
        init : str or ndarray of shape (n_clusters, d)
            ``"k-means++"`` (of cuML the scalable one, if `n_init` is more than 1), ``"random"`` or starting centroids.
        n_init, max_iter, tol, random_state, oversampling_factor
            As in cuML; the last is used on a GPU alone.

        Returns
        -------
        ndarray of shape (n_clusters, d)
            float32 centroids on the host, not normalised.

        Notes
        -----
        On the CPU it runs on one thread: scikit-learn sums the threads' partial centroids in the
        order in which they end, so more threads would make the result differ from run to run. cuML does so too,
        and its centroids differ by rounding from run to run.
        With ``n_init=1`` k-means++ picks the starting centroids from the first 8 rows per cluster, for on all rows
        it would take longer than what follows.
        """
        fit = self._fit_cuml if self.is_gpu else _fit_sklearn
        options = {"n_init": n_init, "max_iter": max_iter, "tol": tol, "random_state": random_state}
        return fit(x, n_clusters, init, oversampling_factor, options)

    def _fit_cuml(
        self, x: Floats, n_clusters: int, init: Any, oversampling_factor: float, options: dict[str, Any]
    ) -> Floats:
        rows = self.asarray(x)
        if isinstance(init, str) and init == "k-means++":
            init = "scalable-k-means++"
            if options["n_init"] == 1:
                init = spread_rows(rows[: _INIT_ROWS_PER_CLUSTER * n_clusters], n_clusters, options["random_state"])
                n_clusters = len(init)
        if not isinstance(init, str):
            init, options = self.asarray(init), {**options, "n_init": 1}
        model = importlib.import_module("cuml.cluster").KMeans(
            n_clusters=n_clusters, init=init, oversampling_factor=oversampling_factor, output_type="cupy", **options
        )
        model.fit(rows)
        return self.to_host(model.cluster_centers_).astype(np.float32)


def _fit_sklearn(x: Floats, n_clusters: int, init: Any, oversampling_factor: float, options: dict[str, Any]) -> Floats:
    from sklearn.cluster import KMeans, kmeans_plusplus
    from threadpoolctl import threadpool_limits

    del oversampling_factor
    with threadpool_limits(limits=1):
        first = x[: _INIT_ROWS_PER_CLUSTER * n_clusters]
        if isinstance(init, str) and init == "k-means++" and options["n_init"] == 1 and len(first) < len(x):
            init, _ = kmeans_plusplus(first, n_clusters, random_state=options["random_state"])
        if not isinstance(init, str):
            options = {**options, "n_init": 1}
        model = KMeans(n_clusters=n_clusters, init=init, **options).fit(x)
    return np.ascontiguousarray(model.cluster_centers_, dtype=np.float32)


def spread_rows(rows: Any, n: int, random_state: int) -> Any:
    """Pick rows to start k-means with: each with a chance in proportion to its squared distance to those before it.

    Parameters
    ----------
    rows : ndarray of float32 of shape (m, d)
        NumPy or CuPy.
    n : int
        How many to pick; at most m.
    random_state : int
        Seed.

    Returns
    -------
    ndarray of float32 of shape (k, d)
        Distinct rows, sorted, of the same library; k < n where no more rows are distinct.

    References
    ----------
    Arthur, Vassilvitskii: k-means++: The Advantages of Careful Seeding. SODA 2007.
    """
    xp = np if isinstance(rows, np.ndarray) else importlib.import_module("cupy")
    draws = np.random.default_rng(random_state).random(n + 1)
    picked = xp.empty(n, dtype=np.int64)
    nearest = xp.full(len(rows), np.inf)
    at = xp.asarray(int(draws[0] * len(rows)))
    for i in range(n):
        picked[i] = at
        nearest = xp.minimum(nearest, ((rows - rows[at]) ** 2).sum(axis=1, dtype=np.float64))
        # Nothing here waits for the device.
        sums = xp.cumsum(nearest)
        at = xp.minimum(xp.searchsorted(sums, draws[i + 1] * sums[-1], side="right"), len(rows) - 1)
    chosen = rows[picked]
    # CuPy sorts rows by comparing two at a time from Python.
    return xp.asarray(np.unique(chosen if xp is np else chosen.get(), axis=0))


def lazy_frame(
    make: Callable[..., Any], /, *items: Sequence[Any], meta: Any, label: str, **kwargs: Any
) -> dd.DataFrame:
    """Return the Dask DataFrame whose partitions are what a function makes of items; ``dd.from_map`` as it is needed.

    Nothing is done to what the function returns: its dtypes are those of `meta`, and Dask does not make strings
    of its columns.
    """
    with dask.config.set({"dataframe.convert-string": False}):
        return dd.from_map(make, *items, meta=meta, label=label, enforce_metadata=False, **kwargs)


def list_array(array: npt.NDArray[Any], valid: npt.NDArray[np.bool_] | None = None) -> pa.ListArray:
    """Return a 2-D host array as an Arrow list array.

    Parameters
    ----------
    array : ndarray of shape (n_valid, d)
        The rows that are not null.
    valid : ndarray of bool of shape (n,), optional
        Which of the n rows are not null; by default all.
    """
    n_valid, dim = array.shape
    values = pa.array(np.ascontiguousarray(array).reshape(-1))
    if valid is None:
        valid = np.ones(n_valid, dtype=bool)
    offsets = np.zeros(len(valid) + 1, dtype=np.int64)
    np.cumsum(np.where(valid, dim, 0), out=offsets[1:])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise ConfigError(
            f"a partition holds {n_valid} rows of {dim} values, more than a list column can "
            "(2^31 - 1 values): use fewer files_per_partition"
        )
    mask = None if valid.all() else pa.array(~valid)
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values, mask=mask)


def array_from_list_column(series: Any) -> Any:
    """Return a list column without nulls as a 2-D array of shape (n, d).

    Accepts a pandas Series of Arrow lists, a cudf list Series, or an Arrow (chunked) list array; the
    result is a view where the layout allows it.

    Raises
    ------
    ConfigError
        If the column has nulls or its lists differ in length.
    """
    if isinstance(series, pd.Series):
        series = pa.chunked_array(pa.array(series))
    if isinstance(series, (pa.ChunkedArray, pa.Array)):
        column = series.combine_chunks() if isinstance(series, pa.ChunkedArray) else series
        n, nulls = len(column), column.null_count
        flat = column.flatten().to_numpy(zero_copy_only=False)
    else:
        n, nulls = len(series), int(series.isnull().sum())
        flat = series.list.leaves.values
    if nulls:
        raise ConfigError(f"{nulls} of {n} rows have no embedding: filter them out first")
    if n == 0:
        return flat.reshape(0, 0)
    dim, rest = divmod(len(flat), n)
    if rest:
        raise ConfigError(f"the {n} embeddings differ in length ({len(flat)} values in all)")
    return flat.reshape(n, dim)


@functools.cache
def why_no_gpu() -> str | None:
    """Return why this process cannot use a GPU, in words; None if it can."""
    if sys.platform == "linux" and not any(map(os.path.exists, _GPU_DEVICES)):
        # Importing torch takes seconds.
        return "there is no NVIDIA driver (no /dev/nvidiactl)"
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return "this torch is built without CUDA"
        return "torch sees no CUDA device (no GPU, no driver, or a driver too old for this torch)"
    for library in _GPU_LIBRARIES:
        if importlib.util.find_spec(library) is None:
            return f"{library} is not installed (the README says how, under GPUs)"
    return None


def get_backend(device: str = "auto") -> Backend:
    """Return the backend for `device`.

    Parameters
    ----------
    device : {"auto", "cpu", "gpu"}
        ``auto`` takes the GPU where there is one, else the CPU.

    Raises
    ------
    ConfigError
        If `device` is none of these.
    DeviceError
        If ``gpu`` is asked for and is not usable; the message says why.
    """
    if device not in DEVICES:
        raise ConfigError(f"device={device!r} is none of {', '.join(DEVICES)}")
    if device == "cpu":
        return Backend("cpu")
    reason = why_no_gpu()
    if reason is None:
        return Backend("gpu")
    if device == "gpu":
        raise DeviceError(f"device='gpu' is not usable here: {reason}. Use device='cpu' or 'auto'")
    return Backend("cpu")


def check_batch_size(name: str, value: int | str) -> None:
    """Check a parameter that says how many images are worked on at once.

    Raises
    ------
    ConfigError
        If it is neither ``auto`` nor a whole number from 1 on.
    """
    if value == "auto":
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ConfigError(f"{name}={value!r} should be a whole number, or auto")
    if value < 1:
        raise ConfigError(f"{name}={value} should be >= 1, or auto")
    if value > _LARGEST_BATCH:
        raise ConfigError(f"{name}={value} should be at most {_LARGEST_BATCH:,}")


def cpu_count() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
