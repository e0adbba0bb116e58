"""Gated residual: ``x + gate * y`` (adaLN-Zero, DiT)."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .quantize import bounded

FP16_MAX = 65504.0
"""The largest finite float16."""

_FP16_MAX = tl.constexpr(FP16_MAX)


def gate_residual_ref(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """Add ``y [B, S, D]`` to ``x [B, S, D]`` through ``gate [B, 1, D]``.

    In float16 the sum saturates: late activations of FLUX leave its range (diffusers clips them).
    """
    out = torch.addcmul(x, gate, y)
    return out.clamp(-FP16_MAX, FP16_MAX) if out.dtype == torch.float16 else out


@dataclass(frozen=True)
class Config:
    """A program takes a tile of ``rows`` × ``columns``."""

    rows: int = 4
    columns: int = 1024
    warps: int = 4


CONFIG = Config()
"""On every chip: bound by memory."""


@triton.jit
def stored(x, dtype: tl.constexpr):
    """Float32 ``x`` in ``dtype``; float16 saturates, and NaN stays."""
    if dtype == tl.float16:
        x = bounded(x, -_FP16_MAX, _FP16_MAX)
    return x.to(dtype)


@triton.jit(do_not_specialize=["tokens"])
def _gate_residual_kernel(
    x_ptr, gate_ptr, y_ptr, out_ptr,
    tokens, x_batch, x_token, y_batch, y_token, gate_batch, out_batch, out_token,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of columns, blocks of tokens, batch)."""
    batch = tl.program_id(2).to(tl.int64)
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (token < tokens) & (d < D)
    gate = tl.load(gate_ptr + batch * gate_batch + d, d < D, 0.0).to(tl.float32)
    x = tl.load(x_ptr + batch * x_batch + token * x_token + d, mask, 0.0).to(tl.float32)
    y = tl.load(y_ptr + batch * y_batch + token * y_token + d, mask, 0.0).to(tl.float32)
    out = stored(tl.fma(gate, y, x), out_ptr.dtype.element_ty)
    tl.store(out_ptr + batch * out_batch + token * out_token + d, out, mask)


def launch_gate_residual(out: Tensor, x: Tensor, gate: Tensor, y: Tensor) -> Launch:
    """Write ``x + gate * y`` into ``out``, which may be x or y; gate ``[B or 1, 1, D]``."""
    batch, tokens, width = x.shape
    gate = gate.expand(batch, 1, width)
    assert out.shape == y.shape == x.shape, (out.shape, y.shape, x.shape)
    assert all(t.stride(-1) == 1 for t in (x, y, out, gate)), "strided rows"
    c = CONFIG
    args = {
        "x_ptr": x, "gate_ptr": gate, "y_ptr": y, "out_ptr": out, "tokens": tokens,
        "x_batch": x.stride(0), "x_token": x.stride(1),
        "y_batch": y.stride(0), "y_token": y.stride(1), "gate_batch": gate.stride(0),
        "out_batch": out.stride(0), "out_token": out.stride(1),
        "D": width, "ROWS": c.rows, "COLUMNS": c.columns,
    }  # fmt: skip
    grid = (triton.cdiv(width, c.columns), triton.cdiv(tokens, c.rows), batch)
    return Launch(_gate_residual_kernel, grid, args, c.warps)


@torch.library.custom_op("fluxkontext::gate_residual", mutates_args=())
def _gate_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch_gate_residual(out, x, gate, y)()
    return out


@_gate_residual.register_fake
def _(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def gate_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """:func:`gate_residual_ref` as one kernel."""
    out: Tensor = _gate_residual(x, gate, y)
    return out
