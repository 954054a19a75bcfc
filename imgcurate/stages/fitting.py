"""Run a stage on a batch, in pieces where the whole does not fit in memory."""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from pathlib import Path

from imgcurate import schema
from imgcurate.backend import Backend
from imgcurate.batches import ImageBatch
from imgcurate.errors import ConfigError, ImgcurateError
from imgcurate.memory import is_out_of_memory
from imgcurate.stages.base import ProcessingStage

__all__ = ["BatchLimit", "process_batch"]

logger = logging.getLogger(__name__)


class BatchLimit:
    """The most images that a stage was seen to process at once, after a larger batch did not fit in memory.

    One for each stage of a worker process; its threads share it.

    Attributes
    ----------
    images : int or None
        None as long as every batch fitted.
    """

    def __init__(self) -> None:
        self.images: int | None = None
        self._lock = threading.Lock()

    def lower(self, images: int, stage: str, before: int) -> None:
        """Remember that `images` fit and `before` do not; say so, once."""
        with self._lock:
            if self.images is not None and self.images <= images:
                return
            self.images = images
        logger.warning(
            "stage %s: a batch of %d images does not fit in memory; batches have at most %d images from now on",
            stage, before, images,
        )  # fmt: skip


def process_batch(stage: ProcessingStage, batch: ImageBatch, limit: BatchLimit, backend: Backend) -> ImageBatch:
    """Run a stage on a batch; where memory runs out, on halves of it, down to one image.

    Parameters
    ----------
    stage : ProcessingStage
        What to run. What an attempt that failed had set in the batch is gone.
    batch : ImageBatch
        Stays as it is.
    limit : BatchLimit
        What is known of the stage in this process; batches above it are cut up front.
    backend : Backend
        Where the stage runs.

    Returns
    -------
    ImageBatch
        What the stage makes of the whole batch.

    Raises
    ------
    ConfigError
        If the stage does not return a batch with all its rows.
    ImgcurateError
        If a single image does not fit in memory, or the stage raises anything else: with the stage's name, and where.
    """
    n, start = len(batch), 0
    most, failed = limit.images, None
    given: list[ImageBatch] = []
    made: list[ImageBatch] = []
    while start < n or not made:
        part = batch.part(start, n if most is None else min(start + most, n))
        part.at_most = most
        out = _attempt(stage, part)
        if out is None:
            backend.free_memory()
            failed = failed or most or n
            most = (min(len(part), most or n) + 1) // 2
            continue
        if failed and most and most < failed:
            limit.lower(most, stage.name, failed)
            failed = None
        given.append(part)
        made.append(out)
        start += len(part)
    return made[0] if len(made) == 1 else batch.join(given, made)


def _attempt(stage: ProcessingStage, part: ImageBatch) -> ImageBatch | None:
    """Return what a stage makes of a part of a batch; None if it should be tried with fewer images at once."""
    where = (
        f"in {part.rows[schema.SHARD].iloc[0]}, key {part.rows[schema.KEY].iloc[0]!r} and after" if len(part) else ""
    )
    try:
        out = stage.process(part.part(0, len(part)))
    except (Exception, SystemExit, KeyboardInterrupt, GeneratorExit) as exc:
        # Ctrl-C is not for workers: what they are raised by is the stage.
        if is_out_of_memory(exc):
            if len(part) > 1 or part.at_most != 1:
                return None
            # The frames of what failed hold its tensors, as long as the error lives.
            traceback.clear_frames(exc.__traceback__)
            raise ImgcurateError(
                f"stage {stage.name}: out of memory with a single image ({where}): give each worker more memory "
                "(fewer workers; on a GPU num_gpus_per_worker=1), or use a smaller model or pixel view"
            ) from exc
        if type(exc) is ConfigError and stage.name not in str(exc):
            raise ConfigError(f"stage {stage.name}: {exc}") from exc
        if isinstance(exc, ImgcurateError):
            raise
        raise ImgcurateError(f"stage {stage.name}: {type(exc).__name__}: {exc} ({_line(exc)}{where})") from exc
    if out is None:
        raise ConfigError(f"stage {stage.name}: process() returned None: is 'return batch' missing at its end?")
    if not isinstance(out, ImageBatch) or len(out) != len(part):
        raise ConfigError(f"stage {stage.name}: process() must return the batch with all its rows")
    if not out.rows.index.equals(part.rows.index):
        raise ConfigError(f"stage {stage.name}: process() must return the rows of the batch in their order")
    return out


def _line(exc: BaseException) -> str:
    """Return where an error was raised: the innermost line that is no library's, nor imgcurate's."""
    own = str(Path(__file__).parents[1])
    frames = [f for f in traceback.extract_tb(exc.__traceback__) if "-packages" not in f.filename]
    theirs = [f for f in frames if not f.filename.startswith((own, "<frozen", sys.prefix, sys.base_prefix))]
    if not theirs:
        return ""
    # Code that came with the task, as from a notebook, has no file here.
    file = "" if theirs[-1].filename.startswith("<") else f" of {theirs[-1].filename}"
    return f"{theirs[-1].name}(), line {theirs[-1].lineno}{file}; "
