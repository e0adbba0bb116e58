"""What matrix products share: how a result is cut into tiles, and the order these are taken in."""

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True)
class Config:
    """Tiles of ``rows`` × ``columns`` of the result, ``depth`` of the inner axis at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    specialize: bool = False


_BAND = tl.constexpr(8)


@triton.jit
def banded(tile, row_blocks, column_blocks):
    """(block of rows, block of columns) of a tile.

    Tiles are taken in bands of 8 blocks of rows, column after column, so that what consecutive
    ones read is still in L2.
    """
    band = tile // (_BAND * column_blocks) * _BAND
    within = tile % (_BAND * column_blocks)
    height = min(row_blocks - band, _BAND)
    return band + within % height, within // height
