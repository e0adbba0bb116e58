"""FP8 linear layers equal their reference: ragged, strided, one stream or two."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fluxkontext.kernels.chips import Chip
from fluxkontext.kernels.linear_fp8 import (
    Fp8Product,
    launch_linear_fp8,
    linear_fp8,
    linear_fp8_ref,
    linear_fp8_upcast,
)
from fluxkontext.kernels.quantize import FP8, quantize_rows_ref

from ..house_rule import compare

SHAPES = [
    # batch, tokens of each stream, inner, columns
    pytest.param(1, [1], 16, 8, id="one row"),
    pytest.param(2, [37], 208, 136, id="ragged"),
    pytest.param(2, [13, 137], 144, 264, id="two streams"),
    pytest.param(1, [200, 1], 32, 40, id="long stream first"),
    pytest.param(1, [256, 256], 128, 256, id="full tiles"),
    pytest.param(1, [5], 15360, 8, id="long sums"),
    pytest.param(1, [512, 8192], 3072, 9216, id="full size", marks=pytest.mark.large),
]


def layer(
    inner: int, columns: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, their scales, and biases of a bf16 or fp16 result."""
    weight, scale = quantize_rows_ref(0.05 * torch.randn(columns, inner, device=device))
    return weight, scale.squeeze(-1), torch.randn(columns).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("batch", "tokens", "inner", "columns"), SHAPES)
def test_scales_of_rows(
    batch: int,
    tokens: list[int],
    inner: int,
    columns: int,
    dtype: torch.dtype,
    chip: Chip,
    device: torch.device,
) -> None:
    """From the columns of one buffer into those of another, of which nothing else is written."""
    if not chip.fp8:
        pytest.skip("no FP8 tensor cores")
    products = drawn(batch, tokens, inner, columns, dtype, device)
    buffers = [torch.zeros(*it.x.shape[:2], columns + 16).to(it.bias) for it in products]
    outs = [buffer[..., 8:-8] for buffer in buffers]
    launch_linear_fp8(outs, products, chip)()
    hold(outs, products)
    for buffer in buffers:
        assert not buffer[..., :8].any()
        assert not buffer[..., -8:].any()


@pytest.mark.usefixtures("_fp8")
def test_scales_of_tensors(device: torch.device) -> None:
    x = torch.randn(1, 9, 64, device=device).to(FP8)
    weight, _, bias = layer(64, 24, torch.bfloat16, device)
    x_scale, w_scale = torch.tensor([[[0.7]]], device=device), torch.tensor([0.2], device=device)
    products = [Fp8Product(x, x_scale, weight, w_scale, bias)]
    hold(linear_fp8(products), products)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("batch", "tokens", "inner", "columns"), SHAPES)
def test_upcast(
    batch: int,
    tokens: list[int],
    inner: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Sums beyond float16's largest number among them: scales come after."""
    products = drawn(batch, tokens, inner, columns, dtype, device)
    hold(linear_fp8_upcast(products), products)


def drawn(
    batch: int,
    tokens: list[int],
    inner: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Fp8Product]:
    """A product of each stream, whose inputs are columns of a wider buffer."""
    products = []
    for count in tokens:
        x, x_scale = quantize_rows_ref(torch.randn(batch, count, inner + 32, device=device))
        weight, w_scale, bias = layer(inner, columns, dtype, device)
        products.append(Fp8Product(x[..., 16:-16], x_scale, weight, w_scale, bias))
    return products


def hold(outs: Sequence[Tensor], products: Sequence[Fp8Product]) -> None:
    """The scales and FP8 numbers are given: the exact result is that of just these."""
    exact = linear_fp8_ref([it._replace(bias=it.bias.double()) for it in products])
    for found in zip(outs, linear_fp8_ref(products), exact, strict=True):
        compare(*found)
