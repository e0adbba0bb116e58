"""Joint attention over text, target and context tokens: no mask, not causal.

The kernel here loads tiles through pointers, for chips whose matrix instructions read registers;
others have the one of ``attention_tma.py``. Either takes 16-bit or FP8 inputs; this one can also
norm and rotate queries and keys as they are loaded.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .attention_inputs import Fp8Inputs
from .attention_step import SCALE_BLOCK, Config, attend, shared_args
from .attention_tma import launch_attention_tma
from .chips import Chip, chip_of
from .launch import Launch
from .norm_rope import norm_rope_ref, rotated, rotations


def attention_ref(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention; ``q [B, Sq, H, d]`` and ``k, v [B, Sk, H, d]`` give ``[B, Sq, H * d]``."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def attention_fp8_ref(inputs: Fp8Inputs, dtype: torch.dtype) -> Tensor:
    """The same of what quantised inputs stand for, computed in ``dtype``."""
    return attention_ref(*(t.to(dtype) for t in inputs.dequantized()))


@dataclass(frozen=True)
class Rotation:
    """Norm scales ``[d]`` and angles ``[S, d / 2, 2]`` for queries and keys that have neither."""

    q_norm: Tensor
    k_norm: Tensor
    q_rope: Tensor
    k_rope: Tensor


def attention_rotated_ref(q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
    """Norm and rotation of queries and keys, then attention."""
    q = norm_rope_ref(q, rotation.q_norm, rotation.q_rope)
    k = norm_rope_ref(k, rotation.k_norm, rotation.k_rope)
    return attention_ref(q, k, v)


_WIDE = Config(128, 64, warps=8, stages=2)

CONFIGS = {
    # (compute capability, bytes of an element, head_dim)
    **{(sm, 2, dim): _WIDE for sm in (80, 86, 89, 120) for dim in (64, 128)},
    **{(sm, 1, dim): _WIDE for sm in (89, 120) for dim in (64, 128)},
    (120, 2, 128): Config(128, 32, warps=8, stages=2),  # 64 keys spill
}
ROTATED_CONFIG = Config(128, 64, warps=8, stages=1)
"""On every chip: a second stage would hold angles too, beyond 99 KiB."""


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
            k_scale = tl.load(k_scale_ptr + first // SCALE_BLOCK)
            v_scale = tl.load(v_scale_ptr + first // SCALE_BLOCK)
        v = tl.load(v_ptr + key[:, None] * v_token + d[None, :] * v_channel, mask[:, None], 0.0)
        acc, total, top, unit = attend(
            q, k, v, acc, total, top, unit, scale * k_scale, v_scale, end - first,
            FP8, RAGGED, False,
        )  # fmt: skip
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
        scale *= tl.load(q_scale_ptr + tl.program_id(0) * M // SCALE_BLOCK)

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


def launch_attention(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, chip: Chip, rotation: Rotation | None = None
) -> Launch:
    """Write attention of ``q [B, Sq, H, d]``, ``k, v [B, Sk, H, d]`` into ``out [B, Sq, H * d]``.

    With a rotation, queries and keys are normed and rotated as they are loaded.
    """
    assert k.shape == v.shape, (k.shape, v.shape)
    if chip.tma and rotation is None:
        return launch_attention_tma(out, q, k, v.flatten(2), chip, None)
    v_strides = (v.stride(0), v.stride(1), v.stride(2), v.stride(3))
    return _launch_pointer(out, q, k, v, v_strides, chip, None, rotation)


def launch_attention_fp8(out: Tensor, inputs: Fp8Inputs, chip: Chip) -> Launch:
    """The same of quantised inputs. Queries may be fewer: whole blocks of ``q`` and ``q_scale``."""
    v = inputs.v
    if chip.tma:
        return launch_attention_tma(out, inputs.q, inputs.k, v.flatten(1, 2), chip, inputs)
    v_strides = (v.stride(0), v.stride(3), v.stride(1), v.stride(2))
    return _launch_pointer(out, inputs.q, inputs.k, v, v_strides, chip, inputs, None)


def _launch_pointer(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    v_strides: tuple[int, int, int, int],
    chip: Chip,
    scales: Fp8Inputs | None,
    rotation: Rotation | None,
) -> Launch:
    batch, tokens, heads, dim = q.shape
    assert q.stride(-1) == k.stride(-1) == out.stride(-1) == 1, "channels lie side by side"
    assert all(t.shape[1] * t.stride(1) < 2**31 for t in (q, k, out)), "offsets are 32-bit"
    c = ROTATED_CONFIG if rotation else CONFIGS[chip.sm, q.itemsize, dim]
    v_batch, v_token, v_head, v_channel = v_strides
    args = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "out_ptr": out, **shared_args(q, k, scales),
        "q_norm_ptr": rotation and rotation.q_norm, "k_norm_ptr": rotation and rotation.k_norm,
        "q_rope_ptr": rotation and rotation.q_rope, "k_rope_ptr": rotation and rotation.k_rope,
        "q_batch": q.stride(0), "q_token": q.stride(1), "q_head": q.stride(2),
        "k_batch": k.stride(0), "k_token": k.stride(1), "k_head": k.stride(2),
        "v_batch": v_batch, "v_token": v_token, "v_head": v_head, "v_channel": v_channel,
        "out_batch": out.stride(0), "out_token": out.stride(1),
        "D": dim, "M": c.queries, "N": c.keys, "STAGES": c.stages,
    }  # fmt: skip
    grid = (triton.cdiv(tokens, c.queries), heads, batch)
    return Launch(_attention_kernel, grid, args, c.warps, c.stages)


@torch.library.custom_op("fluxkontext::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.empty(*q.shape[:2], q.shape[2] * q.shape[3], dtype=q.dtype, device=q.device)
    launch_attention(out, q, k, v, chip_of(q.device))()
    return out


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty(*q.shape[:2], q.shape[2] * q.shape[3], dtype=q.dtype, device=q.device)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """:func:`attention_ref` as one kernel."""
    out: Tensor = _attention(q, k, v)
    return out
