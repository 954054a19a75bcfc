"""Embeddings: pixels -> unit-norm vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import dask.dataframe as dd
import numpy as np
import pyarrow as pa

from imgcurate import schema
from imgcurate.batches import ImageBatch, PixelView
from imgcurate.errors import ConfigError
from imgcurate.models.encoders import Encoder, EncoderSpec, load_encoder
from imgcurate.models.weights import absolute_path
from imgcurate.stages.base import IMAGE, ProcessingStage, Worker
from imgcurate.stages.executor import apply_stages
from imgcurate.stages.reading import ImageReaderStage
from imgcurate.stages.scoring import absolute_weights

__all__ = ["ImageEmbeddingStage", "embed"]


@dataclass
class ImageEmbeddingStage(ProcessingStage):
    """Embed images with an open_clip model, or with ``tiny-image``, which needs no weights.

    Adds ``embedding``, (d,) float32 with unit L2 norm, and ``encoder``, the model's identity.

    Attributes
    ----------
    model : str
        An open_clip architecture (``open_clip.list_models()``), or ``tiny-image``.
    pretrained : str
        A tag of that architecture (``open_clip.list_pretrained()``), the path of a weights file
        (safetensors, or a state dict without code), or ``random``.
    model_dir : str, optional
        Folder with the weights; what is missing is downloaded into it. Default:
        ``$IMGCURATE_MODEL_DIR``, else ``~/.cache/imgcurate``.
    model_inference_batch_size : int or "auto"
        Images per forward pass; ``auto`` is 32 on a CPU and 256 on a GPU.
    num_gpus_per_worker : float
        Share of a GPU that one task takes; see :class:`ImageReaderStage`.
    remove_image_data : bool
        Free the pixels afterwards; stages that look at pixels must then stand before this one.
    precision : {"auto", "fp32", "bf16", "fp16", "fp8"}
        ``auto`` takes bf16 where the hardware computes in it, else fp32; ``fp8`` is the fastest, on a GPU of compute
        capability 8.9 or more, see ``docs/performance.md`` for what it costs.
    compile : bool or "auto"
        Whether the model is compiled; ``auto`` compiles open_clip's own transformers on a GPU, in some seconds.
    skip_dropped : bool
        Embed only what the stages before this one keep, in batches that are filled up with the next ones: cheap filters
        before a large model save its time. What they drop has no embedding and no scores, so that ``refilter`` cannot
        bring it back.

    Raises
    ------
    ConfigError
        If the model or the tag is unknown, or a parameter is not what it should be.
    WeightsError
        When the run starts, if the weights are missing and cannot be downloaded.

    References
    ----------
    Radford et al.: Learning Transferable Visual Models From Natural Language Supervision, 2021.
    """

    model: str = "ViT-L-14"
    pretrained: str = "openai"
    model_dir: str | None = None
    model_inference_batch_size: int | Literal["auto"] = "auto"
    num_gpus_per_worker: float = 1.0
    remove_image_data: bool = False
    precision: str = "auto"
    compile: bool | Literal["auto"] = "auto"
    skip_dropped: bool = False

    name: ClassVar[str] = "ImageEmbeddingStage"
    needs: ClassVar[tuple[str, ...]] = (IMAGE,)
    finite: ClassVar[tuple[str, ...]] = (schema.EMBEDDING,)  # type: ignore[misc]
    adds: ClassVar[Mapping[str, str | pa.DataType]] = {
        schema.EMBEDDING: schema.arrow_type(schema.EMBEDDING),
        schema.ENCODER: schema.arrow_type(schema.ENCODER),
    }

    def __post_init__(self) -> None:
        self.model_dir = absolute_path(self.model_dir)
        self.pretrained = absolute_weights(self.pretrained)
        if not isinstance(self.skip_dropped, bool):
            raise ConfigError(f"skip_dropped={self.skip_dropped!r} should be true or false")
        self._spec = EncoderSpec(
            self.model, self.pretrained, self.model_dir, self.precision, self.model_inference_batch_size, self.compile
        )
        self._encoder: Encoder | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the loaded model behind when the stage travels to a worker."""
        return {**self.__dict__, "_encoder": None}

    @property
    def encoder(self) -> str:  # type: ignore[override]
        """Identity of the embeddings, such as ``ViT-L-14/openai``."""
        return self._spec.identity()

    @property
    def views(self) -> tuple[PixelView, ...]:  # type: ignore[override]
        """The pixels that the model takes; known once it is loaded."""
        return (self._encoder.view,) if self._encoder else ()

    @property
    def removes(self) -> tuple[str, ...]:
        """Pixels, if ``remove_image_data``."""
        return (IMAGE,) if self.remove_image_data else ()

    def fingerprint(self) -> dict[str, Any]:
        """Return the model's identity and the checksum of its weights."""
        return self._spec.fingerprint()

    def setup(self, worker: Worker) -> None:
        """Load the model, once per process."""
        self._encoder = load_encoder(self._spec, worker.backend)

    def process(self, batch: ImageBatch) -> ImageBatch:
        """Embed the images of a batch."""
        if self._encoder is None:
            raise RuntimeError("setup() was not called")
        batch[schema.EMBEDDING] = self._encoder(batch.pixels(self._encoder.view), at_most=batch.at_most)
        batch[schema.ENCODER] = np.full(len(batch), self._encoder.identity, dtype=object)
        return batch


def embed(
    ddf: dd.DataFrame,
    *,
    model: str = "ViT-L-14",
    pretrained: str = "openai",
    model_dir: str | None = None,
    batch_size: int | Literal["auto"] = "auto",
    device: str = "auto",
    storage_options: Mapping[str, Any] | None = None,
) -> dd.DataFrame:
    """Decode and embed the images of a frame, lazily.

    Parameters
    ----------
    ddf : dask.dataframe.DataFrame
        From :func:`read_webdataset`.
    model, pretrained, model_dir
        As in :class:`ImageEmbeddingStage`.
    batch_size : int or "auto"
        Images per batch, for decoding and for the model; ``auto`` is 32 on a CPU and 256 on a GPU.
    device : {"auto", "cpu", "gpu"}
        Where.
    storage_options : mapping, optional
        For reading the shards.

    Returns
    -------
    dask.dataframe.DataFrame
        With ``embedding`` (null where no image decoded), ``encoder``, and ``width`` and ``height``
        filled; rows that did not decode have ``status`` ``decode_error`` and a reason.
    """
    stage = ImageEmbeddingStage(
        model, pretrained, model_dir, model_inference_batch_size=batch_size, remove_image_data=True
    )
    reader = ImageReaderStage(dali_batch_size=batch_size)
    return apply_stages(ddf, [stage], reader=reader, device=device, storage_options=storage_options)
