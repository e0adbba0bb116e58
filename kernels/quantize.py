"""FP8 E4M3 with one scale a row, or a calibrated one for all: activations of FP8 products.

``x ≈ q * scale``; the largest magnitude of a row becomes 448, the largest of E4M3.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chips import Chip, chip_of
from .launch import Launch

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
TINY = 1e-12
"""Least maximum of a row, so that a row of zeros has a scale to divide by."""

_FP8_MAX = tl.constexpr(FP8_MAX)
_TINY = tl.constexpr(TINY)


class Rows(NamedTuple):
    """``values [..., K]`` E4M3 and ``scale [..., 1]`` float32, or one that is broadcast: what an
    FP8 layer takes."""

    values: Tensor
    scale: Tensor


def tokens_of(x: Tensor | Rows, keep: slice) -> Tensor | Rows:
    """Some tokens of ``[B, tokens, K]``."""
    if isinstance(x, Rows):
        return Rows(x.values[:, keep], x.scale[:, keep])
    return x[:, keep]


def quantize_rows_ref(x: Tensor) -> Rows:
    """``x [..., K]`` with the largest magnitude of a row at 448."""
    x = x if x.dtype == torch.float64 else x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=TINY) / FP8_MAX
    return Rows((x / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale.float())


def quantize_tensor_ref(x: Tensor, scale: Tensor) -> Rows:
    """``x [B, tokens, K]`` under one ``scale []``, which is returned as ``[1, 1, 1]``; what lies
    beyond 448 becomes 448."""
    x = x if x.dtype == torch.float64 else x.float()
    return Rows((x / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale.view(1, 1, 1))


@dataclass(frozen=True)
class Config:
    """A program takes one row, all of it in registers."""

    warps: int


def config(width: int) -> Config:
    """16 elements a thread where there are that many."""
    return Config(warps=min(max(triton.next_power_of_2(width) // (16 * 32), 1), 16))


@triton.jit
def bounded(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    """float32 ``x`` between both. NaN stays, of which a clamp by itself makes a bound."""
    return tl.clamp(x, LOW, HIGH, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def rounded(x, BITS: tl.constexpr, LEAST: tl.constexpr):
    """float32 ``x`` to ``BITS`` bits behind its leading one, that of ``LEAST`` below; ties go to
    even.

    A number whose last bit is that one takes up the rest of ``x``, and is taken off again.
    """
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    large = tl.maximum(power, LEAST) * (1.5 * 2.0 ** (23 - BITS))
    return (x + large) - large


@triton.jit
def e4m3_rounded(x):
    """The nearest numbers of E4M3 to float32 ``x``, at most 448, as float32.

    For where a cast will not do: on sm_89 it rounds to float16 before, below it does not exist.
    """
    return rounded(x, 3, 2.0**-6)


@triton.jit
def e4m3(x, dtype: tl.constexpr):
    """float32 ``x``, at most 448, as E4M3; or, where ``dtype`` is uint8, as its bits.

    These are, put in place, those of a float16 number 8 powers of two smaller: the bias of its
    exponent is 15, not 7, and the upper bit of that is clear.
    """
    if dtype == tl.uint8:
        half = (e4m3_rounded(x) * 2.0**-8).to(tl.float16).to(tl.uint16, bitcast=True)
        bits = ((half >> 8) & 0x80) | ((half >> 7) & 0x7F)
        return tl.where(x == x, bits, 0x7F).to(tl.uint8)
    else:
        return x.to(tl.float8e4nv)


@triton.jit
def quantized(x, dtype: tl.constexpr):
    """A row ``x`` float32, zero beyond its end, as :func:`e4m3` gives it, and its scale."""
    largest = tl.maximum(tl.max(tl.abs(x), axis=0), _TINY)
    return e4m3(x * (_FP8_MAX / largest), dtype), largest / _FP8_MAX


@triton.jit
def _quantize_rows_kernel(
    x_ptr, out_ptr, scale_ptr, x_row, out_row, K: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_row + k, k < K, 0.0).to(tl.float32)
    q, scale = quantized(x, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_row + k, q, k < K)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _quantize_tensor_kernel(
    x_ptr, out_ptr, scale_ptr, x_row, out_row, K: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_row + k, k < K, 0.0).to(tl.float32)
    x = tl.div_rn(x, tl.load(scale_ptr))
    x = bounded(x, -_FP8_MAX, _FP8_MAX)
    q = e4m3(e4m3_rounded(x), out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_row + k, q, k < K)


def launch_quantize_rows(out: Tensor, scale: Tensor, x: Tensor) -> Launch:
    """Write ``x [M, K]`` into ``out [M, K]``, :func:`storable`, and ``scale [M, 1]``; rows may be
    strided."""
    assert scale.shape == (len(x), 1), scale.shape
    assert scale.is_contiguous(), scale.stride()
    return _launch(_quantize_rows_kernel, out, scale, x)


def launch_quantize_tensor(out: Tensor, x: Tensor, scale: Tensor) -> Launch:
    """Write ``x [M, K]`` under one ``scale []`` into ``out [M, K]``, :func:`storable`; rows may be
    strided."""
    assert scale.numel() == 1, scale.shape
    return _launch(_quantize_tensor_kernel, out, scale, x)


def _launch(kernel: Any, out: Tensor, scale: Tensor, x: Tensor) -> Launch:
    rows, width = x.shape
    assert out.shape == x.shape, (out.shape, x.shape)
    assert x.stride(1) == out.stride(1) == 1, "strided rows"
    args = {
        "x_ptr": x, "out_ptr": out, "scale_ptr": scale,
        "x_row": x.stride(0), "out_row": out.stride(0),
        "K": width, "BLOCK": triton.next_power_of_2(width),
    }  # fmt: skip
    return Launch(kernel, (rows,), args, config(width).warps)


def storable(out: Tensor, chip: Chip) -> Tensor:
    """``out`` E4M3 as kernels write it: as bytes where Triton cannot name the type."""
    return out if chip.fp8 else out.view(torch.uint8)


def empty_rows(like: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Values and scales to write into, for as many rows as ``like [..., K]`` has."""
    return (
        torch.empty((*like.shape[:-1], width), dtype=FP8, device=like.device),
        torch.empty((*like.shape[:-1], 1), dtype=torch.float32, device=like.device),
    )


@torch.library.custom_op("fluxkontext::quantize_rows", mutates_args=())
def _quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    out, scale = _fake(x)
    rows = x.flatten(0, -2)
    values = storable(out.view(rows.shape), chip_of(x.device))
    launch_quantize_rows(values, scale.view(-1, 1), rows)()
    return out, scale


@_quantize_rows.register_fake
def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return empty_rows(x, x.shape[-1])


def quantize_rows(x: Tensor) -> Rows:
    """:func:`quantize_rows_ref` as one kernel."""
    return Rows(*_quantize_rows(x))


@torch.library.custom_op("fluxkontext::quantize_tensor", mutates_args=())
def _quantize_tensor(x: Tensor, scale: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=FP8, device=x.device)
    rows = x.flatten(0, -2)
    launch_quantize_tensor(storable(out.view(rows.shape), chip_of(x.device)), rows, scale)()
    return out


@_quantize_tensor.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=FP8, device=x.device)


def quantize_tensor(x: Tensor, scale: Tensor) -> Rows:
    """:func:`quantize_tensor_ref` as one kernel."""
    return Rows(_quantize_tensor(x, scale), scale.view(1, 1, 1))
