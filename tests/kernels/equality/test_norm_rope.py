"""Norm and rotation equal their references, on the views that a fused projection gives."""

import pytest
import torch
from torch import Tensor

from fluxkontext.kernels.norm_rope import (
    id_table,
    launch_norm_rope,
    norm_rope,
    norm_rope_ref,
    qk_norm_rope,
    qk_norm_rope_ref,
    rope_table,
)

from ..house_rule import DTYPES, check

AXES = {64: (16, 24, 24), 128: (16, 56, 56)}
THETA = 10_000.0
SHAPES = [
    pytest.param(1, 7, 3, 64, id="smaller than a tile"),
    pytest.param(2, 33, 9, 128, id="ragged"),
    pytest.param(1, 32, 8, 128, id="full tiles"),
    pytest.param(1, 8704, 24, 128, id="full size", marks=pytest.mark.large),
]


def positions(tokens: int, device: torch.device) -> Tensor:
    """``[tokens, 3]``: two pictures 5 wide, the second in another frame."""
    n = torch.arange(tokens, device=device)
    half = n % max(tokens // 2, 1)
    return torch.stack((n // max(tokens // 2, 1), half // 5, half % 5), -1).int()


def projection(batch: int, tokens: int, heads: int, dim: int, like: Tensor) -> Tensor:
    """``[B, S, 3, H, d]``: the first columns of something wider, as ``linear1`` gives."""
    row = torch.randn(batch, tokens, (3 * heads + 2) * dim).to(like)
    return row[..., : 3 * heads * dim].unflatten(-1, (3, heads, dim))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "heads", "dim"), SHAPES)
def test_one_projection(
    batch: int, tokens: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    like = torch.empty(0, dtype=dtype, device=device)
    x = projection(batch, tokens, heads, dim, like)[:, :, 1]
    scale = (1 + 0.3 * torch.randn(dim)).to(like)
    rope = rope_table(positions(tokens, device), AXES[dim], THETA)
    check(norm_rope(x, scale, rope), norm_rope_ref, x, scale, rope)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "heads", "dim"), SHAPES)
@pytest.mark.parametrize("text_tokens", [0, 5])
def test_queries_and_keys_of_two_streams(
    batch: int,
    tokens: int,
    heads: int,
    dim: int,
    text_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    like = torch.empty(0, dtype=dtype, device=device)
    qkv = projection(batch, tokens, heads, dim, like)
    scales = (1 + 0.3 * torch.randn(2 if text_tokens else 1, 2, dim)).to(like)
    rope = rope_table(positions(tokens, device), AXES[dim], THETA)
    results = qk_norm_rope(qkv, scales, text_tokens, rope)
    check(results, qk_norm_rope_ref, qkv, scales, text_tokens, rope)


@pytest.mark.parametrize("dim", AXES)
def test_in_place_with_angles_gathered_by_id(dim: int, device: torch.device) -> None:
    """Both forms of the table hold the same numbers, so the results are the same."""
    ids = positions(37, device)
    qkv = projection(1, 37, 9, dim, torch.empty(0, dtype=torch.bfloat16, device=device))
    scales = torch.randn(2, 2, dim, dtype=torch.bfloat16, device=device)
    expected = qk_norm_rope(qkv, scales, 5, rope_table(ids, AXES[dim], THETA))
    values = qkv[:, :, 2].clone()
    table = id_table(int(ids.max()) + 1, AXES[dim], THETA, device)
    launch_norm_rope(qkv[:, :, :2], qkv[:, :, :2], scales, 5, table, ids, AXES[dim])()
    torch.testing.assert_close(qkv[:, :, :2].unbind(2), expected, rtol=0, atol=0)
    assert torch.equal(qkv[:, :, 2], values)
