"""The files of the heads: found or downloaded, read without running code, checked, converted."""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import safetensors

from imgcurate import storage
from imgcurate.errors import EncoderMismatchError, WeightsError
from imgcurate.lazy import torch
from imgcurate.models import weights
from imgcurate.models.heads import (
    AESTHETIC_LAYERS,
    B32,
    L14,
    MINUS_ZERO,
    AestheticHead,
    Head,
    NsfwHead,
    Tensors,
)
from imgcurate.models.savedmodel import SavedModel, read_saved_model

__all__ = [
    "check_aesthetic_encoder",
    "check_nsfw_encoder",
    "find_head",
    "load_aesthetic_head",
    "load_nsfw_head",
    "nsfw_tensors",
]

logger = logging.getLogger(__name__)

_NSFW_NOTE: Final = (
    'columns int_columns: text "%.6f"%x looked up in vocab.<col>.micro (value*1e6, -0.000000 = -2147483648), '
    "index=position+1, 0 if absent; then (x-mean)/max(sqrt(var),1e-7); dense+ReLU...; sigmoid"
)


@dataclass(frozen=True, slots=True)
class _Variant:
    """One head: its files, the widths of its layers, and the digest of the published tensors."""

    name: str
    encoder: str
    original: weights.WeightFile
    converted: str
    widths: tuple[int, ...]
    sha256: str


_AESTHETIC: Final = _Variant(
    "LAION aesthetic V2", L14, weights.AESTHETIC_V2, "sac+logos+ava1-l14-linearMSE.safetensors",
    (768, 1024, 128, 64, 16, 1),
    "1b7752689948e346c45f9c9a5601f9c66411ce4a206e6bbbb9aa6dd202117d54",
)  # fmt: skip
_NSFW: Final = {
    L14: _Variant(
        "LAION NSFW L/14", L14, weights.NSFW_L14, "nsfw_vit_l_14.safetensors", (768, 64, 512, 256, 1),
        "18dbe6cbbdf3e405bd65b0934154867b12da690aeaf0dfefaf486a87521c99d3",
    ),
    B32: _Variant(
        "LAION NSFW B/32", B32, weights.NSFW_B32, "nsfw_vit_b_32.safetensors", (512, 32, 32, 1),
        "ec9d625feb8b4c65ee39c89b1114c042eca5c7755939d45c9c67c30daef2faaf",
    ),
}  # fmt: skip


def check_aesthetic_encoder(encoder: str) -> None:
    """Raise EncoderMismatchError unless the aesthetic head takes this encoder's embeddings."""
    if encoder != _AESTHETIC.encoder:
        raise EncoderMismatchError(
            f"the head {_AESTHETIC.name!r} takes embeddings of {_AESTHETIC.encoder}, not of {encoder!r}: its "
            "scores would mean nothing. Use that encoder or leave the aesthetic filter out"
        )


def check_nsfw_encoder(encoder: str) -> None:
    """Raise EncoderMismatchError unless there is an NSFW head for this encoder's embeddings."""
    if encoder not in _NSFW:
        raise EncoderMismatchError(
            f"there is no NSFW head for embeddings of {encoder!r}: there are heads for "
            f"{' and '.join(_NSFW)}. Use one of these encoders or leave the NSFW filter out"
        )


def find_head(name: str, encoder: str, model_dir: str | os.PathLike[str] | None = None) -> Path | None:
    """Return the file of a head as a run would take it; None if it is not there.

    Parameters
    ----------
    name : {"aesthetic", "nsfw"}
        Which head.
    encoder : str
        Identity of the encoder that makes the embeddings.
    model_dir : path, optional
        As in :func:`load_aesthetic_head`.
    """
    variant = _AESTHETIC if name == "aesthetic" else _NSFW.get(encoder)
    if variant is None:
        return None
    folder = weights.resolve_model_dir(model_dir)
    return weights.find_file(variant.converted, folder) or weights.find_weights(variant.original, folder)


def load_aesthetic_head(
    model_dir: str | os.PathLike[str] | None = None, device: str | torch.device = "cpu"
) -> AestheticHead:
    """Load the aesthetic predictor V2 for ViT-L/14, downloading it if it is not there.

    Parameters
    ----------
    model_dir : path, optional
        Folder that holds, or will hold, ``sac+logos+ava1-l14-linearMSE.safetensors`` or ``.pth``.
        Default: :func:`imgcurate.models.weights.default_model_dir`.
    device : str or torch.device
        Where to compute.

    Raises
    ------
    WeightsError
        If the weights are missing and out of reach, or damaged.
    """
    folder = weights.resolve_model_dir(model_dir)
    path = weights.find_file(_AESTHETIC.converted, folder)
    if path is not None:
        tensors = _read_safetensors(path)
    else:
        path = weights.ensure_weights(_AESTHETIC.original, folder)
        tensors = _read_pth(path)
    _check_tensors(tensors, _aesthetic_shapes(), path)
    head = AestheticHead(tensors, path, device)
    _compare(head, _AESTHETIC)
    return head


def load_nsfw_head(
    encoder: str, model_dir: str | os.PathLike[str] | None = None, device: str | torch.device = "cpu"
) -> NsfwHead:
    """Load the NSFW detector for an encoder, downloading and converting it if it is not there.

    Parameters
    ----------
    encoder : {"ViT-L-14/openai", "ViT-B-32/openai"}
        Identity of the encoder that makes the embeddings.
    model_dir : path, optional
        Folder that holds, or will hold, the published zip (``clip_autokeras_binary_nsfw.zip`` or
        ``clip_autokeras_nsfw_b32.zip``) or ``nsfw_vit_l_14.safetensors`` or
        ``nsfw_vit_b_32.safetensors``; the latter is written beside the zip.
        Default: :func:`imgcurate.models.weights.default_model_dir`.
    device : str or torch.device
        Where to compute.

    Raises
    ------
    EncoderMismatchError
        If there is no NSFW head for `encoder`.
    WeightsError
        If the weights are missing and out of reach, or damaged.
    """
    check_nsfw_encoder(encoder)
    variant = _NSFW[encoder]
    folder = weights.resolve_model_dir(model_dir)
    path = weights.find_file(variant.converted, folder)
    if path is not None:
        tensors = _read_safetensors(path)
    else:
        path = weights.ensure_weights(variant.original, folder)
        tensors = nsfw_tensors(read_saved_model(path))
    _check_tensors(tensors, _nsfw_shapes(tensors, variant.widths), path)
    if path.name != variant.converted:
        _keep_converted(tensors, path, variant)
    head = NsfwHead(tensors, variant.name, variant.encoder, path, device)
    _compare(head, variant)
    return head


def nsfw_tensors(model: SavedModel) -> dict[str, torch.Tensor]:
    """Return the tensors of LAION's NSFW detector from its SavedModel.

    Returns
    -------
    dict of str to torch.Tensor
        ``norm.mean`` and ``norm.variance`` (d,) float32; ``dense<i>.kernel`` (in, out) and
        ``dense<i>.bias`` (out,) float32; ``int_columns`` (c,) int64, ascending; for each of these
        ``vocab.<column>.micro`` (v,) int32, the texts in millionths, -0.000000 being -2147483648.

    Raises
    ------
    WeightsError
        If the model is built in another way.
    """
    pattern = re.compile(r"layer_with_weights-0/encoding_layers/(\d+)/token_counts/.*table-values")
    columns = sorted(int(m[1]) for m in map(pattern.fullmatch, model.variables) if m)
    # The tables in the checkpoint are empty: the graph fills them from its constants, which stand in
    # the order of the columns, the texts before their indices.
    constants = list(model.constants.values())
    vocabularies = []
    for texts, index in itertools.pairwise(constants):
        if isinstance(texts, tuple) and isinstance(index, np.ndarray) and index.shape == (len(texts),):
            if not np.array_equal(index, np.arange(1, len(texts) + 1)):
                raise WeightsError("not LAION's NSFW detector: a vocabulary's indices are not 1, 2, 3, ...")
            vocabularies.append(torch.tensor([_micro(text) for text in texts], dtype=torch.int32))
    if len(vocabularies) != len(columns):
        raise WeightsError(
            f"not LAION's NSFW detector: {len(vocabularies)} vocabularies for {len(columns)} columns of categories"
        )
    tensors = {"int_columns": torch.tensor(columns, dtype=torch.int64)}
    tensors |= {f"vocab.{c}.micro": v for c, v in zip(columns, vocabularies, strict=True)}
    for key, array in model.variables.items():
        match = re.fullmatch(r"layer_with_weights-(\d+)/(mean|variance|kernel|bias)", key)
        if match:
            layer = int(match[1])
            name = f"norm.{match[2]}" if layer == 1 else f"dense{layer - 2}.{match[2]}"
            tensors[name] = torch.from_numpy(array.copy())
    return tensors


def _micro(text: bytes) -> int:
    """Return a number with six decimals in millionths."""
    if not re.fullmatch(rb"-?\d{1,3}\.\d{6}", text):
        raise WeightsError(f"not LAION's NSFW detector: {text[:20]!r} in a vocabulary, expected six decimals")
    return MINUS_ZERO if text == b"-0.000000" else int(text.replace(b".", b""))


def _aesthetic_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (n_in, n_out) in zip(AESTHETIC_LAYERS, itertools.pairwise(_AESTHETIC.widths), strict=True):
        shapes |= {f"layers.{i}.weight": (n_out, n_in), f"layers.{i}.bias": (n_out,)}
    return shapes


def _nsfw_shapes(tensors: Tensors, widths: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"norm.mean": (widths[0],), "norm.variance": (widths[0],)}
    for i, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
        shapes |= {f"dense{i}.kernel": (n_in, n_out), f"dense{i}.bias": (n_out,)}
    columns = tensors.get("int_columns", torch.zeros(0))
    shapes["int_columns"] = (columns.numel(),)
    for column in columns.flatten().tolist():
        name = f"vocab.{column}.micro"
        shapes[name] = (tensors[name].numel(),) if name in tensors else (0,)
    return shapes


def _check_tensors(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raise WeightsError unless the tensors have exactly these names and shapes, and sensible values."""
    if missing := sorted(set(shapes) ^ set(tensors)):
        raise WeightsError(
            f"{path} holds other tensors than expected: {missing[0]!r} is "
            f"{'missing' if missing[0] in shapes else 'not known'} ({len(missing)} in all). "
            "Remove the file to have the published one downloaded"
        )
    for name, shape in shapes.items():
        tensor = tensors[name]
        dtype = {"int_columns": torch.int64}.get(name, torch.int32 if name.startswith("vocab.") else torch.float32)
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise WeightsError(
                f"{path}: tensor {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}, "
                f"expected {dtype} of shape {shape}"
            )
        if not torch.isfinite(tensor).all() or (name == "norm.variance" and (tensor < 0).any()):
            raise WeightsError(f"{path}: tensor {name!r} has values that are not finite or a negative variance")
        if dtype != torch.float32 and len(set(tensor.tolist())) != len(tensor):
            raise WeightsError(f"{path}: tensor {name!r} has a value twice")
        if name == "int_columns" and len(tensor) and not 0 <= tensor.min() <= tensor.max() < shapes["norm.mean"][0]:
            raise WeightsError(f"{path}: int_columns {tensor.tolist()} are not all in 0..{shapes['norm.mean'][0] - 1}")


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, ValueError, safetensors.SafetensorError) as exc:
        raise WeightsError(f"{path} cannot be read as safetensors: {exc}. Remove it to have it made again") from exc


def _read_pth(path: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as exc:
        raise WeightsError(f"{path} cannot be read as torch weights: {exc}") from exc
    return dict(state)


def _keep_converted(tensors: Tensors, original: Path, variant: _Variant) -> None:
    """Write the tensors beside the file that they were converted from, where that is possible."""
    metadata = {
        "source": f"{variant.original.source} {variant.original.name}",
        "licence": f"{variant.original.licence} (c) 2022 Christoph Schuhmann",
        "input": "L2-normalised CLIP image embedding",
        "note": _NSFW_NOTE,
    }
    from safetensors.torch import save

    try:
        with storage.atomic_write(str(original.with_name(variant.converted))) as out:
            out.write(save(dict(tensors), metadata))
    except storage.StorageError as exc:
        logger.info("the converted weights are not kept: %s", exc)


def _compare(head: Head, variant: _Variant) -> None:
    if head.sha256 != variant.sha256:
        logger.warning(
            "%s fits the head %r, but its values are not the published ones: digest %s, published %s",
            head.path, head.name, head.sha256, variant.sha256,
        )  # fmt: skip
