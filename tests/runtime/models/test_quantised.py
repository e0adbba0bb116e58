"""Each module against the product that its format stands for, in float64, written anew with numpy
and ml_dtypes; and what rounding its inputs may cost at most."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fluxkontext.kernels import reference
from fluxkontext.kernels.linear_fp8 import Fp8Product, linear_fp8_ref
from fluxkontext.kernels.quantize import quantize_rows_ref, tokens_of
from fluxkontext.runtime.models.quantised import (
    QuantisedLinear,
    QuantisedWeight,
    input_scale,
    quantise,
    side_by_side,
    stand_in,
)
from fluxkontext.runtime.models.transformer import FusedLinear

OPS = reference()
E4M3, E2M1 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn
WIDTHS = [48, 48, 96]
ROWS, COLUMNS = sum(WIDTHS), 80
Array = NDArray[np.float64]

VARIANTS = [
    ("fp8", "dynamic"),
    ("fp8", "static"),
    ("fp8", "plain"),
    ("nvfp4", "plain"),
    ("nvfp4", "static"),
]


def layer(fused: bool = False, bias: bool = True) -> nn.Linear:
    """Rows of very different sizes, one of zeros, and a block of zeros."""
    torch.manual_seed(0)
    made = FusedLinear(COLUMNS, WIDTHS) if fused else nn.Linear(COLUMNS, ROWS, bias=bias)
    with torch.no_grad():
        made.weight.mul_(torch.logspace(-3, 1, ROWS)[:, None])
        made.weight[5] = 0
        made.weight[9, 16:32] = 0
    return made.requires_grad_(False)


def inputs_of(dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(2, 7, COLUMNS, generator=torch.Generator().manual_seed(1))
    x[0, 3] *= 100
    x[1, 2] = 0
    return x.to(dtype)


def quantised(
    form: str, takes: str, linear: nn.Linear, dtype: torch.dtype = torch.float32
) -> QuantisedLinear:
    tensors = quantise(linear.weight, form)
    if takes == "static":
        amax = inputs_of().abs().amax().item() / 4  # of the large token, much is clamped
        tensors["input_scale"] = torch.tensor(input_scale(amax, form))
    module = stand_in(linear, QuantisedWeight(form, takes, tensors), OPS, dtype)
    if linear.bias is not None:
        tensors["bias"] = linear.bias.to(dtype)
    module.load_state_dict(tensors, assign=True)
    return module


def float64(tensor: Tensor) -> Array:
    """Any of the types, read from its bytes by other code."""
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy().view(E4M3).astype(np.float64)
    return tensor.double().numpy()


def meaning(module: QuantisedLinear) -> Array:
    """The matrix that a module's tensors stand for."""
    state = module.state_dict()
    if "weight_scale_2" not in state:
        return float64(state["weight"]) * float64(state["weight_scale"])[:, None]
    packed = state["weight"].numpy()
    codes = np.stack((packed & 15, packed >> 4), -1).reshape(len(packed), -1)
    blocks = codes.view(E2M1).astype(np.float64).reshape(len(packed), -1, 16)
    scales = float64(state["weight_scale"])[:, :, None] * float64(state["weight_scale_2"])
    return (blocks * scales).reshape(len(packed), -1)


def single(x: Array) -> Array:
    """Rounded to float32, in which scales and quotients are computed."""
    return x.astype(np.float32).astype(np.float64)


def nearest(x: Array, kind: type) -> Array:
    """To nearest, ties to even."""
    return x.astype(np.float32).astype(kind).astype(np.float64)


def rounded(x: Array, form: str, takes: str, scale: Array | None) -> tuple[Array, Array]:
    """Inputs as the recipe has them multiplied, and how far each may be from what it was."""
    if takes == "plain":
        return x, np.zeros_like(x)
    if form == "fp8":
        s = single(np.maximum(np.abs(x).max(-1, keepdims=True), 1e-12) / 448)
        s = s if scale is None else scale
        y = nearest(np.clip(single(x / s), -448, 448), E4M3) * s
        # half a unit in the last of three places, or half of the smallest number
        allowed = np.maximum(np.abs(x) * 2**-4, s * 2**-10) + np.maximum(np.abs(x) - 448 * s, 0)
        return y, allowed
    assert scale is not None
    blocks = single(x / scale).reshape(*x.shape[:-1], -1, 16)
    largest = np.abs(blocks).max(-1, keepdims=True)
    s = nearest(np.clip(single(largest / 6), 2**-9, 448), E4M3)
    y = nearest(np.clip(single(blocks / s), -6, 6), E2M1) * s * scale
    # half of the widest gap, 4 to 6, and what lies above 6 because its scale was rounded or clamped
    allowed = np.broadcast_to(s * scale + np.maximum(largest - 6 * s, 0) * scale, blocks.shape)
    return y.reshape(x.shape), allowed.reshape(x.shape)


@pytest.mark.parametrize(("form", "takes"), VARIANTS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_that_of_what_the_numbers_stand_for(form: str, takes: str, bias: bool) -> None:
    linear, x = layer(bias=bias), inputs_of()
    module = quantised(form, takes, linear)
    weight = meaning(module)
    scale = module.state_dict().get("input_scale")
    taken, allowed = rounded(float64(x), form, takes, None if scale is None else float64(scale))
    result = module(x)
    assert isinstance(result, Tensor)
    assert result.shape == (2, 7, ROWS)
    offset = float64(linear.bias) if bias else 0.0
    # sums of K products in float32, and scales applied to them
    size = np.abs(taken) @ np.abs(weight).T + np.abs(offset)
    summing = (COLUMNS + 8) * 2.0**-24 * size
    found = float64(result)
    assert np.all(np.abs(found - taken @ weight.T - offset) <= summing)
    # and so no further from the unrounded product than its rounded inputs allow
    exact = float64(x) @ weight.T + offset
    assert np.all(np.abs(found - exact) <= allowed @ np.abs(weight).T * (1 + 2.0**-20) + summing)


@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
def test_rounding_is_not_for_nothing(form: str) -> None:
    """The test above would not see inputs that are left as they are; this one does."""
    x = inputs_of()
    takes = "dynamic" if form == "fp8" else "static"
    changed = quantised(form, takes, layer())(x)
    kept = quantised(form, "plain", layer())(x)
    assert isinstance(changed, Tensor)
    assert isinstance(kept, Tensor)
    assert 1e-3 < (changed - kept).norm() / kept.norm() < 1


@pytest.mark.parametrize(("form", "takes"), VARIANTS)
def test_parts_of_a_fused_layer_are_its_rows(form: str, takes: str) -> None:
    x = inputs_of()
    whole = quantised(form, takes, layer())(x)
    module = quantised(form, takes, layer(fused=True))
    assert isinstance(whole, Tensor)
    pieces = whole.split(WIDTHS, dim=-1)
    for found, wanted in zip(module(x), pieces, strict=True):
        assert torch.equal(found, wanted)
    for start, stop in ((0, 1), (1, 3), (2, 3)):
        for found, wanted in zip(module.part(x, start, stop), pieces[start:stop], strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_weight_only_fp8_is_the_dequantised_layer_bit_for_bit(
    dtype: torch.dtype, bias: bool
) -> None:
    linear, x = layer(bias=bias), inputs_of(dtype)
    module = quantised("fp8", "plain", linear, dtype)
    weight = torch.from_numpy(meaning(module).astype(np.float32)).to(dtype)
    offset = linear.bias.to(dtype) if bias else None
    assert torch.equal(module(x), F.linear(x, weight, offset))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_only_nvfp4_is_the_dequantised_layer_bit_for_bit(dtype: torch.dtype) -> None:
    linear, x = layer(), inputs_of(dtype)
    module = quantised("nvfp4", "plain", linear, dtype)
    weight = torch.from_numpy(meaning(module).astype(np.float32)).to(dtype)
    assert torch.equal(module(x), F.linear(x, weight, linear.bias.to(dtype)))


@pytest.mark.parametrize(("form", "takes"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_come_in_the_type_of_the_model(form: str, takes: str, dtype: torch.dtype) -> None:
    result = quantised(form, takes, layer(), dtype)(inputs_of(dtype))
    full = layer()(inputs_of())
    assert isinstance(result, Tensor)
    assert result.dtype == dtype
    assert result.isfinite().all()
    assert (result.float() - full).norm() / full.norm() < 0.6  # of the loud token, much is clamped


@pytest.mark.parametrize(
    ("dtype", "seed"), list(product([torch.float32, torch.bfloat16], range(3)))
)
def test_every_weight_is_the_nearest_that_its_scale_allows(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    weight = (torch.randn(33, 64) * torch.logspace(-4, 2, 33)[:, None]).to(dtype)
    weight[4] = 0
    exact = float64(weight)
    fp8 = quantise(weight, "fp8")
    assert {k: (v.dtype, tuple(v.shape)) for k, v in fp8.items()} == {
        "weight": (torch.float8_e4m3fn, (33, 64)),
        "weight_scale": (torch.float32, (33,)),
    }
    values = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float64)
    values = values[np.isfinite(values)]
    scale = float64(fp8["weight_scale"])
    np.testing.assert_allclose(scale[exact.any(1)] * 448, np.abs(exact).max(1)[exact.any(1)], 1e-7)
    best = np.abs(exact[:, :, None] - values * scale[:, None, None]).min(-1)
    error = np.abs(exact - float64(fp8["weight"]) * scale[:, None])
    assert np.all(error <= best + 2.0**-23 * np.abs(exact))

    packed = quantise(weight, "nvfp4")
    assert {k: (v.dtype, tuple(v.shape)) for k, v in packed.items()} == {
        "weight": (torch.uint8, (33, 32)),
        "weight_scale": (torch.float8_e4m3fn, (33, 4)),
        "weight_scale_2": (torch.float32, ()),
    }
    whole, blocks = float64(packed["weight_scale_2"]), exact.reshape(33, 4, 16)
    np.testing.assert_allclose(whole * 6 * 448, np.abs(exact).max(), 1e-6)
    wanted = np.clip(np.abs(blocks).max(-1) / 6 / whole, 2.0**-9, 448)
    assert np.array_equal(float64(packed["weight_scale"]), nearest(wanted, E4M3))
    scales = float64(packed["weight_scale"]) * whole
    values = np.arange(16, dtype=np.uint8).view(E2M1).astype(np.float64)
    best = np.abs(blocks[..., None] - values * scales[:, :, None, None]).min(-1)
    codes = np.stack((packed["weight"].numpy() & 15, packed["weight"].numpy() >> 4), -1)
    found = codes.reshape(33, 4, 16).view(E2M1).astype(np.float64) * scales[:, :, None]
    assert np.all(np.abs(blocks - found) <= best + 2.0**-22 * np.abs(blocks))


@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
def test_rows_are_quantised_in_chunks_without_a_trace(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantise(layer().weight, form)
    monkeypatch.setattr("fluxkontext.runtime.models.quantised.CHUNK", 7)
    for name, tensor in quantise(layer().weight, form).items():
        assert torch.equal(tensor.float(), whole[name].float()), name


@pytest.mark.parametrize(("form", "takes"), VARIANTS)
@pytest.mark.parametrize("bias", [True, False])
def test_only_dynamic_fp8_takes_rows(form: str, takes: str, bias: bool) -> None:
    module = quantised(form, takes, layer(bias=bias))
    assert module.takes_rows == ((form, takes, bias) == ("fp8", "dynamic", True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_come_quantised_give_the_same_bits(dtype: torch.dtype) -> None:
    module, x = quantised("fp8", "dynamic", layer(fused=True), dtype), inputs_of(dtype)
    rows = quantize_rows_ref(x)
    for given, found in zip(module(x), module(rows), strict=True):
        assert found.dtype == dtype
        assert torch.equal(given, found)
    (part,), (same,) = module.part(x, 1, 2), module.part(rows, 1, 2)
    assert torch.equal(part, same)
    kept = tokens_of(rows, slice(2, 5))
    torch.testing.assert_close(module.part(kept, 1, 2)[0], part[:, 2:5])


@pytest.mark.parametrize("takes", ["dynamic", "static"])
def test_two_fp8_layers_are_one_product(takes: str) -> None:
    counts: list[int] = []

    def counting(products: Sequence[Fp8Product]) -> list[Tensor]:
        counts.append(len(products))
        return linear_fp8_ref(products)

    x, y = inputs_of(), inputs_of()[:, :3]
    first, second = (quantised("fp8", takes, layer(fused=True)) for _ in range(2))
    second.weight_scale.mul_(2)
    expected = first(x), second(y)
    first.kernels = replace(OPS, linear_fp8=counting)
    for found, wanted in zip(side_by_side((first, second), (x, y)), expected, strict=True):
        assert [it.shape for it in found] == [it.shape for it in wanted]
        assert all(map(torch.equal, found, wanted))
    assert counts == [2]


def test_an_fp8_layer_beside_another_runs_by_itself() -> None:
    plain, x = layer(), inputs_of()
    beside = quantised("fp8", "dynamic", plain)
    found = side_by_side((plain, beside), (x, x[:, :2]))
    assert torch.equal(found[0], plain(x))
    assert torch.equal(found[1], beside(x[:, :2]))
