"""The NVFP4 format: rounding, packing, and the two ways in which files order it differently."""

import torch

from fluxkontext.kernels.nvfp4 import (
    BLOCK,
    VALUES,
    NvFp4,
    pack,
    swap_nibbles,
    swizzle_scales,
    unpack,
    unswizzle_scales,
)


def test_every_number_of_the_format_survives() -> None:
    values = torch.tensor([*VALUES, *(-v for v in VALUES)])
    x = values.repeat(3, 1) * torch.tensor([[1.0], [2.0], [0.25]])
    packed = pack(x, torch.tensor(1.0))
    assert packed.packed.shape == (3, 8)
    assert packed.block_scale.shape == (3, 1)
    assert torch.equal(unpack(packed), x)


def test_ties_go_to_the_even_code() -> None:
    halfway = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    x = torch.cat((halfway, -halfway, torch.tensor([6.0, 0.0])))[None]  # 6: the scale is 1
    expected = torch.tensor([0, 1, 1, 2, 2, 4, 4.0])
    assert torch.equal(unpack(pack(x, torch.tensor(1.0)))[0, :14], torch.cat((expected, -expected)))


def test_the_first_number_lies_in_the_lower_nibble() -> None:
    x = torch.zeros(1, BLOCK)
    x[0, 0], x[0, 1] = 6.0, -0.5
    packed = pack(x, torch.tensor(1.0)).packed
    assert packed[0].tolist() == [0x97, 0, 0, 0, 0, 0, 0, 0]
    assert swap_nibbles(packed)[0, 0] == 0x79


def test_the_largest_scale_of_a_block_is_the_largest_of_its_type() -> None:
    x = torch.randn(5, 64)
    packed = pack(x)
    assert packed.block_scale.float().max() == 448
    assert (unpack(packed) - x).abs().max() <= x.abs().max() / 6  # half of the widest gap, 4 to 6
    assert isinstance(packed, NvFp4)


def test_swizzled_scales() -> None:
    """Places by the formula in cuBLAS' documentation."""
    rows, columns = 200, 7
    scales = torch.arange(rows * columns).remainder(200).to(torch.uint8).reshape(rows, columns)
    swizzled = swizzle_scales(scales)
    assert swizzled.shape == (256, 8)
    flat = swizzled.flatten()
    for row, column in ((0, 0), (1, 0), (33, 2), (127, 3), (128, 4), (199, 6)):
        tile = row // 128 * 2 + column // 4
        place = tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4
        assert flat[place] == scales[row, column]
    assert torch.equal(unswizzle_scales(swizzled, rows, columns), scales)
