"""What the scoring stages share: thresholds and ranges, the encoder behind a batch, the model of texts."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from imgcurate import schema
from imgcurate.batches import ImageBatch
from imgcurate.errors import ConfigError, EncoderMismatchError
from imgcurate.models import clip_weights
from imgcurate.models.encoders import EncoderSpec
from imgcurate.models.weights import absolute_path
from imgcurate.stages.base import ProcessingStage
from imgcurate.stages.rules import Rule

__all__ = [
    "Range",
    "TextStage",
    "absolute_weights",
    "check_pair",
    "check_threshold",
    "encoders_of",
    "rules_of",
]

Range = Sequence[float | None]
"""The least and the largest value of a column that are kept; None is open."""


def check_threshold(stage: str, threshold: float | None) -> None:
    """Raise ConfigError if a threshold is outside [0, 1]."""
    if threshold is None:
        return
    if isinstance(threshold, bool) or not isinstance(threshold, numbers.Real) or not 0 <= threshold <= 1:
        raise ConfigError(f"stage {stage}: score_threshold={threshold!r} should be a number in [0, 1]")


def check_pair(column: str, bounds: Any) -> None:
    """Raise ConfigError if the bounds of a column are no range."""
    if isinstance(bounds, (str, bytes)) or not isinstance(bounds, Sequence) or len(bounds) != 2:
        expected = "least and largest: [256, null] in YAML, (256, None) in Python"
        raise ConfigError(f"ranges: {column} should be a pair, {expected}, not {bounds!r}")
    given = [b for b in bounds if b is not None]
    if not all(isinstance(b, numbers.Real) and not isinstance(b, bool) and math.isfinite(b) for b in given):
        expected = "least and largest, of finite numbers or of what is open (null, None)"
        raise ConfigError(f"ranges: {column} should be a pair, {expected}, not {bounds!r}")
    if len(given) == 2 and given[0] > given[1]:
        raise ConfigError(f"ranges: {column} has min={given[0]} > max={given[1]}, which would keep nothing")


def rules_of(ranges: Mapping[str, Range], status: str) -> tuple[Rule, ...]:
    """Return a rule for each bound of the ranges of some columns."""
    return tuple(
        # Whole numbers may be larger than those that a float tells apart.
        Rule(column, op, int(bound) if isinstance(bound, numbers.Integral) else float(bound), status)
        for column, bounds in ranges.items()
        for op, bound in zip((">=", "<="), bounds, strict=True)
        if bound is not None
    )


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


def absolute_weights(pretrained: str) -> str:
    """Return the absolute path of a weights file, for workers run elsewhere; a tag as it is."""
    if not isinstance(pretrained, str):
        raise ConfigError(f"pretrained={pretrained!r} should be a tag of open_clip, such as 'openai', or a file")
    if ("/" in pretrained or "." in pretrained) and Path(pretrained).expanduser().is_file():
        return absolute_path(pretrained) or pretrained
    return pretrained


class TextStage(ProcessingStage):
    """What the stages share that compare embedded images with texts: both are embedded by one model, :attr:`_spec`."""

    _spec: EncoderSpec

    def check(self, encoder: str | None) -> None:
        """Refuse embeddings of another model."""
        if encoder is not None and encoder != (mine := self._spec.identity()):
            raise EncoderMismatchError(
                f"stage {self.name}: the images are embedded by {encoder} and the texts by {mine}, which cannot be "
                "compared: name the same model and weights (model, pretrained)"
            )

    def fingerprint(self) -> dict[str, Any]:
        """Return the model's identity and the checksum of its weights; its tokenizer is fetched too."""
        clip_weights.tokenizer(self._spec.model, self._spec.model_dir)
        return self._spec.fingerprint()
