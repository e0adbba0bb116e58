"""GroupNorm, then SiLU: what stands before every convolution of the VAE.

Three kernels: the moments of pieces of a picture, the merge of these, and the result.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .launch import Launch


def group_norm_silu_ref(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool = True
) -> Tensor:
    """Normalise ``x [B, C, H, W]`` in groups of channels; ``weight, bias [C]``."""
    x = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(x) if silu else x


@dataclass(frozen=True)
class Config:
    """A program takes tiles of about ``elements`` numbers, and up to ``pieces`` share a picture."""

    elements: int = 4096
    pieces: int = 256
    warps: int = 8


CONFIG = Config()
"""On every chip: bound by memory, 16 numbers a thread."""


@triton.jit(do_not_specialize=["pixels", "piece"])
def _moments_kernel(
    x_ptr, mean_ptr, square_ptr, pixels, piece, x_batch, x_channel,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Mean, and sum of squares about it, of a group in a piece of ``piece`` pixels.

    Grid: (pieces, groups, batch). WIDTH: channels of a group. Results: ``[B, groups, pieces]``.
    """
    at, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = at * piece
    end = tl.minimum(first + piece, pixels)
    channel = group * WIDTH + tl.arange(0, WIDTH)
    x_ptr += batch * x_batch + channel[None, :] * x_channel
    mean = 0.0
    square = 0.0
    before = 0.0
    for start in tl.range(first, end, P):
        pixel = start + tl.arange(0, P)
        mask = (pixel < end)[:, None]
        x = tl.load(x_ptr + pixel[:, None], mask, 0.0).to(tl.float32)
        count = (tl.minimum(end - start, P) * WIDTH).to(tl.float32)
        tile_mean = tl.sum(tl.sum(x, axis=0), axis=0) / count
        centred = tl.where(mask, x - tile_mean, 0.0)
        tile_square = tl.sum(tl.sum(centred * centred, axis=0), axis=0)
        # Chan, Golub & LeVeque, "Updating formulae ... for computing sample variances", 1979
        away = tile_mean - mean
        mean += away * (count / (before + count))
        square += tile_square + away * away * (before * count / (before + count))
        before += count
    out = (batch * GROUPS + group) * tl.num_programs(0) + at
    tl.store(mean_ptr + out, mean)
    tl.store(square_ptr + out, square)


@triton.jit(do_not_specialize=["pixels", "piece", "pieces"])
def _merge_kernel(
    mean_ptr, square_ptr, pixels, piece, pieces, eps, WIDTH: tl.constexpr, PIECES: tl.constexpr
):
    """Put the mean, and one over the deviation, in place of the first piece's moments.

    Grid: (batch × groups,).
    """
    part = tl.arange(0, PIECES)
    first = tl.program_id(0) * pieces
    means = tl.load(mean_ptr + first + part, part < pieces, 0.0)
    squares = tl.load(square_ptr + first + part, part < pieces, 0.0)
    counts = tl.minimum(pixels - part * piece, piece) * WIDTH
    counts = tl.where(part < pieces, counts, 0).to(tl.float32)
    total = tl.sum(counts, axis=0)
    mean = tl.sum(means * counts, axis=0) / total
    away = means - mean
    variance = tl.sum(squares + counts * away * away, axis=0) / total
    tl.store(mean_ptr + first, mean)
    tl.store(square_ptr + first, tl.rsqrt(variance + eps))


@triton.jit(do_not_specialize=["pixels", "pieces"])
def _normalize_kernel(
    x_ptr, mean_ptr, inverse_ptr, weight_ptr, bias_ptr, out_ptr,
    pixels, pieces, x_batch, x_channel,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of pixels, groups, batch)."""
    group, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel = group * WIDTH + tl.arange(0, WIDTH)
    moments = (batch * GROUPS + group) * pieces
    mean = tl.load(mean_ptr + moments)
    scale = tl.load(inverse_ptr + moments) * tl.load(weight_ptr + channel).to(tl.float32)
    shift = tl.load(bias_ptr + channel).to(tl.float32)
    pixel = tl.program_id(0) * P + tl.arange(0, P)
    place = batch * x_batch + channel[None, :] * x_channel + pixel[:, None]
    x = tl.load(x_ptr + place, (pixel < pixels)[:, None], 0.0).to(tl.float32)
    y = (x - mean) * scale[None, :] + shift[None, :]
    if SILU:
        y = y / (1 + tl.exp(-y))
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), (pixel < pixels)[:, None])


def launch_group_norm(
    out: Tensor,
    moments: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
) -> tuple[Launch, Launch, Launch]:
    """Write the result for ``x [B, C, H, W]`` into ``out``, which may be x.

    Dense, channels a power of two. moments: ``[2, B, groups, pieces]`` float32 of
    :func:`moments_shape`, overwritten.
    """
    batch, channels, height, width = x.shape
    pixels = height * width
    assert x.is_contiguous(), x.stride()
    assert out.is_contiguous(), out.stride()
    assert moments.shape == moments_shape(x, groups), moments.shape
    pieces = moments.shape[-1]
    piece = triton.cdiv(pixels, pieces)
    group = channels // groups
    block = max(CONFIG.elements // group, 1)
    sizes = {"mean_ptr": moments[0], "pixels": pixels, "WIDTH": group}
    picture = {
        **sizes, "x_ptr": x, "x_batch": x.stride(0), "x_channel": pixels,
        "GROUPS": groups, "P": block,
    }  # fmt: skip
    merge = {
        **sizes, "square_ptr": moments[1], "piece": piece, "pieces": pieces, "eps": eps,
        "PIECES": triton.next_power_of_2(pieces),
    }  # fmt: skip
    result = {
        **picture, "inverse_ptr": moments[1], "weight_ptr": weight, "bias_ptr": bias,
        "out_ptr": out, "pieces": pieces, "SILU": silu,
    }  # fmt: skip
    blocks = triton.cdiv(pixels, block)
    picture |= {"square_ptr": moments[1], "piece": piece}
    return (
        Launch(_moments_kernel, (pieces, groups, batch), picture, CONFIG.warps),
        Launch(_merge_kernel, (batch * groups,), merge, warps=1),
        Launch(_normalize_kernel, (blocks, groups, batch), result, CONFIG.warps),
    )


def moments_shape(x: Tensor, groups: int) -> tuple[int, int, int, int]:
    """How large the scratch of :func:`launch_group_norm` is for ``x``."""
    pixels = x.shape[2] * x.shape[3]
    tiles = triton.cdiv(pixels * x.shape[1], CONFIG.elements)
    pieces = min(CONFIG.pieces, max(tiles // groups, 1))
    # Every piece holds a pixel, the last one too.
    return 2, x.shape[0], groups, triton.cdiv(pixels, triton.cdiv(pixels, pieces))


@torch.library.custom_op("fluxkontext::group_norm_silu", mutates_args=())
def _group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool
) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    moments = torch.empty(moments_shape(x, groups), dtype=torch.float32, device=x.device)
    for launch in launch_group_norm(out, moments, x, groups, weight, bias, eps, silu):
        launch()
    return out


@_group_norm_silu.register_fake
def _(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool = True
) -> Tensor:
    """:func:`group_norm_silu_ref` as three kernels."""
    out: Tensor = _group_norm_silu(x, groups, weight, bias, eps, silu)
    return out
