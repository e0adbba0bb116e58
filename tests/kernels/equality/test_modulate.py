"""LayerNorm, modulation and the gated residual equal their references, alone and in one pass."""

import pytest
import torch
from torch import Tensor

from fluxkontext.kernels.gate_residual import gate_residual, gate_residual_ref
from fluxkontext.kernels.modulate import (
    launch_modulate,
    modulate,
    modulate_ref,
    residual_modulate,
    residual_modulate_ref,
)
from fluxkontext.kernels.quantize import FP8, quantize_rows_ref

from ..house_rule import DTYPES, check, compare

SHAPES = [
    pytest.param(1, 1, 32, id="one row"),
    pytest.param(2, 7, 96, id="ragged"),
    pytest.param(1, 5, 3072, id="full width"),
    pytest.param(1, 8704, 3072, id="full size", marks=pytest.mark.large),
]


def tokens(batch: int, count: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[B, S, D]``, a few columns of something wider, away from zero in the mean."""
    wide = torch.randn(batch, count, width + 16).add(0.5).to(device, dtype)
    return wide[..., :width]


def vectors(batch: int, width: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shift, scale and gate ``[B, 1, D]``, as a step's modulation holds them."""
    shift, scale, gate = torch.randn(3, batch, 1, width).to(like).unbind(0)
    return shift, scale, gate


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "count", "width"), SHAPES)
def test_functions(
    batch: int, count: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    x, y = (tokens(batch, count, width, dtype, device) for _ in range(2))
    shift, scale, gate = vectors(batch, width, x)
    check(modulate(x, shift, scale), modulate_ref, x, shift, scale)
    check(gate_residual(x, gate, y), gate_residual_ref, x, gate, y)
    results = residual_modulate(x, gate, y, shift, scale)
    check(results, residual_modulate_ref, x, gate, y, shift, scale)


@pytest.mark.usefixtures("_fp8")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text_tokens", [0, 3, 8])
def test_two_streams_quantised_in_one_pass(
    text_tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    """What comes out is as near as norm, modulation and quantisation one after the other."""
    x, y = (tokens(2, 11, 96, dtype, device) for _ in range(2))
    rows = torch.randn(2, 3, 2, 96).to(x)  # streams, (shift, scale, gate), batch, channels
    shift, scale, gate = rows[: 2 if text_tokens else 1].unbind(1)
    out, row_scale = torch.empty(2, 11, 96).to(device, FP8), torch.empty(2, 11, 1).to(device)
    total = torch.empty_like(x)
    launch_modulate(out, x, shift, scale, text_tokens, row_scale, (total, gate, y))()

    def reference(
        x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, gate: Tensor
    ) -> tuple[Tensor, Tensor]:
        def of_tokens(vector: Tensor) -> Tensor:
            text, image = vector[-1:].expand(text_tokens, -1, -1), vector[:1]
            return torch.cat((text, image.expand(11 - text_tokens, -1, -1))).transpose(0, 1)

        return residual_modulate_ref(x, of_tokens(gate), y, of_tokens(shift), of_tokens(scale))

    new, normed = reference(x, y, shift, scale, gate)
    exact = reference(*(t.double() for t in (x, y, shift, scale, gate)))
    compare(total, new, exact[0])
    q, q_scale = quantize_rows_ref(normed)
    compare(out.float() * row_scale, q.float() * q_scale, exact[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays(dtype: torch.dtype, device: torch.device) -> None:
    """An edit that went wrong is seen by its latents, and so must not become finite."""
    x = tokens(1, 3, 32, dtype, device)
    x[:, 1, 5] = torch.nan
    shift, scale, gate = vectors(1, 32, x)
    lost = x.isnan()
    assert torch.equal(gate_residual(x, gate, x).isnan(), lost)
    total, out = residual_modulate(x, gate, x, shift, scale)
    assert torch.equal(total.isnan(), lost)
    assert torch.equal(out.isnan(), lost.any(-1, keepdim=True).expand_as(x))


def test_fp16_saturates(device: torch.device) -> None:
    """A sum beyond 65504 is that, not infinite, and what is normed is finite."""
    x = torch.full((1, 3, 32), 6e4, dtype=torch.float16, device=device)
    x[:, :, 1::2] *= -1
    one, zero = torch.ones(1, 1, 32).to(x), torch.zeros(1, 1, 32).to(x)
    expected = x.sign() * 65504
    for gated in (gate_residual, gate_residual_ref):
        assert torch.equal(gated(x, one, x), expected)
    for fused in (residual_modulate, residual_modulate_ref):
        total, out = fused(x, one, x, zero, zero)
        assert torch.equal(total, expected)
        torch.testing.assert_close(out, x.sign())
