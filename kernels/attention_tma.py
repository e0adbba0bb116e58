"""Attention fed by the tensor memory accelerator, for Hopper and data-centre Blackwell.

Programs are persistent: as many as the chip has multiprocessors, each taking tile after tile.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .attention_inputs import Fp8Inputs
from .attention_step import SCALE_BLOCK, Config, attend, shared_args
from .chips import Chip
from .launch import Launch

CONFIGS = {
    (90, 2, 64): Config(128, 128, warps=8, stages=2),
    (90, 2, 128): Config(128, 128, warps=8, stages=2),
    (90, 1, 64): Config(128, 128, warps=8, stages=2),
    (90, 1, 128): Config(128, 128, warps=8, stages=2),
    (100, 2, 64): Config(128, 128, warps=4, stages=2, specialize=True),
    (100, 2, 128): Config(128, 64, warps=8, stages=3, specialize=True),
    (100, 1, 64): Config(128, 128, warps=4, stages=2, specialize=True),
    (100, 1, 128): Config(128, 64, warps=8, stages=3, specialize=True),
}
"""Triton 3.7 specialises no warps of this kernel for 9.0: it makes the same code either way."""


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
        k_scale_at = batch * k_scale_batch + head * k_scale_head
        if FP8:
            q_scale_at = batch * q_scale_batch + head * q_scale_head + first // SCALE_BLOCK
            factor = scale * tl.load(q_scale_ptr + q_scale_at)

        acc = tl.zeros((M, D), tl.float32)
        total = tl.zeros((M,), tl.float32)
        top = tl.full((M,), float("-inf"), tl.float32)
        unit = 1.0
        k_scale = 1.0
        v_scale = 1.0
        for key in tl.range(0, k_tokens, N, num_stages=STAGES, warp_specialize=SPECIALIZE):
            k = k_desc.load([batch, key, head * D]).reshape(N, D).T
            if FP8:
                k_scale = tl.load(k_scale_ptr + k_scale_at + key // SCALE_BLOCK)
                v_scale = tl.load(v_scale_ptr + k_scale_at + key // SCALE_BLOCK)
                v = v_desc.load([batch, head * D, key]).reshape(D, N).T
            else:
                v = v_desc.load([batch, key, head * D]).reshape(N, D)
            acc, total, top, unit = attend(
                q, k, v, acc, total, top, unit, factor * k_scale, v_scale, k_tokens - key,
                FP8, True, True,
            )  # fmt: skip
        out = (acc * (unit / total)[:, None]).to(out_desc.dtype)
        out_desc.store([batch, first, head * D], out.reshape(1, M, D))


def launch_attention_tma(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, chip: Chip, scales: Fp8Inputs | None
) -> Launch:
    """``q, k [B, S, H, d]``, ``v [B, S, H * d]`` or, FP8, ``[B, H * d, S]``; all rows of 16 bytes.

    Heads lie side by side.
    """
    batch, tokens, heads, dim = q.shape
    c = CONFIGS[chip.sm, q.itemsize, dim]
    v_block = [1, c.keys, dim] if scales is None else [1, dim, c.keys]
    args = {
        "q_desc": _descriptor(q.flatten(2), [1, c.queries, dim]),
        "k_desc": _descriptor(k.flatten(2), [1, c.keys, dim]),
        "v_desc": _descriptor(v, v_block), "out_desc": _descriptor(out, [1, c.queries, dim]),
        **shared_args(q, k, scales), "heads": heads, "batches": batch,
        "D": dim, "M": c.queries, "N": c.keys, "STAGES": c.stages, "SPECIALIZE": c.specialize,
    }  # fmt: skip
    tiles = triton.cdiv(tokens, c.queries) * heads * batch
    grid = (min(tiles, chip.multiprocessors),)
    return Launch(_attention_tma_kernel, grid, args, c.warps, c.stages)


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)
