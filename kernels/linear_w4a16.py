"""Linear layers with NVFP4 weights and 16-bit activations, on any chip.

Weights are dequantised as they are loaded, exactly: a number times its block's scale has at most
six significant bits. They are the first factor of the product, which matrix instructions take from
registers, so that they never go back to shared memory; the result is transposed as it is stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .chips import Chip, chip_of
from .gemm import Config, banded
from .launch import Launch
from .nvfp4 import BLOCK, NvFp4, unpack

_BLOCK = tl.constexpr(BLOCK)


def linear_w4a16_ref(x: Tensor, weight: NvFp4, bias: Tensor) -> Tensor:
    """``x [M, K]`` times ``weight [N, K]``, plus ``bias [N]``."""
    return F.linear(x, unpack(weight).to(x.dtype), bias)


CONFIGS = {
    **{sm: Config(128, 128, 64, warps=8, stages=3) for sm in (80, 86, 89, 100, 120)},
    90: Config(256, 128, 64, warps=8, stages=3),
}


@triton.jit
def _dequantized(packed, scale, dtype: tl.constexpr):
    """``packed [N, K / 2]`` and ``scale [N, K / 16]``, both bytes, as ``[N, K]``.

    The bits of E2M1 and of E4M3 are, put in place, those of float16 numbers with another exponent
    bias: 15 - 1 and 15 - 7 powers of two too small.
    """
    N: tl.constexpr = packed.shape[0]
    K: tl.constexpr = packed.shape[1] * 2
    codes = tl.join(packed & 15, packed >> 4).reshape(N, K).to(tl.uint16)
    bits = ((codes & 8) << 12) | ((codes & 7) << 9)
    values = bits.to(tl.float16, bitcast=True) * 16384.0
    scale = (scale.to(tl.uint16) << 7).to(tl.float16, bitcast=True) * 256.0
    values = values.reshape(N, K // _BLOCK, _BLOCK) * scale[:, :, None]
    return values.reshape(N, K).to(dtype)


@triton.jit(do_not_specialize=["rows"])
def _linear_w4a16_kernel(
    x_ptr, packed_ptr, block_scale_ptr, scale_ptr, bias_ptr, out_ptr,
    rows, columns, x_row, out_row,
    K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles,). ``packed_ptr`` and ``block_scale_ptr`` are bytes, rows dense."""
    row, column = banded(tl.program_id(0), tl.cdiv(rows, M), tl.cdiv(columns, N))
    m, n = row * M + tl.arange(0, M), column * N + tl.arange(0, N)
    # Rows beyond the end read the last one: their results are not written.
    weight = tl.minimum(n, columns - 1)[:, None]
    token = tl.minimum(m, rows - 1)[None, :]
    pair, block = tl.arange(0, DEPTH // 2)[None, :], tl.arange(0, DEPTH // _BLOCK)[None, :]
    k = tl.arange(0, DEPTH)[:, None]
    acc = tl.zeros((N, M), tl.float32)
    for start in tl.range(0, K, DEPTH, num_stages=STAGES):
        p, b = start // 2 + pair, start // _BLOCK + block
        packed = tl.load(packed_ptr + weight * (K // 2) + p, p < K // 2, 0)
        block_scale = tl.load(block_scale_ptr + weight * (K // _BLOCK) + b, b < K // _BLOCK, 0)
        x = tl.load(x_ptr + token * x_row + start + k, start + k < K, 0.0)
        acc = tl.dot(_dequantized(packed, block_scale, x.dtype), x, acc)
    bias = tl.load(bias_ptr + n, n < columns, 0.0).to(tl.float32)
    out = tl.trans(acc * tl.load(scale_ptr) + bias[:, None]).to(out_ptr.dtype.element_ty)
    mask = (m < rows)[:, None] & (n < columns)[None, :]
    tl.store(out_ptr + m[:, None].to(tl.int64) * out_row + n[None, :], out, mask)


def launch_linear_w4a16(out: Tensor, x: Tensor, weight: NvFp4, bias: Tensor, chip: Chip) -> Launch:
    """Write the layer's result into ``out [M, N]``; arguments as of ``linear_w4a16_ref``."""
    rows, width = x.shape
    columns = weight.packed.shape[0]
    assert out.shape == (rows, columns), out.shape
    assert weight.packed.shape[1] * 2 == width, (weight.packed.shape, width)
    assert weight.packed.is_contiguous(), weight.packed.stride()
    assert weight.block_scale.is_contiguous(), weight.block_scale.stride()
    assert x.stride(1) == out.stride(1) == 1, "strided rows"
    assert width % BLOCK == 0, width
    assert rows * x.stride(0) < 2**31, "offsets are 32-bit"
    c = CONFIGS[chip.sm]
    args = {
        "x_ptr": x, "packed_ptr": weight.packed,
        "block_scale_ptr": weight.block_scale.view(torch.uint8), "scale_ptr": weight.scale,
        "bias_ptr": bias, "out_ptr": out, "rows": rows, "columns": columns,
        "x_row": x.stride(0), "out_row": out.stride(0),
        "K": width, "M": c.rows, "N": c.columns, "DEPTH": c.depth, "STAGES": c.stages,
    }  # fmt: skip
    tiles = triton.cdiv(rows, c.rows) * triton.cdiv(columns, c.columns)
    return Launch(_linear_w4a16_kernel, (tiles,), args, c.warps, c.stages)


@torch.library.custom_op("fluxkontext::linear_w4a16", mutates_args=())
def _linear_w4a16(
    x: Tensor, packed: Tensor, block_scale: Tensor, scale: Tensor, bias: Tensor
) -> Tensor:
    out = torch.empty(*x.shape[:-1], len(packed), dtype=x.dtype, device=x.device)
    weight = NvFp4(packed, block_scale, scale)
    rows = x.flatten(0, -2)
    launch_linear_w4a16(out.flatten(0, -2), rows, weight, bias, chip_of(x.device))()
    return out


@_linear_w4a16.register_fake
def _(x: Tensor, packed: Tensor, block_scale: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return torch.empty(*x.shape[:-1], len(packed), dtype=x.dtype, device=x.device)


def linear_w4a16(x: Tensor, weight: NvFp4, bias: Tensor) -> Tensor:
    """:func:`linear_w4a16_ref` as one kernel; ``x [..., K]``."""
    out: Tensor = _linear_w4a16(x, weight.packed, weight.block_scale, weight.scale, bias)
    return out
