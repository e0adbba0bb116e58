"""FP8 inputs of attention: queries, keys and values quantised, the first two after their norm and
rotation or as they come, in one pass.

A scale belongs to one head's block of 128 tokens. Values are written with their tokens side by
side, as FP8 matrix instructions want the second factor of ``weights @ values``.
"""

from dataclasses import dataclass
from typing import Any

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

    The scales are ``[B, H, S' / 128]`` float32. Queries may be fewer.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor

    @classmethod
    def empty(
        cls,
        batch: int,
        tokens: int,
        heads: int,
        dim: int,
        device: torch.device | str,
        queries: int | None = None,
    ) -> "Fp8Inputs":
        """Buffers to write into; queries: as many as tokens if None."""
        queries = tokens if queries is None else queries
        blocks, q_blocks = triton.cdiv(tokens, BLOCK), triton.cdiv(queries, BLOCK)
        q, k = (
            torch.empty(batch, count, heads, dim, dtype=FP8, device=device)
            for count in (queries, tokens)
        )
        v = torch.empty(batch, heads, dim, blocks * BLOCK, dtype=FP8, device=device)
        q_scale = torch.empty(batch, heads, q_blocks, device=device)
        k_scale, v_scale = torch.empty(2, batch, heads, blocks, device=device).unbind(0)
        return cls(q, k, v, q_scale, k_scale, v_scale)

    def dequantized(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[B, S, H, d]`` float32 that the numbers stand for."""
        queries, tokens = self.q.shape[1], self.k.shape[1]
        q, k, v = (
            s.repeat_interleave(BLOCK, -1).transpose(1, 2)[:, :, :, None]
            for s in (self.q_scale, self.k_scale, self.v_scale)
        )
        values = self.v.float().permute(0, 3, 1, 2) * v
        return self.q.float() * q[:, :queries], self.k.float() * k[:, :tokens], values[:, :tokens]


def attention_inputs_ref(qkv: Tensor, scales: Tensor, text_tokens: int, rope: Tensor) -> Fp8Inputs:
    """Quantise ``qkv [B, S, 3, H, d]``; the other arguments are those of ``qk_norm_rope_ref``."""
    return quantize_attention_ref(*qk_norm_rope_ref(qkv, scales, text_tokens, rope), qkv[:, :, 2])


def quantize_attention_ref(q: Tensor, k: Tensor, v: Tensor) -> Fp8Inputs:
    """Quantise ``q [B, Sq, H, d]``, ``k, v [B, Sk, H, d]``."""
    (q8, q_scale), (k8, k_scale), (v8, v_scale) = map(_quantize_blocks, (q, k, v))
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


@triton.jit(do_not_specialize=["queries", "tokens", "text_tokens"])
def _attention_inputs_kernel(
    q_in_ptr, k_in_ptr, v_in_ptr, norm_ptr, q_rope_ptr, rope_ptr,
    q_ptr, k_ptr, v_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr,
    queries, tokens, text_tokens, heads,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    norm_stream, norm_part,
    D: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of tokens, heads, batch). Without ``norm_ptr``, queries and keys are normed
    and rotated already; without ``q_rope_ptr``, both have the same angles."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    token = block * T + tl.arange(0, T)
    channel = tl.arange(0, D)[None, :]
    mask = token < tokens
    scale_at = (batch * heads + head) * tl.num_programs(0) + block
    rope = None
    stream = None
    if norm_ptr is not None:
        rope = rotations(rope_ptr, None, token, mask, D, 0, 0)
        stream = tl.where(token < text_tokens, norm_stream, 0)[:, None]

    if block * T < queries:
        exists = (token < queries)[:, None]
        q_in_ptr += batch * q_batch + head * q_head
        q = tl.load(q_in_ptr + token[:, None] * q_token + channel, exists, 0.0).to(tl.float32)
        if norm_ptr is not None:
            q_rope = rope
            if q_rope_ptr is not None:
                q_rope = rotations(q_rope_ptr, None, token, token < queries, D, 0, 0)
            q = rotated(q, tl.load(norm_ptr + stream + channel).to(tl.float32), q_rope)
        q, scale = _block_quantized(q)
        place = ((batch * queries + token[:, None]) * heads + head) * D + channel
        tl.store(q_ptr + place, q, exists)
        tl.store(q_scale_ptr + (batch * heads + head) * tl.cdiv(queries, T) + block, scale)

    k_in_ptr += batch * k_batch + head * k_head
    k = tl.load(k_in_ptr + token[:, None] * k_token + channel, mask[:, None], 0.0).to(tl.float32)
    if norm_ptr is not None:
        k = rotated(k, tl.load(norm_ptr + norm_part + stream + channel).to(tl.float32), rope)
    k, scale = _block_quantized(k)
    place = ((batch * tokens + token[:, None]) * heads + head) * D + channel
    tl.store(k_ptr + place, k, mask[:, None])
    tl.store(k_scale_ptr + scale_at, scale)

    v_in_ptr += batch * v_batch + head * v_head
    v = tl.load(v_in_ptr + token[:, None] * v_token + channel, mask[:, None], 0.0).to(tl.float32)
    v, scale = _block_quantized(v)
    padded = tl.num_programs(0) * T
    row = (batch * heads + head) * D + tl.arange(0, D)
    tl.store(v_ptr + row[:, None] * padded + token[None, :], tl.trans(v))
    tl.store(v_scale_ptr + scale_at, scale)


def launch_attention_inputs(
    out: Fp8Inputs,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: Tensor,
    text_tokens: int,
    rope: Tensor,
    q_rope: Tensor | None = None,
) -> Launch:
    """Norm and rotate ``q [B, Sq, H, d]`` and ``k [B, Sk, H, d]``, and quantise them and ``v`` into
    ``out``; other arguments as of ``launch_norm_rope``.

    q_rope: the angles ``[Sq, d / 2, 2]`` of queries that are not the first tokens, which only
    one stream may have.
    """
    dim = q.shape[-1]
    assert q_rope is None or not text_tokens, "of two streams, all queries are needed"
    assert scales.shape == (2 if text_tokens else 1, 2, dim), scales.shape
    assert scales.stride(-1) == 1, "channels lie side by side"
    norm = {
        "norm_ptr": scales, "q_rope_ptr": q_rope, "rope_ptr": rope, "text_tokens": text_tokens,
        "norm_stream": scales.stride(0), "norm_part": scales.stride(1),
    }  # fmt: skip
    return _launch(out, q, k, v, norm)


def launch_quantize_attention(out: Fp8Inputs, q: Tensor, k: Tensor, v: Tensor) -> Launch:
    """Quantise ``q [B, Sq, H, d]``, ``k, v [B, Sk, H, d]``, Sq at most Sk, as they are."""
    norm = {
        "norm_ptr": None, "q_rope_ptr": None, "rope_ptr": None, "text_tokens": 0,
        "norm_stream": 0, "norm_part": 0,
    }  # fmt: skip
    return _launch(out, q, k, v, norm)


def _launch(out: Fp8Inputs, q: Tensor, k: Tensor, v: Tensor, norm: dict[str, Any]) -> Launch:
    batch, tokens, heads, dim = k.shape
    assert out.q.shape == q.shape, (out.q.shape, q.shape)
    assert out.k.shape == k.shape == v.shape, (out.k.shape, k.shape, v.shape)
    assert q.shape[1] <= tokens, (q.shape, k.shape)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "channels lie side by side"
    assert all(t.is_contiguous() for t in vars(out).values()), "outputs are dense"
    args = {
        "q_in_ptr": q, "k_in_ptr": k, "v_in_ptr": v, **norm,
        "q_ptr": out.q, "k_ptr": out.k, "v_ptr": out.v,
        "q_scale_ptr": out.q_scale, "k_scale_ptr": out.k_scale, "v_scale_ptr": out.v_scale,
        "queries": q.shape[1], "tokens": tokens, "heads": heads,
        "q_batch": q.stride(0), "q_token": q.stride(1), "q_head": q.stride(2),
        "k_batch": k.stride(0), "k_token": k.stride(1), "k_head": k.stride(2),
        "v_batch": v.stride(0), "v_token": v.stride(1), "v_head": v.stride(2),
        "D": dim, "T": BLOCK,
    }  # fmt: skip
    grid = (triton.cdiv(tokens, BLOCK), heads, batch)
    return Launch(_attention_inputs_kernel, grid, args, CONFIG.warps)
