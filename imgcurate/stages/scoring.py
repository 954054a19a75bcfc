"""What the scoring stages share: thresholds in [0, 1], and the encoder behind a batch."""

from __future__ import annotations

import numbers

import pandas as pd

from imgcurate import schema
from imgcurate.batches import ImageBatch
from imgcurate.errors import ConfigError, EncoderMismatchError

__all__ = ["check_threshold", "encoders_of"]


def check_threshold(stage: str, threshold: float | None) -> None:
    """Raise ConfigError if a threshold is outside [0, 1]."""
    if threshold is None:
        return
    if isinstance(threshold, bool) or not isinstance(threshold, numbers.Real) or not 0 <= threshold <= 1:
        raise ConfigError(f"stage {stage}: score_threshold={threshold!r} should be a number in [0, 1]")


def encoders_of(batch: ImageBatch) -> list[str]:
    """Return the identity of the encoder that made a batch's embeddings; empty for an empty batch.

    Raises
    ------
    EncoderMismatchError
        If the embeddings of one batch come from several models.
    """
    names = [str(n) for n in pd.unique(pd.Series(batch[schema.ENCODER]))]
    if len(names) > 1:
        raise EncoderMismatchError(f"the embeddings of one frame come from several models: {', '.join(names)}")
    return names
