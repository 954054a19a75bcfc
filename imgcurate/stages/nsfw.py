"""LAION's NSFW classifier: embeddings -> the probability that an image is not safe for work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import dask.dataframe as dd
import pyarrow as pa

from imgcurate import schema
from imgcurate.batches import ImageBatch
from imgcurate.lazy import torch
from imgcurate.models.head_files import check_nsfw_encoder, load_nsfw_head
from imgcurate.models.heads import NsfwHead
from imgcurate.models.weights import absolute_path
from imgcurate.stages.base import ProcessingStage
from imgcurate.stages.executor import apply_stages
from imgcurate.stages.rules import Rule
from imgcurate.stages.scoring import check_threshold, encoders_of

__all__ = ["ImageNSFWFilterStage", "score_nsfw"]


@dataclass
class ImageNSFWFilterStage(ProcessingStage):
    """Score images with LAION's NSFW classifier and drop what is likely not safe for work.

    Adds ``nsfw_score``, a probability in [0, 1], higher is less safe.

    Attributes
    ----------
    score_threshold : float or None
        Keep ``nsfw_score < score_threshold``; in [0, 1]. None: score alone.
    model_dir : str, optional
        Folder with the weights; what is missing is downloaded into it.
    num_gpus_per_worker : float
        Accepted for compatibility; stages of one run share the GPU share of the reader.
    model_inference_batch_size : int or "auto"
        Accepted for compatibility; the head takes a whole batch at once.

    Raises
    ------
    ConfigError
        If the threshold is outside [0, 1].
    EncoderMismatchError
        Before the run starts, if the embeddings are not those of OpenAI's ViT-L/14 or ViT-B/32.

    References
    ----------
    LAION-AI: CLIP-based-NSFW-Detector, 2022.
    """

    score_threshold: float | None = 0.5
    model_dir: str | None = None
    num_gpus_per_worker: float = 1.0
    model_inference_batch_size: int | Literal["auto"] = "auto"

    name: ClassVar[str] = schema.STATUS_NSFW
    needs: ClassVar[tuple[str, ...]] = (schema.EMBEDDING, schema.ENCODER)
    adds: ClassVar[Mapping[str, str | pa.DataType]] = {schema.NSFW_SCORE: schema.arrow_type(schema.NSFW_SCORE)}

    def __post_init__(self) -> None:
        check_threshold(self.name, self.score_threshold)
        self.model_dir = absolute_path(self.model_dir)
        self._encoder: str | None = None
        self._heads: dict[str, NsfwHead] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the loaded heads behind when the stage travels to a worker."""
        return {**self.__dict__, "_heads": {}}

    @property
    def rules(self) -> tuple[Rule, ...]:  # type: ignore[override]
        """The threshold."""
        if self.score_threshold is None:
            return ()
        return (Rule(schema.NSFW_SCORE, "<", self.score_threshold, schema.STATUS_NSFW),)

    def check(self, encoder: str | None) -> None:
        """Refuse embeddings of another model, and note which head will be needed."""
        if encoder is not None:
            check_nsfw_encoder(encoder)
            self._encoder = encoder

    def fingerprint(self) -> dict[str, Any]:
        """Return the checksum of the head's weights."""
        return {"weights_sha256": load_nsfw_head(self._encoder, self.model_dir).sha256} if self._encoder else {}

    def process(self, batch: ImageBatch) -> ImageBatch:
        """Score the embeddings of a batch; a head is loaded once it is known to fit them."""
        scores = [self._head(encoder, batch.device)(batch[schema.EMBEDDING]) for encoder in encoders_of(batch)]
        batch[schema.NSFW_SCORE] = scores[0] if scores else torch.empty(0)
        return batch

    def _head(self, encoder: str, device: str) -> NsfwHead:
        if encoder not in self._heads:
            self._heads[encoder] = load_nsfw_head(encoder, self.model_dir, device)
        return self._heads[encoder]


def score_nsfw(ddf: dd.DataFrame, *, model_dir: str | None = None, device: str = "auto") -> dd.DataFrame:
    """Add ``nsfw_score`` to a frame with embeddings, lazily.

    Parameters
    ----------
    ddf : dask.dataframe.DataFrame
        From :func:`embed`, with embeddings of OpenAI's ViT-L/14 or ViT-B/32.
    model_dir : str, optional
        As in :class:`ImageNSFWFilterStage`.
    device : {"auto", "cpu", "gpu"}
        Where.

    Returns
    -------
    dask.dataframe.DataFrame
        Nothing is dropped: filter with ``ddf[ddf.nsfw_score < 0.5]``. Null where no image decoded.
    """
    return apply_stages(ddf, [ImageNSFWFilterStage(None, model_dir)], device=device)
