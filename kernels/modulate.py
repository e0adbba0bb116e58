"""Modulated LayerNorm: ``LN(x) * (1 + scale) + shift`` without affine parameters (adaLN, DiT).

The kernel can add the gated residual of the layer before it on the way in, and quantise rows to FP8
on the way out: one pass over memory where the parts take three.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .chips import chip_of
from .gate_residual import gate_residual_ref, stored
from .launch import Launch
from .quantize import Rows, empty_rows, quantize_rows_ref, quantized, storable

EPS = 1e-6
"""LayerNorm epsilon of FLUX (BFL ``layers.py``, diffusers ``AdaLayerNormZero``)."""

_EPS = tl.constexpr(EPS)


def modulate_ref(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise the last axis of ``x [B, S, D]``, then scale and shift it by ``[B, 1, D]``."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)


def residual_modulate_ref(
    x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """``x + gate * y``, and that modulated."""
    x = gate_residual_ref(x, gate, y)
    return x, modulate_ref(x, shift, scale)


def modulate_rows_ref(x: Tensor, shift: Tensor, scale: Tensor) -> Rows:
    """:func:`modulate_ref`, quantised."""
    return quantize_rows_ref(modulate_ref(x, shift, scale))


def residual_modulate_rows_ref(
    x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Rows]:
    """:func:`residual_modulate_ref`, the second result quantised."""
    x = gate_residual_ref(x, gate, y)
    return x, modulate_rows_ref(x, shift, scale)


@dataclass(frozen=True)
class Config:
    """A program takes ``rows`` rows in turn, each in registers, and keeps the vectors it needs."""

    rows: int
    warps: int


def config(width: int) -> Config:
    """Up to 16 elements a thread, and no more than the three vectors beside them fit."""
    return Config(rows=4, warps=min(max(triton.next_power_of_2(width) // (16 * 32), 1), 16))


@triton.jit(do_not_specialize=["tokens", "text_tokens"])
def _modulate_kernel(
    x_ptr, gate_ptr, y_ptr, shift_ptr, scale_ptr, sum_ptr, out_ptr, row_scale_ptr,
    tokens, text_tokens,
    x_batch, x_token, y_batch, y_token, sum_batch, sum_token, out_batch, out_token,
    vector_stream, vector_batch,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    RESIDUAL: tl.constexpr, QUANTIZE: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of tokens, batch). Blocks of text come first; none holds both streams."""
    batch = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    text_blocks = tl.cdiv(text_tokens, ROWS)
    if block < text_blocks:
        first, end, stream = block * ROWS, text_tokens, vector_stream
    else:
        first, end, stream = text_tokens + (block - text_blocks) * ROWS, tokens, 0

    d = tl.arange(0, BLOCK)
    mask = d < D
    vector = stream + batch * vector_batch + d
    shift = tl.load(shift_ptr + vector, mask, 0.0).to(tl.float32)
    scale = 1 + tl.load(scale_ptr + vector, mask, 0.0).to(tl.float32)
    gate = None
    if RESIDUAL:
        gate = tl.load(gate_ptr + vector, mask, 0.0).to(tl.float32)
    for token in range(first, min(first + ROWS, end)):
        x = tl.load(x_ptr + batch * x_batch + token * x_token + d, mask, 0.0).to(tl.float32)
        if RESIDUAL:
            y = tl.load(y_ptr + batch * y_batch + token * y_token + d, mask, 0.0)
            x = tl.fma(gate, y.to(tl.float32), x)
            new = stored(x, sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + batch * sum_batch + token * sum_token + d, new, mask)
        centred = tl.where(mask, x - tl.sum(x, axis=0) / D, 0.0)
        variance = tl.sum(centred * centred, axis=0) / D
        out = centred * tl.rsqrt(variance + _EPS) * scale + shift
        if QUANTIZE:
            out, row_scale = quantized(out, out_ptr.dtype.element_ty)
            tl.store(row_scale_ptr + batch * tokens + token, row_scale)
        else:
            out = out.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + batch * out_batch + token * out_token + d, out, mask)


def launch_modulate(
    out: Tensor,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    text_tokens: int = 0,
    row_scale: Tensor | None = None,
    residual: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Launch:
    """Write ``x [B, S, D]``, modulated, into ``out``.

    shift, scale, and the gate: ``[streams, B, D]`` of (image, text), of one where ``text_tokens``
    is 0; alike in strides. row_scale: ``[B, S, 1]`` float32; with it, ``out`` is
    :func:`~.quantize.storable`. residual: (sum, gate, y); ``x + gate * y`` is what is modulated,
    and is written into sum, which may be x.
    """
    batch, tokens, width = x.shape
    total, gate, y = residual or (None, None, None)
    vectors = [v for v in (shift, scale, gate) if v is not None]
    assert all(v.shape == (2 if text_tokens else 1, batch, width) for v in vectors), shift.shape
    assert all(v.stride() == shift.stride() for v in vectors), "vectors differ in strides"
    assert all(t is None or t.shape == x.shape for t in (out, y, total)), out.shape
    assert all(t is None or t.stride(-1) == 1 for t in (x, out, y, total, shift)), "strided rows"
    assert row_scale is None or row_scale.is_contiguous(), row_scale
    c = config(width)
    y_strides, sum_strides = ((0, 0) if t is None else t.stride()[:2] for t in (y, total))
    args = {
        "x_ptr": x, "gate_ptr": gate, "y_ptr": y, "shift_ptr": shift, "scale_ptr": scale,
        "sum_ptr": total, "out_ptr": out, "row_scale_ptr": row_scale,
        "tokens": tokens, "text_tokens": text_tokens,
        "x_batch": x.stride(0), "x_token": x.stride(1),
        "y_batch": y_strides[0], "y_token": y_strides[1],
        "sum_batch": sum_strides[0], "sum_token": sum_strides[1],
        "out_batch": out.stride(0), "out_token": out.stride(1),
        "vector_stream": shift.stride(0), "vector_batch": shift.stride(1),
        "D": width, "BLOCK": triton.next_power_of_2(width), "ROWS": c.rows,
        "RESIDUAL": residual is not None, "QUANTIZE": row_scale is not None,
    }  # fmt: skip
    blocks = triton.cdiv(text_tokens, c.rows) + triton.cdiv(tokens - text_tokens, c.rows)
    return Launch(_modulate_kernel, (blocks, batch), args, c.warps)


@torch.library.custom_op("fluxkontext::modulate", mutates_args=())
def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    shift, scale = _streams(x, shift, scale)
    launch_modulate(out, x, shift, scale)()
    return out


@_modulate.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("fluxkontext::residual_modulate", mutates_args=())
def _residual_modulate(
    x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    total, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    gate, shift, scale = _streams(x, gate, shift, scale)
    launch_modulate(out, x, shift, scale, residual=(total, gate, y))()
    return total, out


@_residual_modulate.register_fake
def _(x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return out, torch.empty_like(out)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """:func:`modulate_ref` as one kernel."""
    out: Tensor = _modulate(x, shift, scale)
    return out


def residual_modulate(
    x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`residual_modulate_ref` as one kernel."""
    total, out = _residual_modulate(x, gate, y, shift, scale)
    return total, out


@torch.library.custom_op("fluxkontext::modulate_rows", mutates_args=())
def _modulate_rows(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    out, row_scale = empty_rows(x, x.shape[-1])
    shift, scale = _streams(x, shift, scale)
    launch_modulate(storable(out, chip_of(x.device)), x, shift, scale, row_scale=row_scale)()
    return out, row_scale


@_modulate_rows.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return empty_rows(x, x.shape[-1])


@torch.library.custom_op("fluxkontext::residual_modulate_rows", mutates_args=())
def _residual_modulate_rows(
    x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out, row_scale = empty_rows(x, x.shape[-1])
    gate, shift, scale = _streams(x, gate, shift, scale)
    values = storable(out, chip_of(x.device))
    launch_modulate(values, x, shift, scale, row_scale=row_scale, residual=(total, gate, y))()
    return total, out, row_scale


@_residual_modulate_rows.register_fake
def _(
    x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), *empty_rows(x, x.shape[-1])


def modulate_rows(x: Tensor, shift: Tensor, scale: Tensor) -> Rows:
    """:func:`modulate_rows_ref` as one kernel."""
    return Rows(*_modulate_rows(x, shift, scale))


def residual_modulate_rows(
    x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Rows]:
    """:func:`residual_modulate_rows_ref` as one kernel."""
    total, out, row_scale = _residual_modulate_rows(x, gate, y, shift, scale)
    return total, Rows(out, row_scale)


def _streams(x: Tensor, *vectors: Tensor) -> list[Tensor]:
    """Vectors ``[B or 1, 1, D]`` as one stream's ``[1, B, D]``, alike in strides."""
    shape = (1, x.shape[0], x.shape[2])
    return [vector.transpose(0, 1).expand(shape).contiguous() for vector in vectors]
