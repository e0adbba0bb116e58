"""What attention's kernels share: one step of the algorithm, and the arguments of any.

The algorithm is FlashAttention-2 (arXiv 2307.08691): keys come block by block, under a running
maximum and a running sum.
"""

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .attention_inputs import BLOCK, Fp8Inputs
from .gemm import summed

_LOG2_E = 1.4426950408889634
_WEIGHT_BITS = tl.constexpr(8.0)
"""Weights are multiplied by 2⁸ before they become E4M3, whose largest number is 448."""

SCALE_BLOCK = tl.constexpr(BLOCK)


@dataclass(frozen=True)
class Config:
    """A program takes ``queries`` queries of one head, and ``keys`` keys at a time."""

    queries: int
    keys: int
    warps: int
    stages: int
    specialize: bool = False


@triton.jit
def attend(
    q, k, v, acc, total, top, unit, scale, v_scale, left,
    FP8: tl.constexpr, RAGGED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Take one block of keys into account.

    q ``[M, d]``, k ``[d, N]``, v ``[N, d]``. acc ``[M, d]``: the weighted sum of values so far, in
    units of ``unit``, which was the last block's ``v_scale``. total ``[M]``: the sum of weights.
    top ``[M]``: the largest score so far, times ``scale``, which also takes base e to 2. left: how
    many keys of this block exist, looked at if RAGGED. TMA: as of :func:`~.gemm.summed`.
    """
    scores = tl.dot(q, k)
    if RAGGED:
        exists = tl.arange(0, scores.shape[1])[None, :] < left
        scores = tl.where(exists, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
    shrink = tl.exp2(top - new_top)
    if FP8:
        weights = tl.exp2(scores * scale - (new_top - _WEIGHT_BITS)[:, None])
        acc = acc * (shrink * (unit / v_scale))[:, None]
        unit = v_scale
    else:
        weights = tl.exp2(scores * scale - new_top[:, None])
        acc = acc * shrink[:, None]
    total = total * shrink + tl.sum(weights, axis=1)
    acc = summed(weights.to(v.dtype), v, acc, TMA)
    return acc, total, new_top, unit


def shared_args(q: Tensor, k: Tensor, scales: Fp8Inputs | None) -> dict[str, Any]:
    """What both kernels take. Keys and values share the strides of their scales."""
    tensors = [None] * 3 if scales is None else [scales.q_scale, scales.k_scale, scales.v_scale]
    strides = [(0, 0) if t is None else t.stride()[:2] for t in tensors]
    assert strides[1] == strides[2], strides
    return {
        "q_scale_ptr": tensors[0], "k_scale_ptr": tensors[1], "v_scale_ptr": tensors[2],
        "scale": _LOG2_E / q.shape[-1] ** 0.5, "q_tokens": q.shape[1], "k_tokens": k.shape[1],
        "q_scale_batch": strides[0][0], "q_scale_head": strides[0][1],
        "k_scale_batch": strides[1][0], "k_scale_head": strides[1][1],
    }  # fmt: skip
