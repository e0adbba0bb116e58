"""Linear layers with NVFP4 weights equal their references."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fluxkontext.kernels.chips import Chip, chip_of
from fluxkontext.kernels.linear_w4a4 import (
    launch_linear_w4a4,
    launch_quantize_nvfp4,
    launch_round_nvfp4,
    linear_w4a4,
    linear_w4a4_ref,
    linear_w4a4_upcast,
)
from fluxkontext.kernels.linear_w4a16 import launch_linear_w4a16, linear_w4a16, linear_w4a16_ref
from fluxkontext.kernels.nvfp4 import E4M3_MAX, NvFp4, pack, unpack

from ..house_rule import compare

SHAPES = [
    pytest.param(1, 16, 8, id="one row"),
    pytest.param(37, 208, 136, id="ragged"),
    pytest.param(256, 256, 256, id="full tiles"),
    pytest.param(8704, 3072, 9216, id="full size", marks=pytest.mark.large),
]


def layer(inner: int, columns: int, like: Tensor) -> tuple[NvFp4, Tensor]:
    weight = pack(0.05 * torch.randn(columns, inner, device=like.device))
    return weight, torch.randn(columns).to(like)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inner", "columns"), SHAPES)
def test_w4a16(
    rows: int, inner: int, columns: int, dtype: torch.dtype, chip: Chip, device: torch.device
) -> None:
    """From the columns of one buffer into those of another, of which nothing else is written."""
    x = torch.randn(rows, inner + 16).to(device, dtype)[:, 8:-8]
    weight, bias = layer(inner, columns, x)
    buffer = torch.zeros(rows, columns + 16).to(x)
    out = buffer[:, 8:-8]
    launch_linear_w4a16(out, x, weight, bias, chip)()
    exact = F.linear(x.double(), unpack(weight).double(), bias.double())
    compare(out, linear_w4a16_ref(x, weight, bias), exact)
    assert not buffer[:, :8].any()
    assert not buffer[:, -8:].any()


@pytest.mark.parametrize(("rows", "inner", "columns"), SHAPES)
def test_w4a4(rows: int, inner: int, columns: int, chip: Chip, device: torch.device) -> None:
    if not chip.fp4:
        pytest.skip("no FP4 tensor cores")
    x = torch.randn(rows, inner).to(device, torch.bfloat16)
    weight, bias = layer(inner, columns, x)
    scale = torch.tensor(0.01, device=device)
    quantized, out = pack(x, scale), torch.empty(rows, columns).to(x)
    launch_linear_w4a4(out, quantized, weight, bias, chip)()
    exact = F.linear(unpack(quantized).double(), unpack(weight).double(), bias.double())
    compare(out, linear_w4a4_ref(x, scale, weight, bias), exact)


@pytest.mark.usefixtures("_fp8")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 16), (37, 272)])
def test_quantised_rows(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(shape[0], shape[1] + 16).to(device, dtype)[:, :-16]
    expected = pack(x, torch.tensor(0.01, device=device))
    out = NvFp4(*(torch.empty_like(t) for t in vars(expected).values()))
    out.scale.fill_(0.01)
    launch_quantize_nvfp4(out, x)()
    compare(unpack(out), unpack(expected), x.double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 16), (37, 272)])
def test_rounded_rows(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """Number by number what the codes stand for, from beyond the range to below it."""
    x = torch.randn(shape[0], shape[1] + 16).to(device, dtype)[:, :-16]
    x *= torch.tensor([30, 1, 1e-2, 1e-4]).to(x).repeat(10)[: len(x), None]
    scale, one = torch.tensor(0.01, device=device), torch.ones((), device=device)
    out = torch.empty(shape).to(x)
    launch_round_nvfp4(out, x, scale)()
    expected = replace(pack(x, scale), scale=one)
    assert torch.equal(out.float(), unpack(expected))
    if len(x) > 1:
        scales = expected.block_scale.float()
        assert {scales.min().item(), scales.max().item()} == {2**-9, E4M3_MAX}
        assert ((scales > 2**-9) & (scales < E4M3_MAX)).any()


def test_nan_stays(device: torch.device) -> None:
    """It takes its block with it, as in the reference."""
    x = torch.randn(3, 48).to(device, torch.bfloat16)
    x[1, 20] = torch.nan
    scale = torch.tensor(0.01, device=device)
    expected = pack(x, scale)
    lost = unpack(expected).isnan()
    assert lost.sum() == 16
    rounded = torch.empty_like(x)
    launch_round_nvfp4(rounded, x, scale)()
    assert torch.equal(rounded.isnan(), lost)
    if chip_of(device).fp8:
        out = NvFp4(*map(torch.empty_like, vars(expected).values()))
        out.scale.copy_(scale)
        launch_quantize_nvfp4(out, x)()
        assert torch.equal(unpack(out).isnan(), lost)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inner", "columns"), SHAPES)
def test_w4a4_upcast(
    rows: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = torch.randn(rows, inner + 16).to(device, dtype)[:, 8:-8]
    weight, bias = layer(inner, columns, x)
    scale = torch.tensor(0.01, device=device)
    exact = F.linear(unpack(pack(x, scale)).double(), unpack(weight).double(), bias.double())
    found = linear_w4a4_upcast(x, scale, weight, bias)
    compare(found, linear_w4a4_ref(x, scale, weight, bias), exact)


def test_functions(device: torch.device) -> None:
    x = torch.randn(2, 3, 32).to(device, torch.bfloat16)
    weight, bias = layer(32, 24, x)
    exact = F.linear(x.double(), unpack(weight).double(), bias.double())
    compare(linear_w4a16(x, weight, bias), linear_w4a16_ref(x, weight, bias), exact)
    if chip_of(device).fp4:
        scale = torch.tensor(0.01, device=device)
        out = linear_w4a4(x, scale, weight, bias)
        compare(out, linear_w4a4_ref(x.flatten(0, 1), scale, weight, bias).view_as(out), exact)
