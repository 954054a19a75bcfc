"""Captions: how well an image's text describes it, as the cosine of their embeddings."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import dask.dataframe as dd
import numpy as np
import pyarrow as pa

from imgcurate import schema
from imgcurate.batches import ImageBatch
from imgcurate.errors import ConfigError
from imgcurate.lazy import torch
from imgcurate.models.encoders import EncoderSpec
from imgcurate.models.texts import TextEncoder, captions_of, check_knows_text, load_text_encoder
from imgcurate.models.weights import absolute_path
from imgcurate.stages.base import Worker
from imgcurate.stages.executor import apply_stages
from imgcurate.stages.rules import Rule
from imgcurate.stages.scoring import TextStage, absolute_weights, encoders_of

__all__ = ["ImageCaptionFilterStage", "score_captions"]


@dataclass
class ImageCaptionFilterStage(TextStage):
    """Compare images with their captions, and keep those that their captions describe.

    Adds ``caption_similarity``, the cosine of the embeddings of image and caption, in [-1, 1], known as CLIP score:
    what fits has about 0.2 to 0.4. Null without a caption.

    Attributes
    ----------
    score_threshold : float or None
        Keep ``caption_similarity >= score_threshold``, in [-1, 1]; images without a caption are not kept then. None:
        score alone.
    text_column : str
        Column of the captions: of members that ``text_columns`` of the reader names, such as ``txt`` or ``json``.
    json_field : str, optional
        If the column holds JSON objects, the key of the caption in them; dots lead into objects within.
    model, pretrained, model_dir
        The model that embedded the images, as in :class:`ImageEmbeddingStage`.
    model_inference_batch_size : int or "auto"
        Captions per forward pass; ``auto`` is 32 on a CPU and 256 on a GPU.
    precision : {"auto", "fp32", "bf16", "fp16"}
        ``auto`` takes bf16 where the hardware computes in it, else fp32.

    Raises
    ------
    ConfigError
        If the threshold is outside [-1, 1], or the model knows no texts.
    EncoderMismatchError
        Before the run starts, if the images were embedded by another model.
    WeightsError
        When the run starts, if weights or tokenizer are missing and cannot be downloaded.

    References
    ----------
    Hessel et al.: CLIPScore: A Reference-free Evaluation Metric for Image Captioning, 2021.
    Gadre et al.: DataComp: In search of the next generation of multimodal datasets, 2023.
    """

    score_threshold: float | None = None
    text_column: str = "txt"
    json_field: str | None = None
    model: str = "ViT-L-14"
    pretrained: str = "openai"
    model_dir: str | None = None
    model_inference_batch_size: int | Literal["auto"] = "auto"
    precision: str = "auto"

    name: ClassVar[str] = schema.STATUS_CAPTION
    adds: ClassVar[Mapping[str, str | pa.DataType]] = {
        schema.CAPTION_SIMILARITY: schema.arrow_type(schema.CAPTION_SIMILARITY)
    }

    def __post_init__(self) -> None:
        _check_cosine(self.name, self.score_threshold)
        if not isinstance(self.text_column, str) or not self.text_column:
            raise ConfigError(f"text_column={self.text_column!r} should be the name of a column, such as 'txt'")
        if self.json_field is not None and (not isinstance(self.json_field, str) or not self.json_field):
            raise ConfigError(f"json_field={self.json_field!r} should be a key, such as 'caption'")
        if self.precision == "fp8":
            raise ConfigError("precision='fp8' is for images alone: captions take auto, fp32, bf16 or fp16")
        self.model_dir = absolute_path(self.model_dir)
        self.pretrained = absolute_weights(self.pretrained)
        self._spec = EncoderSpec(
            self.model, self.pretrained, self.model_dir, self.precision, self.model_inference_batch_size
        )
        check_knows_text(self._spec)
        self._encoder: TextEncoder | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the loaded model behind when the stage travels to a worker."""
        return {**self.__dict__, "_encoder": None}

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The embeddings, and the captions."""
        return (schema.EMBEDDING, schema.ENCODER, self.text_column)

    @property
    def texts(self) -> tuple[str, ...]:  # type: ignore[override]
        """The captions."""
        return (self.text_column,)

    @property
    def nullable(self) -> tuple[str, ...]:  # type: ignore[override]
        """The captions."""
        return (self.text_column,)

    @property
    def rules(self) -> tuple[Rule, ...]:  # type: ignore[override]
        """The threshold."""
        if self.score_threshold is None:
            return ()
        return (Rule(schema.CAPTION_SIMILARITY, ">=", self.score_threshold, schema.STATUS_CAPTION),)

    def setup(self, worker: Worker) -> None:
        """Load the model, once per process."""
        self._encoder = load_text_encoder(self._spec, worker.backend)

    def process(self, batch: ImageBatch) -> ImageBatch:
        """Compare the images of a batch with their captions."""
        if self._encoder is None:
            raise RuntimeError("setup() was not called")
        for encoder in encoders_of(batch):
            self.check(encoder)
        captions = captions_of(batch[self.text_column], self.json_field)
        there = [i for i, caption in enumerate(captions) if caption is not None]
        scores = torch.full((len(batch),), math.nan, device=batch.device)
        if there:
            texts = self._encoder([captions[i] or "" for i in there], at_most=batch.at_most)
            index = torch.as_tensor(np.array(there), device=batch.device)
            scores[index] = (batch[schema.EMBEDDING][index] * texts).sum(dim=1).clamp_(-1, 1)
        batch[schema.CAPTION_SIMILARITY] = scores
        return batch


def score_captions(
    ddf: dd.DataFrame,
    *,
    text_column: str = "txt",
    json_field: str | None = None,
    model: str = "ViT-L-14",
    pretrained: str = "openai",
    model_dir: str | None = None,
    batch_size: int | Literal["auto"] = "auto",
    device: str = "auto",
) -> dd.DataFrame:
    """Add ``caption_similarity`` to a frame with embeddings and captions, lazily.

    Parameters
    ----------
    ddf : dask.dataframe.DataFrame
        From :func:`embed`, with the captions as a column, as of ``read_webdataset(..., text_columns=("txt",))``.
    text_column, json_field, model, pretrained, model_dir
        As in :class:`ImageCaptionFilterStage`.
    batch_size : int or "auto"
        Captions per forward pass.
    device : {"auto", "cpu", "gpu"}
        Where.

    Returns
    -------
    dask.dataframe.DataFrame
        Nothing is dropped: filter with ``ddf[ddf.caption_similarity >= 0.28]``. Null where there is no caption or no
        embedding.
    """
    stage = ImageCaptionFilterStage(
        None, text_column, json_field, model, pretrained, model_dir, model_inference_batch_size=batch_size
    )
    return apply_stages(ddf, [stage], device=device)


def _check_cosine(stage: str, threshold: float | None) -> None:
    """Raise ConfigError if a threshold is outside [-1, 1]."""
    if threshold is None:
        return
    if isinstance(threshold, bool) or not isinstance(threshold, numbers.Real) or not -1 <= threshold <= 1:
        raise ConfigError(f"stage {stage}: score_threshold={threshold!r} should be a number in [-1, 1]")
