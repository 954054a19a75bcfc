"""Zero-shot classes: how likely an image shows what prompts describe, from embeddings alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import dask.dataframe as dd
import pyarrow as pa

from imgcurate import schema
from imgcurate.batches import ImageBatch
from imgcurate.errors import ConfigError, nearest
from imgcurate.lazy import torch
from imgcurate.models.encoders import EncoderSpec
from imgcurate.models.texts import check_knows_text, prompt_embeddings
from imgcurate.models.weights import absolute_path
from imgcurate.stages.base import Worker
from imgcurate.stages.executor import apply_stages
from imgcurate.stages.rules import Rule
from imgcurate.stages.scoring import Range, TextStage, absolute_weights, check_pair, encoders_of, rules_of

__all__ = ["ImageZeroShotFilterStage", "score_zero_shot"]

_LABEL: Final = re.compile(r"[A-Za-z0-9_]+")


@dataclass
class ImageZeroShotFilterStage(TextStage):
    """Tell what images show by prompts, and keep those whose probabilities lie in given ranges.

    Adds ``zero_shot_<label>`` for each label, a probability in [0, 1]. They sum to 1, so an image is told to be like
    one of the labels whatever it shows: there should be one for all the rest. (Of models that were trained to judge
    each text by itself, SigLIP's, each label has a probability of its own.)

    Attributes
    ----------
    labels : mapping of str to str or sequence of str
        At least two, each with a prompt or several: ``{"photo": "a photo", "screenshot": ["a screenshot of a web
        page", "a screenshot of a phone"], "text": "a page of text"}``. Of several prompts the mean counts. A label is
        letters, digits and ``_``.
    ranges : mapping of str to pair
        Per label the smallest and the largest probability that is kept, both inclusive; None is open:
        ``{"screenshot": (None, 0.5)}``. An image outside has the status ``zero_shot`` and a reason such as
        ``zero_shot_screenshot 0.83 > 0.50``.
    model, pretrained, model_dir
        The model that embedded the images, as in :class:`ImageEmbeddingStage`.

    Raises
    ------
    ConfigError
        If a label is none or has no prompt, a range is none, or the model knows no texts.
    EncoderMismatchError
        Before the run starts, if the images were embedded by another model.
    WeightsError
        When the run starts, if weights or tokenizer are missing and cannot be downloaded.

    References
    ----------
    Radford et al.: Learning Transferable Visual Models From Natural Language Supervision, 2021.
    Zhai et al.: Sigmoid Loss for Language Image Pre-Training, 2023.
    """

    labels: Mapping[str, str | Sequence[str]]
    ranges: Mapping[str, Range] = field(default_factory=dict)
    model: str = "ViT-L-14"
    pretrained: str = "openai"
    model_dir: str | None = None

    name: ClassVar[str] = schema.STATUS_ZERO_SHOT
    needs: ClassVar[tuple[str, ...]] = (schema.EMBEDDING, schema.ENCODER)

    def __post_init__(self) -> None:
        self._prompts = _prompts(self.labels)
        if not isinstance(self.ranges, Mapping):
            raise ConfigError(
                f"ranges={self.ranges!r} should be a mapping of labels to pairs, such as text: [null, 0.5]"
            )
        for label, bounds in self.ranges.items():
            if label not in self._prompts:
                raise ConfigError(f"ranges: there is no label {label!r}{nearest(str(label), self._prompts)}")
            check_pair(label, bounds)
        self.model_dir = absolute_path(self.model_dir)
        self.pretrained = absolute_weights(self.pretrained)
        self._spec = EncoderSpec(self.model, self.pretrained, self.model_dir)
        check_knows_text(self._spec)
        self._classifier: _Classifier | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave what was computed of the prompts behind when the stage travels to a worker."""
        return {**self.__dict__, "_classifier": None}

    @property
    def adds(self) -> Mapping[str, str | pa.DataType]:  # type: ignore[override]
        """A column for each label."""
        return {schema.zero_shot_column(label): pa.float32() for label in self._prompts}

    @property
    def rules(self) -> tuple[Rule, ...]:  # type: ignore[override]
        """A rule for each bound."""
        ranges = {schema.zero_shot_column(label): bounds for label, bounds in self.ranges.items()}
        return rules_of(ranges, schema.STATUS_ZERO_SHOT)

    def setup(self, worker: Worker) -> None:
        """Embed the prompts, once per process; the text tower is not kept."""
        embeddings, scale, bias = prompt_embeddings(list(self._prompts.values()), self._spec)
        self._classifier = _Classifier(torch.from_numpy(embeddings).to(worker.device), scale, bias)

    def process(self, batch: ImageBatch) -> ImageBatch:
        """Compare the embeddings of a batch with the prompts."""
        if self._classifier is None:
            raise RuntimeError("setup() was not called")
        for encoder in encoders_of(batch):
            self.check(encoder)
        likely = self._classifier(batch[schema.EMBEDDING]) if len(batch) else torch.empty((0, len(self._prompts)))
        for i, label in enumerate(self._prompts):
            batch[schema.zero_shot_column(label)] = likely[:, i]
        return batch


@dataclass(frozen=True)
class _Classifier:
    """The embeddings of the labels, (n, d) float32 on the device, and how cosines become probabilities."""

    embeddings: torch.Tensor
    scale: float
    bias: float | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the probability of each label for each row of `x`, (m, n)."""
        # Each row by itself: how a product is divided into blocks depends on the number of rows.
        logits = self.scale * torch.stack([(x * label).sum(dim=1) for label in self.embeddings], dim=1)
        return logits.softmax(dim=1) if self.bias is None else (logits + self.bias).sigmoid()


def score_zero_shot(
    ddf: dd.DataFrame,
    labels: Mapping[str, str | Sequence[str]],
    *,
    model: str = "ViT-L-14",
    pretrained: str = "openai",
    model_dir: str | None = None,
    device: str = "auto",
) -> dd.DataFrame:
    """Add ``zero_shot_<label>`` for each label to a frame with embeddings, lazily.

    Parameters
    ----------
    ddf : dask.dataframe.DataFrame
        From :func:`embed`.
    labels, model, pretrained, model_dir
        As in :class:`ImageZeroShotFilterStage`.
    device : {"auto", "cpu", "gpu"}
        Where.

    Returns
    -------
    dask.dataframe.DataFrame
        Nothing is dropped: filter with ``ddf[ddf.zero_shot_screenshot <= 0.5]``. Null where no image decoded.
    """
    return apply_stages(ddf, [ImageZeroShotFilterStage(labels, {}, model, pretrained, model_dir)], device=device)


def _prompts(labels: Any) -> dict[str, tuple[str, ...]]:
    """Return the prompts of each label."""
    if not isinstance(labels, Mapping) or len(labels) < 2:
        raise ConfigError(
            f"labels={labels!r} should be a mapping of two labels at least to their prompts, such as "
            "photo: a photo, text: a page of text"
        )
    prompts: dict[str, tuple[str, ...]] = {}
    for label, given in labels.items():
        if not isinstance(label, str) or not _LABEL.fullmatch(label):
            raise ConfigError(f"labels: {label!r} should be a name of letters, digits and _: it names a column")
        texts = (given,) if isinstance(given, str) else given
        if not isinstance(texts, Sequence) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise ConfigError(f"labels: {label} should have a prompt or a list of prompts, not {given!r}")
        prompts[label] = tuple(texts)
    return prompts
