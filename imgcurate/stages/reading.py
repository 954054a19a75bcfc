"""Where samples come from: which shards, in which partitions, and how their images are decoded."""

from __future__ import annotations

import dataclasses
import itertools
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imgcurate import schema
from imgcurate.archives import Archives
from imgcurate.backend import Backend, check_batch_size
from imgcurate.batches import PixelView
from imgcurate.decode import MAX_ASPECT_RATIO, MAX_PIXELS, Decoded, borrow_decoder
from imgcurate.errors import ConfigError
from imgcurate.folders import file_url
from imgcurate.inputs import find_shards
from imgcurate.isolation import IsolatedDecoder
from imgcurate.members import MemberColumns
from imgcurate.shards import Shard
from imgcurate.sidecars import SidecarColumns, Sidecars, find_sidecars
from imgcurate.stages.base import IMAGE, Stage, check_count
from imgcurate.storage import StorageError, is_local, read_ahead, read_bytes, read_ranges

__all__ = ["FilePartitioningStage", "ImageReaderStage", "read_images", "read_pixels"]

_T = TypeVar("_T")
# Of a GPU's batch, which is filled up to its full size, it is to be rare that a part is cut off.
_MAX_CHUNK_BYTES: Final = {"cpu": 128 * 1024**2, "gpu": 1024**3}
_FILE_THREADS: Final = 16


@dataclass(frozen=True)
class FilePartitioningStage(Stage):
    """Say which shards are read and how many go into a partition.

    Attributes
    ----------
    file_paths : str or sequence of str
        Paths or fsspec URLs of tars, Parquet or Arrow files with a column of images, folders of either or
        of images; braces and globs expand. See :mod:`imgcurate.inputs`.
    files_per_partition : int, optional
        Shards per partition, the unit of work, of retry and of the checkpoint. By default each shard is one, but
        tiny neighbours share one, up to 8 MiB, 64 shards and a 64th of all.
    storage_options : mapping, optional
        Passed to fsspec (credentials, endpoint).
    sidecar_columns : "auto" or sequence of str
        Columns to join from the Parquet files beside tars; see :func:`read_webdataset`.
    """

    file_paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
    files_per_partition: int | None = None
    # Not shown, for it may hold secrets.
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)
    sidecar_columns: SidecarColumns = "auto"

    def __post_init__(self) -> None:
        if self.files_per_partition is not None:
            check_count("files_per_partition", self.files_per_partition)

    def find(self, taken: Iterable[str] = ()) -> tuple[list[Shard], Sidecars]:
        """Find the shards and the columns of their sidecars; `taken` are names that these cannot have.

        Raises
        ------
        InputError
            If a pattern matches nothing, or names something of an unknown kind.
        """
        shards = find_shards(self.file_paths, self.storage_options)
        return shards, find_sidecars(shards, self.sidecar_columns, self.storage_options, taken=taken)


@dataclass(frozen=True)
class ImageReaderStage(Stage):
    """Read samples from their shards and decode the images.

    Attributes
    ----------
    dali_batch_size : int or "auto"
        Images per batch, for DALI and for the stages after it; ``auto`` is 32 on a CPU and 256 on a GPU.
    num_threads : int, optional
        DALI's CPU threads per worker; by default the worker's share of the cores.
    max_pixels : int
        Images with more pixels are refused before they are decoded.
    max_aspect_ratio : float
        So are images whose longer side is more than so many times the shorter one: resized to the
        encoder's input they would be enormous.
    min_size : int
        Images whose shorter side has fewer pixels get the status ``too_small``.
    max_image_bytes : int
        Image members with more bytes are refused before they are read.
    text_columns : sequence of str
        Members to have as columns, by extension: ``("txt", "json")`` gives captions and metadata.
    json_columns : mapping of str to str, optional
        Keys of the objects in members ``.json`` to have as columns, and what they hold: ``{"pwatermark": "number",
        "meta.license": "text"}``; dots lead into objects within. ``number`` and ``integer`` take text that is one too,
        ``text`` takes all, as JSON, ``boolean`` true and false; other values are null. A key that is a column of
        imgcurate itself, such as ``width``, comes as ``source_width``.
    num_gpus_per_worker : float
        Share of a GPU that one task takes: 0.5 runs two tasks at once on each GPU, so that one computes while the
        other begins or ends. More than two share it with no gain.
    jpeg_scaling : bool
        On a CPU, decode JPEGs that are far larger than what is made of them at a half, a quarter or an eighth of
        their size, from the low frequencies alone. What is left has at least three times the pixels a side that any
        stage asks for. Very sharp pictures, such as scanned text, come out a little softer.

    Notes
    -----
    In a pipeline's run a partition whose worker died, or whose run was killed, is decoded once more in
    a process of its own (on the CPU, see :mod:`imgcurate.isolation`): an image that kills that one too,
    or takes it more than 60 s, gets the status ``decoder_crash``. Functions on frames have no folder to
    remember a death in: there such an image ends the computation as Dask's ``KilledWorker``.
    """

    dali_batch_size: int | Literal["auto"] = "auto"
    num_threads: int | None = None
    max_pixels: int = MAX_PIXELS
    max_aspect_ratio: float = MAX_ASPECT_RATIO
    min_size: int = 1
    max_image_bytes: int = 256 * 1024**2
    text_columns: Sequence[str] = ()
    json_columns: Mapping[str, str] = field(default_factory=dict)
    num_gpus_per_worker: float = 0.5
    jpeg_scaling: bool = True

    name: ClassVar[str] = "ImageReaderStage"

    def __post_init__(self) -> None:
        check_batch_size("dali_batch_size", self.dali_batch_size)
        if self.num_threads is not None:
            check_count("num_threads", self.num_threads)
        if not isinstance(self.jpeg_scaling, bool):
            raise ConfigError(f"jpeg_scaling={self.jpeg_scaling!r} should be true or false")
        for name in ("max_pixels", "min_size", "max_image_bytes"):
            check_count(name, getattr(self, name))
        ratio = self.max_aspect_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not ratio >= 1:
            raise ConfigError(f"max_aspect_ratio={ratio!r} should be a number >= 1")
        share = self.num_gpus_per_worker
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ConfigError(f"num_gpus_per_worker={share!r} should be a number in (0, 1]")
        _ = self.members

    @property
    def members(self) -> MemberColumns:
        """The columns that are made of members."""
        return MemberColumns.of(self.text_columns, self.json_columns)

    @property
    def adds(self) -> Mapping[str, str | pa.DataType]:  # type: ignore[override]
        """The index columns, those of members, and pixels."""
        index = {name: schema.arrow_type(name) for name in schema.INDEX_COLUMNS}
        return {**index, **self.members.types, IMAGE: pa.null()}


@dataclass(frozen=True, slots=True)
class _Chunk:
    positions: npt.NDArray[np.int64]
    blobs: list[bytes] = field(default_factory=list)


def read_pixels(
    table: pa.Table,
    views: Sequence[PixelView],
    reader: ImageReaderStage,
    backend: Backend,
    *,
    num_threads: int,
    storage_options: Mapping[str, Any] | None = None,
    facts: Sequence[str] = (),
    encoded: bool = False,
    isolated: bool = False,
) -> Iterator[tuple[npt.NDArray[np.int64], Decoded]]:
    """Read and decode the images of a partition, ahead of the caller.

    While the caller works on batch n, batch n + 1 is decoded and the bytes of n + 2 are read. Where
    `isolated` is true, a process of its own decodes: see :mod:`imgcurate.isolation`. Where `encoded` is true, the files
    of the images come along.

    Yields
    ------
    positions : ndarray of int64 of shape (m,)
        Rows of `table`, in order; rows that are not ``ok`` are left out.
    decoded : Decoded
        Their pixels.
    """
    wanted = np.flatnonzero(pc.equal(table[schema.STATUS], schema.STATUS_OK).to_numpy(zero_copy_only=False))
    nbytes = table[schema.NBYTES].to_numpy()
    too_large = wanted[nbytes[wanted] > reader.max_image_bytes]
    if len(too_large):
        yield too_large, _refused(nbytes[too_large], reader.max_image_bytes)
        wanted = np.setdiff1d(wanted, too_large)
    most = backend.batch_size(reader.dali_batch_size)
    # A GPU takes batches of one size, whatever is in the last one; on a CPU equal ones leave nothing to fill up.
    size = most if backend.is_gpu else -(-len(wanted) // max(1, -(-len(wanted) // most)))
    threads = reader.num_threads or num_threads
    options: dict[str, Any] = {
        "batch_size": most,
        "num_threads": threads,
        "max_pixels": reader.max_pixels,
        "max_aspect_ratio": reader.max_aspect_ratio,
        "min_size": reader.min_size,
        "facts": tuple(facts),
        "jpeg_scaling": reader.jpeg_scaling,
    }
    borrow = IsolatedDecoder if isolated else borrow_decoder
    with borrow(views, backend, **options) as decoder:
        read = _read_chunks(table, wanted, max(size, 1), storage_options, _MAX_CHUNK_BYTES[backend.name])
        chunks = prefetch(read, depth=1)
        yield from prefetch(((c.positions, _decoded(decoder, c.blobs, encoded)) for c in chunks), depth=1)


def _decoded(decoder: Any, blobs: list[bytes], encoded: bool) -> Decoded:
    decoded: Decoded = decoder.decode(blobs)
    if not encoded:
        return decoded
    return dataclasses.replace(decoded, encoded=[b for b, ok in zip(blobs, decoded.ok, strict=True) if ok])


def _refused(nbytes: npt.NDArray[np.int64], limit: int) -> Decoded:
    reasons = [f"{n:,} bytes, over the limit of {limit:,} (max_image_bytes)" for n in nbytes.tolist()]
    n = len(reasons)
    return Decoded(
        np.zeros(n, bool), {}, reasons, np.zeros(n, np.int32), np.zeros(n, np.int32), [schema.STATUS_DECODE_ERROR] * n
    )


def _cut(
    wanted: npt.NDArray[np.int64], lengths: Sequence[int], size: int, most_bytes: int
) -> Iterator[npt.NDArray[np.int64]]:
    """Cut rows into batches of at most `size`, and of at most so many bytes."""
    start = 0
    while start < len(wanted):
        stop, nbytes = start, 0
        while stop < len(wanted) and stop - start < size:
            nbytes += lengths[wanted[stop]]
            if stop > start and nbytes > most_bytes:
                break
            stop += 1
        yield wanted[start:stop]
        start = stop


def read_images(
    table: pa.Table, storage_options: Mapping[str, Any] | None = None, *, size: int = 64
) -> Iterator[list[tuple[int, bytes]]]:
    """Read the images of some rows, undecoded, and yield (row, bytes) of up to `size` of them at a time.

    Parameters
    ----------
    table : pa.Table
        Rows with ``shard``, ``files``, ``offset`` and ``nbytes``, each of which has an image.
    storage_options : mapping, optional
        Passed to fsspec.
    size : int
        The most that are read at once.

    Raises
    ------
    StorageError
        If a shard cannot be read, or is not as it was.
    """
    for chunk in _read_chunks(table, np.arange(len(table)), size, storage_options, _MAX_CHUNK_BYTES["cpu"]):
        yield list(zip(chunk.positions.tolist(), chunk.blobs, strict=True))


def _read_chunks(
    table: pa.Table,
    wanted: npt.NDArray[np.int64],
    size: int,
    storage_options: Mapping[str, Any] | None,
    most_bytes: int,
) -> Iterator[_Chunk]:
    rows = table.select([schema.SHARD, schema.FILES, schema.OFFSET, schema.NBYTES]).to_pydict()
    shards, files, offsets, lengths = rows.values()
    last = None
    with Archives(storage_options, limit=1) as archives:
        for positions in _cut(wanted, lengths, size, most_bytes):
            chunk = _Chunk(positions)
            for url, group in itertools.groupby(positions.tolist(), key=shards.__getitem__):
                members = list(group)
                if files[members[0]] is not None:
                    images = [(file_url(url, files[i][0]), lengths[i]) for i in members]
                    chunk.blobs.extend(_read_files(images, storage_options))
                    continue
                if url != last and (following := _next_shard(shards, wanted, url)) is not None:
                    read_ahead(following, storage_options)
                last = url
                chunk.blobs.extend(read_ranges(archives(url), [(offsets[i], lengths[i]) for i in members]))
            yield chunk


def _read_files(files: Sequence[tuple[str, int]], storage_options: Mapping[str, Any] | None) -> list[bytes]:
    """Read whole files of known sizes: on this machine one by one, from elsewhere at the same time."""

    def read(file: tuple[str, int]) -> bytes:
        url, size = file
        data = read_bytes(url, storage_options)
        if len(data) != size:
            raise StorageError(f"{url} has {len(data):,} bytes and had {size:,}: it changed since it was indexed")
        return data

    if all(is_local(url) for url, _ in files):
        return list(map(read, files))
    with ThreadPoolExecutor(_FILE_THREADS) as pool:
        return list(pool.map(read, files))


def _next_shard(shards: Sequence[str], wanted: npt.NDArray[np.int64], url: str) -> str | None:
    """Return the shard that is read after this one."""
    rows = iter(wanted.tolist())
    for row in rows:
        if shards[row] == url:
            break
    return next((shards[row] for row in rows if shards[row] != url), None)


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def prefetch(items: Iterable[_T], depth: int) -> Iterator[_T]:
    """Run an iterator in a thread, `depth` items ahead; its errors come out here.

    The thread ends when the consumer stops, also in the middle.
    """
    done = object()
    stop = threading.Event()
    ready: queue.Queue[Any] = queue.Queue(maxsize=depth)

    def put(item: object) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    thread = threading.Thread(target=_fill, args=(items, put, done), daemon=True, name="imgcurate-prefetch")
    thread.start()
    try:
        while (item := ready.get()) is not done:
            if isinstance(item, _Failure):
                raise item.error
            yield item
    finally:
        stop.set()
        thread.join()


def _fill(items: Iterable[Any], put: Callable[[object], bool], done: object) -> None:
    iterator = iter(items)
    try:
        for item in iterator:
            if not put(item):
                break
    except BaseException as exc:  # noqa: BLE001 - handed to the consumer, who raises it
        put(_Failure(exc))
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()
        put(done)
