"""Quantisation, alone and behind GELU, equals its reference; so does GELU."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxkontext.kernels.gelu import gelu, gelu_beside, gelu_beside_ref, gelu_ref, launch_gelu
from fluxkontext.kernels.launch import Launch
from fluxkontext.kernels.quantize import (
    FP8,
    e4m3,
    e4m3_rounded,
    launch_quantize_rows,
    quantize_rows,
    quantize_rows_ref,
    quantize_tensor,
    quantize_tensor_ref,
)

from ..house_rule import DTYPES, check, compare

SHAPES = [
    pytest.param((1, 1, 16), id="one row"),
    pytest.param((2, 7, 1000), id="ragged"),
    pytest.param((1, 3, 12288), id="full width"),
    pytest.param((1, 8704, 12288), id="full size", marks=pytest.mark.large),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gelu(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    wide = 3 * torch.randn(*shape[:-1], shape[-1] + 16).to(device, dtype)
    x = wide[..., : shape[-1]]
    check(gelu(x), gelu_ref, x)
    left = wide[..., 16 : 16 + shape[-1] // 4]
    check(gelu_beside(left, x), gelu_beside_ref, left, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_rows(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    wide = 3 * torch.randn(*shape[:-1], shape[-1] + 16).to(device, dtype)
    x = wide[..., : shape[-1]]
    (q, scale), (q_ref, scale_ref) = quantize_rows(x), quantize_rows_ref(x)
    torch.testing.assert_close(scale, scale_ref)
    compare(q.float() * scale, q_ref.float() * scale_ref, x.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Number by number as the reference, which graphs equal; the largest are beyond the range."""
    wide = 3 * torch.randn(*shape[:-1], shape[-1] + 16).to(device, dtype)
    x, scale = wide[..., : shape[-1]], torch.tensor(0.02, device=device)
    (q, one), (q_ref, one_ref) = quantize_tensor(x, scale), quantize_tensor_ref(x, scale)
    assert torch.equal(q.float(), q_ref.float())
    assert q.float().abs().max() == 448 or x.abs().max() < 448 * 0.02
    assert torch.equal(one, one_ref)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(1, 3, 32).to(device, dtype)
    x[:, 1, 5] = torch.nan
    for q, scale in (quantize_rows(x), quantize_tensor(x, torch.tensor(0.02, device=device))):
        assert torch.equal((q.float() * scale).isnan(), x.isnan())


@triton.jit
def _rounded_kernel(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out_ptr + at, e4m3_rounded(tl.load(x_ptr + at)))


@pytest.fixture
def points(device: torch.device) -> Tensor:
    """Every number of E4M3, all that lies halfway between two, and the next float32 to each."""
    codes = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    points = torch.cat((codes, (codes[1:] + codes[:-1]) / 2))
    points = torch.cat((points, *(points.nextafter(torch.tensor(to)) for to in (0.0, 1e3))))
    return torch.cat((points, -points, torch.randn(2048 - 1518))).clamp(-448, 448).to(device)


def test_e4m3_is_rounded_to_once(points: Tensor) -> None:
    out = torch.empty_like(points)
    Launch(_rounded_kernel, (8,), {"x_ptr": points, "out_ptr": out, "N": 256})()
    assert torch.equal(out, points.to(FP8).float())


@triton.jit
def _bits_kernel(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out_ptr + at, e4m3(tl.load(x_ptr + at), out_ptr.dtype.element_ty))


def test_e4m3_as_bits(points: Tensor) -> None:
    points[-1] = torch.nan
    out = torch.empty_like(points, dtype=torch.uint8)
    Launch(_bits_kernel, (8,), {"x_ptr": points, "out_ptr": out, "N": 256})()
    expected = points.to(FP8).float()
    assert torch.equal(out.view(FP8).float()[:-1], expected[:-1])
    assert out.view(FP8)[-1].isnan()


def test_a_row_of_zeros(device: torch.device) -> None:
    q, scale = quantize_rows(torch.zeros(2, 32, device=device))
    assert torch.equal(q.float(), torch.zeros(2, 32, device=device))
    assert torch.isfinite(scale).all()


@pytest.mark.usefixtures("_fp8")
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_into_the_columns_of_a_wider_buffer(dtype: torch.dtype, device: torch.device) -> None:
    x = (3 * torch.randn(9, 200)).to(device, dtype)
    buffer = torch.zeros(9, 320).to(device, FP8)
    out = buffer[:, 96:296]
    scale = torch.empty(9, 1, device=device)
    launch_gelu(out, x, scale)()
    expected, scale_ref = quantize_rows_ref(gelu_ref(x))
    torch.testing.assert_close(scale, scale_ref, rtol=5e-3, atol=0)  # bf16 rounds GELU first
    compare(out.float() * scale, expected.float() * scale, gelu_ref(x.double()))
    assert not buffer[:, :96].float().any()
    assert not buffer[:, 296:].float().any()


@pytest.mark.usefixtures("_fp8")
def test_rows_of_a_wider_buffer(device: torch.device) -> None:
    x = torch.randn(5, 64, device=device)
    buffer, scale = torch.zeros(5, 96).to(device, FP8), torch.empty(5, 1, device=device)
    launch_quantize_rows(buffer[:, 32:], scale, x)()
    expected, expected_scale = quantize_rows_ref(x)
    compare(buffer[:, 32:].float() * scale, expected.float() * expected_scale, x.double())
