"""LAION's aesthetic predictor: embeddings -> a score in [0, 1], higher is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import dask.dataframe as dd
import pyarrow as pa

from imgcurate import schema
from imgcurate.batches import ImageBatch
from imgcurate.models.head_files import check_aesthetic_encoder, load_aesthetic_head
from imgcurate.models.heads import AestheticHead
from imgcurate.models.weights import absolute_path
from imgcurate.stages.base import ProcessingStage
from imgcurate.stages.executor import apply_stages
from imgcurate.stages.rules import Rule
from imgcurate.stages.scoring import check_threshold, encoders_of

__all__ = ["ImageAestheticFilterStage", "score_aesthetic"]


@dataclass
class ImageAestheticFilterStage(ProcessingStage):
    """Score images with LAION's aesthetic predictor V2 and keep the better ones.

    Adds ``aesthetic_score`` in [0, 1], higher is better, and ``aesthetic_score_raw`` on LAION's own
    scale, about 1 to 10.

    Attributes
    ----------
    score_threshold : float or None
        Keep ``aesthetic_score >= score_threshold``; in [0, 1]. None: score alone.
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
        Before the run starts, if the embeddings are not those of ViT-L/14 by OpenAI.

    References
    ----------
    Schuhmann: improved-aesthetic-predictor, ``sac+logos+ava1-l14-linearMSE``, 2022.
    """

    score_threshold: float | None = 0.5
    model_dir: str | None = None
    num_gpus_per_worker: float = 1.0
    model_inference_batch_size: int | Literal["auto"] = "auto"

    name: ClassVar[str] = schema.STATUS_AESTHETIC
    needs: ClassVar[tuple[str, ...]] = (schema.EMBEDDING, schema.ENCODER)
    adds: ClassVar[Mapping[str, str | pa.DataType]] = {
        schema.AESTHETIC_SCORE: schema.arrow_type(schema.AESTHETIC_SCORE),
        schema.AESTHETIC_SCORE_RAW: schema.arrow_type(schema.AESTHETIC_SCORE_RAW),
    }

    def __post_init__(self) -> None:
        check_threshold(self.name, self.score_threshold)
        self.model_dir = absolute_path(self.model_dir)
        self._head: AestheticHead | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the loaded head behind when the stage travels to a worker."""
        return {**self.__dict__, "_head": None}

    @property
    def rules(self) -> tuple[Rule, ...]:  # type: ignore[override]
        """The threshold."""
        if self.score_threshold is None:
            return ()
        return (Rule(schema.AESTHETIC_SCORE, ">=", self.score_threshold, schema.STATUS_AESTHETIC),)

    def check(self, encoder: str | None) -> None:
        """Refuse embeddings of another model."""
        if encoder is not None:
            check_aesthetic_encoder(encoder)

    def fingerprint(self) -> dict[str, Any]:
        """Return the checksum of the head's weights."""
        return {"weights_sha256": load_aesthetic_head(self.model_dir).sha256}

    def process(self, batch: ImageBatch) -> ImageBatch:
        """Score the embeddings of a batch; the head is loaded once it is known to fit them."""
        for encoder in encoders_of(batch):
            check_aesthetic_encoder(encoder)
        if self._head is None:
            self._head = load_aesthetic_head(self.model_dir, batch.device)
        raw = self._head(batch[schema.EMBEDDING])
        batch[schema.AESTHETIC_SCORE_RAW] = raw
        batch[schema.AESTHETIC_SCORE] = self._head.score(raw)
        return batch


def score_aesthetic(ddf: dd.DataFrame, *, model_dir: str | None = None, device: str = "auto") -> dd.DataFrame:
    """Add ``aesthetic_score`` and ``aesthetic_score_raw`` to a frame with embeddings, lazily.

    Parameters
    ----------
    ddf : dask.dataframe.DataFrame
        From :func:`embed`, with embeddings of ViT-L/14 by OpenAI.
    model_dir : str, optional
        As in :class:`ImageAestheticFilterStage`.
    device : {"auto", "cpu", "gpu"}
        Where.

    Returns
    -------
    dask.dataframe.DataFrame
        Nothing is dropped: filter with ``ddf[ddf.aesthetic_score >= 0.5]``. Null where no image decoded.
    """
    return apply_stages(ddf, [ImageAestheticFilterStage(None, model_dir)], device=device)
