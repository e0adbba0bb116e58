"""Attention equals its reference on every chip's configuration: ragged, strided, quantised."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fluxkontext.kernels.attention import (
    Rotation,
    attention,
    attention_fp8_ref,
    attention_ref,
    attention_rotated_ref,
    launch_attention,
    launch_attention_fp8,
)
from fluxkontext.kernels.attention_inputs import (
    Fp8Inputs,
    attention_inputs_ref,
    launch_attention_inputs,
    quantize_attention_ref,
)
from fluxkontext.kernels.chips import Chip
from fluxkontext.kernels.norm_rope import qk_norm_rope_ref, rope_table

from ..house_rule import check, compare

SHAPES = [
    # batch, queries, keys, heads, channels of a head
    pytest.param(1, 1, 1, 1, 64, id="one token"),
    pytest.param(2, 37, 201, 2, 64, id="ragged d64"),
    pytest.param(1, 131, 131, 2, 128, id="ragged d128"),
    pytest.param(1, 128, 256, 1, 128, id="full tiles"),
    pytest.param(1, 8704, 8704, 4, 128, id="full size", marks=pytest.mark.large),
]


def heads(batch: int, tokens: int, count: int, dim: int, like: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values ``[B, S, H, d]``: views of a fused projection."""
    return torch.randn(batch, tokens, 3, count, dim).to(like).unbind(2)


def table(tokens: int, dim: int, device: torch.device) -> Tensor:
    ids = torch.arange(tokens, device=device)
    return rope_table(torch.stack((ids // 50, ids // 7, ids % 7), -1), (dim - 48, 24, 24), 1e4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("batch", "queries", "keys", "count", "dim"), SHAPES)
def test_attention(
    batch: int,
    queries: int,
    keys: int,
    count: int,
    dim: int,
    dtype: torch.dtype,
    chip: Chip,
    device: torch.device,
) -> None:
    """Into columns of a wider buffer, of which nothing else is written."""
    like = torch.empty(0, dtype=dtype, device=device)
    q, _, _ = heads(batch, queries, count, dim, like)
    _, k, v = heads(batch, keys, count, dim, like)
    buffer = torch.zeros(batch, queries, (count + 2) * dim).to(like)
    out = buffer[..., dim:-dim]
    launch_attention(out, q, k, v, chip)()
    check(out, attention_ref, q, k, v)
    assert not buffer[..., :dim].any()
    assert not buffer[..., -dim:].any()


@pytest.mark.parametrize("dim", [64, 128])
def test_function(dim: int, device: torch.device) -> None:
    q, k, v = heads(1, 33, 2, dim, torch.empty(0, dtype=torch.bfloat16, device=device))
    check(attention(q, k, v), attention_ref, q, k, v)


@pytest.mark.parametrize("dim", [64, 128])
def test_scores_far_from_zero(dim: int, chip: Chip, device: torch.device) -> None:
    """One key takes all the weight, and exponents would overflow without the running maximum."""
    q, k, v = heads(1, 70, 1, dim, torch.empty(0, dtype=torch.bfloat16, device=device))
    out = torch.empty(1, 70, dim).to(q)
    launch_attention(out, 30 * q, 30 * k, v, chip)()
    check(out, attention_ref, 30 * q, 30 * k, v)


@pytest.mark.parametrize("dim", [64, 128])
def test_rotated_as_loaded(dim: int, chip: Chip, device: torch.device) -> None:
    q, k, v = heads(1, 71, 2, dim, torch.empty(0, dtype=torch.bfloat16, device=device))
    q_norm, k_norm = (1 + 0.3 * torch.randn(2, dim)).to(q).unbind(0)
    rope = table(71, dim, device)
    rotation = Rotation(q_norm, k_norm, rope[10:50], rope)
    q, out = q[:, 10:50], torch.empty(1, 40, 2 * dim).to(q)
    launch_attention(out, q, k, v, chip, rotation)()

    exact = {name: value.double() for name, value in vars(rotation).items()}
    compare(
        out,
        attention_rotated_ref(q, k, v, rotation),
        attention_rotated_ref(q.double(), k.double(), v.double(), Rotation(**exact)),
    )


@pytest.mark.usefixtures("_fp8")
@pytest.mark.parametrize(
    ("tokens", "text_tokens", "dim"), [(1, 0, 64), (131, 5, 128), (256, 0, 64)]
)
def test_quantised_inputs(tokens: int, text_tokens: int, dim: int, device: torch.device) -> None:
    qkv, scales, rope = projection(tokens, text_tokens, dim, device)
    inputs = Fp8Inputs.empty(2, tokens, 2, dim, device)
    launch_attention_inputs(inputs, *qkv.unbind(2), scales, text_tokens, rope)()
    expected = attention_inputs_ref(qkv, scales, text_tokens, rope)
    exact = qk_norm_rope_ref(qkv.double(), scales.double(), text_tokens, rope.double())
    truth = (*exact, qkv[:, :, 2].double())
    for ours, theirs, high in zip(inputs.dequantized(), expected.dequantized(), truth, strict=True):
        compare(ours, theirs, high)
    assert not inputs.v[..., tokens:].float().any()  # what attention reads beyond the end


@pytest.mark.parametrize(("tokens", "dim"), [(1, 64), (131, 128), (256, 64)])
def test_fp8(tokens: int, dim: int, chip: Chip, device: torch.device) -> None:
    """As near to unquantised attention as exact attention of quantised inputs, times two."""
    if not chip.fp8:
        pytest.skip("no FP8 tensor cores")
    qkv, scales, rope = projection(tokens, 0, dim, device)
    inputs = attention_inputs_ref(qkv, scales, 0, rope)
    out = torch.empty(2, tokens, 2 * dim).to(qkv)
    launch_attention_fp8(out, inputs, chip)()
    exact = qk_norm_rope_ref(qkv.double(), scales.double(), 0, rope.double())
    truth = attention_ref(*exact, qkv[:, :, 2].double())
    compare(out, attention_fp8_ref(inputs, qkv.dtype), truth)


def test_fp8_of_some_queries(chip: Chip, device: torch.device) -> None:
    """The last block needs only the target's tokens, which start at a whole block."""
    if not chip.fp8:
        pytest.skip("no FP8 tensor cores")
    qkv, scales, rope = projection(200, 0, 64, device)
    inputs = attention_inputs_ref(qkv, scales, 0, rope)
    whole, part = (torch.empty(2, n, 2 * 64).to(qkv) for n in (200, 72))
    launch_attention_fp8(whole, inputs, chip)()
    some = replace(inputs, q=inputs.q[:, 128:], q_scale=inputs.q_scale[:, :, 1:])
    launch_attention_fp8(part, some, chip)()
    assert torch.equal(part, whole[:, 128:])


def test_fp8_of_many_keys(chip: Chip, device: torch.device) -> None:
    """Values of one sign, nearly equal weights: the sum grows with every key."""
    if not chip.fp8:
        pytest.skip("no FP8 tensor cores")
    q, k, v = heads(1, 8192, 1, 64, torch.empty(0, dtype=torch.bfloat16, device=device))
    q, v, out = q[:, :9], v + 4, torch.empty(1, 9, 64).to(v)
    inputs = quantize_attention_ref(q, k, v)
    launch_attention_fp8(out, inputs, chip)()
    truth = attention_ref(q.double(), k.double(), v.double())
    compare(out, attention_fp8_ref(inputs, q.dtype), truth)


def projection(
    tokens: int, text_tokens: int, dim: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """A fused projection of two pictures, norm scales, and angles."""
    qkv = torch.randn(2, tokens, 3, 2, dim).to(device, torch.bfloat16)
    scales = (1 + 0.3 * torch.randn(2 if text_tokens else 1, 2, dim)).to(qkv)
    return qkv, scales, table(tokens, dim, device)
