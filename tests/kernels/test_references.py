"""The reference of every op against its formula in float64, on odd and on strided tensors."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fluxkontext.kernels import reference
from fluxkontext.kernels.norm_rope import rope_table

OPS = reference()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
AXES = (16, 56, 56)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def strided(x: Tensor) -> Tensor:
    """The same values as a slice of something larger, as chunks of a fused projection are."""
    wide = torch.full((*x.shape[:-1], 3 * x.shape[-1] + 2), torch.nan, dtype=x.dtype)
    view = wide[..., x.shape[-1] : 2 * x.shape[-1]]
    view.copy_(x)
    assert x.numel() == x.shape[-1] or not view.is_contiguous()
    return view


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def check(
    op: Callable[..., Tensor], ideal: Callable[..., Tensor], *inputs: Tensor, fp32: float = 2.0
) -> None:
    """In bf16 and fp16 the error is at most twice the rounding of the ideal, dense and strided.

    fp32: the error allowed there, in units of 2**-24: what is summed in float32 is rounded often.
    """
    for dtype in DTYPES:
        low = [x if x.dtype == torch.float32 else x.to(dtype) for x in inputs]
        exact = ideal(*(x.double() for x in low))
        if dtype == torch.float32:
            allowed = fp32 * 2**-24 * rms(exact)
        else:
            allowed = 2 * rms(exact.to(dtype).double() - exact)
        for given in (low, [strided(x) for x in low]):
            before = [x.clone() for x in given]
            found = op(*given)
            assert found.dtype == dtype
            assert found.shape == exact.shape
            off = rms(found.double() - exact)
            print(dtype, off, allowed)
            assert off <= allowed, f"{dtype}: {off:.3g}, allowed {allowed:.3g}"
            assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


SHAPES = [(5, 1, 37), (2, 3, 40), (1, 17, 129), (3, 5, 256), (1, 7, 3072)]


@pytest.mark.parametrize("shape", SHAPES)
def test_modulate(shape: tuple[int, int, int]) -> None:
    batch, _, width = shape

    def ideal(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        norm = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return norm * (1 + scale) + shift

    x = 3 * draw(*shape) + 1
    check(OPS.modulate, ideal, x, draw(batch, 1, width, seed=1), draw(batch, 1, width, seed=2))


def test_modulate_epsilon() -> None:
    """A row of no variance is the shift; a tiny one is damped by the epsilon."""
    flat = torch.full((1, 2, 16), 4.0)
    shift, scale = draw(1, 1, 16).float(), draw(1, 1, 16, seed=1).float()
    torch.testing.assert_close(OPS.modulate(flat, shift, scale), shift.expand(1, 2, 16))
    tiny = 1e-3 * torch.tensor([1.0, -1.0]).repeat(8).expand(1, 2, 16)
    zero = torch.zeros(1, 1, 16)
    torch.testing.assert_close(OPS.modulate(tiny, zero, zero), tiny / math.sqrt(2e-6))


@pytest.mark.parametrize(("batch", "tokens", "heads"), [(1, 1, 1), (2, 5, 3), (1, 33, 2)])
def test_norm_rope(batch: int, tokens: int, heads: int) -> None:
    rope = rope_table(draw(tokens, 3, seed=3).mul(50).int(), AXES, 10_000.0)

    def ideal(x: Tensor, scale: Tensor, rope: Tensor) -> Tensor:
        normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale
        pairs = torch.view_as_complex(normed.unflatten(-1, (-1, 2)).contiguous())
        turned = pairs * torch.view_as_complex(rope.contiguous())[:, None]
        return torch.view_as_real(turned).flatten(-2)

    x = 0.3 * draw(batch, tokens, heads, 128)
    check(OPS.norm_rope, ideal, x, 1 + 0.2 * draw(128, seed=1), rope)


def test_norm_rope_epsilon() -> None:
    x = 1e-3 * torch.ones(1, 1, 1, 128)
    still = rope_table(torch.zeros(1, 3, dtype=torch.int32), AXES, 10_000.0)
    found = OPS.norm_rope(x, torch.ones(128), still)
    torch.testing.assert_close(found, x / math.sqrt(2e-6))


def test_rope_table() -> None:
    """Each axis turns its own channels, by position times a falling frequency."""
    positions = torch.tensor([[0, 0, 0], [1, 2, 3], [2, 511, 4095]], dtype=torch.int32)
    table = rope_table(positions, AXES, 10_000.0)
    assert table.shape == (3, 64, 2)
    assert table.dtype == torch.float32
    channel = 0
    for axis, dim in enumerate(AXES):
        for i in range(dim // 2):
            for row, position in enumerate(positions[:, axis].tolist()):
                angle = position * 10_000.0 ** (-2 * i / dim)
                found = table[row, channel].tolist()
                assert found == pytest.approx((math.cos(angle), math.sin(angle)), abs=1e-7)
            channel += 1


def test_rope_table_is_diffusers() -> None:
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    positions = torch.randint(0, 4096, (50, 3), generator=torch.Generator().manual_seed(0))
    cos, sin = FluxPosEmbed(theta=10_000, axes_dim=list(AXES))(positions.float())
    table = rope_table(positions.int(), AXES, 10_000.0)
    torch.testing.assert_close(table[..., 0], cos[:, ::2], rtol=0, atol=1e-7)
    torch.testing.assert_close(table[..., 1], sin[:, ::2], rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "dim"),
    [(1, 1, 1, 1, 8), (2, 5, 7, 3, 16), (1, 33, 65, 2, 128), (1, 4, 130, 2, 128)],
)
def test_attention(batch: int, queries: int, keys: int, heads: int, dim: int) -> None:
    def ideal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(dim)
        return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v).flatten(2)

    q = draw(batch, queries, heads, dim)
    k, v = (draw(batch, keys, heads, dim, seed=seed) for seed in (1, 2))
    check(OPS.attention, ideal, q, k, v, fp32=8.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_gate_residual(shape: tuple[int, int, int]) -> None:
    gate = draw(shape[0], 1, shape[2], seed=1)
    y = draw(*shape, seed=2)
    check(OPS.gate_residual, lambda x, gate, y: x + gate * y, draw(*shape), gate, y)


@pytest.mark.parametrize("shape", [(37,), (3, 15), (2, 7, 1024)])
def test_gelu(shape: tuple[int, ...]) -> None:
    """The tanh form, and not the exact one."""

    def ideal(x: Tensor) -> Tensor:
        return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    check(OPS.gelu, ideal, 2 * draw(*shape))
    x = torch.linspace(-3, 3, 50)
    assert (OPS.gelu(x) - torch.nn.functional.gelu(x)).abs().max() > 1e-4


@pytest.mark.parametrize("value", [30.0, -30.0, 1e4, -1e4])
def test_gelu_far_out(value: float) -> None:
    x = torch.tensor([value])
    assert OPS.gelu(x).tolist() == [max(value, 0.0)]


def test_names() -> None:
    """The set holds nothing but the references."""
    named: dict[str, Any] = vars(OPS)
    assert named.pop("name") == "reference"
    assert {f"{key}_ref" for key in named} == {op.__name__ for op in named.values()}
