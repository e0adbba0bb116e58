"""FP8 linear layers: E4M3 activations and weights, scales a row or a tensor, 16-bit results.

One product can serve both streams of a double block: their weights are stacked, and each tile of
rows takes those of the stream it belongs to. Text comes first in a sequence, second in a stack.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .chips import Chip, chip_of
from .gemm import Config, banded
from .launch import Launch


def linear_fp8_ref(
    x: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor, text_tokens: int = 0
) -> Tensor:
    """``x [B, S, K]`` E4M3 times ``weight [streams, N, K]`` E4M3, plus ``bias [streams, N]``.

    x_scale: float32 ``[B, S, 1]``, or ``[1, 1, 1]`` for all. w_scale: float32 ``[streams, N]`` or
    ``[streams, 1]``. The weights of the last stream are those of the first ``text_tokens`` of a
    sequence. Returns ``[B, S, N]`` in the bias' type; products are exact, and summed in float32.
    """
    wide = torch.float64 if bias.dtype == torch.float64 else torch.float32
    parts = []
    for stream, rows in zip((-1, 0), x.to(wide).tensor_split([text_tokens], dim=1), strict=True):
        product = rows @ weight[stream].to(wide).T
        parts.append(product * w_scale[stream].to(wide))
    split = x_scale.to(wide).expand(*x.shape[:2], 1).tensor_split([text_tokens], dim=1)
    biases = (bias[-1].to(wide), bias[0].to(wide))
    scaled = (p * s + b for p, s, b in zip(parts, split, biases, strict=True))
    return torch.cat(list(scaled), dim=1).to(bias.dtype)


def linear_fp8_scaled_mm(
    x: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor, text_tokens: int = 0
) -> Tensor:
    """:func:`linear_fp8_ref` by torch's own product; of one stream, bfloat16 results."""
    assert len(weight) == 1, "one stream"
    assert not text_tokens, "one stream"
    rows = x.flatten(0, 1)
    out = torch._scaled_mm(
        rows,
        weight[0].T,
        scale_a=x_scale.expand(*x.shape[:2], 1).reshape(-1, 1).contiguous(),
        scale_b=w_scale.expand(1, weight.shape[1]).contiguous(),
        bias=bias[0],
        out_dtype=bias.dtype,
    )
    result: Tensor = out.unflatten(0, x.shape[:2])
    return result


CONFIGS = {
    89: Config(128, 128, 128, warps=8, stages=3),
    90: Config(128, 256, 128, warps=8, stages=3),
    100: Config(128, 256, 128, warps=8, stages=3, specialize=True),
    120: Config(128, 128, 128, warps=8, stages=3),
}


@triton.jit
def _tile(tile, tokens, text_tokens, columns, M: tl.constexpr, N: tl.constexpr):
    """(first row, first column, stream, batch) of a tile; tiles of text come first."""
    text_blocks = tl.cdiv(text_tokens, M)
    row_blocks = text_blocks + tl.cdiv(tokens - text_tokens, M)
    column_blocks = tl.cdiv(columns, N)
    batch = tile // (row_blocks * column_blocks)
    block, column = banded(tile % (row_blocks * column_blocks), row_blocks, column_blocks)
    is_text = block < text_blocks
    row = tl.where(is_text, block * M, text_tokens + (block - text_blocks) * M)
    return row, column * N, is_text.to(tl.int32), batch


@triton.jit
def _finished(
    acc, row, column, stream, batch, tokens, columns,
    x_scale_ptr, w_scale_ptr, bias_ptr, x_scale_batch, x_scale_row, w_scale_stream, w_scale_row,
):  # fmt: skip
    """The sums ``acc [M, N]``, scaled, with the bias."""
    m = row + tl.arange(0, acc.shape[0])
    n = column + tl.arange(0, acc.shape[1])
    x_scale = tl.load(x_scale_ptr + batch * x_scale_batch + m * x_scale_row, m < tokens, 0.0)
    w_scale = tl.load(w_scale_ptr + stream * w_scale_stream + n * w_scale_row, n < columns, 0.0)
    bias = tl.load(bias_ptr + stream * columns + n, n < columns, 0.0).to(tl.float32)
    return acc * x_scale[:, None] * w_scale[None, :] + bias[None, :]


@triton.jit(do_not_specialize=["tokens", "text_tokens"])
def _linear_kernel(
    x_ptr, w_ptr, out_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, tokens, text_tokens, columns,
    x_batch, x_row, w_stream, w_row, out_batch, out_row,
    x_scale_batch, x_scale_row, w_scale_stream, w_scale_row,
    K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles,)."""
    row, column, stream, batch = _tile(tl.program_id(0), tokens, text_tokens, columns, M, N)
    batch = batch.to(tl.int64)
    end = tl.where(stream == 1, text_tokens, tokens)
    m, n, k = row + tl.arange(0, M), column + tl.arange(0, N), tl.arange(0, DEPTH)
    # Rows beyond the end read the last one: their results are not written.
    x_ptr += batch * x_batch + tl.minimum(m, tokens - 1)[:, None] * x_row + k[None, :]
    w_ptr += stream * w_stream + tl.minimum(n, columns - 1)[None, :] * w_row + k[:, None]
    acc = tl.zeros((M, N), tl.float32)
    for start in tl.range(0, K, DEPTH, num_stages=STAGES):
        x = tl.load(x_ptr + start, (start + k < K)[None, :], 0.0)
        w = tl.load(w_ptr + start, (start + k < K)[:, None], 0.0)
        acc = tl.dot(x, w, acc)
    out = _finished(
        acc, row, column, stream, batch, tokens, columns,
        x_scale_ptr, w_scale_ptr, bias_ptr, x_scale_batch, x_scale_row, w_scale_stream, w_scale_row,
    )  # fmt: skip
    out_ptr += batch * out_batch + m[:, None] * out_row + n[None, :]
    tl.store(out_ptr, out.to(out_ptr.dtype.element_ty), (m < end)[:, None] & (n < columns)[None, :])


@triton.jit(do_not_specialize=["tokens", "text_tokens"])
def _linear_tma_kernel(
    x_desc, w_desc, out_desc, text_desc, x_scale_ptr, w_scale_ptr, bias_ptr,
    tokens, text_tokens, columns, batches,
    x_scale_batch, x_scale_row, w_scale_stream, w_scale_row,
    K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """Grid: (programs,), each of which takes tile after tile.

    Text is written through a descriptor of its own, which ends where the image begins.
    """
    row_blocks = tl.cdiv(text_tokens, M) + tl.cdiv(tokens - text_tokens, M)
    tiles = row_blocks * tl.cdiv(columns, N) * batches
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), warp_specialize=SPECIALIZE):
        row, column, stream, batch = _tile(tile, tokens, text_tokens, columns, M, N)
        acc = tl.zeros((M, N), tl.float32)
        for start in tl.range(0, K, DEPTH, num_stages=STAGES):
            x = x_desc.load([batch, row, start]).reshape(M, DEPTH)
            w = w_desc.load([stream, column, start]).reshape(N, DEPTH)
            acc = tl.dot(x, w.T, acc)
        out = _finished(
            acc, row, column, stream, batch, tokens, columns,
            x_scale_ptr, w_scale_ptr, bias_ptr,
            x_scale_batch, x_scale_row, w_scale_stream, w_scale_row,
        )  # fmt: skip
        out = out.to(out_desc.dtype).reshape(1, M, N)
        if text_desc is None:
            out_desc.store([batch, row, column], out)
        elif stream == 1:
            text_desc.store([batch, row, column], out)
        else:
            out_desc.store([batch, row, column], out)


def launch_linear_fp8(
    out: Tensor,
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor,
    chip: Chip,
    text_tokens: int = 0,
) -> Launch:
    """Write the layer's result into ``out [B, S, N]``; arguments as of ``linear_fp8_ref``."""
    batch, tokens, width = x.shape
    streams, columns, _ = weight.shape
    assert out.shape == (batch, tokens, columns), out.shape
    assert streams == (2 if text_tokens else 1), (streams, text_tokens)
    assert bias.shape == (streams, columns), bias.shape
    assert bias.is_contiguous(), bias.stride()
    assert x.stride(-1) == weight.stride(-1) == out.stride(-1) == 1, "strided rows"
    assert tokens * max(x.stride(1), out.stride(1)) < 2**31, "offsets are 32-bit"
    assert width % 16 == 0, f"rows of {width} bytes are not aligned"
    c = CONFIGS[chip.sm]
    args = {
        "x_scale_ptr": x_scale, "w_scale_ptr": w_scale, "bias_ptr": bias,
        "tokens": tokens, "text_tokens": text_tokens, "columns": columns,
        "x_scale_batch": 0 if x_scale.shape[0] == 1 else x_scale.stride(0),
        "x_scale_row": 0 if x_scale.shape[1] == 1 else x_scale.stride(1),
        "w_scale_stream": w_scale.stride(0),
        "w_scale_row": 0 if w_scale.shape[1] == 1 else w_scale.stride(1),
        "K": width, "M": c.rows, "N": c.columns, "DEPTH": c.depth, "STAGES": c.stages,
    }  # fmt: skip
    blocks = triton.cdiv(text_tokens, c.rows) + triton.cdiv(tokens - text_tokens, c.rows)
    tiles = blocks * triton.cdiv(columns, c.columns) * batch
    if chip.tma:
        text = out[:, :text_tokens]
        args |= {
            "x_desc": _descriptor(x, c.rows, c.depth),
            "w_desc": _descriptor(weight, c.columns, c.depth),
            "out_desc": _descriptor(out, c.rows, c.columns),
            "text_desc": _descriptor(text, c.rows, c.columns) if text_tokens else None,
            "batches": batch, "SPECIALIZE": c.specialize,
        }  # fmt: skip
        grid = (min(tiles, chip.multiprocessors),)
        return Launch(_linear_tma_kernel, grid, args, c.warps, c.stages)
    args |= {
        "x_ptr": x, "w_ptr": weight, "out_ptr": out,
        "x_batch": x.stride(0), "x_row": x.stride(1),
        "w_stream": weight.stride(0), "w_row": weight.stride(1),
        "out_batch": out.stride(0), "out_row": out.stride(1),
    }  # fmt: skip
    return Launch(_linear_kernel, (tiles,), args, c.warps, c.stages)


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, columns])


@torch.library.custom_op("fluxkontext::linear_fp8", mutates_args=())
def _linear_fp8(
    x: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor, text_tokens: int
) -> Tensor:
    out = torch.empty(*x.shape[:2], weight.shape[1], dtype=bias.dtype, device=x.device)
    chip = chip_of(x.device)
    launch_linear_fp8(out, x, x_scale, weight, w_scale, bias, chip, text_tokens)()
    return out


@_linear_fp8.register_fake
def _(
    x: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor, text_tokens: int
) -> Tensor:
    return torch.empty(*x.shape[:2], weight.shape[1], dtype=bias.dtype, device=x.device)


def linear_fp8(
    x: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor, text_tokens: int = 0
) -> Tensor:
    """:func:`linear_fp8_ref` as one kernel."""
    out: Tensor = _linear_fp8(x, x_scale, weight, w_scale, bias, text_tokens)
    return out
