"""GroupNorm and SiLU equal their reference, whatever the order of what they are given."""

import pytest
import torch

from fluxkontext.kernels.group_norm import group_norm_silu, group_norm_silu_ref, moments_shape

from ..house_rule import DTYPES, check

SHAPES = [
    # batch, channels, height, width; groups; pieces whose moments are merged
    pytest.param((1, 8, 1, 1), 4, 1, id="one pixel"),
    pytest.param((2, 32, 7, 9), 8, 1, id="ragged"),
    pytest.param((1, 8, 65, 67), 2, 4, id="several pieces"),
    pytest.param((1, 128, 1024, 1024), 32, 256, id="full size", marks=pytest.mark.large),
    pytest.param((1, 512, 128, 128), 32, 64, id="full depth", marks=pytest.mark.large),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("shape", "groups", "pieces"), SHAPES)
def test_group_norm_silu(
    shape: tuple[int, ...],
    groups: int,
    pieces: int,
    memory_format: torch.memory_format,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    x = (2 * torch.randn(shape) + 3).to(device, dtype).contiguous(memory_format=memory_format)
    assert moments_shape(x, groups)[-1] == pieces
    weight, bias = (1 + 0.3 * torch.randn(2, shape[1])).to(x).unbind(0)
    for silu in (True, False):
        out = group_norm_silu(x, groups, weight, bias, 1e-6, silu)
        check(out, group_norm_silu_ref, x, groups, weight, bias, 1e-6, silu)
        assert out.is_contiguous()
