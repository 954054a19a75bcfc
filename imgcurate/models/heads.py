"""Heads: small networks that turn the embeddings of one certain encoder into one number per image.

======================  ========================  ==========================================================
head                    encoders                  number
======================  ========================  ==========================================================
:class:`AestheticHead`  ViT-L-14/openai           LAION's aesthetic scale, about 1..10, higher is better
:class:`NsfwHead`       ViT-L-14/openai           probability in [0, 1] that the image is not safe for work
:class:`NsfwHead`       ViT-B-32/openai           the same
======================  ========================  ==========================================================

Each is read from the file that its authors published, whose checksum is known, or from the same
tensors as ``.safetensors``, which are checked by name, type and shape.

References
----------
https://github.com/christophschuhmann/improved-aesthetic-predictor and
https://github.com/LAION-AI/CLIP-based-NSFW-Detector, both at ``main``; checksums in
:mod:`imgcurate.models.weights`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Self, TypeAlias

from imgcurate.errors import ConfigError, EncoderMismatchError
from imgcurate.lazy import torch

__all__ = ["B32", "L14", "AestheticHead", "Head", "NsfwHead"]

Tensors: TypeAlias = "Mapping[str, torch.Tensor]"

L14: Final = "ViT-L-14/openai"
B32: Final = "ViT-B-32/openai"
_CHUNK_ROWS: Final = 128
MINUS_ZERO: Final = -(2**31)
_MIN_STD: Final = 1e-7
AESTHETIC_LAYERS: Final = (0, 2, 4, 6, 7)


class Head(ABC):
    """Turn unit-norm embeddings into one number each.

    Attributes
    ----------
    name : str
        What it is called in reports.
    dim : int
        Length of the embeddings that it takes.
    encoders : tuple of str
        Identities of the encoders whose embeddings it takes, such as ``ViT-L-14/openai``.
    sha256 : str
        Digest of its tensors' names, types, shapes and values: the same whichever file they came from.
    path : Path or None
        The file that it was read from.
    """

    def __init__(
        self, name: str, encoders: tuple[str, ...], dim: int, tensors: Tensors, path: Path | None = None
    ) -> None:
        self.name = name
        self.encoders = encoders
        self.dim = dim
        self.path = path
        self.sha256 = _digest(tensors)
        self._tensors: dict[str, torch.Tensor] = {}

    @property
    def device(self) -> torch.device:
        """The device that its tensors are on, and its results."""
        return next(iter(self._tensors.values())).device

    def to(self, device: str | torch.device) -> Self:
        """Move the tensors to a device; returns the head itself."""
        self._tensors = {name: tensor.to(device) for name, tensor in self._tensors.items()}
        return self

    def check_encoder(self, encoder_id: str) -> None:
        """Do nothing if the head takes this encoder's embeddings.

        Raises
        ------
        EncoderMismatchError
            If it was trained on those of another.
        """
        if encoder_id not in self.encoders:
            raise EncoderMismatchError(
                f"the head {self.name!r} takes embeddings of {' or '.join(self.encoders)}, got those of "
                f"{encoder_id!r}: its scores would mean nothing. Use one of these encoders or leave the "
                "head out"
            )

    def __call__(self, embedding: torch.Tensor) -> torch.Tensor:
        """Score embeddings.

        Parameters
        ----------
        embedding : torch.Tensor of shape (n, dim)
            Unit L2 norm; any floating type, any device.

        Returns
        -------
        torch.Tensor of shape (n,)
            float32, on the head's device; NaN where the embedding has a NaN or an infinity.

        Raises
        ------
        ConfigError
            If `embedding` is not a matrix of floating numbers.
        EncoderMismatchError
            If its rows are not `dim` long.

        Notes
        -----
        Rows are computed in blocks of a fixed number, the last one padded, so that a score does not
        depend on how many embeddings come together.
        """
        if embedding.ndim != 2 or not embedding.is_floating_point():
            raise ConfigError(
                f"the head {self.name!r} was given a tensor of shape {tuple(embedding.shape)} and type "
                f"{embedding.dtype}, expected embeddings of shape (n, {self.dim}) of a floating type"
            )
        if embedding.shape[1] != self.dim:
            raise EncoderMismatchError(
                f"the head {self.name!r} was given embeddings of length {embedding.shape[1]}, expected "
                f"{self.dim}, those of {' or '.join(self.encoders)}"
            )
        n = len(embedding)
        with torch.inference_mode():
            x = embedding.to(self.device, torch.float32)
            x = torch.nn.functional.pad(x, (0, 0, 0, -n % _CHUNK_ROWS))
            scores = [self._score(x[i : i + _CHUNK_ROWS]) for i in range(0, n, _CHUNK_ROWS)]
            finite = torch.isfinite(x).all(dim=1)[:n]
            return torch.cat([x.new_empty(0), *scores])[:n].where(finite, torch.nan)

    @abstractmethod
    def _score(self, x: torch.Tensor) -> torch.Tensor:
        """Return the scores (n,) of float32 embeddings (n, dim) on the head's device."""


class AestheticHead(Head):
    """LAION's aesthetic predictor V2 on LAION's own scale, about 1..10, higher is better.

    Parameters
    ----------
    tensors : mapping of str to torch.Tensor
        ``layers.{0,2,4,6,7}.{weight,bias}``, float32.
    path : Path, optional
        Where they came from.
    device : str or torch.device
        Where to compute.

    Notes
    -----
    The published network 768-1024-128-64-16-1 has no activations: it is one affine map, collapsed
    here in float64 and applied in float32.
    """

    def __init__(self, tensors: Tensors, path: Path | None = None, device: str | torch.device = "cpu") -> None:
        super().__init__("LAION aesthetic V2", (L14,), tensors["layers.0.weight"].shape[1], tensors, path)
        weight = torch.eye(self.dim, dtype=torch.float64)
        bias = torch.zeros(self.dim, dtype=torch.float64)
        for i in AESTHETIC_LAYERS:
            layer = tensors[f"layers.{i}.weight"].double()
            weight, bias = layer @ weight, layer @ bias + tensors[f"layers.{i}.bias"].double()
        self._tensors = {"weight": weight[0].float(), "bias": bias.float()}
        self.to(device)

    @staticmethod
    def score(raw: torch.Tensor) -> torch.Tensor:
        """Return raw scores as aesthetic scores in [0, 1]: a tenth of them, clipped."""
        return (raw / 10).clamp(0, 1)

    def _score(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self._tensors["weight"] + self._tensors["bias"]


class NsfwHead(Head):
    """LAION's NSFW detector: the probability in [0, 1] that an image is not safe for work.

    Parameters
    ----------
    tensors : mapping of str to torch.Tensor
        As :func:`imgcurate.models.head_files.nsfw_tensors` returns them.
    name, encoder : str
        What it is called, and the identity of the encoder that it was trained on.
    path : Path, optional
        Where they came from.
    device : str or torch.device
        Where to compute.

    Notes
    -----
    AutoKeras took a few input columns for categories: their values, written with six decimals, are
    looked up in a vocabulary and replaced by 1 + the position there, or by 0 if they are not in it.
    That is done here as the published model does it, without leaving the device. Only NaN differs:
    the published model reads it as 0, here the score is NaN.
    """

    def __init__(
        self,
        tensors: Tensors,
        name: str,
        encoder: str,
        path: Path | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(name, (encoder,), len(tensors["norm.mean"]), tensors, path)
        self._n_layers = sum(key.endswith(".kernel") for key in tensors)
        keys, values = _vocabulary(tensors)
        self._tensors = {
            "mean": tensors["norm.mean"].clone(),
            "std": tensors["norm.variance"].sqrt().clamp_min(_MIN_STD),
            "columns": tensors["int_columns"].clone(),
            "vocabulary_keys": keys,
            "vocabulary_values": values,
            **{key: tensor.clone() for key, tensor in tensors.items() if key.startswith("dense")},
        }
        self.to(device)

    def _score(self, x: torch.Tensor) -> torch.Tensor:
        t = self._tensors
        if len(t["columns"]):
            x = x.index_copy(1, t["columns"], self._lookup(x[:, t["columns"]]))
        x = (x - t["mean"]) / t["std"]
        for i in range(self._n_layers):
            x = torch.addmm(t[f"dense{i}.bias"], x.relu() if i else x, t[f"dense{i}.kernel"])
        return x[:, 0].sigmoid()

    def _lookup(self, x: torch.Tensor) -> torch.Tensor:
        """Return the vocabulary index of each value (n, columns), 0 where it is not in the vocabulary."""
        # A float32 times 1e6 (14 significant bits after 2**6) is exact in float64, so this rounds as
        # printf("%.6f") does: to nearest, ties to even.
        micro = (x.double() * 1e6).round()
        micro = micro.where((micro != 0) | ~x.signbit(), MINUS_ZERO).T.contiguous()
        keys, values = self._tensors["vocabulary_keys"], self._tensors["vocabulary_values"]
        place = torch.searchsorted(keys, micro).clamp_max(keys.shape[1] - 1)
        return values.gather(1, place).where(keys.gather(1, place) == micro, 0).T


def _vocabulary(tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sorted keys (columns, m) float64, padded with infinity, and indices (columns, m) float32."""
    columns = tensors["int_columns"].tolist()
    vocabularies = [tensors[f"vocab.{c}.micro"] for c in columns]
    longest = max((len(v) for v in vocabularies), default=0)
    keys = torch.full((len(columns), longest + 1), torch.inf, dtype=torch.float64)
    values = torch.zeros((len(columns), longest + 1), dtype=torch.float32)
    for row, vocabulary in enumerate(vocabularies):
        ordered, position = vocabulary.double().sort()
        keys[row, : len(ordered)] = ordered
        values[row, : len(ordered)] = position.float() + 1
    return keys, values


def _digest(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name].cpu().contiguous().numpy()
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
