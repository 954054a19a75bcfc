"""What a stage is: the columns that it needs and adds, the pixels that it looks at, what it does.

Three kinds make a pipeline: the two that say what is read (:mod:`imgcurate.stages.reading`),
per-batch stages (:class:`ProcessingStage`), which run fused in one task per partition, and stages
that need the whole data set (:class:`DatasetStage`).
"""

from __future__ import annotations

import contextlib
import datetime as dt
import decimal
import enum
import hashlib
import inspect
import numbers
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, Final

import cloudpickle
import dask.dataframe as dd
import numpy as np
import pyarrow as pa

from imgcurate.backend import Backend
from imgcurate.batches import ImageBatch, PixelView
from imgcurate.errors import ConfigError
from imgcurate.stages.rules import AnyRule

__all__ = [
    "IMAGE",
    "DatasetStage",
    "ProcessingStage",
    "Stage",
    "Worker",
    "check_count",
    "check_texts",
    "columns_added",
    "stage_config",
    "told_beside",
]

IMAGE: Final = "image"
"""The pseudo-column that stands for pixels in ``needs``; it never leaves a task."""


@dataclass(frozen=True, slots=True)
class Worker:
    """Where a stage runs.

    Attributes
    ----------
    backend : Backend
        CPU or GPU, and the libraries that go with it.
    num_threads : int
        CPU threads that this worker process should use.
    """

    backend: Backend
    num_threads: int

    @property
    def device(self) -> str:
        """The torch device, ``cpu`` or ``cuda:0``."""
        return self.backend.torch_device


class Stage:
    """Base of all stages.

    Attributes
    ----------
    name : str
        Shown in plans and messages, and the status of what the stage drops. Default: the class name.
    needs : tuple of str
        Columns that must exist before; ``"image"`` stands for pixels.
    adds : mapping of str to (str or pa.DataType)
        Columns that the stage makes, with their Arrow types (``"float32"``, ``pa.list_(...)``).
    """

    name: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()
    adds: ClassVar[Mapping[str, str | pa.DataType]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__

    @property
    def removes(self) -> tuple[str, ...]:
        """Columns that are gone after the stage; ``"image"`` once the pixels are freed."""
        return ()

    def check(self, encoder: str | None) -> None:
        """Check the parameters against the encoder in use, before anything runs.

        Parameters
        ----------
        encoder : str or None
            Identity of the embeddings that reach this stage; None if nothing embeds before it.
        """

    def fingerprint(self) -> dict[str, Any]:
        """Return what, besides the parameters, decides the values of the columns: model checksums."""
        return {}


class ProcessingStage(Stage):
    """A stage that works batch by batch; subclass it for your own embedder, score or filter.

    Override :meth:`process`, and :meth:`setup` where something must be loaded first. Drop samples
    with :meth:`ImageBatch.drop`, or give :attr:`rules` on columns that the stage adds: rules are
    kept in the run's manifest.

    Attributes
    ----------
    views : tuple of PixelView
        The sizes of the pixels that the stage looks at.
    facts : tuple of str
        What the decoder should tell of each image besides, of :data:`imgcurate.facts.FACTS`: columns of
        ``batch.rows`` with these names, which are the stage's if it declares them in ``adds``.
    encoded : bool
        Whether the stage takes the files of the images, as ``batch.encoded``: for all that pixels of a fixed size do
        not tell, at the price of decoding them itself.
    rules : tuple of Rule or ValueRule
        Thresholds on columns, and values of columns.
    encoder : str or None
        For a stage that adds ``embedding``: a name for the model, so that heads can check it.
    nullable : tuple of str
        Columns of ``needs`` that may be null; where no images are decoded, rows in which another one is null do not
        come to the stage.
    texts : tuple of str
        Columns of ``needs`` that have to hold text.
    finite : tuple of str
        Columns of ``adds`` in which NaN or infinity is a fault of the stage, which ends the partition.
    skip_dropped : bool
        Whether samples that a stage before this one has dropped do not come to it, nor to the stages after it: their
        columns are null then. Only where images are decoded.

    Examples
    --------
    >>> class Bright(ProcessingStage):
    ...     name = "dark"
    ...     needs = ("image",)
    ...     adds = {"brightness": "float32"}
    ...     views = (PixelView(32, 32),)
    ...     rules = (Rule("brightness", ">=", 40, "dark"),)
    ...
    ...     def process(self, batch):
    ...         batch["brightness"] = batch.pixels(self.views[0]).float().mean(dim=(1, 2, 3))
    ...         return batch
    """

    views: tuple[PixelView, ...] = ()
    facts: tuple[str, ...] = ()
    encoded: bool = False
    rules: tuple[AnyRule, ...] = ()
    encoder: str | None = None
    nullable: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    finite: tuple[str, ...] = ()
    skip_dropped: bool = False

    def setup(self, worker: Worker) -> None:
        """Load what the stage needs; called once per worker process, before the first batch."""

    def process(self, batch: ImageBatch) -> ImageBatch:
        """Process one batch and return it.

        May be called by several threads of a worker at once. If it runs out of memory it is called again with
        parts of the batch, so it should set columns anew rather than change values in place.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override process()")


class DatasetStage(Stage):
    """A stage that needs the whole data set: it takes and returns a Dask DataFrame.

    The frame that comes out has the same rows in the same partitions, with columns added and
    ``status`` and ``reason`` of dropped rows set.
    """

    @property
    def numbers(self) -> tuple[str, ...]:
        """Columns of ``needs`` that have to hold numbers."""
        return ()

    @property
    def revises(self) -> tuple[str, ...]:
        """Columns of ``adds`` that a stage before may have added: this one carries over what they hold."""
        return ()

    def process_dataset(self, ddf: dd.DataFrame) -> dd.DataFrame:
        """Process the data set."""
        raise NotImplementedError(f"{type(self).__name__} does not override process_dataset()")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Check a parameter that counts something.

    Raises
    ------
    ConfigError
        If it is no whole number, or less than `least`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ConfigError(f"{name}={value!r} should be a whole number")
    if value < least:
        raise ConfigError(f"{name}={value} should be >= {least}")


def check_texts(name: str, value: Any, example: str) -> None:
    """Check a parameter that is a sequence of texts, none of them empty.

    Raises
    ------
    ConfigError
        If it is none.
    """
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) and v for v in value):
        raise ConfigError(f"{name}={value!r} should be a sequence of strings, such as [{example}]")


def columns_added(stage: Stage) -> dict[str, pa.DataType]:
    """Return the columns that a stage adds, with Arrow types.

    Raises
    ------
    ConfigError
        If a type is unknown.
    """
    added = {}
    for column, type_ in stage.adds.items():
        try:
            added[column] = pa.type_for_alias(type_) if isinstance(type_, str) else type_
        except ValueError as exc:
            raise ConfigError(f"stage {stage.name}: column {column!r} has the unknown type {type_!r}") from exc
    return added


def stage_config(stage: Stage) -> dict[str, Any]:
    """Return a stage as plain data: its class and its parameters, for plans and the manifest."""
    if is_dataclass(stage):
        params = {f.name: getattr(stage, f.name) for f in fields(stage) if f.init}
    else:
        params = {k: v for k, v in vars(stage).items() if not k.startswith("_")}
    plain = {k: _plain(v) for k, v in params.items()}
    kind = type(stage)
    if isinstance(stage, ProcessingStage) and not kind.__module__.startswith("imgcurate."):
        # What a stage of one's own declares may be written in its class, not in its parameters.
        plain |= {
            name: _plain(getattr(stage, name)) for name in ("rules", "views", "facts", "adds", "needs", "encoder")
        }
        plain |= {"skip_dropped": True} if stage.skip_dropped else {}
    module = "" if kind.__module__.startswith("imgcurate.") else f"{kind.__module__}."
    return {"stage": f"{module}{kind.__qualname__}", **plain}


def told_beside(stages: Iterable[Stage]) -> dict[str, Any]:
    """Return what a manifest tells of stages beside what decides their results.

    ``code``: checksums of the source code of the classes that are not imgcurate's own, where it is known;
    ``model_dir``: the folder of weights that the first of them names, if one does.
    """
    stages = list(stages)
    found: dict[str, str] = {}
    for kind in {type(stage) for stage in stages}:
        if not kind.__module__.startswith("imgcurate."):
            with contextlib.suppress(OSError, TypeError):
                found[f"{kind.__module__}.{kind.__qualname__}"] = _digest(inspect.getsource(kind).encode())
    folders = (getattr(stage, "model_dir", None) for stage in stages)
    return {"code": found, "model_dir": next((folder for folder in folders if folder), None)}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        # One of float64 is a float of Python besides, which YAML does not take.
        return _plain(value.item())
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, map(_plain, value)))
    if isinstance(value, enum.Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, (pa.DataType, decimal.Decimal, dt.date, dt.timedelta)):
        return str(value)
    # The repr of most objects holds their address, which differs from run to run; their content does not.
    content = value.tobytes() if isinstance(value, np.ndarray) else cloudpickle.dumps(value)
    return f"<{type(value).__module__}.{type(value).__qualname__} sha256:{_digest(content)}>"
