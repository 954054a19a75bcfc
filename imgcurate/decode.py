"""Encoded images -> pixels, through one persistent DALI graph per worker.

The pixel rule, the same on every device:

- 8-bit sRGB as stored: colour profiles and gamma are not applied, nobody's training does.
- Gray is repeated to three channels; 1, 2 and 4 bits are scaled to 0..255.
- 9 to 16 bits are scaled so that the largest level is 255 (16 bits: by 1/257) and rounded.
- 32-bit integers and floats are reported, as nothing says which level is white.
- Alpha, also that of a palette or a transparent colour, is composited on white.
- CMYK is (255 - C)(255 - K) / 255; in JPEG inverted, as Adobe writes it and browsers read it.
- EXIF orientation is applied (and that of TIFF, AVIF and HEIC), orientation in XMP is not.
- The first frame of an animation, the first page of a TIFF, the largest picture of an ICO.

DALI takes the formats that it decodes by this rule, :mod:`imgcurate.pillow` the others one by one,
and :mod:`imgcurate.resize` makes the views of both. On a CPU, JPEGs that are far larger than all that is made of
them are decoded at a half, a quarter or an eighth of their size, from the low frequencies alone.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from imgcurate import schema
from imgcurate.backend import Backend
from imgcurate.batches import PixelView
from imgcurate.errors import ConfigError, ImgcurateError
from imgcurate.facts import BYTE_FACTS, FACTS, HASH_BYTES, pixels_hash
from imgcurate.lazy import torch
from imgcurate.memory import is_device_error, is_out_of_memory
from imgcurate.pillow import UndecodableError, decode_with_pillow, smaller_jpeg
from imgcurate.probe import Probe, probe
from imgcurate.resize import Box, make_views, view_operators

__all__ = ["MAX_PIXELS", "Decoded", "Decoder", "borrow_decoder"]

MAX_PIXELS: Final = 178_956_970
"""Default limit of width x height, that of Pillow: 512 MiB of RGB."""

MAX_ASPECT_RATIO: Final = 50.0
# Pixels that DALI holds at once: 300 MB and 1.5 GB. Of a GPU it is to be rare that a batch is parted.
_MAX_GROUP_PIXELS: Final = {"cpu": 100_000_000, "gpu": 500_000_000}
# A JPEG decoded at a part of its size has still at least so many times the pixels a side that a view has.
_SPARE: Final = 3
_DIVISORS: Final = (8, 4, 2)

_BAD_SAMPLE: Final = re.compile(r"sample #(\d+)")


@dataclass(frozen=True, slots=True)
class Decoded:
    """The result of decoding n encoded images.

    Attributes
    ----------
    ok : ndarray of bool of shape (n,)
        Which images decoded.
    images : mapping of PixelView to torch.Tensor
        Per view, uint8 of shape (n_ok, height, width, 3): the images that decoded, in order.
    reasons : list of n str
        Why an image did not decode; ``""`` if it did.
    widths, heights : ndarray of int32 of shape (n,)
        Pixels, orientation applied; of an undecoded image as its header says, or 0.
    statuses : list of n str
        The status of each row: ``ok``, ``decode_error``, ``too_small`` or ``decoder_crash``.
    facts : mapping of str to ndarray of shape (n_ok,)
        What was asked for of :data:`imgcurate.facts.FACTS`, of the images that decoded.
    encoded : list of bytes
        The files of the images that decoded, if they were asked for.
    """

    ok: npt.NDArray[np.bool_]
    images: Mapping[PixelView, torch.Tensor]
    reasons: list[str]
    widths: npt.NDArray[np.int32]
    heights: npt.NDArray[np.int32]
    statuses: list[str]
    facts: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    encoded: list[bytes] = field(default_factory=list)


class Decoder:
    """Decode batches of images and bring them to fixed sizes.

    Parameters
    ----------
    views : sequence of PixelView
        The sizes to make.
    backend : Backend
        Decides between DALI's ``cpu`` and ``mixed`` operators.
    batch_size : int
        Largest number of images in a call.
    num_threads : int
        DALI's CPU threads.
    max_pixels : int
        Images with more pixels are refused before they are decoded.
    max_aspect_ratio : float
        So are images whose longer side is more than so many times the shorter one.
    min_size : int
        Images whose shorter side has fewer pixels are not decoded: they are ``too_small``.
    facts : sequence of str
        What else to tell of each image; see :data:`imgcurate.facts.FACTS`.
    jpeg_scaling : bool
        On a CPU, decode large JPEGs at a part of their size, with at least three times the pixels of each view a side.

    Raises
    ------
    ConfigError
        If a fact is unknown.

    Notes
    -----
    One object may serve one thread at a time: use :func:`borrow_decoder`.
    """

    def __init__(
        self,
        views: Sequence[PixelView],
        backend: Backend,
        *,
        batch_size: int,
        num_threads: int,
        max_pixels: int = MAX_PIXELS,
        max_aspect_ratio: float = MAX_ASPECT_RATIO,
        min_size: int = 1,
        facts: Sequence[str] = (),
        jpeg_scaling: bool = True,
    ) -> None:
        unknown = [f for f in facts if f not in FACTS]
        if unknown:
            raise ConfigError(f"the decoder cannot tell {unknown[0]!r} of an image; it can tell {', '.join(FACTS)}")
        self.views = tuple(views)
        self.facts = tuple(facts)
        self.backend = backend
        self.batch_size = batch_size
        self.max_pixels = max_pixels
        self.max_aspect_ratio = max_aspect_ratio
        self.min_size = min_size
        self._num_threads = num_threads
        # What is made of all pixels has to see all of them.
        self._scales = jpeg_scaling and not backend.is_gpu and bool(views) and schema.PIXEL_HASH not in facts
        self._stream = backend.stream()
        self._from_bytes = self._build(decode=True)
        self._from_pixels: Any = None

    def decode(self, blobs: Sequence[bytes]) -> Decoded:
        """Decode up to ``batch_size`` encoded images.

        A broken image never raises: it is left out of the pixels and its reason is told.
        """
        n = len(blobs)
        reasons, statuses = [""] * n, [schema.STATUS_OK] * n
        widths, heights = np.zeros(n, np.int32), np.zeros(n, np.int32)
        by_dali: list[int] = []
        by_pillow: list[int] = []
        smaller: dict[int, int] = {}
        for i, blob in enumerate(blobs):
            found = probe(
                blob,
                max_pixels=self.max_pixels,
                max_aspect_ratio=self.max_aspect_ratio,
                min_size=self.min_size,
            )
            widths[i], heights[i] = _int32(found.width), _int32(found.height)
            if found.route == "none":
                reasons[i], statuses[i] = found.reason, found.status
            elif found.route == "dali" and (divisor := self._divisor(found)) > 1:
                smaller[i] = divisor
            else:
                (by_dali if found.route == "dali" else by_pillow).append(i)
        parts = self._decode_smaller(blobs, smaller, by_dali)
        for group in _groups(by_dali, widths.astype(np.int64) * heights, _MAX_GROUP_PIXELS[self.backend.name]):
            parts += self._decode_with_dali(blobs, group, by_pillow)
        for i in sorted(by_pillow):
            try:
                pixels = decode_with_pillow(blobs[i], max_pixels=self.max_pixels)
                images, sizes = self._run_pixels(pixels)
            except (UndecodableError, RuntimeError) as exc:
                self._raise_if_of_the_device(exc)
                reasons[i], statuses[i] = _reason(exc), _status(exc)
                continue
            parts.append(([i], images, sizes))
        return self._assemble(blobs, parts, reasons, widths, heights, statuses)

    def _divisor(self, found: Probe) -> int:
        """Return at which part of its size an image is decoded."""
        if not self._scales or found.format != "JPEG":
            return 1
        longest = max(max(view.height, view.width) for view in self.views)
        shorter = min(found.width, found.height)
        return next((d for d in _DIVISORS if shorter >= d * _SPARE * longest), 1)

    def _decode_smaller(
        self, blobs: Sequence[bytes], divisors: Mapping[int, int], rejected: list[int]
    ) -> list[tuple[list[int], list[torch.Tensor], npt.NDArray[np.int64]]]:
        """Decode large JPEGs at a part of their size; what does not decode so is added to `rejected`."""
        if not divisors:
            return []
        with ThreadPoolExecutor(self._num_threads) as pool:
            found = list(pool.map(smaller_jpeg, (blobs[i] for i in divisors), divisors.values()))
        decoded = {i: f for i, f in zip(divisors, found, strict=True) if f is not None}
        rejected += [i for i in divisors if i not in decoded]
        rejected.sort()
        areas = np.zeros(len(blobs), np.int64)
        for i, (pixels, _) in decoded.items():
            areas[i] = pixels.shape[0] * pixels.shape[1]
        parts = []
        for group in _groups(list(decoded), areas, _MAX_GROUP_PIXELS[self.backend.name]):
            boxes = [decoded[i][1] for i in group]
            sizes = [
                (round((bottom - top) * divisors[i]), round((right - left) * divisors[i]))
                for i, (top, left, bottom, right) in zip(group, boxes, strict=True)
            ]
            parts.append((group, *self._views_of([decoded[i][0] for i in group], sizes, boxes)))
        return parts

    def _decode_with_dali(
        self, blobs: Sequence[bytes], todo: Sequence[int], rejected: list[int]
    ) -> list[tuple[list[int], list[torch.Tensor], npt.NDArray[np.int64]]]:
        """Decode `todo`; what DALI cannot decode is appended to `rejected`.

        DALI fails a batch as a whole. Its message mostly names one sample, which is taken out, and the others are
        decoded in two halves: so are those of a batch that a GPU has no memory for.
        """
        parts = []
        pending = [list(todo)] if todo else []
        while pending:
            group = pending.pop()
            try:
                parts.append((group, *self._run_bytes([blobs[i] for i in group])))
                continue
            except RuntimeError as exc:
                if self._has_no_room(exc) and len(group) > 1:
                    self.backend.free_memory()
                    left = group
                else:
                    self._raise_if_of_the_device(exc)
                    named = {int(m) for m in _BAD_SAMPLE.findall(str(exc))}
                    bad = {group[k] for k in named if k < len(group)} or set(group if len(group) == 1 else ())
                    rejected.extend(sorted(bad))
                    left = [i for i in group if i not in bad]
            half = (len(left) + 1) // 2
            pending += [half_group for half_group in (left[half:], left[:half]) if half_group]
        return parts

    def _has_no_room(self, error: Exception) -> bool:
        return self.backend.is_gpu and is_out_of_memory(error)

    def _raise_if_of_the_device(self, error: Exception) -> None:
        """Raise an error that says nothing of the images: they would be called broken, one by one."""
        if is_device_error(error) or self._has_no_room(error):
            self.backend.free_memory()
            raise ImgcurateError(f"the GPU cannot decode any more: {str(error).splitlines()[0]}") from error

    def _run_bytes(self, blobs: Sequence[bytes]) -> tuple[list[torch.Tensor], npt.NDArray[np.int64]]:
        """Return the views of images that DALI decodes, and their sizes of shape (n, 2)."""
        # Without a stream this waits until all is decoded, and it has to: nvJPEG's hardware engine writes when it is
        # called, and not in the order of the stream, so memory that kernels still read must not be given to it.
        outputs = self._from_bytes.run(source=[np.frombuffer(blob, np.uint8) for blob in blobs])
        if len(outputs[0]) != len(blobs):
            raise ImgcurateError(f"DALI returned {len(outputs[0])} images for {len(blobs)}: this is a bug")
        if self.backend.is_gpu:
            return self._on_gpu(outputs)
        # DALI's own memory, which the next batch takes.
        return self._views_of([np.asarray(pixels) for pixels in outputs[0]])

    def _run_pixels(self, pixels: npt.NDArray[np.uint8]) -> tuple[list[torch.Tensor], npt.NDArray[np.int64]]:
        """Return the views of an image that is decoded, and its size."""
        if not self.backend.is_gpu:
            return self._views_of([pixels])
        if self._from_pixels is None:
            self._from_pixels = self._build(decode=False)
        return self._on_gpu(self._from_pixels.run(source=[pixels]))

    def _views_of(
        self,
        pixels: Sequence[npt.NDArray[np.uint8]],
        sizes: Sequence[tuple[int, int]] | None = None,
        boxes: Sequence[Box] | None = None,
    ) -> tuple[list[torch.Tensor], npt.NDArray[np.int64]]:
        images = make_views(pixels, self.views, sizes=sizes, boxes=boxes, num_threads=self._num_threads)
        if schema.PIXEL_HASH in self.facts:
            images.append(self._hashes(pixels))
        return images, np.array([p.shape[:2] for p in pixels] if sizes is None else sizes, np.int64)

    def _on_gpu(self, outputs: Sequence[Any]) -> tuple[list[torch.Tensor], npt.NDArray[np.int64]]:
        n_views = len(self.views)
        images = self.backend.copies(outputs[:n_views], self._stream)
        shapes, *full = (out.as_cpu() if hasattr(out, "as_cpu") else out for out in outputs[n_views:])
        if full:
            images.append(self._hashes([np.asarray(pixels) for pixels in full[0]]))
        return images, np.asarray(shapes.as_array(), dtype=np.int64)[:, :2]

    def _hashes(self, images: Sequence[npt.NDArray[np.uint8]]) -> torch.Tensor:
        """Return hashes of all pixels as rows of bytes, which take the way of a further view."""
        with ThreadPoolExecutor(self._num_threads) as pool:
            return torch.from_numpy(np.stack(list(pool.map(pixels_hash, images))))

    def _assemble(
        self,
        blobs: Sequence[bytes],
        parts: Sequence[tuple[list[int], list[torch.Tensor], npt.NDArray[np.int64]]],
        reasons: list[str],
        widths: npt.NDArray[np.int32],
        heights: npt.NDArray[np.int32],
        statuses: list[str],
    ) -> Decoded:
        ok = np.zeros(len(blobs), dtype=bool)
        order: list[int] = []
        for indices, _, sizes in parts:
            ok[indices] = True
            heights[indices], widths[indices] = sizes[:, 0], sizes[:, 1]
            order += indices

        def in_order(v: int, shape: tuple[int, ...]) -> torch.Tensor:
            if not parts:
                return torch.empty((0, *shape), dtype=torch.uint8, device=self.backend.torch_device)
            if len(parts) == 1:
                return parts[0][1][v]
            stacked = torch.cat([images_[v] for _, images_, _ in parts])
            if order == sorted(order):
                return stacked
            return stacked[torch.from_numpy(np.argsort(order)).to(stacked.device)]

        with self.backend.on(self._stream):
            images = {view: in_order(v, (view.height, view.width, 3)) for v, view in enumerate(self.views)}
        good = [blobs[i] for i in np.flatnonzero(ok).tolist()]
        facts = {f: np.array([BYTE_FACTS[f](b) for b in good], FACTS[f]) for f in self.facts if f in BYTE_FACTS}
        if schema.PIXEL_HASH in self.facts:
            rows = in_order(len(self.views), (HASH_BYTES,)).cpu().numpy()
            facts[schema.PIXEL_HASH] = np.array([row.tobytes().hex() for row in rows], FACTS[schema.PIXEL_HASH])
        return Decoded(ok, images, reasons, widths, heights, statuses, facts)

    def _build(self, *, decode: bool) -> Any:
        from nvidia.dali import Pipeline, fn, types

        # With a queue depth of one and run(source=...), a batch's outputs are those of its inputs.
        graph = Pipeline(
            batch_size=self.batch_size,
            num_threads=self._num_threads,
            device_id=self.backend.dali_device_id,
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )
        with graph:
            image = fn.external_source(name="source", device="cpu", layout=None if decode else "HWC")
            if decode:
                image = fn.decoders.image(image, output_type=types.RGB, **self.backend.dali_decoder)
            elif self.backend.is_gpu:
                image = image.gpu()
            graph.set_outputs(*(self._operators(image) if self.backend.is_gpu else [image]))
        graph.build()
        return graph

    def _operators(self, image: Any) -> list[Any]:
        """Add what makes the views of decoded images to a graph; return its outputs: views, sizes, maybe all pixels."""
        from nvidia.dali import fn, types

        size = image.shape(device="cpu")
        views = [view_operators(image, view, fn.cast(size, dtype=types.FLOAT)) for view in self.views]
        return [*views, fn.cast(size, dtype=types.INT64), *([image] if schema.PIXEL_HASH in self.facts else [])]


def _groups(index: Sequence[int], pixels: npt.NDArray[np.int64], most: int) -> Iterator[list[int]]:
    """Divide images into groups of at most so many pixels, of which DALI can hold all; of most batches it is one."""
    group: list[int] = []
    total = 0
    for i in index:
        if group and total + pixels[i] > most:
            yield group
            group, total = [], 0
        group.append(i)
        total += int(pixels[i])
    if group:
        yield group


def _reason(exc: Exception) -> str:
    return str(exc) if isinstance(exc, UndecodableError) else "the image decodes and cannot be resized"


def _status(exc: Exception) -> str:
    return schema.STATUS_DECODER_CRASH if isinstance(exc.__cause__, MemoryError) else schema.STATUS_DECODE_ERROR


def _int32(value: int) -> int:
    return min(value, 2**31 - 1)


_idle: defaultdict[tuple[Any, ...], list[Decoder]] = defaultdict(list)
_idle_lock = threading.Lock()


@contextlib.contextmanager
def borrow_decoder(
    views: Sequence[PixelView],
    backend: Backend,
    *,
    batch_size: int,
    num_threads: int,
    max_pixels: int = MAX_PIXELS,
    max_aspect_ratio: float = MAX_ASPECT_RATIO,
    min_size: int = 1,
    facts: Sequence[str] = (),
    jpeg_scaling: bool = True,
) -> Iterator[Decoder]:
    """Borrow a decoder from this process's pool; graphs are built once and used for every partition."""
    limits = (max_pixels, max_aspect_ratio, min_size)
    key = (tuple(views), backend, batch_size, num_threads, limits, tuple(facts), jpeg_scaling)
    with _idle_lock:
        decoder = _idle[key].pop() if _idle[key] else None
    if decoder is None:
        decoder = Decoder(
            views, backend, batch_size=batch_size, num_threads=num_threads,
            max_pixels=max_pixels, max_aspect_ratio=max_aspect_ratio, min_size=min_size, facts=facts,
            jpeg_scaling=jpeg_scaling,
        )  # fmt: skip
    try:
        yield decoder
    finally:
        with _idle_lock:
            _idle[key].append(decoder)
