"""Joint attention over text, target and context tokens: no mask, not causal.

Two kernels of one algorithm (FlashAttention-2, arXiv 2307.08691): one whose tiles are loaded
through pointers, for chips whose matrix instructions read registers, and a persistent one fed by
the tensor memory accelerator, for Hopper and data-centre Blackwell.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from .attention_inputs import BLOCK, Fp8Inputs
from .chips import Chip, chip_of
from .launch import Launch
from .norm_rope import rotated, rotations

_LOG2_E = 1.4426950408889634
_SCALE_BLOCK = tl.constexpr(BLOCK)
_P_BITS = tl.constexpr(8.0)
"""Probabilities are multiplied by 2⁸ before they become E4M3, whose largest number is 448."""


def attention_ref(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention; ``q [B, Sq, H, d]`` and ``k, v [B, Sk, H, d]`` give ``[B, Sq, H * d]``."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class Config:
    """A program takes ``queries`` queries of one head, and ``keys`` keys at a time."""

    queries: int
    keys: int
    warps: int
    stages: int
    specialize: bool = False


POINTER_CONFIGS = {
    # (bytes of an element, head_dim)
    (2, 64): Config(128, 64, warps=4, stages=2),
    (2, 128): Config(128, 64, warps=8, stages=2),
    (1, 64): Config(128, 64, warps=4, stages=2),
    (1, 128): Config(128, 64, warps=8, stages=2),
}
"""Within 99 KiB of shared memory, so for every chip without ``Chip.tma``."""

TMA_CONFIGS = {
    # (compute capability, bytes of an element, head_dim)
    (90, 2, 64): Config(128, 128, warps=8, stages=2),
    (90, 2, 128): Config(128, 128, warps=8, stages=2),
    (90, 1, 64): Config(128, 128, warps=8, stages=2),
    (90, 1, 128): Config(128, 128, warps=8, stages=2),
    (100, 2, 64): Config(128, 128, warps=4, stages=2),
    (100, 2, 128): Config(128, 128, warps=4, stages=2),
    (100, 1, 64): Config(128, 128, warps=4, stages=2),
    (100, 1, 128): Config(128, 128, warps=4, stages=2),
}


@triton.jit
def _attend(
    q, k, v, acc, total, top, unit, scale, v_scale, left, FP8: tl.constexpr, RAGGED: tl.constexpr
):
    """Take one block of keys into account.

    q ``[M, d]``, k ``[d, N]``, v ``[N, d]``. acc ``[M, d]``: the weighted sum of values so far, in
    units of ``unit``, which was the last block's ``v_scale``. total ``[M]``: the sum of weights.
    top ``[M]``: the largest score so far, times ``scale``, which also takes base e to 2. left: how
    many keys of this block exist, looked at if RAGGED.
    """
    scores = tl.dot(q, k)
    if RAGGED:
        exists = tl.arange(0, scores.shape[1])[None, :] < left
        scores = tl.where(exists, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
    shrink = tl.exp2(top - new_top)
    if FP8:
        weights = tl.exp2(scores * scale - (new_top - _P_BITS)[:, None])
        acc = acc * (shrink * (unit / v_scale))[:, None]
        unit = v_scale
    else:
        weights = tl.exp2(scores * scale - new_top[:, None])
        acc = acc * shrink[:, None]
    total = total * shrink + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc)
    return acc, total, new_top, unit


@triton.jit
def _attend_range(
    q, acc, total, top, unit, scale, start, end,
    k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, k_norm, k_rope_ptr,
    k_token, v_token, v_channel,
    N: tl.constexpr, STAGES: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Take the keys from ``start`` to ``end`` into account; pointers are one head's."""
    D: tl.constexpr = q.shape[1]
    FP8: tl.constexpr = k_scale_ptr is not None
    d = tl.arange(0, D)
    k_scale = 1.0
    v_scale = 1.0
    for first in tl.range(start, end, N, num_stages=STAGES):
        key = first + tl.arange(0, N)
        mask = key < end if RAGGED else tl.full((N,), True, tl.int1)
        if k_rope_ptr is None:
            k = tl.load(k_ptr + key[None, :] * k_token + d[:, None], mask[None, :], 0.0)
        else:
            k = tl.load(k_ptr + key[:, None] * k_token + d[None, :], mask[:, None], 0.0)
            rope = rotations(k_rope_ptr, None, key, mask, D, 0, 0)
            k = tl.trans(rotated(k, k_norm, rope).to(k.dtype))
        if FP8:
            k_scale = tl.load(k_scale_ptr + first // _SCALE_BLOCK)
            v_scale = tl.load(v_scale_ptr + first // _SCALE_BLOCK)
        v = tl.load(v_ptr + key[:, None] * v_token + d[None, :] * v_channel, mask[:, None], 0.0)
        acc, total, top, unit = _attend(
            q, k, v, acc, total, top, unit, scale * k_scale, v_scale, end - first, FP8, RAGGED
        )
    return acc, total, top, unit


@triton.jit(do_not_specialize=["q_tokens", "k_tokens"])
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr,
    q_norm_ptr, k_norm_ptr, q_rope_ptr, k_rope_ptr,
    scale, q_tokens, k_tokens,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, v_channel,
    out_batch, out_token, q_scale_batch, q_scale_head, k_scale_batch, k_scale_head,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of queries, heads, batch). With a rope, queries and keys come without norm."""
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    query = tl.program_id(0) * M + tl.arange(0, M)
    d = tl.arange(0, D)
    mask = query < q_tokens
    q_ptr += batch * q_batch + head * q_head
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    q = tl.load(q_ptr + query[:, None] * q_token + d[None, :], mask[:, None], 0.0)
    k_norm = None
    if q_rope_ptr is not None:
        q_norm = tl.load(q_norm_ptr + d)[None, :].to(tl.float32)
        k_norm = tl.load(k_norm_ptr + d)[None, :].to(tl.float32)
        q = rotated(q, q_norm, rotations(q_rope_ptr, None, query, mask, D, 0, 0)).to(q.dtype)
    if q_scale_ptr is not None:
        q_scale_ptr += batch * q_scale_batch + head * q_scale_head
        k_scale_ptr += batch * k_scale_batch + head * k_scale_head
        v_scale_ptr += batch * k_scale_batch + head * k_scale_head
        scale *= tl.load(q_scale_ptr + tl.program_id(0) * M // _SCALE_BLOCK)

    acc = tl.zeros((M, D), tl.float32)
    total = tl.zeros((M,), tl.float32)
    top = tl.full((M,), float("-inf"), tl.float32)
    unit = 1.0
    whole = k_tokens // N * N
    acc, total, top, unit = _attend_range(
        q, acc, total, top, unit, scale, 0, whole,
        k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, k_norm, k_rope_ptr, k_token, v_token, v_channel,
        N, STAGES, False,
    )  # fmt: skip
    acc, total, top, unit = _attend_range(
        q, acc, total, top, unit, scale, whole, k_tokens,
        k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, k_norm, k_rope_ptr, k_token, v_token, v_channel,
        N, 1, True,
    )  # fmt: skip
    out = (acc * (unit / total)[:, None]).to(out_ptr.dtype.element_ty)
    out_ptr += batch * out_batch + head * D
    tl.store(out_ptr + query[:, None] * out_token + d[None, :], out, mask[:, None])


@triton.jit(do_not_specialize=["q_tokens", "k_tokens"])
def _attention_tma_kernel(
    q_desc, k_desc, v_desc, out_desc, q_scale_ptr, k_scale_ptr, v_scale_ptr,
    scale, q_tokens, k_tokens, heads, batches,
    q_scale_batch, q_scale_head, k_scale_batch, k_scale_head,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """Grid: (programs,), each of which takes tile after tile.

    Descriptors: queries, keys and the result ``[B, S, H * d]``, values the same or, FP8,
    ``[B, H * d, S]``. What lies beyond a sequence is read as zeros and not written.
    """
    FP8: tl.constexpr = q_scale_ptr is not None
    blocks = tl.cdiv(q_tokens, M)
    for tile in tl.range(tl.program_id(0), blocks * heads * batches, tl.num_programs(0)):
        first = tile % blocks * M
        head = tile // blocks % heads
        batch = tile // (blocks * heads)
        q = q_desc.load([batch, first, head * D]).reshape(M, D)
        factor = scale
        if FP8:
            k_scales = k_scale_ptr + batch * k_scale_batch + head * k_scale_head
            v_scales = v_scale_ptr + batch * k_scale_batch + head * k_scale_head
            q_scales = q_scale_ptr + batch * q_scale_batch + head * q_scale_head
            factor = scale * tl.load(q_scales + first // _SCALE_BLOCK)

        acc = tl.zeros((M, D), tl.float32)
        total = tl.zeros((M,), tl.float32)
        top = tl.full((M,), float("-inf"), tl.float32)
        unit = 1.0
        k_scale = 1.0
        v_scale = 1.0
        for key in tl.range(0, k_tokens, N, num_stages=STAGES, warp_specialize=SPECIALIZE):
            k = k_desc.load([batch, key, head * D]).reshape(N, D).T
            if FP8:
                k_scale = tl.load(k_scales + key // _SCALE_BLOCK)
                v_scale = tl.load(v_scales + key // _SCALE_BLOCK)
                v = v_desc.load([batch, head * D, key]).reshape(D, N).T
            else:
                v = v_desc.load([batch, key, head * D]).reshape(N, D)
            acc, total, top, unit = _attend(
                q, k, v, acc, total, top, unit, factor * k_scale, v_scale, k_tokens - key, FP8, True
            )
        out = (acc * (unit / total)[:, None]).to(out_desc.dtype)
        out_desc.store([batch, first, head * D], out.reshape(1, M, D))
