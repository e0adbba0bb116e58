"""GELU in its tanh form, the activation of FLUX's feed-forwards.

A kernel can write FP8 straight into the next product's input, with a scale a row, which other
columns of the row can share.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .chips import chip_of
from .launch import Launch
from .quantize import (
    FP8_MAX,
    TINY,
    Rows,
    e4m3,
    empty_rows,
    quantize_rows_ref,
    quantized,
    storable,
)

SQRT_8_OVER_PI = 1.5957691216057308
CUBIC = 0.044715
"""Constants of the tanh form: Hendrycks & Gimpel, arXiv 1606.08415, section 2."""

_SQRT_8_OVER_PI = tl.constexpr(SQRT_8_OVER_PI)
_CUBIC = tl.constexpr(CUBIC)
_FP8_MAX = tl.constexpr(FP8_MAX)
_TINY = tl.constexpr(TINY)


def gelu_ref(x: Tensor) -> Tensor:
    """Tanh-approximated GELU, elementwise."""
    return F.gelu(x, approximate="tanh")


def gelu_beside_ref(left: Tensor, x: Tensor) -> Tensor:
    """``left [B, S, D]`` and, in the columns after it, GELU of ``x [B, S, N]``: linear2's input."""
    return torch.cat((left, gelu_ref(x)), dim=-1)


def gelu_rows_ref(x: Tensor) -> Rows:
    """:func:`gelu_ref`, quantised."""
    return quantize_rows_ref(gelu_ref(x))


def gelu_beside_rows_ref(left: Tensor, x: Tensor) -> Rows:
    """:func:`gelu_beside_ref`, quantised: one scale for both parts of a row."""
    return quantize_rows_ref(gelu_beside_ref(left, x))


def gelu_sigmoid(x: Tensor) -> Tensor:
    """:func:`gelu_ref` for float32 as ``x * sigmoid(2u)``: on a CPU half the time of torch's tanh.

    That takes 1.7 ns an element, a sigmoid 0.4 (one core with AVX-512, 160 × 768 elements).
    """
    return _sigmoid_factor(x).mul_(x)


def gelu_beside_sigmoid(left: Tensor, x: Tensor) -> Tensor:
    """:func:`gelu_beside_ref` likewise, written in place: no concatenation."""
    width = left.shape[-1]
    out = left.new_empty(*left.shape[:-1], width + x.shape[-1])
    out[..., :width].copy_(left)
    torch.mul(_sigmoid_factor(x), x, out=out[..., width:])
    return out


def _sigmoid_factor(x: Tensor) -> Tensor:
    """``(1 + tanh(u)) / 2``."""
    return (x * x).mul_(CUBIC * SQRT_8_OVER_PI).add_(SQRT_8_OVER_PI).mul_(x).sigmoid_()


@dataclass(frozen=True)
class Config:
    """A program takes one row, all of it in registers."""

    warps: int


def config(width: int) -> Config:
    """Up to 32 elements a thread."""
    return Config(warps=min(max(triton.next_power_of_2(width) // (32 * 32), 1), 16))


@triton.jit
def activated(x):
    """GELU of float32 ``x``: ``(1 + tanh(u)) / 2`` is ``1 / (1 + exp(-2u))``."""
    return x / (1 + tl.exp((x + x * x * x * _CUBIC) * -_SQRT_8_OVER_PI))


@triton.jit
def _gelu_kernel(
    x_ptr, out_ptr, row_scale_ptr, x_row, out_row, N: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_row + n, n < N, 0.0)
    y = activated(x.to(tl.float32))
    if row_scale_ptr is not None:
        y, row_scale = quantized(y, out_ptr.dtype.element_ty)
        tl.store(row_scale_ptr + row, row_scale)
    tl.store(out_ptr + row * out_row + n, y.to(out_ptr.dtype.element_ty), n < N)


def launch_gelu(out: Tensor, x: Tensor, row_scale: Tensor | None = None) -> Launch:
    """Write GELU of ``x [M, N]`` into ``out [M, N]``; rows of both may be strided.

    row_scale: ``[M, 1]`` float32 to be written; with it, ``out`` is :func:`~.quantize.storable`.
    """
    rows, width = x.shape
    assert out.shape == x.shape, (out.shape, x.shape)
    assert x.stride(1) == out.stride(1) == 1, "strided rows"
    assert row_scale is None or row_scale.is_contiguous(), row_scale
    args = {
        "x_ptr": x, "out_ptr": out, "row_scale_ptr": row_scale,
        "x_row": x.stride(0), "out_row": out.stride(0),
        "N": width, "BLOCK": triton.next_power_of_2(width),
    }  # fmt: skip
    return Launch(_gelu_kernel, (rows,), args, config(width).warps)


@triton.jit
def _gelu_beside_rows_kernel(
    left_ptr, x_ptr, out_ptr, row_scale_ptr, left_row, x_row,
    D: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: (rows,). Both parts of a row in registers, since they share its scale."""
    row = tl.program_id(0).to(tl.int64)
    d, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    left = tl.load(left_ptr + row * left_row + d, d < D, 0.0).to(tl.float32)
    y = activated(tl.load(x_ptr + row * x_row + n, n < N, 0.0).to(tl.float32))
    largest = tl.maximum(tl.max(tl.abs(left), axis=0), tl.max(tl.abs(y), axis=0))
    largest = tl.maximum(largest, _TINY)
    factor = _FP8_MAX / largest
    out_ptr += row * (D + N)
    tl.store(out_ptr + d, e4m3(left * factor, out_ptr.dtype.element_ty), d < D)
    tl.store(out_ptr + D + n, e4m3(y * factor, out_ptr.dtype.element_ty), n < N)
    tl.store(row_scale_ptr + row, largest / _FP8_MAX)


def launch_gelu_beside_rows(out: Tensor, row_scale: Tensor, left: Tensor, x: Tensor) -> Launch:
    """Write ``left [M, D]`` and GELU of ``x [M, N]``, quantised together, into ``out [M, D + N]``,
    :func:`~.quantize.storable`, and ``row_scale [M, 1]``; rows of left and x may be strided."""
    (rows, width), columns = x.shape, left.shape[1]
    assert left.shape[0] == rows, (left.shape, x.shape)
    assert out.shape == (rows, columns + width), out.shape
    assert x.stride(1) == left.stride(1) == 1, "strided rows"
    assert out.is_contiguous(), out.stride()
    assert row_scale.is_contiguous(), row_scale.stride()
    args = {
        "left_ptr": left, "x_ptr": x, "out_ptr": out, "row_scale_ptr": row_scale,
        "left_row": left.stride(0), "x_row": x.stride(0), "D": columns, "N": width,
        "BLOCK_D": triton.next_power_of_2(columns), "BLOCK_N": triton.next_power_of_2(width),
    }  # fmt: skip
    return Launch(_gelu_beside_rows_kernel, (rows,), args, config(width + columns).warps)


@torch.library.custom_op("fluxkontext::gelu", mutates_args=())
def _gelu(x: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch_gelu(out.flatten(0, -2), x.flatten(0, -2))()
    return out


@_gelu.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def gelu(x: Tensor) -> Tensor:
    """:func:`gelu_ref` as one kernel."""
    out: Tensor = _gelu(x)
    return out


@torch.library.custom_op("fluxkontext::gelu_beside", mutates_args=())
def _gelu_beside(left: Tensor, x: Tensor) -> Tensor:
    width = left.shape[-1]
    out = torch.empty(*x.shape[:-1], width + x.shape[-1], dtype=x.dtype, device=x.device)
    out[..., :width].copy_(left)
    launch_gelu(out[..., width:].flatten(0, -2), x.flatten(0, -2))()
    return out


@_gelu_beside.register_fake
def _(left: Tensor, x: Tensor) -> Tensor:
    width = left.shape[-1] + x.shape[-1]
    return torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)


def gelu_beside(left: Tensor, x: Tensor) -> Tensor:
    """:func:`gelu_beside_ref` as a copy and one kernel."""
    out: Tensor = _gelu_beside(left, x)
    return out


@torch.library.custom_op("fluxkontext::gelu_rows", mutates_args=())
def _gelu_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    out, row_scale = empty_rows(x, x.shape[-1])
    values = storable(out.flatten(0, -2), chip_of(x.device))
    launch_gelu(values, x.flatten(0, -2), row_scale.view(-1, 1))()
    return out, row_scale


@_gelu_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return empty_rows(x, x.shape[-1])


def gelu_rows(x: Tensor) -> Rows:
    """:func:`gelu_rows_ref` as one kernel."""
    return Rows(*_gelu_rows(x))


@torch.library.custom_op("fluxkontext::gelu_beside_rows", mutates_args=())
def _gelu_beside_rows(left: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    out, row_scale = empty_rows(x, left.shape[-1] + x.shape[-1])
    values = storable(out, chip_of(x.device))
    parts = (t.flatten(0, -2) for t in (values, row_scale, left, x))
    launch_gelu_beside_rows(*parts)()
    return out, row_scale


@_gelu_beside_rows.register_fake
def _(left: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return empty_rows(x, left.shape[-1] + x.shape[-1])


def gelu_beside_rows(left: Tensor, x: Tensor) -> Rows:
    """:func:`gelu_beside_rows_ref` as one kernel."""
    return Rows(*_gelu_beside_rows(left, x))
