"""Image encoders: uint8 pixels in, unit-norm embeddings out.

An encoder is known by its *identity*, ``"ViT-L-14/openai"`` or ``"tiny-image"``, which goes into
every row beside the embedding: heads refuse the embeddings of a model that they were not trained on.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import math
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Final, Literal

from imgcurate.backend import Backend, check_batch_size
from imgcurate.batches import PixelView
from imgcurate.errors import ConfigError, DeviceError
from imgcurate.lazy import torch
from imgcurate.memory import MAPPED_BYTES
from imgcurate.models import clip_weights

__all__ = [
    "PRECISIONS",
    "TINY_IMAGE",
    "Encoder",
    "EncoderSpec",
    "OpenClipEncoder",
    "TinyImageEncoder",
    "compute_dtype",
    "load_encoder",
]

TINY_IMAGE: Final = "tiny-image"
PRECISIONS: Final = ("auto", "fp32", "bf16", "fp16", "fp8")
# Ada and Hopper were the first of NVIDIA's to multiply 8-bit floats.
_FLOAT8_CAPABILITY: Final = (8, 9)
# What an allocator adds to an array is less than a page.
_LARGEST_KEPT: Final = MAPPED_BYTES - 4096
_DTYPES: Final = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "bfloat16"}


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """Which encoder to load; small, hashable and picklable.

    Attributes
    ----------
    model : str
        An open_clip architecture such as ``ViT-L-14``, or ``tiny-image``.
    pretrained : str
        An open_clip tag such as ``openai``, the path of a weights file, or ``random`` for random
        weights (seed 0), which are good for measuring speed alone.
    model_dir : str, optional
        Folder where weights are looked for and downloaded to.
    precision : {"auto", "fp32", "bf16", "fp16", "fp8"}
        Type of the weights in the model; ``auto`` is bf16 where the hardware computes in it, else fp32. ``fp8``
        multiplies 8-bit floats in the blocks of a transformer, and is for GPUs of compute capability 8.9 on.
    batch_size : int or "auto"
        Images per forward pass; ``auto`` is 32 on a CPU and 256 on a GPU.
    compile : bool or "auto"
        Whether the model is compiled, which takes some seconds in each process; ``auto`` compiles open_clip's own
        transformers, on a GPU.
    """

    model: str
    pretrained: str = "openai"
    model_dir: str | None = None
    precision: str = "auto"
    batch_size: int | Literal["auto"] = "auto"
    compile: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision={self.precision!r} is none of {', '.join(PRECISIONS)}")
        if self.compile not in (True, False, "auto"):
            raise ConfigError(f"compile={self.compile!r} is none of true, false, auto")
        check_batch_size("model_inference_batch_size", self.batch_size)
        if not isinstance(self.model, str):
            raise ConfigError(f"model={self.model!r} should be the name of an open_clip model, or {TINY_IMAGE}")
        if self.model != TINY_IMAGE:
            names = _open_clip_models()
            if self.model not in names:
                near = difflib.get_close_matches(self.model, [*names, TINY_IMAGE], n=3, cutoff=0.4)
                hint = f"; did you mean {' or '.join(near)}?" if near else ""
                if ":" in self.model:
                    hint = (
                        ". Models of the hub or of a folder are not loaded by address: name the architecture, and "
                        "as pretrained the file of weights, with the model's open_clip_config.json beside it"
                    )
                raise ConfigError(f"unknown encoder {self.model!r}: expected an open_clip model or {TINY_IMAGE}{hint}")

    def identity(self) -> str:
        """Return the identity of the embeddings, such as ``ViT-L-14/openai``; computes no model."""
        if self.model == TINY_IMAGE:
            return TINY_IMAGE
        return clip_weights.identity(self.model, self.pretrained, self.model_dir)

    def fingerprint(self) -> dict[str, Any]:
        """Return what decides the embeddings' values: identity and the checksum of the weights.

        Downloads the weights if they are not there.
        """
        if self.model == TINY_IMAGE:
            return {"encoder": TINY_IMAGE}
        found = clip_weights.find(self.model, self.pretrained, self.model_dir)
        made: dict[str, Any] = {
            "encoder": found.identity,
            "weights_sha256": found.sha256(),
            "precision": self.precision,
        }
        if (preprocess := found.preprocess_if_unusual()) is not None:
            made["preprocess"] = preprocess
        return made if self.compile == "auto" else {**made, "compile": self.compile}


class Encoder(ABC):
    """Turn pixels into unit-norm embeddings.

    Attributes
    ----------
    identity : str
        The name that goes beside the embeddings.
    dim : int
        Length of an embedding.
    view : PixelView
        The pixels that it takes.
    """

    identity: str
    dim: int
    view: PixelView

    @abstractmethod
    def __call__(self, pixels: torch.Tensor, *, at_most: int | None = None) -> torch.Tensor:
        """Encode images.

        Parameters
        ----------
        pixels : torch.Tensor of shape (n, height, width, 3)
            uint8 RGB, 0-255, in the size of :attr:`view`, on the encoder's device.
        at_most : int, optional
            The most images that may be encoded at once, where more do not fit in memory.

        Returns
        -------
        torch.Tensor of shape (n, dim)
            float32, unit L2 norm, on the same device.
        """


class TinyImageEncoder(Encoder):
    """The 16 x 16 RGB thumbnail, zero mean and unit norm: 768 values, no weights.

    Close in this space means close as a picture: it finds resized, recompressed, brightened copies,
    and knows nothing of what a picture shows.

    References
    ----------
    Torralba, Fergus, Freeman: 80 Million Tiny Images. IEEE TPAMI 30 (11), 2008.
    """

    identity = TINY_IMAGE
    dim = 16 * 16 * 3
    view = PixelView(16, 16, resize="squash", interpolation="bilinear")

    def __call__(self, pixels: torch.Tensor, *, at_most: int | None = None) -> torch.Tensor:
        """Encode images; an image of one single colour has the zero vector."""
        del at_most
        flat = pixels.reshape(len(pixels), -1).to(torch.float32)
        return torch.nn.functional.normalize(flat - flat.mean(dim=1, keepdim=True), dim=1)


class OpenClipEncoder(Encoder):
    """The image tower of an open_clip model.

    Parameters
    ----------
    spec : EncoderSpec
        Architecture, weights and precision.
    backend : Backend
        Where to run.

    Raises
    ------
    WeightsError
        If the weights are missing and cannot be downloaded, or do not fit the model.

    Notes
    -----
    On a GPU, or compiled, forward passes have a fixed batch size, the last one padded, so that an embedding does
    not depend on how many images are in the batch. On a CPU half a batch and more goes as it is, and fewer images
    are padded to half a batch: an embedding depends on their number by rounding alone. What makes arrays of 32 MiB and
    more goes in several parts, since such arrays are fetched from the system page by page.
    """

    def __init__(self, spec: EncoderSpec, backend: Backend) -> None:
        from imgcurate.models import towers

        weights = clip_weights.find(spec.model, spec.pretrained, spec.model_dir)
        self.identity = weights.identity
        self._batch_size = backend.batch_size(spec.batch_size)
        self._is_fixed = backend.is_gpu or spec.compile is True
        precision = _precision(spec.precision, backend)
        self.dtype = compute_dtype(spec.precision, backend)
        cfg = weights.preprocess
        height, width = cfg["size"]
        self.view = PixelView(height, width, cfg["resize_mode"], cfg["interpolation"], int(cfg["fill_color"]))
        model = clip_weights.load(weights, texts=False)
        self.dim = clip_weights.embed_dim(spec.model)
        # The text tower is not needed; dropping it frees its memory.
        self._visual = towers.prepare(
            model.visual.eval(), backend.torch_device, self.dtype, float8=precision == "fp8", compiled=spec.compile
        )
        if not self._is_fixed:
            nbytes = max(3 * height * width * 4, towers.most_values(self._visual) * self.dtype.itemsize)
            self._batch_size = min(self._batch_size, max(1, _LARGEST_KEPT // nbytes))
        # While torch compiles in one thread, no other may call what is compiled. Its settings belong to a thread.
        self._before = towers.allow_compiling if self._is_fixed and spec.compile else lambda: None
        self._turn = _compiling if backend.is_gpu or spec.compile is True else contextlib.nullcontext()
        self._scale, self._shift = _normalisation(cfg["mean"], cfg["std"], width, backend.torch_device)

    def __call__(self, pixels: torch.Tensor, *, at_most: int | None = None) -> torch.Tensor:
        """Encode images; see :class:`Encoder`."""
        size = step = min(self._batch_size, at_most or self._batch_size)
        if not self._is_fixed and len(pixels) > size:
            step = math.ceil(len(pixels) / math.ceil(len(pixels) / size))
        self._before()
        with torch.inference_mode(), self._turn:
            chunks = [self._encode(pixels[start : start + step], size) for start in range(0, len(pixels), step)]
            return torch.cat(chunks) if chunks else torch.empty((0, self.dim), device=pixels.device)

    def _encode(self, chunk: torch.Tensor, size: int) -> torch.Tensor:
        """Encode at most `size` images; see the notes of the class."""
        n = len(chunk)
        least = size if self._is_fixed else size // 2
        if n < least:
            chunk = torch.cat([chunk, chunk.new_zeros((least - n, *chunk.shape[1:]))])
        features = self._visual(self.planes(chunk).to(self.dtype))
        if isinstance(features, tuple):
            features = features[0]
        return torch.nn.functional.normalize(features.float(), dim=-1)[:n]

    def planes(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return what the model is given for pixels: float32 of shape (n, 3, height, width), normalised."""
        n, height, width, colours = pixels.shape
        # Whole rows at a time: three colours alone are too few for vector instructions.
        rows = pixels.reshape(n, height, width * colours).to(torch.float32)
        return rows.mul_(self._scale).add_(self._shift).view(n, height, width, colours).permute(0, 3, 1, 2)


_load_lock = threading.Lock()
_compiling = threading.Lock()


def load_encoder(spec: EncoderSpec, backend: Backend) -> Encoder:
    """Return the encoder of a spec; its weights are loaded once per process."""
    with _load_lock:
        return _load_encoder(spec, backend)


@functools.lru_cache(maxsize=2)
def _load_encoder(spec: EncoderSpec, backend: Backend) -> Encoder:
    return TinyImageEncoder() if spec.model == TINY_IMAGE else OpenClipEncoder(spec, backend)


def _open_clip_models() -> tuple[str, ...]:
    import open_clip

    return tuple(open_clip.list_models())


def compute_dtype(precision: str, backend: Backend) -> torch.dtype:
    """Return the type that a model computes in.

    Raises
    ------
    DeviceError
        If the device cannot do it.
    """
    dtype: torch.dtype = getattr(torch, _DTYPES[_precision(precision, backend)])
    return dtype


def _precision(precision: str, backend: Backend) -> str:
    """Return which precision is meant on a device.

    Raises
    ------
    DeviceError
        If the device cannot do it.
    """
    if precision == "auto":
        if backend.is_gpu:
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        # Without these instructions bf16 is emulated, slower than float32.
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bf16" if fast else "fp32"
    if precision == "fp8" and (reason := _why_not_float8(backend)):
        raise DeviceError(f"precision='fp8' is not usable here: {reason}. Use bf16")
    return precision


def _why_not_float8(backend: Backend) -> str | None:
    if not backend.is_gpu:
        return "it needs a GPU"
    capability = torch.cuda.get_device_capability(backend.torch_device)
    if capability >= _FLOAT8_CAPABILITY:
        return None
    return f"it needs a GPU of compute capability 8.9 or more, and this one has {'.'.join(map(str, capability))}"


def _normalisation(mean: Any, std: Any, width: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the values of a row of pixels, colour by colour, are multiplied by, and what is added then."""
    mean_, std_ = (torch.tensor(each, dtype=torch.float64).repeat(width) for each in (mean, std))
    return (1 / (255 * std_)).float().to(device), (-mean_ / std_).float().to(device)
