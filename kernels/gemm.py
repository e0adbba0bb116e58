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


@triton.jit
def summed(a, b, acc, TMA: tl.constexpr):
    """``a [M, K]`` times ``b [K, N]``, plus ``acc`` float32.

    Of FP8, tensor cores up to Hopper's keep some 14 bits of a sum (SageAttention2, arXiv
    2411.10958, 3.4; DeepGEMM #50), those of 12.x perhaps no more: theirs are the sums of one step,
    which are added to the others in registers. On the chips with TMA, Triton does that itself, for
    9.0; 10.0 sums in float32.
    """
    if a.dtype.primitive_bitwidth > 8:
        return tl.dot(a, b, acc)
    elif TMA:
        return tl.dot(a, b, acc, max_num_imprecise_acc=a.shape[1])
    else:
        # The limit keeps the compiler from making both one operation.
        return acc + tl.dot(a, b, max_num_imprecise_acc=a.shape[1])
