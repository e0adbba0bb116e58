"""NVFP4: E2M1 numbers in blocks of 16, each with an E4M3 scale, under one float32 scale.

``x ≈ e2m1 * block_scale * scale``. Two numbers share a byte, the first in the lower nibble (NVIDIA,
"Introducing NVFP4", and cuBLAS' "Narrow precision data types usage").
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the codes 0 to 7 stand for; 8 to 15 are their negatives."""


@dataclass(frozen=True)
class NvFp4:
    """A matrix ``[N, K]``: ``packed [N, K / 2]`` uint8, ``block_scale [N, K / 16]`` E4M3, and
    ``scale``, a float32 scalar."""

    packed: Tensor
    block_scale: Tensor
    scale: Tensor


def pack(x: Tensor, scale: Tensor | None = None) -> NvFp4:
    """Quantise ``x [N, K]``, to nearest, ties to even.

    scale: what the largest block's scale is measured in; by default such that it becomes 448.
    """
    x = x.float()
    if scale is None:
        scale = x.abs().amax().clamp(min=1e-12) / (E2M1_MAX * E4M3_MAX)
    blocks = x.unflatten(-1, (-1, BLOCK)) / scale
    wanted = blocks.abs().amax(-1, keepdim=True) / E2M1_MAX
    block_scale = wanted.clamp(2**-9, E4M3_MAX).to(torch.float8_e4m3fn)
    codes = _codes(blocks / block_scale.float()).flatten(-2)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    return NvFp4(packed, block_scale.squeeze(-1), scale)


def unpack(x: NvFp4) -> Tensor:
    """The float32 matrix that ``x`` stands for."""
    codes = torch.stack((x.packed & 15, x.packed >> 4), -1).flatten(-2).long()
    values = torch.tensor((*VALUES, *(-v for v in VALUES)), device=x.packed.device)[codes]
    return values * x.block_scale.float().repeat_interleave(BLOCK, -1) * x.scale


def _codes(x: Tensor) -> Tensor:
    """The nearest E2M1 codes, uint8. Halfway, the even code wins, so every second bound is open."""
    code = torch.zeros_like(x, dtype=torch.uint8)
    for i, (low, high) in enumerate(pairwise(VALUES)):
        middle = (low + high) / 2
        code += (x.abs() >= middle) if i % 2 else (x.abs() > middle)
    return code | (x.signbit().to(torch.uint8) << 3)


def unswizzle_scales(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Block scales in cuBLAS' order of tiles of 128 × 4, as ComfyUI stores them, to ``[rows,
    columns]``.

    A tile holds, for each of 32 rows, the four columns of rows r, r + 32, r + 64 and r + 96
    (cuBLAS, "1D Block Scaling Factors Layout"); tiles run along a row, and pad its end.
    """
    high, wide = -(-rows // 128), -(-columns // 4)
    tiles = scales.view(torch.uint8).reshape(high, wide, 32, 4, 4)
    plain = tiles.permute(0, 3, 2, 1, 4).reshape(high * 128, wide * 4)
    return plain[:rows, :columns].contiguous().view(scales.dtype)


def swizzle_scales(scales: Tensor) -> Tensor:
    """The inverse of :func:`unswizzle_scales`, padded with zeros to whole tiles."""
    rows, columns = scales.shape
    padded = F.pad(scales.view(torch.uint8), (0, -columns % 4, 0, -rows % 128))
    high, wide = padded.shape[0] // 128, padded.shape[1] // 4
    tiles = padded.reshape(high, 4, 32, wide, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(padded.shape).contiguous().view(scales.dtype)


def swap_nibbles(packed: Tensor) -> Tensor:
    """Bytes whose first number lies in the upper nibble, to the order used here, or back."""
    return packed << 4 | packed >> 4
