"""QK-RMSNorm, then rotary position embedding from integer ``(frame, h, w)`` positions.

The kernel takes queries and keys as they lie in the output of a fused projection, in one launch.
Its angles come from a table of cosines and sines: one row a token, or, when positions are given,
one row an id, gathered for each axis. (A polynomial in the kernel would have to carry angles in two
float32 numbers to stay within the house rule, for a table that is 2% of the traffic and stays in
L2; ``tl.cos`` takes a slow path with local memory.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .launch import Launch

EPS = 1e-6
"""RMSNorm epsilon of FLUX's query and key norms (BFL ``layers.py``)."""

_EPS = tl.constexpr(EPS)


def rope_table(
    positions: Tensor, axes_dim: Sequence[int], theta: float, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Cosine and sine of every rotation angle.

    positions: ``[S, len(axes_dim)]`` integers, one column an axis (FLUX: frame, h, w).
    axes_dim: channels of a head that each axis rotates (FLUX: 16, 56, 56); even, in sum head_dim.
    dtype: of the angles; float64, as in diffusers, keeps them exact far from the origin.
    Returns ``[S, head_dim / 2, 2]`` float32 as (cos, sin).
    """
    angles = []
    for axis, dim in enumerate(axes_dim):
        exponent = torch.arange(0, dim, 2, dtype=dtype, device=positions.device) / dim
        angles.append(torch.outer(positions[:, axis].to(dtype), theta**-exponent))
    angle = torch.cat(angles, dim=-1)
    return torch.stack((angle.cos(), angle.sin()), dim=-1).float()


def id_table(ids: int, axes_dim: Sequence[int], theta: float, device: torch.device) -> Tensor:
    """The same for every id below ``ids`` on all axes at once: ``[ids, head_dim / 2, 2]``."""
    every = torch.arange(ids, device=device)
    return rope_table(every[:, None].expand(-1, len(axes_dim)), axes_dim, theta)


def norm_rope_ref(x: Tensor, scale: Tensor, rope: Tensor) -> Tensor:
    """RMS-normalise ``x [B, S, H, head_dim]``, times ``scale [head_dim]``, and rotate its pairs.

    rope: ``[S, head_dim / 2, 2]`` float32 of :func:`rope_table`. The rotation is done in float32,
    or in float64 if that is what ``x`` comes in.
    """
    normed = F.rms_norm(x, scale.shape, scale, EPS)
    wide = normed.to(torch.promote_types(x.dtype, torch.float32))
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope.unsqueeze(1).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def norm_rope_complex(x: Tensor, scale: Tensor, rope: Tensor) -> Tensor:
    """:func:`norm_rope_ref` in float32 within, a pair of channels as one complex number.

    For CPUs, where every pass counts: six where the reference takes twenty.
    """
    wide = x.float()
    size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    normed = (wide * scale).mul_(size.square_().div_(x.shape[-1]).add_(EPS).rsqrt_())
    pairs = torch.view_as_complex(normed.unflatten(-1, (-1, 2)))
    pairs.mul_(torch.view_as_complex(rope).unsqueeze(1))
    return normed.to(x.dtype)


def qk_norm_rope_ref(
    qkv: Tensor, scales: Tensor, text_tokens: int, rope: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[B, S, H, head_dim]`` of ``qkv [B, S, 3, H, head_dim]``, normed, rotated.

    scales: ``[streams, 2, head_dim]``, of (image, text) or of one stream, each (query, key). The
    first ``text_tokens`` of the sequence are text.
    """
    parts = []
    for part in range(2):
        text, image = qkv[:, :, part].tensor_split([text_tokens], dim=1)
        text = norm_rope_ref(text, scales[-1, part], rope[:text_tokens])
        image = norm_rope_ref(image, scales[0, part], rope[text_tokens:])
        parts.append(torch.cat((text, image), dim=1))
    return parts[0], parts[1]


@dataclass(frozen=True)
class Config:
    """A program takes ``tokens`` tokens of ``heads`` heads, one after the other."""

    tokens: int
    heads: int = 8
    warps: int = 4


CONFIGS = {2: Config(tokens=16), 4: Config(tokens=8)}
"""By bytes of an element, on every chip: bound by memory, a tile is two 16-byte loads a thread."""


@triton.jit
def rotated(x, scale, rope):
    """RMS-norm ``x [T, d]``, times ``scale``, and rotate its pairs by ``rope``, both float32.

    Returns float32. All are loaded in one shape, so that one layout serves from load to store.
    """
    T: tl.constexpr = x.shape[0]
    D: tl.constexpr = x.shape[1]
    x = x.to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, axis=1) / D + _EPS)[:, None] * scale
    even, odd = tl.split(x.reshape(T, D // 2, 2))
    cos, sin = tl.split(rope.reshape(T, D // 2, 2))
    pairs = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return pairs.reshape(T, D)


@triton.jit
def rotations(
    rope_ptr, position_ptr, token, mask, D: tl.constexpr, A0: tl.constexpr, A1: tl.constexpr
):
    """Cosines and sines ``[T, d]``, in turns, of ``token [T]``.

    With positions (``A0 + A1 > 0``) the table's rows are ids, and the first A0, the next A1 and the
    remaining channels of a head belong to one axis each; without, its rows are tokens.
    """
    channel = tl.arange(0, D)[None, :]
    if A0 + A1 == 0:
        place = token[:, None] * D + channel
    else:
        frame = tl.load(position_ptr + token * 3, mask, 0)[:, None]
        h = tl.load(position_ptr + token * 3 + 1, mask, 0)[:, None]
        w = tl.load(position_ptr + token * 3 + 2, mask, 0)[:, None]
        row = tl.where(channel < A0, frame, tl.where(channel < A0 + A1, h, w))
        # Axes meet at multiples of 8, which the compiler cannot see.
        place = tl.max_contiguous(tl.multiple_of(row * D + channel, [1, 8]), [1, 8])
    return tl.load(rope_ptr + place, mask[:, None], 0.0)


@triton.jit(do_not_specialize=["tokens", "text_tokens"])
def _norm_rope_kernel(
    x_ptr, scale_ptr, rope_ptr, position_ptr,
    tokens, text_tokens, heads,
    x_batch, x_token, x_part, x_head,
    out_batch, out_token, out_part, out_head,
    scale_stream, scale_part, out_ptr,
    PARTS: tl.constexpr, D: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr,
    A0: tl.constexpr, A1: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of tokens, groups of heads, batch × parts). Strides count elements. The order
    of parameters, inputs, integers, outputs, is the one in which TensorRT passes a plugin's."""
    batch = (tl.program_id(2) // PARTS).to(tl.int64)
    part = tl.program_id(2) % PARTS
    token = tl.program_id(0) * T + tl.arange(0, T)
    first = tl.program_id(1) * HEADS
    channel = tl.arange(0, D)[None, :]
    mask = token < tokens

    rope = rotations(rope_ptr, position_ptr, token, mask, D, A0, A1)
    stream = tl.where(token < text_tokens, scale_stream, 0)[:, None]
    scale = tl.load(scale_ptr + stream + part * scale_part + channel).to(tl.float32)
    x_ptr += batch * x_batch + part * x_part
    out_ptr += batch * out_batch + part * out_part
    for head in range(first, min(first + HEADS, heads)):
        x = tl.load(x_ptr + head * x_head + token[:, None] * x_token + channel, mask[:, None], 0.0)
        y = rotated(x, scale, rope).to(x.dtype)
        tl.store(out_ptr + head * out_head + token[:, None] * out_token + channel, y, mask[:, None])


def launch_norm_rope(
    out: Tensor,
    x: Tensor,
    scales: Tensor,
    text_tokens: int,
    rope: Tensor,
    positions: Tensor | None = None,
    axes_dim: Sequence[int] = (),
) -> Launch:
    """Write ``x [B, S, P, H, head_dim]``, normed and rotated, into ``out``, which may be ``x``.

    scales: ``[streams, P, head_dim]``, of (image, text), or of one where ``text_tokens`` is 0.
    rope: a row a token, or a row an id (:func:`id_table`) where ``positions [S, 3]`` int32 and
    ``axes_dim`` are given.
    """
    batch, tokens, parts, heads, dim = x.shape
    assert out.shape == x.shape, (out.shape, x.shape)
    assert scales.shape == (2 if text_tokens else 1, parts, dim), scales.shape
    assert x.stride(-1) == out.stride(-1) == scales.stride(-1) == 1, "channels lie side by side"
    assert rope.is_contiguous(), rope.stride()
    assert all(dim % 8 == 0 for dim in axes_dim), axes_dim
    assert positions is None or positions.is_contiguous(), positions
    c = CONFIGS[x.itemsize]
    args = {
        "x_ptr": x, "scale_ptr": scales, "rope_ptr": rope, "position_ptr": positions,
        "out_ptr": out, "tokens": tokens, "text_tokens": text_tokens, "heads": heads,
        "x_batch": x.stride(0), "x_token": x.stride(1), "x_part": x.stride(2),
        "x_head": x.stride(3), "out_batch": out.stride(0), "out_token": out.stride(1),
        "out_part": out.stride(2), "out_head": out.stride(3),
        "scale_stream": scales.stride(0), "scale_part": scales.stride(1),
        "PARTS": parts, "D": dim, "T": c.tokens, "HEADS": c.heads,
        "A0": axes_dim[0] if positions is not None else 0,
        "A1": axes_dim[1] if positions is not None else 0,
    }  # fmt: skip
    grid = (triton.cdiv(tokens, c.tokens), triton.cdiv(heads, c.heads), batch * parts)
    return Launch(_norm_rope_kernel, grid, args, c.warps)


@torch.library.custom_op("fluxkontext::norm_rope", mutates_args=())
def _norm_rope(x: Tensor, scales: Tensor, text_tokens: int, rope: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch_norm_rope(out, x, scales, text_tokens, rope)()
    return out


@_norm_rope.register_fake
def _(x: Tensor, scales: Tensor, text_tokens: int, rope: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def norm_rope(x: Tensor, scale: Tensor, rope: Tensor) -> Tensor:
    """:func:`norm_rope_ref` as one kernel."""
    out: Tensor = _norm_rope(x.unsqueeze(2), scale[None, None], 0, rope)
    return out.squeeze(2)


def qk_norm_rope(
    qkv: Tensor, scales: Tensor, text_tokens: int, rope: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`qk_norm_rope_ref` as one kernel."""
    q, k = _norm_rope(qkv[:, :, :2], scales, text_tokens, rope).unbind(2)
    return q, k
