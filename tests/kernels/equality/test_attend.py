"""Attention from raw projections equals the ops that it takes the place of, one after the other."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fluxkontext.kernels import Stream, reference
from fluxkontext.kernels.attend import attend_fp8, attend_fp8_ref, attend_ref, attend_rotated
from fluxkontext.kernels.attention import attention_ref
from fluxkontext.kernels.chips import chip_of
from fluxkontext.kernels.norm_rope import norm_rope_ref, rope_table

from ..house_rule import compare

OPS = reference()
HEADS = 2


def stream(tokens: int, dim: int, device: torch.device) -> Stream:
    """Views of a fused projection of two pictures, and norms unlike any other stream's."""
    qkv = torch.randn(2, tokens, 3, HEADS, dim).to(device, torch.bfloat16)
    norms = (1 + 0.3 * torch.randn(2, dim)).to(qkv)
    return Stream(*qkv.unbind(2), *norms.unbind(0))


def table(tokens: int, dim: int, device: torch.device) -> Tensor:
    ids = torch.arange(tokens, device=device)
    return rope_table(torch.stack((ids // 50, ids // 7, ids % 7), -1), (dim - 48, 24, 24), 1e4)


def cases(dim: int, device: torch.device) -> dict[str, tuple[list[Stream], Tensor, Tensor]]:
    """Text beside image, with angles of equal value; one stream; and of that the last tokens alone
    as queries."""
    rope = table(150, dim, device)
    both = [stream(21, dim, device), stream(129, dim, device)]
    one = stream(150, dim, device)
    cut = one._replace(q=one.q[:, 17:])
    return {
        "two streams": (both, rope.clone(), rope),
        "one stream": ([one], rope, rope),
        "some queries": ([cut], rope[17:], rope),
    }


def wide(streams: list[Stream]) -> list[Stream]:
    return [Stream(*(tensor.double() for tensor in it)) for it in streams]


def exact(streams: list[Stream], q_rope: Tensor, rope: Tensor) -> Tensor:
    return attend_ref(OPS, wide(streams), q_rope.double(), rope.double())


@pytest.mark.parametrize("case", ["two streams", "one stream", "some queries"])
def test_apart(case: str) -> None:
    """Each stream under its own norms, in the order of the sequence."""
    streams, q_rope, rope = cases(64, torch.device("cpu"))[case]
    streams, start, parts = wide(streams), 0, []
    for it in streams:
        angles = rope[start : start + it.k.shape[1]].double()
        turned = q_rope[start : start + it.q.shape[1]].double()
        q = norm_rope_ref(it.q, it.q_norm, turned)
        parts.append((q, norm_rope_ref(it.k, it.k_norm, angles), it.v))
        start += it.k.shape[1]
    q, k, v = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
    found = attend_ref(OPS, streams, q_rope.double(), rope.double())
    assert torch.equal(found, attention_ref(q, k, v))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("case", ["two streams", "one stream", "some queries"])
@pytest.mark.usefixtures("_fp8")
def test_fp8(case: str, dim: int, device: torch.device) -> None:
    streams, q_rope, rope = cases(dim, device)[case]
    found = attend_fp8(OPS, streams, q_rope, rope)
    expected = attend_fp8_ref(OPS, streams, q_rope, rope)
    compare(found, expected, exact(streams, q_rope, rope))


@pytest.mark.parametrize("case", ["two streams", "one stream", "some queries"])
def test_rotated_inside(case: str, device: torch.device) -> None:
    streams, q_rope, rope = cases(64, device)[case]
    found = attend_rotated(OPS, streams, q_rope, rope)
    expected = attend_ref(OPS, streams, q_rope, rope)
    compare(found, expected, exact(streams, q_rope, rope))


def test_what_is_fused_does_without_the_ops(device: torch.device) -> None:
    if not chip_of(device).fp8:
        pytest.skip("no FP8 tensor cores")
    nothing: Any = None
    streams, q_rope, rope = cases(64, device)["two streams"]
    assert attend_fp8(nothing, streams, q_rope, rope).isfinite().all()
