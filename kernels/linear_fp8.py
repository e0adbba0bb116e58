"""FP8 linear layers: E4M3 activations and weights, scales a row or a tensor, 16-bit results.

One launch serves both streams of a double block: their products have equal shapes but for the
tokens, and the short one's tiles fill up what the long one's last wave leaves idle.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .chips import Chip, chip_of
from .gemm import Config, banded, summed
from .launch import Launch


class Fp8Product(NamedTuple):
    """``x [B, S, K]`` E4M3 times ``weight [N, K]`` E4M3, plus ``bias [N]``, whose type is the
    result's.

    x_scale: float32 ``[B, S, 1]``, or ``[1, 1, 1]`` for all. w_scale: float32 ``[N]`` or ``[1]``.
    """

    x: Tensor
    x_scale: Tensor
    weight: Tensor
    w_scale: Tensor
    bias: Tensor


def linear_fp8_ref(products: Sequence[Fp8Product]) -> list[Tensor]:
    """``[B, S, N]`` of each of one or two products, which differ in S alone.

    The single products are exact, and summed in float32.
    """
    return [_product_ref(*product) for product in products]


def _product_ref(
    x: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor
) -> Tensor:
    wide = torch.float64 if bias.dtype == torch.float64 else torch.float32
    sums = x.to(wide) @ weight.to(wide).T
    return (sums * w_scale.to(wide) * x_scale.to(wide) + bias.to(wide)).to(bias.dtype)


def linear_fp8_scaled_mm(products: Sequence[Fp8Product]) -> list[Tensor]:
    """:func:`linear_fp8_ref` by torch's own product, one after the other; bfloat16 results."""
    return [_scaled_mm(*product) for product in products]


def _scaled_mm(x: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor) -> Tensor:
    out = torch._scaled_mm(
        x.flatten(0, 1),
        weight.T,
        scale_a=x_scale.expand(*x.shape[:2], 1).reshape(-1, 1).contiguous(),
        scale_b=w_scale.expand(1, len(weight)).contiguous(),
        bias=bias,
        out_dtype=bias.dtype,
    )
    result: Tensor = out.unflatten(0, x.shape[:2])
    return result


def linear_fp8_upcast(products: Sequence[Fp8Product]) -> list[Tensor]:
    """:func:`linear_fp8_ref` for tensor cores that do not multiply FP8: as one kernel after copies
    of inputs and weights in the result's 16-bit type, which holds E4M3 exactly."""
    return linear_fp8([_upcast(*product) for product in products])


def _upcast(
    x: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor
) -> Fp8Product:
    return Fp8Product(x.to(bias.dtype), x_scale, weight.to(bias.dtype), w_scale, bias)


CONFIGS = {
    89: Config(128, 128, 128, warps=8, stages=3),
    90: Config(256, 128, 128, warps=8, stages=3),  # 256 columns spill
    100: Config(128, 256, 128, warps=8, stages=3, specialize=True),
    120: Config(128, 128, 128, warps=8, stages=3),
}
UPCAST = Config(128, 128, 64, warps=8, stages=3)
"""On every chip."""


@triton.jit
def _tile(tile, tokens, tokens2, columns, M: tl.constexpr, N: tl.constexpr):
    """(whether it is the second product's, its first row and column, batch) of a tile."""
    blocks = tl.cdiv(tokens, M)
    row_blocks, column_blocks = blocks + tl.cdiv(tokens2, M), tl.cdiv(columns, N)
    batch = tile // (row_blocks * column_blocks)
    block, column = banded(tile % (row_blocks * column_blocks), row_blocks, column_blocks)
    second = block >= blocks
    return second, tl.where(second, block - blocks, block) * M, column * N, batch


@triton.jit
def _finished(
    acc, row, column, batch, tokens, columns,
    x_scale_ptr, w_scale_ptr, bias_ptr, x_scale_batch, x_scale_row, w_scale_row,
):  # fmt: skip
    """The sums ``acc [M, N]``, scaled, with the bias."""
    m = row + tl.arange(0, acc.shape[0])
    n = column + tl.arange(0, acc.shape[1])
    x_scale = tl.load(x_scale_ptr + batch * x_scale_batch + m * x_scale_row, m < tokens, 0.0)
    w_scale = tl.load(w_scale_ptr + n * w_scale_row, n < columns, 0.0)
    bias = tl.load(bias_ptr + n, n < columns, 0.0).to(tl.float32)
    return acc * x_scale[:, None] * w_scale[None, :] + bias[None, :]


@triton.jit(do_not_specialize=["tokens", "tokens2"])
def _linear_kernel(
    x_ptr, w_ptr, out_ptr, x_scale_ptr, w_scale_ptr, bias_ptr,
    x2_ptr, w2_ptr, out2_ptr, x_scale2_ptr, w_scale2_ptr, bias2_ptr,
    x_batch, x_row, out_batch, out_row, x_scale_batch, x_scale_row,
    x2_batch, x2_row, out2_batch, out2_row, x_scale2_batch, x_scale2_row,
    tokens, tokens2, columns, w_scale_row,
    K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles,)."""
    second, row, column, batch = _tile(tl.program_id(0), tokens, tokens2, columns, M, N)
    if x2_ptr is not None:
        if second:
            x_ptr, w_ptr, out_ptr = x2_ptr, w2_ptr, out2_ptr
            x_scale_ptr, w_scale_ptr, bias_ptr = x_scale2_ptr, w_scale2_ptr, bias2_ptr
        tokens = tl.where(second, tokens2, tokens)
        x_batch, x_row = tl.where(second, x2_batch, x_batch), tl.where(second, x2_row, x_row)
        out_batch = tl.where(second, out2_batch, out_batch)
        out_row = tl.where(second, out2_row, out_row)
        x_scale_batch = tl.where(second, x_scale2_batch, x_scale_batch)
        x_scale_row = tl.where(second, x_scale2_row, x_scale_row)
    batch = batch.to(tl.int64)
    m, n, k = row + tl.arange(0, M), column + tl.arange(0, N), tl.arange(0, DEPTH)
    # Rows beyond the end read the last one: their results are not written.
    x_ptr += batch * x_batch + tl.minimum(m, tokens - 1)[:, None] * x_row + k[None, :]
    w_ptr += tl.minimum(n, columns - 1)[None, :] * K + k[:, None]
    acc = tl.zeros((M, N), tl.float32)
    for start in tl.range(0, K, DEPTH, num_stages=STAGES):
        x = tl.load(x_ptr + start, (start + k < K)[None, :], 0.0)
        w = tl.load(w_ptr + start, (start + k < K)[:, None], 0.0)
        acc = summed(x, w, acc, False)
    out = _finished(
        acc, row, column, batch, tokens, columns,
        x_scale_ptr, w_scale_ptr, bias_ptr, x_scale_batch, x_scale_row, w_scale_row,
    )  # fmt: skip
    out_ptr += batch * out_batch + m[:, None] * out_row + n[None, :]
    inside = (m < tokens)[:, None] & (n < columns)[None, :]
    tl.store(out_ptr, out.to(out_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["tokens", "tokens2"])
def _linear_tma_kernel(
    x_desc, w_desc, out_desc, x_scale_ptr, w_scale_ptr, bias_ptr,
    x2_desc, w2_desc, out2_desc, x_scale2_ptr, w_scale2_ptr, bias2_ptr,
    x_scale_batch, x_scale_row, x_scale2_batch, x_scale2_row,
    tokens, tokens2, columns, w_scale_row, batches,
    K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """Grid: (programs,), each of which takes tile after tile."""
    row_blocks = tl.cdiv(tokens, M) + tl.cdiv(tokens2, M)
    tiles = row_blocks * tl.cdiv(columns, N) * batches
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), warp_specialize=SPECIALIZE):
        second, row, column, batch = _tile(tile, tokens, tokens2, columns, M, N)
        x_from, w_from, out_to, rows = x_desc, w_desc, out_desc, tokens
        x_scale, w_scale, bias = x_scale_ptr, w_scale_ptr, bias_ptr
        scale_batch, scale_row = x_scale_batch, x_scale_row
        if x2_desc is not None:
            if second:
                x_from, w_from, out_to = x2_desc, w2_desc, out2_desc
                x_scale, w_scale, bias = x_scale2_ptr, w_scale2_ptr, bias2_ptr
            rows = tl.where(second, tokens2, tokens)
            scale_batch = tl.where(second, x_scale2_batch, x_scale_batch)
            scale_row = tl.where(second, x_scale2_row, x_scale_row)
        acc = tl.zeros((M, N), tl.float32)
        for start in tl.range(0, K, DEPTH, num_stages=STAGES):
            x = x_from.load([batch, row, start]).reshape(M, DEPTH)
            w = w_from.load([column, start])
            acc = summed(x, w.T, acc, True)
        out = _finished(
            acc, row, column, batch, rows, columns,
            x_scale, w_scale, bias, scale_batch, scale_row, w_scale_row,
        )  # fmt: skip
        out_to.store([batch, row, column], out.to(out_desc.dtype).reshape(1, M, N))


def launch_linear_fp8(outs: Sequence[Tensor], products: Sequence[Fp8Product], chip: Chip) -> Launch:
    """Write the results of ``linear_fp8_ref`` into ``outs``, each ``[B, S, N]``; FP8 numbers may
    come in a 16-bit type."""
    batch, _, width = products[0].x.shape
    columns = len(products[0].weight)
    for out, (x, x_scale, weight, w_scale, bias) in zip(outs, products, strict=True):
        assert x.shape == (batch, x.shape[1], width), x.shape
        assert out.shape == (batch, x.shape[1], columns), out.shape
        assert weight.shape == (columns, width), weight.shape
        assert x_scale.shape in ((*x.shape[:2], 1), (1, 1, 1)), x_scale.shape
        assert len(w_scale) == len(products[0].w_scale), "scales of rows and of tensors"
        assert bias.shape == (columns,), bias.shape
        assert out.itemsize == 2, out.dtype
        assert weight.is_contiguous(), weight.stride()
        assert bias.is_contiguous(), bias.stride()
        assert w_scale.is_contiguous(), w_scale.stride()
        assert x.stride(-1) == out.stride(-1) == 1, "strided rows"
        assert x.shape[1] * max(x.stride(1), out.stride(1)) < 2**31, "offsets are 32-bit"
    assert len(products) in (1, 2), len(products)
    assert width % 16 == 0, f"rows of {width} bytes are not aligned"
    fp8 = products[0].x.itemsize == 1
    c, tma = CONFIGS[chip.sm] if fp8 else UPCAST, fp8 and chip.tma
    counts = [product.x.shape[1] for product in products]
    args: dict[str, Any] = {
        "tokens": counts[0], "tokens2": sum(counts[1:]), "columns": columns,
        "w_scale_row": 0 if len(products[0].w_scale) == 1 else 1,
        "K": width, "M": c.rows, "N": c.columns, "DEPTH": c.depth, "STAGES": c.stages,
    }  # fmt: skip
    args |= _operands("", outs[0], products[0], c, tma)
    second = _operands("2", outs[-1], products[-1], c, tma)
    args |= second if len(products) == 2 else dict.fromkeys(second)
    tiles = sum(triton.cdiv(count, c.rows) for count in counts)
    tiles *= triton.cdiv(columns, c.columns) * batch
    if not tma:
        return Launch(_linear_kernel, (tiles,), args, c.warps, c.stages)
    args |= {"batches": batch, "SPECIALIZE": c.specialize}
    grid = (min(tiles, chip.multiprocessors),)
    return Launch(_linear_tma_kernel, grid, args, c.warps, c.stages)


def _operands(
    number: str, out: Tensor, product: Fp8Product, c: Config, tma: bool
) -> dict[str, Any]:
    """Arguments of the product of that number."""
    x, x_scale, weight, w_scale, bias = product
    args = {
        f"x_scale{number}_ptr": x_scale,
        f"w_scale{number}_ptr": w_scale,
        f"bias{number}_ptr": bias,
        f"x_scale{number}_batch": 0 if len(x_scale) == 1 else x_scale.stride(0),
        f"x_scale{number}_row": 0 if x_scale.shape[1] == 1 else x_scale.stride(1),
    }
    if tma:
        return args | {
            f"x{number}_desc": _descriptor(x, 1, c.rows, c.depth),
            f"w{number}_desc": _descriptor(weight, c.columns, c.depth),
            f"out{number}_desc": _descriptor(out, 1, c.rows, c.columns),
        }
    return args | {
        f"x{number}_ptr": x,
        f"w{number}_ptr": weight,
        f"out{number}_ptr": out,
        f"x{number}_batch": x.stride(0),
        f"x{number}_row": x.stride(1),
        f"out{number}_batch": out.stride(0),
        f"out{number}_row": out.stride(1),
    }


def _descriptor(x: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))


@torch.library.custom_op("fluxkontext::linear_fp8", mutates_args=())
def _linear_fp8(
    x: Sequence[Tensor],
    x_scale: Sequence[Tensor],
    weight: Sequence[Tensor],
    w_scale: Sequence[Tensor],
    bias: Sequence[Tensor],
) -> list[Tensor]:
    products = list(map(Fp8Product, x, x_scale, weight, w_scale, bias))
    outs = [_empty(product) for product in products]
    launch_linear_fp8(outs, products, chip_of(outs[0].device))()
    return outs


@_linear_fp8.register_fake
def _(
    x: Sequence[Tensor],
    x_scale: Sequence[Tensor],
    weight: Sequence[Tensor],
    w_scale: Sequence[Tensor],
    bias: Sequence[Tensor],
) -> list[Tensor]:
    return [_empty(product) for product in map(Fp8Product, x, x_scale, weight, w_scale, bias)]


def _empty(product: Fp8Product) -> Tensor:
    x, bias = product.x, product.bias
    return torch.empty(*x.shape[:2], len(bias), dtype=bias.dtype, device=x.device)


def linear_fp8(products: Sequence[Fp8Product]) -> list[Tensor]:
    """:func:`linear_fp8_ref` as one kernel."""
    out: list[Tensor] = _linear_fp8(*map(list, zip(*products, strict=True)))
    return out
