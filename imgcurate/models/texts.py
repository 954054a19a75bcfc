"""Text encoders: captions and prompts in, unit-norm embeddings out, in the space of the same model's image encoder.

The tower and its tokenizer are open_clip's. Who encodes some prompts once does so on the CPU, in float32; captions, of
which there is one for each image, are encoded where the images are.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from imgcurate.backend import Backend
from imgcurate.errors import ConfigError
from imgcurate.lazy import torch
from imgcurate.members import json_value
from imgcurate.models import clip_weights
from imgcurate.models.encoders import TINY_IMAGE, EncoderSpec, compute_dtype

__all__ = ["TextEncoder", "captions_of", "check_knows_text", "load_text_encoder", "prompt_embeddings"]

_CPU: Final = Backend("cpu")
_LEAST_TEXTS: Final = 4


class TextEncoder:
    """The text tower of an open_clip model.

    Parameters
    ----------
    spec : EncoderSpec
        Architecture, weights, precision and texts per forward pass; fp8 and `compile` are for images alone.
    backend : Backend
        Where to run.

    Attributes
    ----------
    identity : str
        The name of the model, as beside the embeddings of images.
    logit_scale : float
        What cosines are multiplied by before they are compared with each other, as in training.
    logit_bias : float or None
        Of models that were trained to tell by itself whether a text fits (SigLIP): what is added then.

    Raises
    ------
    ConfigError
        If the model knows no texts.
    WeightsError
        If weights or tokenizer are missing and cannot be downloaded.
    """

    def __init__(self, spec: EncoderSpec, backend: Backend) -> None:
        from imgcurate.models import towers

        check_knows_text(spec)
        weights = clip_weights.find(spec.model, spec.pretrained, spec.model_dir)
        self.identity = weights.identity
        self._tokenize = clip_weights.tokenizer(spec.model, spec.model_dir)
        model = clip_weights.load(weights).eval()
        # The image tower is not needed; dropping it frees its memory.
        model.visual = None
        self.logit_scale = float(model.logit_scale.detach().exp())
        bias = getattr(model, "logit_bias", None)
        self.logit_bias = None if bias is None else float(bias.detach())
        self._tower = towers.prepare_text(model, backend.torch_device, compute_dtype(spec.precision, backend))
        self._batch_size = backend.batch_size(spec.batch_size)

    def __call__(self, texts: Sequence[str], *, at_most: int | None = None) -> torch.Tensor:
        """Encode texts; what is longer than the model takes, mostly 77 tokens, is cut off.

        Returns
        -------
        torch.Tensor of shape (n, d)
            float32, unit L2 norm, on the encoder's device.
        """
        size = min(self._batch_size, at_most or self._batch_size)
        tokens = self._tokenize(list(texts))
        # Texts of one length go together, so that none is computed otherwise for those beside it.
        lengths = self._tower.lengths(tokens)
        order = torch.argsort(lengths, stable=True)
        _, counts = torch.unique_consecutive(lengths[order], return_counts=True)
        chunks = [
            self._encode(tokens[at]) for group in torch.split(order, counts.tolist()) for at in torch.split(group, size)
        ]
        features = torch.cat(chunks)
        out = torch.empty_like(features)
        out[order.to(out.device)] = features
        return out

    def _encode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Encode texts of one length; of few of them a product may be computed in another way."""
        n = len(tokens)
        with torch.inference_mode():
            features = self._tower(torch.cat([tokens, tokens[:1].expand(max(0, _LEAST_TEXTS - n), -1)]))
        return torch.nn.functional.normalize(features[:n].float(), dim=-1)


def check_knows_text(spec: EncoderSpec) -> None:
    """Raise ConfigError if a model has no text tower."""
    if spec.model == TINY_IMAGE:
        raise ConfigError(f"{TINY_IMAGE} knows no texts: take an open_clip model, such as ViT-L-14")


_lock = threading.Lock()


def load_text_encoder(spec: EncoderSpec, backend: Backend) -> TextEncoder:
    """Return the text encoder of a spec; its weights are loaded once per process."""
    with _lock:
        return _load_text_encoder(spec, backend)


@functools.lru_cache(maxsize=1)
def _load_text_encoder(spec: EncoderSpec, backend: Backend) -> TextEncoder:
    return TextEncoder(spec, backend)


def prompt_embeddings(
    prompts: Sequence[Sequence[str]], spec: EncoderSpec
) -> tuple[npt.NDArray[np.float32], float, float | None]:
    """Embed prompts, of which several may describe the same thing, on the CPU in float32.

    Parameters
    ----------
    prompts : sequence of sequence of str
        Per thing at least one.
    spec : EncoderSpec
        The model.

    Returns
    -------
    embeddings : ndarray of float32 of shape (n, d)
        Per thing the direction of the mean of its prompts' embeddings, unit L2 norm.
    logit_scale : float
        As in :class:`TextEncoder`.
    logit_bias : float or None
        As there.

    References
    ----------
    Radford et al.: Learning Transferable Visual Models From Natural Language Supervision, 2021, section 3.1.4.
    """
    encoder = TextEncoder(_exact(spec), _CPU)
    embedded = [encoder(texts).double().mean(dim=0) for texts in prompts]
    means = torch.nn.functional.normalize(torch.stack(embedded), dim=1)
    return means.float().numpy(), encoder.logit_scale, encoder.logit_bias


def _exact(spec: EncoderSpec) -> EncoderSpec:
    return EncoderSpec(spec.model, spec.pretrained, spec.model_dir, precision="fp32")


def captions_of(values: Any, json_field: str | None = None) -> list[str | None]:
    """Return the captions that a column holds; None where there is none.

    Parameters
    ----------
    values : iterable
        Text, or what is null.
    json_field : str, optional
        Take the text of this key of a JSON object; dots lead into objects in it. Of a list of texts the first counts.
    """
    captions: list[str | None] = []
    for value in values:
        text = json_value(value, json_field) if json_field is not None and isinstance(value, str) else value
        if isinstance(text, list):
            text = next((each for each in text if isinstance(each, str)), None)
        captions.append(text if isinstance(text, str) and text.strip() else None)
    return captions
