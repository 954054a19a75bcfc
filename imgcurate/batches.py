"""What a per-batch stage sees: some samples, their pixels on the worker's device, their columns.

Pixels are described by a :class:`PixelView`, the preprocessing as data: every stage that looks at
pixels names the views that it needs, and one DALI graph makes all of them from one decoding.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from imgcurate.backend import Backend
from imgcurate.errors import ConfigError
from imgcurate.lazy import torch
from imgcurate.schema import RESERVED_STATUSES

__all__ = ["ImageBatch", "PixelView", "on_host"]

Drop: TypeAlias = "tuple[npt.NDArray[np.bool_] | torch.Tensor, Sequence[str] | str, str | None]"


@dataclass(frozen=True, slots=True)
class PixelView:
    """How an image is brought to a fixed size.

    Attributes
    ----------
    height, width : int
        Size of the result in pixels.
    resize : {"shortest", "longest", "squash"}
        ``shortest``: scale the shorter side, then cut the middle out (CLIP). ``longest``: scale the
        longer side, then pad. ``squash``: scale both sides, whatever the aspect ratio.
    interpolation : {"bicubic", "bilinear", "lanczos"}
        The filter; always with antialiasing, as in Pillow.
    fill : int
        Value of padded pixels, 0-255.
    """

    height: int
    width: int
    resize: Literal["shortest", "longest", "squash"] = "shortest"
    interpolation: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    fill: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.height <= 8192 and 0 < self.width <= 8192):
            raise ConfigError(f"a pixel view of {self.height}x{self.width} is outside 1..8192 pixels a side")
        if self.resize not in ("shortest", "longest", "squash"):
            raise ConfigError(f"resize={self.resize!r} is none of shortest, longest, squash")
        if self.interpolation not in ("bicubic", "bilinear", "lanczos"):
            raise ConfigError(f"interpolation={self.interpolation!r} is none of bicubic, bilinear, lanczos")


class ImageBatch:
    """Some samples of one partition, inside one task.

    With pixels, the batch holds every sample that decoded, also those that an earlier filter
    dropped, so that all scores exist for all images and thresholds can be changed later. Without,
    it holds the rows whose needed columns are not null.

    Parameters
    ----------
    rows : pd.DataFrame
        The samples' columns so far, one row each; do not change it.
    images : mapping of PixelView to torch.Tensor
        Per view a uint8 tensor of shape (n, height, width, 3), RGB, 0-255, on the worker's device.
    columns : mapping of str to torch.Tensor, optional
        Columns as tensors on the device, such as ``embedding`` of shape (n, d).
    device : str
        The torch device, ``cpu`` or ``cuda:0``.
    encoded : list of n bytes, optional
        The files of the images.

    Attributes
    ----------
    at_most : int or None
        Set once a larger batch did not fit in memory: the most images to work on at once. A stage that pads its
        batches to a fixed size should pad to no more than this.
    """

    def __init__(
        self,
        rows: pd.DataFrame,
        images: Mapping[PixelView, torch.Tensor] | None = None,
        columns: Mapping[str, Any] | None = None,
        device: str = "cpu",
        encoded: Sequence[bytes] | None = None,
    ) -> None:
        self.rows = rows
        self.device = device
        self.drops: list[Drop] = []
        self._images = dict(images or {})
        self._columns: dict[str, Any] = dict(columns or {})
        self.given = frozenset(self._columns)
        self.at_most: int | None = None
        self._encoded = encoded

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.rows)

    def pixels(self, view: PixelView) -> torch.Tensor:
        """Return the pixels of a view: (n, height, width, 3) uint8 RGB, 0-255, on the device.

        Raises
        ------
        ConfigError
            If the view was not asked for by any stage, or its pixels were removed.
        """
        if view not in self._images:
            raise ConfigError(
                f"the batch holds no pixels for {view}: name it in the stage's 'views', and keep "
                "remove_image_data=False on the stages before"
            )
        return self._images[view]

    @property
    def encoded(self) -> Sequence[bytes]:
        """The files of the images, n bytes objects, as they are in the shards.

        Raises
        ------
        ConfigError
            If no stage asked for them, or they went with the pixels.
        """
        if self._encoded is None:
            raise ConfigError(
                "the batch holds no files of images: set 'encoded = True' in the stage, name 'image' in its 'needs', "
                "and keep remove_image_data=False on the stages before"
            )
        return self._encoded

    def all_pixels(self) -> list[torch.Tensor]:
        """Return the pixels of all views."""
        return list(self._images.values())

    def remove_pixels(self) -> None:
        """Free all pixels; later stages of this batch see columns alone."""
        self._images.clear()
        self._encoded = None

    def __getitem__(self, column: str) -> Any:
        """Return a column: a tensor on the device if a stage made it, else a pandas Series."""
        if column in self._columns:
            return self._columns[column]
        if column in self.rows.columns:
            return self.rows[column]
        raise ConfigError(f"the batch has no column {column!r}; it has {', '.join(self.columns)}")

    def __setitem__(self, column: str, values: Any) -> None:
        """Set a column: n values, or an (n, d) array or tensor for a list column."""
        if len(values) != len(self.rows):
            raise ConfigError(f"column {column!r} has {len(values)} values for {len(self.rows)} samples")
        is_matrix = isinstance(values, np.ndarray) and values.ndim == 2
        self._columns[column] = torch.as_tensor(values, device=self.device) if is_matrix else values

    @property
    def made(self) -> tuple[str, ...]:
        """Names of the columns that the batch was given as tensors and that stages set."""
        return tuple(self._columns)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns, those of the rows first."""
        return (*self.rows.columns, *(c for c in self._columns if c not in self.rows.columns))

    def drop(
        self,
        mask: npt.NDArray[np.bool_] | torch.Tensor,
        reason: Sequence[str] | str,
        *,
        status: str | None = None,
    ) -> None:
        """Drop the samples where `mask` is true; they keep their row, with this reason.

        Parameters
        ----------
        mask : array or tensor of bool of shape (n,)
            True for each sample to drop. A sample that left before keeps its first reason.
        reason : str or sequence of n str
            Why, in words.
        status : str, optional
            The status of the dropped rows; by default the name of the stage.
        """
        if isinstance(mask, (list, tuple)):
            mask = np.asarray(mask)
        if len(mask) != len(self.rows):
            raise ConfigError(f"the mask has {len(mask)} values for {len(self.rows)} samples")
        if mask.dtype not in (np.bool_, torch.bool):
            raise ConfigError(f"the mask should hold booleans, not {mask.dtype}")
        if status in RESERVED_STATUSES:
            raise ConfigError(f"samples cannot be dropped with the status {status!r}, which says something else")
        if isinstance(reason, str) and not reason.strip():
            raise ConfigError("samples do not leave without a reason: give one in words")
        if not isinstance(reason, str) and (not hasattr(reason, "__len__") or isinstance(reason, bytes)):
            raise ConfigError(f"reason={reason!r} should be text, or a sequence of n texts")
        if not isinstance(reason, str) and len(reason) != len(self.rows):
            raise ConfigError(f"there are {len(reason)} reasons for {len(self.rows)} samples")
        self.drops.append((mask, reason, status))

    def part(self, start: int, stop: int) -> ImageBatch:
        """Return some samples as a batch of their own: what is set, dropped or removed there is not so here.

        Tensors are views, without a copy. The part begins without drops.

        Parameters
        ----------
        start, stop : int
            The samples from `start` up to and without `stop`.
        """
        whole = start == 0 and stop == len(self)
        part = copy.copy(self)
        # What a stage does to the frame itself, as sorting it in place, stays in the part.
        part.rows = self.rows.copy(deep=False) if whole else self.rows.iloc[start:stop]
        part.drops = []
        part._encoded = self._encoded if whole or self._encoded is None else self._encoded[start:stop]
        part._images = {view: v if whole else v[start:stop] for view, v in self._images.items()}
        part._columns = {name: v if whole else _slice(v, start, stop) for name, v in self._columns.items()}
        return part

    def take(self, index: npt.NDArray[np.int64]) -> ImageBatch:
        """Return the samples at some positions as a batch of their own, which begins without drops; a copy."""
        taken = copy.copy(self)
        at = torch.as_tensor(index, device=self.device)
        taken.rows, taken.drops = self.rows.iloc[index], []
        taken._encoded = None if self._encoded is None else [self._encoded[i] for i in index.tolist()]
        taken._images = {view: v[at] for view, v in self._images.items()}
        taken._columns = {name: _taken(v, index, at) for name, v in self._columns.items()}
        return taken

    @staticmethod
    def concat(batches: Sequence[ImageBatch]) -> ImageBatch:
        """Return batches of the same columns and views as one, which begins without drops."""
        first = batches[0]
        if len(batches) == 1:
            return first
        whole = copy.copy(first)
        whole.rows, whole.drops = pd.concat([b.rows for b in batches]), []
        if first._encoded is not None:
            whole._encoded = [data for b in batches for data in b.encoded]
        whole._images = {view: torch.cat([b._images[view] for b in batches]) for view in first._images}
        nothing = [None] * len(batches)
        whole._columns = {n: _joined(None, nothing, [b._columns[n] for b in batches]) for n in first._columns}
        return whole

    def join(self, given: Sequence[ImageBatch], made: Sequence[ImageBatch]) -> ImageBatch:
        """Return the batch as it is after a stage that worked on parts of it.

        Parameters
        ----------
        given : sequence of ImageBatch
            What :meth:`part` gave, in order, all samples once.
        made : sequence of ImageBatch
            What the stage made of a :meth:`part` of each of them.

        Raises
        ------
        ConfigError
            If a column is set in some of the parts and not in others.
        """
        joined = copy.copy(made[0])
        names = {name for part in made for name in part._columns}
        for name in names:
            if not all(name in part._columns for part in made):
                raise ConfigError(f"the column {name!r} was set for some images and not for others: set it for all")
        kept = all(_same_rows(m.rows, g.rows) for m, g in zip(made, given, strict=True))
        joined._encoded = self._encoded if made[0]._encoded is not None else None
        joined.rows = self.rows if kept else pd.concat([part.rows for part in made])
        joined._images = {
            view: _joined(self._images.get(view), [g._images.get(view) for g in given], [m._images[view] for m in made])
            for view in made[0]._images
            if all(view in part._images for part in made)
        }
        joined._columns = {
            name: _joined(self._columns.get(name), [g._columns.get(name) for g in given], [m[name] for m in made])
            for name in made[0]._columns
        }
        joined.drops = _joined_drops(made)
        return joined


def _same_rows(made: pd.DataFrame, given: pd.DataFrame) -> bool:
    return made is given or (made.columns.equals(given.columns) and made.index.equals(given.index))


def on_host(values: Any) -> npt.NDArray[Any]:
    """Return the values of a column of a batch as a NumPy array."""
    if not isinstance(values, np.ndarray) and isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        # NumPy has no such type.
        values = (values.float() if values.dtype is torch.bfloat16 else values).numpy()
    return np.asarray(values)


def _taken(values: Any, index: npt.NDArray[np.int64], at: torch.Tensor) -> Any:
    if isinstance(values, torch.Tensor):
        return values[at.to(values.device)]
    if isinstance(values, pd.Series):
        return values.iloc[index]
    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        return values.take(pa.array(index))
    return values[index] if isinstance(values, np.ndarray) else [values[i] for i in index.tolist()]


def _slice(values: Any, start: int, stop: int) -> Any:
    return values.iloc[start:stop] if isinstance(values, pd.Series) else values[start:stop]


def _joined(whole: Any, given: Sequence[Any], made: Sequence[Any]) -> Any:
    """Return the values of all parts one after the other; those of the whole batch if no part changed them."""
    # Parts of these are views, so that also what was changed in place is in the whole.
    is_view = isinstance(whole, (torch.Tensor, np.ndarray, pa.Array, pa.ChunkedArray))
    if is_view and all(m is g for m, g in zip(made, given, strict=True)):
        return whole
    if all(isinstance(v, torch.Tensor) for v in made):
        return torch.cat(list(made))
    if all(isinstance(v, pd.Series) for v in made):
        return pd.concat(list(made))
    if all(isinstance(v, (pa.Array, pa.ChunkedArray)) for v in made):
        return pa.chunked_array([c for v in made for c in (v.chunks if isinstance(v, pa.ChunkedArray) else [v])])
    if all(isinstance(v, (list, tuple)) for v in made):
        return [value for v in made for value in v]
    return np.concatenate([Backend("cpu").to_host(v) for v in made])


def _joined_drops(parts: Sequence[ImageBatch]) -> list[Drop]:
    """Return the drops of all parts as drops of the whole: of each sample in the order in which its part made them."""
    n, starts = sum(map(len, parts)), np.cumsum([0, *map(len, parts)])
    drops: list[Drop] = []
    for k in range(max(len(part.drops) for part in parts)):
        of_status: dict[str | None, tuple[npt.NDArray[np.bool_], list[str]]] = {}
        for start, part in zip(starts, parts, strict=False):
            if k < len(part.drops):
                mask, reason, status = part.drops[k]
                masks, reasons = of_status.setdefault(status, (np.zeros(n, dtype=bool), [""] * n))
                here = slice(start, start + len(part))
                masks[here] = Backend("cpu").to_host(mask)
                reasons[here] = [reason] * len(part) if isinstance(reason, str) else list(reason)
        drops += [(masks, reasons, status) for status, (masks, reasons) in of_status.items()]
    return drops
