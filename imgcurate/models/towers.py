"""The transformer blocks of open_clip's towers, written out so that they run fastest.

open_clip's block calls ``nn.MultiheadAttention``, which checks much and whose products no other type can take the place
of. :func:`prepare` puts blocks in its place that compute the same: four linear layers, and
``scaled_dot_product_attention`` between the first and the second. They are compiled once for all layers, and their
linear layers can multiply 8-bit floats. The last block computes the first token alone where no other is looked at, and
the patches become tokens by a matrix product, which is faster than a convolution. On a CPU that multiplies bfloat16 the
weights lie as oneDNN wants them, and a layer whose output is added to something adds it itself. Of texts nothing is
computed behind the end of the longest one that is given.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import nn

from imgcurate.errors import ConfigError

__all__ = ["Float8Linear", "allow_compiling", "most_values", "prepare", "prepare_text"]

logger = logging.getLogger(__name__)
_E4M3: Final = torch.float8_e4m3fn
_E4M3_MAX: Final = 448.0
# Rows of a matrix product should begin at multiples of so many values.
_ALIGNED: Final = 16
_MOST_COMPILED: Final = 64
_STEPS_OF_SCALE: Final = 8
# QuickGELU is x * sigmoid(1.702 x).
_QUICK: Final = 1.702
# So many blocks at the beginning, and what follows attention, lose most to 8-bit floats for the time they save.
_EXACT_BLOCKS: Final = 2
# Texts of about the same length should be of the same shape.
_LENGTH_STEP: Final = 8
_ENDS: Final = ("argmax", "eos")


class Float8Linear(nn.Module):
    """A linear layer whose inputs and weights are 8-bit floats (E4M3), and whose sums have some 22 bits.

    Each row of the input and each row of the weight is scaled to the range of the type, inputs as they come.

    Parameters
    ----------
    linear : nn.Linear
        The layer to take the place of; both sizes a multiple of 16.

    References
    ----------
    Micikevicius et al.: FP8 Formats for Deep Learning, 2022.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = _nearest_float8(linear.weight.detach())
        self.weight: torch.Tensor
        self.scale: torch.Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.t().contiguous())
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output in the type of `x`, which is bfloat16."""
        rows, scale = _to_float8(x.reshape(-1, x.shape[-1]))
        out = torch._scaled_mm(
            rows, self.weight.t(), scale_a=scale, scale_b=self.scale, bias=self.bias,
            out_dtype=x.dtype, use_fast_accum=True,
        )  # fmt: skip
        return out.view(*x.shape[:-1], -1)


def _to_float8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows as 8-bit floats, and the float32 factors of shape (n, 1) that they are to be multiplied by."""
    rows = rows.float()
    scale = (rows.abs().amax(dim=1, keepdim=True) / _E4M3_MAX).clamp(min=1e-12)
    return (rows / scale).to(_E4M3), scale


def _nearest_float8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows as :func:`_to_float8` does, with the scales of an octave under which they are rounded least."""
    best, scale = _to_float8(weight)
    rows = weight.float()
    error = ((best.float() * scale - rows) ** 2).sum(dim=1, keepdim=True)
    first = scale
    for step in range(1, _STEPS_OF_SCALE):
        other = first * 2 ** (step / _STEPS_OF_SCALE)
        rounded = (rows / other).to(_E4M3)
        missed = ((rounded.float() * other - rows) ** 2).sum(dim=1, keepdim=True)
        better = missed < error
        # torch.where takes no 8-bit floats.
        best = torch.where(better, rounded.float(), best.float()).to(_E4M3)
        scale, error = torch.where(better, other, scale), torch.minimum(missed, error)
    return best, scale


class _PackedLinear(nn.Module):
    """A linear layer of bfloat16 on a CPU, whose weights lie as oneDNN multiplies them.

    ``F.linear`` lays the weights out anew in each call, and copies the bias to the output first.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        # Not a buffer: such a tensor can neither be copied nor converted.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous())
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out

    def onto(self, term: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of `term` and the layer's output."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, term, self.weight, self.bias, "add")
        return out


class _Block(nn.Module):
    """What open_clip's ``ResidualAttentionBlock`` computes.

    The sum with what the last layer gives is left to the next block, whose normalisation reads both anyway. Of texts
    (`causal`) a token attends to those before it alone.
    """

    def __init__(
        self, block: Any, linear: Callable[[nn.Linear], nn.Module], *, first_only: bool = False, causal: bool = False
    ) -> None:
        super().__init__()
        attention = block.attn
        self.heads = attention.num_heads
        self.first_only, self.causal = first_only, causal
        self.hidden = block.mlp.c_fc.out_features
        self.ln_1, self.ln_2, self.ls_1, self.ls_2 = block.ln_1, block.ln_2, block.ls_1, block.ls_2
        self.qkv = linear(_linear(attention.in_proj_weight, attention.in_proj_bias))
        self.out = attention.out_proj
        self.expand, self.activation = linear(block.mlp.c_fc), block.mlp.gelu
        self.contract = linear(block.mlp.c_proj)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens after the block as two terms of a sum; `x` and `y` are those before it.

        Tensors are (n, tokens, width); of the last block, if it says so, the first token alone is given.
        """
        x = x + y
        mixed = self._attend(self.ln_1(x))
        if self.first_only:
            x = x[:, :1]
        x = x + self.ls_1(self.out(mixed))
        return x, self.ls_2(self.contract(self.activation(self.expand(self.ln_2(x)))))

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.first_only:
            q = q[:, :, :1]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return mixed.transpose(1, 2).reshape(n, -1, width)


class _PackedBlock(_Block):
    """A block on a CPU, whose sums are made by the layer that gives one of their terms."""

    def __init__(self, block: Any, *, first_only: bool = False, causal: bool = False) -> None:
        super().__init__(block, _PackedLinear, first_only=first_only, causal=causal)
        self.out: _PackedLinear = _PackedLinear(block.attn.out_proj)
        self.contract: _PackedLinear

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Return the tokens after the block for those before it."""
        mixed = self._attend(self.ln_1(x))
        x = self.out.onto(x[:, :1] if self.first_only else x, mixed)
        return self.contract.onto(x, self.activation(self.expand(self.ln_2(x))))


class _Blocks(nn.Module):
    """All blocks, in the place of open_clip's ``Transformer``."""

    def __init__(self, blocks: Sequence[_Block]) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the tokens after the last block; see :class:`_Block`."""
        y = torch.zeros_like(x)
        for block in self.resblocks:
            x, y = block(x, y)
        return x + y


class _PackedBlocks(_Blocks):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


class _Texts(nn.Module):
    """A causal text transformer of open_clip, up to the end of the longest text of a batch.

    A token attends to those before it alone, so what follows the end of a text, which is all that is taken of it,
    changes nothing.
    """

    def __init__(self, tower: Any, blocks: _Blocks, end: int | None) -> None:
        super().__init__()
        self.embedding, self.positions = tower.token_embedding, tower.positional_embedding
        self.blocks, self.norm, self.projection = blocks, tower.ln_final, tower.text_projection
        self.end = end

    def lengths(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return how many tokens of each text are computed if no longer one is beside it, (n,)."""
        return ((self._ends(tokens) // _LENGTH_STEP + 1) * _LENGTH_STEP).clamp(max=tokens.shape[1])

    def _ends(self, tokens: torch.Tensor) -> torch.Tensor:
        # Mostly the end is the token of the highest number.
        return tokens.argmax(dim=1) if self.end is None else (tokens == self.end).int().argmax(dim=1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the features of texts, (n, d), of their tokens, (n, length) on the host."""
        ends, used = self._ends(tokens), int(self.lengths(tokens).max())
        tokens, ends = (each.to(self.positions.device) for each in (tokens[:, :used], ends))
        x = self.blocks(self.embedding(tokens) + self.positions[:used])
        x = self.norm(x[torch.arange(len(x), device=x.device), ends])
        features: torch.Tensor = x
        if isinstance(self.projection, nn.Linear):
            features = self.projection(x)
        elif self.projection is not None:
            features = x @ self.projection
        return features


class _AsItIs(nn.Module):
    """The texts of a model of another kind."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        self.device = next(model.parameters()).device

    def lengths(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.full((len(tokens),), tokens.shape[1])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            features: torch.Tensor = self.model.encode_text(tokens.to(self.device))
        return features


class _Patches(nn.Module):
    """The convolution that makes tokens of patches which do not overlap, as one matrix product."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        width = conv.out_channels
        self.side = conv.kernel_size
        # Pixels by rows, then columns, then colours, as they lie in memory.
        weight = conv.weight.detach().permute(0, 2, 3, 1).reshape(width, -1)
        self.padding = -weight.shape[1] % _ALIGNED
        self.weight = nn.Parameter(F.pad(weight, (0, self.padding)), requires_grad=False)
        self.bias = conv.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return tokens of shape (n, width, rows, columns) for pixels of shape (n, 3, height, width)."""
        (n, channels, height, width), (a, b) = x.shape, self.side
        rows, columns = height // a, width // b
        # As of a convolution, what is left beside whole patches is not looked at.
        whole = x[:, :, : rows * a, : columns * b]
        patches = whole.permute(0, 2, 3, 1).reshape(n, rows, a, columns, b * channels).transpose(2, 3)
        tokens = F.linear(F.pad(patches.reshape(n, rows, columns, -1), (0, self.padding)), self.weight, self.bias)
        return tokens.permute(0, 3, 1, 2)


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """Return a layer that has these parameters, without a copy."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight, layer.bias = weight, bias  # type: ignore[assignment]
    return layer


def prepare(
    visual: Any,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    float8: bool = False,
    compiled: bool | Literal["auto"] = "auto",
) -> Any:
    """Return an image tower with faster layers; what is given is not to be used any more.

    Parameters
    ----------
    visual : nn.Module
        An image tower of open_clip, of float32. Of one that has not open_clip's own blocks only the layout in memory is
        another then.
    device : str
        Where it is to run, as torch calls it.
    dtype : torch.dtype
        Type of the weights in the tower that is returned.
    float8 : bool
        Multiply 8-bit floats in the three large layers of all blocks but the first two; the tower has to be bfloat16.
    compiled : bool or "auto"
        Whether to compile, when the tower runs first; ``auto``: open_clip's own blocks on a GPU, where the tools for
        it are there. A compiled tower has to be given batches of few sizes, each is compiled by itself.

    Raises
    ------
    ConfigError
        If `float8` is asked for and the tower is of another kind.
    """
    if not _is_known(visual):
        if float8:
            raise ConfigError(
                f"precision='fp8' needs an image tower of open_clip's own transformer blocks, which this "
                f"{type(visual).__name__} has not: use bf16"
            )
        visual = visual.to(device=device, dtype=dtype, memory_format=torch.channels_last)
        if compiled is True:
            visual.compile(dynamic=False)
        return visual
    _simplify(visual.transformer)
    visual = visual.to(device=device, dtype=dtype)
    on_gpu = torch.device(device).type == "cuda"
    blocks = _blocks(visual, float8=float8, packed=not (on_gpu or float8 or compiled is True) and _can_pack(visual))
    visual.transformer, visual.conv1 = blocks, _Patches(visual.conv1)
    if compiled == "auto" and on_gpu and (reason := _why_not_compiled()):
        logger.warning("the model is not compiled, and slower than it could be: %s", reason)
    elif compiled is True or (compiled == "auto" and on_gpu):
        for module in (*blocks.resblocks, visual.conv1):
            module.compile(dynamic=False)
    return visual


def prepare_text(model: Any, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Return what makes features of tokens, with faster layers; what is given is not to be used any more.

    Parameters
    ----------
    model : nn.Module
        A model of open_clip, of float32, whose image tower may be gone.
    device : str
        Where it is to run, as torch calls it.
    dtype : torch.dtype
        Type that it computes in.

    Returns
    -------
    nn.Module
        Integers of shape (n, length) on the host in, features of shape (n, d) on the device out, not normalised.
    """
    tower = getattr(model, "text", model)
    if not _is_known_text(tower):
        return _AsItIs(model.to(device=device), dtype)
    _simplify(tower.transformer)
    tower = tower.to(device=device, dtype=dtype)
    names = ("text_pool_type", "text_eos_id") if tower is model else ("pool_type", "eos_id")
    kind, end = (getattr(tower, name, None) for name in names)
    old = tower.transformer.resblocks
    packed = torch.device(device).type == "cpu" and _can_pack(tower)
    blocks = (
        _PackedBlocks([_PackedBlock(block, causal=True) for block in old])
        if packed
        else _Blocks([_Block(block, _same, causal=True) for block in old])
    )
    return _Texts(tower, blocks, end if kind == "eos" else None)


def allow_compiling() -> None:
    """Let the calling thread compile all that is needed: each model and each size of batches is one more."""
    torch._dynamo.config.recompile_limit = _MOST_COMPILED


def _simplify(transformer: Any) -> None:
    """Turn QuickGELU, three passes over memory unless it is compiled, into a SiLU of larger inputs: one pass.

    The factor goes into the layer before and its inverse into the one after, which are not rounded yet.
    """
    from open_clip.transformer import QuickGELU

    for mlp in (block.mlp for block in transformer.resblocks):
        if type(mlp.gelu) is QuickGELU:
            mlp.gelu = nn.SiLU(inplace=True)
            with torch.no_grad():
                for parameter in mlp.c_fc.parameters():
                    parameter.mul_(_QUICK)
                mlp.c_proj.weight.div_(_QUICK)


def _blocks(visual: Any, *, float8: bool, packed: bool) -> _Blocks:
    old = visual.transformer.resblocks
    first_only = visual.attn_pool is None and visual.pool_type == "tok" and not visual.output_tokens
    firsts = [first_only and block is old[-1] for block in old]
    if packed:
        return _PackedBlocks([_PackedBlock(b, first_only=first) for b, first in zip(old, firsts, strict=True)])
    linears = [Float8Linear if float8 and i >= _EXACT_BLOCKS else _same for i in range(len(old))]
    return _Blocks([_Block(b, layer, first_only=f) for b, layer, f in zip(old, linears, firsts, strict=True)])


def _same(linear: nn.Linear) -> nn.Module:
    return linear


def _can_pack(visual: Any) -> bool:
    """Return whether oneDNN multiplies bfloat16 here, and nothing stands between the layers and the sums."""
    return (
        next(visual.parameters()).dtype is torch.bfloat16
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and all(type(scale) is nn.Identity for b in visual.transformer.resblocks for scale in (b.ls_1, b.ls_2))
    )


def most_values(visual: Any) -> int:
    """Return how many values an image has where a tower of :func:`prepare` makes most of it; 0 if that is not known."""
    blocks = getattr(visual, "transformer", None)
    if not isinstance(blocks, _Blocks):
        return 0
    tokens, width = visual.positional_embedding.shape
    return int(tokens * max(3 * width, blocks.resblocks[0].hidden))


def _is_known(visual: Any) -> bool:
    from open_clip.transformer import VisionTransformer

    return type(visual) is VisionTransformer and _are_known(visual.transformer)


def _is_known_text(tower: Any) -> bool:
    """Return whether a text tower is causal, and the features of a text are those of its end."""
    from open_clip.model import CLIP
    from open_clip.transformer import TextTransformer

    if type(tower) not in (CLIP, TextTransformer) or tower.attn_mask is None or not _are_known(tower.transformer):
        return False
    if type(tower) is CLIP:
        return tower.text_pool_type in _ENDS
    return tower.pool_type in _ENDS and tower.cls_emb is None and not tower.output_tokens


def _are_known(transformer: Any) -> bool:
    from open_clip.transformer import ResidualAttentionBlock

    return all(
        type(block) is ResidualAttentionBlock and block.attn.batch_first and block.attn.in_proj_weight is not None
        for block in transformer.resblocks
    )


def _why_not_compiled() -> str | None:
    """Return why models cannot be compiled for a GPU, in words; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        return "there is no C compiler (gcc or clang)"
    return None
