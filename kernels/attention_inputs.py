"""FP8 inputs of attention: queries and keys normed and rotated, all three quantised, in one pass.

A scale belongs to one head's block of 128 tokens. Values are written with their tokens side by
side, as FP8 matrix instructions want the second factor of ``weights @ values``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .launch import Launch
from .norm_rope import qk_norm_rope_ref, rotated, rotations
from .quantize import FP8, FP8_MAX, TINY

BLOCK = 128
"""Tokens that share a scale."""

_FP8_MAX = tl.constexpr(FP8_MAX)
_TINY = tl.constexpr(TINY)


@dataclass(frozen=True)
class Fp8Inputs:
    """``q, k [B, S, H, d]`` and ``v [B, H, d, S']`` E4M3, S' = S rounded up to whole blocks.

    The scales are ``[B, H, S' / 128]`` float32.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor

    @classmethod
    def empty(
        cls, batch: int, tokens: int, heads: int, dim: int, device: torch.device | str
    ) -> "Fp8Inputs":
        """Buffers to write into."""
        blocks = triton.cdiv(tokens, BLOCK)
        q, k = (torch.empty(batch, tokens, heads, dim, dtype=FP8, device=device) for _ in "qk")
        v = torch.empty(batch, heads, dim, blocks * BLOCK, dtype=FP8, device=device)
        q_scale, k_scale, v_scale = torch.empty(3, batch, heads, blocks, device=device).unbind(0)
        return cls(q, k, v, q_scale, k_scale, v_scale)

    def dequantized(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[B, S, H, d]`` float32 that the numbers stand for."""
        tokens = self.q.shape[1]
        scales = (
            s.repeat_interleave(BLOCK, -1) for s in (self.q_scale, self.k_scale, self.v_scale)
        )
        q, k, v = (scale.transpose(1, 2)[:, :tokens, :, None] for scale in scales)
        values = self.v.float().permute(0, 3, 1, 2)[:, :tokens]
        return self.q.float() * q, self.k.float() * k, values * v


def attention_inputs_ref(qkv: Tensor, scales: Tensor, text_tokens: int, rope: Tensor) -> Fp8Inputs:
    """Quantise ``qkv [B, S, 3, H, d]``; the other arguments are those of ``qk_norm_rope_ref``."""
    q, k = qk_norm_rope_ref(qkv, scales, text_tokens, rope)
    (q8, q_scale), (k8, k_scale), (v8, v_scale) = map(_quantize_blocks, (q, k, qkv[:, :, 2]))
    v8 = F.pad(v8.view(torch.uint8).permute(0, 2, 3, 1), (0, -v8.shape[1] % BLOCK)).view(FP8)
    return Fp8Inputs(q8, k8, v8.contiguous(), q_scale, k_scale, v_scale)


def _quantize_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x [B, S, H, d]`` as E4M3, and its blocks' scales ``[B, H, blocks]``."""
    tokens = x.shape[1]
    blocks = F.pad(x.float(), (0, 0, 0, 0, 0, -tokens % BLOCK)).unflatten(1, (-1, BLOCK))
    scale = blocks.abs().amax((2, 4), keepdim=True).clamp(min=TINY) / FP8_MAX
    q = (blocks / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8).flatten(1, 2)[:, :tokens]
    return q, scale[:, :, 0, :, 0].transpose(1, 2).contiguous()


@dataclass(frozen=True)
class Config:
    """A program takes a block of tokens of one head."""

    warps: int = 8


CONFIG = Config()
"""On every chip: a tile of 128 × 128 float32 is 64 registers a thread."""


@triton.jit
def _block_quantized(x):
    """A tile float32 as E4M3, and its one scale."""
    largest = tl.maximum(tl.max(tl.abs(x)), _TINY)
    return (x * (_FP8_MAX / largest)).to(tl.float8e4nv), largest / _FP8_MAX


@triton.jit(do_not_specialize=["tokens", "text_tokens"])
def _attention_inputs_kernel(
    qkv_ptr, norm_ptr, rope_ptr, position_ptr,
    q_ptr, k_ptr, v_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr,
    tokens, text_tokens, heads,
    x_batch, x_token, x_part, x_head, norm_stream, norm_part,
    D: tl.constexpr, T: tl.constexpr, A0: tl.constexpr, A1: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of tokens, heads, batch)."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    token = block * T + tl.arange(0, T)
    channel = tl.arange(0, D)[None, :]
    mask = token < tokens
    x_ptr = qkv_ptr + batch * x_batch + head * x_head + token[:, None] * x_token + channel
    place = ((batch * tokens + token[:, None]) * heads + head) * D + channel
    scale_at = (batch * heads + head) * tl.num_programs(0) + block

    rope = rotations(rope_ptr, position_ptr, token, mask, D, A0, A1)
    stream = tl.where(token < text_tokens, norm_stream, 0)[:, None]
    norm = tl.load(norm_ptr + stream + channel).to(tl.float32)
    q = rotated(tl.load(x_ptr, mask[:, None], 0.0), norm, rope)
    q, scale = _block_quantized(q)
    tl.store(q_ptr + place, q, mask[:, None])
    tl.store(q_scale_ptr + scale_at, scale)

    norm = tl.load(norm_ptr + norm_part + stream + channel).to(tl.float32)
    k = rotated(tl.load(x_ptr + x_part, mask[:, None], 0.0), norm, rope)
    k, scale = _block_quantized(k)
    tl.store(k_ptr + place, k, mask[:, None])
    tl.store(k_scale_ptr + scale_at, scale)

    v = tl.load(x_ptr + 2 * x_part, mask[:, None], 0.0).to(tl.float32)
    v, scale = _block_quantized(v)
    padded = tl.num_programs(0) * T
    row = (batch * heads + head) * D + tl.arange(0, D)
    tl.store(v_ptr + row[:, None] * padded + token[None, :], tl.trans(v))
    tl.store(v_scale_ptr + scale_at, scale)


def launch_attention_inputs(
    out: Fp8Inputs,
    qkv: Tensor,
    scales: Tensor,
    text_tokens: int,
    rope: Tensor,
    positions: Tensor | None = None,
    axes_dim: Sequence[int] = (),
) -> Launch:
    """Quantise ``qkv [B, S, 3, H, d]`` into ``out``; arguments as of ``launch_norm_rope``."""
    batch, tokens, _, heads, dim = qkv.shape
    assert out.q.shape == out.k.shape == (batch, tokens, heads, dim), out.q.shape
    assert scales.shape == (2 if text_tokens else 1, 2, dim), scales.shape
    assert qkv.stride(-1) == scales.stride(-1) == 1, "channels lie side by side"
    assert all(t.is_contiguous() for t in vars(out).values()), "outputs are dense"
    assert all(dim % 8 == 0 for dim in axes_dim), axes_dim
    args = {
        "qkv_ptr": qkv, "norm_ptr": scales, "rope_ptr": rope, "position_ptr": positions,
        "q_ptr": out.q, "k_ptr": out.k, "v_ptr": out.v,
        "q_scale_ptr": out.q_scale, "k_scale_ptr": out.k_scale, "v_scale_ptr": out.v_scale,
        "tokens": tokens, "text_tokens": text_tokens, "heads": heads,
        "x_batch": qkv.stride(0), "x_token": qkv.stride(1), "x_part": qkv.stride(2),
        "x_head": qkv.stride(3),
        "norm_stream": scales.stride(0), "norm_part": scales.stride(1),
        "D": dim, "T": BLOCK,
        "A0": axes_dim[0] if positions is not None else 0,
        "A1": axes_dim[1] if positions is not None else 0,
    }  # fmt: skip
    grid = (triton.cdiv(tokens, BLOCK), heads, batch)
    return Launch(_attention_inputs_kernel, grid, args, CONFIG.warps)
