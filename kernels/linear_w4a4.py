"""Linear layers with weights and activations in NVFP4.

Where tensor cores do not multiply its blocks, activations become the numbers that their NVFP4 codes
stand for, in their own 16-bit type, which holds them exactly.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .chips import Chip, chip_of
from .gemm import Config, banded
from .launch import Launch
from .linear_w4a16 import linear_w4a16
from .nvfp4 import BLOCK, E2M1_MAX, E4M3_MAX, NvFp4, pack, unpack
from .quantize import bounded, e4m3_rounded, rounded

_BLOCK = tl.constexpr(BLOCK)
_E2M1_MAX = tl.constexpr(E2M1_MAX)
_E4M3_MAX = tl.constexpr(E4M3_MAX)
_LEAST_SCALE = tl.constexpr(2.0**-9)


def linear_w4a4_ref(x: Tensor, x_scale: Tensor, weight: NvFp4, bias: Tensor) -> Tensor:
    """``x [M, K]``, quantised under the float32 scalar ``x_scale``, times ``weight [N, K]``, plus
    ``bias [N]``; products are summed in float32."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    quantized = unpack(pack(x, x_scale)).to(wide)
    return F.linear(quantized, unpack(weight).to(wide), bias.to(wide)).to(x.dtype)


CONFIGS = {
    100: Config(128, 256, 256, warps=8, stages=3),
    120: Config(128, 128, 128, warps=8, stages=3),
}


@dataclass(frozen=True)
class QuantizeConfig:
    """A program takes a tile of ``rows`` × ``columns``."""

    rows: int = 16
    columns: int = 256
    warps: int = 4


QUANTIZE = QuantizeConfig()


@triton.jit
def _largest(x):
    """The largest magnitude of each block of ``x [M, blocks, 16]`` float32, or NaN if it holds one:
    of the bits of magnitudes, these are the largest."""
    return tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=2).to(tl.float32, bitcast=True)


@triton.jit
def _codes(x):
    """The nearest E2M1 codes of float32 ``x``. Halfway, the even code wins."""
    a = tl.abs(x)
    code = (a > 0.25).to(tl.uint8) + (a >= 0.75).to(tl.uint8) + (a > 1.25).to(tl.uint8)
    code += (a >= 1.75).to(tl.uint8) + (a > 2.5).to(tl.uint8) + (a >= 3.5).to(tl.uint8)
    code += (a > 5.0).to(tl.uint8)
    return code | ((x < 0).to(tl.uint8) << 3)


@triton.jit(do_not_specialize=["rows"])
def _quantize_kernel(
    x_ptr, x_scale_ptr, packed_ptr, block_scale_ptr, rows, x_row,
    K: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of columns, blocks of rows)."""
    m = tl.program_id(1) * M + tl.arange(0, M)[:, None]
    c = tl.program_id(0) * C + tl.arange(0, C)[None, :]
    x = tl.load(x_ptr + m.to(tl.int64) * x_row + c, (m < rows) & (c < K), 0.0).to(tl.float32)
    x = (x / tl.load(x_scale_ptr)).reshape(M, C // _BLOCK, _BLOCK)
    scale = bounded(_largest(x) / _E2M1_MAX, _LEAST_SCALE, _E4M3_MAX).to(tl.float8e4nv)
    codes = _codes(x / scale.to(tl.float32)[:, :, None])
    low, high = tl.split(codes.reshape(M, C // 2, 2))
    p = tl.program_id(0) * (C // 2) + tl.arange(0, C // 2)[None, :]
    b = tl.program_id(0) * (C // _BLOCK) + tl.arange(0, C // _BLOCK)[None, :]
    m = m.to(tl.int64)
    tl.store(packed_ptr + m * (K // 2) + p, low | (high << 4), (m < rows) & (p < K // 2))
    tl.store(block_scale_ptr + m * (K // _BLOCK) + b, scale, (m < rows) & (b < K // _BLOCK))


def launch_quantize_nvfp4(out: NvFp4, x: Tensor) -> Launch:
    """Quantise ``x [M, K]`` into ``out`` under its float32 ``scale``; rows may be strided."""
    rows, width = x.shape
    assert out.packed.shape == (rows, width // 2), out.packed.shape
    assert out.block_scale.shape == (rows, width // BLOCK), out.block_scale.shape
    assert all(t.is_contiguous() for t in vars(out).values()), "outputs are dense"
    assert x.stride(1) == 1, "strided rows"
    assert width % BLOCK == 0, width
    c = QUANTIZE
    args = {
        "x_ptr": x, "x_scale_ptr": out.scale, "packed_ptr": out.packed,
        "block_scale_ptr": out.block_scale, "rows": rows, "x_row": x.stride(0),
        "K": width, "M": c.rows, "C": c.columns,
    }  # fmt: skip
    grid = (triton.cdiv(width, c.columns), triton.cdiv(rows, c.rows))
    return Launch(_quantize_kernel, grid, args, c.warps)


@triton.jit(do_not_specialize=["rows"])
def _round_kernel(
    x_ptr, x_scale_ptr, out_ptr, rows, x_row, K: tl.constexpr, M: tl.constexpr, C: tl.constexpr
):
    """Grid: (blocks of columns, blocks of rows)."""
    m = tl.program_id(1) * M + tl.arange(0, M)[:, None]
    c = tl.program_id(0) * C + tl.arange(0, C)[None, :]
    inside = (m < rows) & (c < K)
    m = m.to(tl.int64)
    x = tl.load(x_ptr + m * x_row + c, inside, 0.0).to(tl.float32)
    x = tl.div_rn(x, tl.load(x_scale_ptr)).reshape(M, C // _BLOCK, _BLOCK)
    scale = bounded(tl.div_rn(_largest(x), _E2M1_MAX), _LEAST_SCALE, _E4M3_MAX)
    scale = e4m3_rounded(scale)[:, :, None]
    x = rounded(bounded(tl.div_rn(x, scale), -_E2M1_MAX, _E2M1_MAX), 1, 1.0) * scale
    tl.store(out_ptr + m * K + c, x.reshape(M, C).to(out_ptr.dtype.element_ty), inside)


def launch_round_nvfp4(out: Tensor, x: Tensor, x_scale: Tensor) -> Launch:
    """Write the numbers of NVFP4 nearest to ``x [M, K]``, in units of ``x_scale``, into ``out``;
    rows may be strided."""
    rows, width = x.shape
    assert out.shape == x.shape, (out.shape, x.shape)
    assert out.is_contiguous(), out.stride()
    assert x.stride(1) == 1, "strided rows"
    assert width % BLOCK == 0, width
    c = QUANTIZE
    args = {
        "x_ptr": x, "x_scale_ptr": x_scale, "out_ptr": out, "rows": rows, "x_row": x.stride(0),
        "K": width, "M": c.rows, "C": c.columns,
    }  # fmt: skip
    grid = (triton.cdiv(width, c.columns), triton.cdiv(rows, c.rows))
    return Launch(_round_kernel, grid, args, c.warps)


@triton.jit(do_not_specialize=["rows"])
def _linear_w4a4_kernel(
    x_ptr, x_block_ptr, x_scale_ptr, w_ptr, w_block_ptr, w_scale_ptr, bias_ptr, out_ptr,
    rows, columns, out_row,
    K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles,). ``x_ptr`` and ``w_ptr`` are packed bytes; their rows are dense."""
    row, column = banded(tl.program_id(0), tl.cdiv(rows, M), tl.cdiv(columns, N))
    m, n = row * M + tl.arange(0, M), column * N + tl.arange(0, N)
    # Rows beyond the end read the last one: their results are not written.
    x_row, w_row = tl.minimum(m, rows - 1)[:, None], tl.minimum(n, columns - 1)[:, None]
    pair, block = tl.arange(0, DEPTH // 2)[None, :], tl.arange(0, DEPTH // _BLOCK)[None, :]
    acc = tl.zeros((M, N), tl.float32)
    for start in tl.range(0, K, DEPTH, num_stages=STAGES):
        p, b = start // 2 + pair, start // _BLOCK + block
        x = tl.load(x_ptr + x_row * (K // 2) + p, p < K // 2, 0)
        w = tl.load(w_ptr + w_row * (K // 2) + p, p < K // 2, 0)
        x_block = tl.load(x_block_ptr + x_row * (K // _BLOCK) + b, b < K // _BLOCK, 0.0)
        w_block = tl.load(w_block_ptr + w_row * (K // _BLOCK) + b, b < K // _BLOCK, 0.0)
        acc = tl.dot_scaled(x, x_block, "e2m1", w.T, w_block, "e2m1", acc)
    bias = tl.load(bias_ptr + n, n < columns, 0.0).to(tl.float32)
    scale = tl.load(x_scale_ptr) * tl.load(w_scale_ptr)
    out = (acc * scale + bias[None, :]).to(out_ptr.dtype.element_ty)
    mask = (m < rows)[:, None] & (n < columns)[None, :]
    tl.store(out_ptr + m[:, None].to(tl.int64) * out_row + n[None, :], out, mask)


def launch_linear_w4a4(out: Tensor, x: NvFp4, weight: NvFp4, bias: Tensor, chip: Chip) -> Launch:
    """Write ``x [M, K]`` times ``weight [N, K]``, plus ``bias [N]``, into ``out [M, N]``."""
    rows, columns = len(x.packed), len(weight.packed)
    assert out.shape == (rows, columns), out.shape
    assert x.packed.shape[1] == weight.packed.shape[1], (x.packed.shape, weight.packed.shape)
    assert all(t.is_contiguous() for n in (x, weight) for t in vars(n).values()), "dense inputs"
    assert out.stride(1) == 1, out.stride()
    assert x.packed.numel() < 2**31, "offsets are 32-bit"
    c = CONFIGS[chip.sm]
    args = {
        "x_ptr": x.packed, "x_block_ptr": x.block_scale, "x_scale_ptr": x.scale,
        "w_ptr": weight.packed, "w_block_ptr": weight.block_scale, "w_scale_ptr": weight.scale,
        "bias_ptr": bias, "out_ptr": out, "rows": rows, "columns": columns,
        "out_row": out.stride(0), "K": 2 * x.packed.shape[1],
        "M": c.rows, "N": c.columns, "DEPTH": c.depth, "STAGES": c.stages,
    }  # fmt: skip
    tiles = triton.cdiv(rows, c.rows) * triton.cdiv(columns, c.columns)
    return Launch(_linear_w4a4_kernel, (tiles,), args, c.warps, c.stages)


@torch.library.custom_op("fluxkontext::linear_w4a4", mutates_args=())
def _linear_w4a4(
    x: Tensor, x_scale: Tensor, packed: Tensor, block_scale: Tensor, scale: Tensor, bias: Tensor
) -> Tensor:
    rows = x.flatten(0, -2)
    out = torch.empty(*x.shape[:-1], len(packed), dtype=x.dtype, device=x.device)
    empty = torch.empty(len(rows), x.shape[-1] // 2, dtype=torch.uint8, device=x.device)
    blocks = empty.new_empty(len(rows), x.shape[-1] // BLOCK, dtype=block_scale.dtype)
    quantized, weight = NvFp4(empty, blocks, x_scale), NvFp4(packed, block_scale, scale)
    launch_quantize_nvfp4(quantized, rows)()
    launch_linear_w4a4(out.flatten(0, -2), quantized, weight, bias, chip_of(x.device))()
    return out


@_linear_w4a4.register_fake
def _(
    x: Tensor, x_scale: Tensor, packed: Tensor, block_scale: Tensor, scale: Tensor, bias: Tensor
) -> Tensor:
    return torch.empty(*x.shape[:-1], len(packed), dtype=x.dtype, device=x.device)


def linear_w4a4(x: Tensor, x_scale: Tensor, weight: NvFp4, bias: Tensor) -> Tensor:
    """:func:`linear_w4a4_ref` as two kernels; ``x [..., K]``."""
    w = weight
    out: Tensor = _linear_w4a4(x, x_scale, w.packed, w.block_scale, w.scale, bias)
    return out


@torch.library.custom_op("fluxkontext::round_nvfp4", mutates_args=())
def _round_nvfp4(x: Tensor, x_scale: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch_round_nvfp4(out.flatten(0, -2), x.flatten(0, -2), x_scale)()
    return out


@_round_nvfp4.register_fake
def _(x: Tensor, x_scale: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def linear_w4a4_upcast(x: Tensor, x_scale: Tensor, weight: NvFp4, bias: Tensor) -> Tensor:
    """:func:`linear_w4a4_ref` as two kernels where tensor cores do not multiply NVFP4; 16-bit
    ``x [..., K]``."""
    scaled = NvFp4(weight.packed, weight.block_scale, weight.scale * x_scale)
    return linear_w4a16(_round_nvfp4(x, x_scale), scaled, bias)
