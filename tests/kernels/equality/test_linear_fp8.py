"""FP8 linear layers equal their reference: ragged, strided, one stream or two."""

import pytest
import torch
from torch import Tensor

from fluxkontext.kernels.chips import Chip
from fluxkontext.kernels.linear_fp8 import launch_linear_fp8, linear_fp8, linear_fp8_ref
from fluxkontext.kernels.quantize import FP8, quantize_rows_ref

from ..house_rule import compare

SHAPES = [
    # batch, tokens, of them text, inner, columns
    pytest.param(1, 1, 0, 16, 8, id="one row"),
    pytest.param(2, 37, 0, 208, 136, id="ragged"),
    pytest.param(2, 150, 13, 144, 264, id="two streams"),
    pytest.param(1, 256, 128, 128, 256, id="full tiles"),
    pytest.param(1, 8704, 512, 3072, 9216, id="full size", marks=pytest.mark.large),
]


def layer(
    streams: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, their scales, and biases of a bf16 or fp16 result."""
    weight, scale = quantize_rows_ref(0.05 * torch.randn(streams, columns, inner, device=device))
    return weight, scale.squeeze(-1), torch.randn(streams, columns).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("batch", "tokens", "text_tokens", "inner", "columns"), SHAPES)
def test_scales_of_rows(
    batch: int,
    tokens: int,
    text_tokens: int,
    inner: int,
    columns: int,
    dtype: torch.dtype,
    chip: Chip,
    device: torch.device,
) -> None:
    """From the columns of one buffer into those of another, of which nothing else is written."""
    if not chip.fp8:
        pytest.skip("no FP8 tensor cores")
    x, x_scale = quantize_rows_ref(torch.randn(batch, tokens, inner + 32, device=device))
    x = x[..., 16:-16]
    weight, w_scale, bias = layer(2 if text_tokens else 1, inner, columns, dtype, device)
    buffer = torch.zeros(batch, tokens, columns + 16).to(bias)
    out = buffer[..., 8:-8]
    launch_linear_fp8(out, x, x_scale, weight, w_scale, bias, chip, text_tokens)()
    hold(out, x, x_scale, weight, w_scale, bias, text_tokens)
    assert not buffer[..., :8].any()
    assert not buffer[..., -8:].any()


@pytest.mark.usefixtures("_fp8")
def test_scales_of_tensors(device: torch.device) -> None:
    x = torch.randn(1, 9, 64, device=device).to(FP8)
    weight, _, bias = layer(1, 64, 24, torch.bfloat16, device)
    x_scale, w_scale = torch.tensor([[[0.7]]], device=device), torch.tensor([[0.2]], device=device)
    out = linear_fp8(x, x_scale, weight, w_scale, bias)
    hold(out, x, x_scale, weight, w_scale, bias, 0)


def hold(
    out: Tensor,
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor,
    text_tokens: int,
) -> None:
    """The scales and FP8 numbers are given: the exact result is that of just these."""
    reference = linear_fp8_ref(x, x_scale, weight, w_scale, bias, text_tokens)
    exact = linear_fp8_ref(x, x_scale, weight, w_scale, bias.double(), text_tokens)
    compare(out, reference, exact)
