"""Attention over streams side by side, from what their projections give: the norm and rotation of
queries and keys, and attention.

The first two either are an op of their own, whose results attention reads; or happen as
attention's FP8 inputs are quantised, which saves writing and reading queries and keys; or inside
attention, as its tiles are loaded, which saves that too but rotates every key once for each block
of queries. ``fluxkontext bench kernels`` times all three.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention import (
    Rotation,
    attention_fp8_ref,
    launch_attention,
    launch_attention_fp8,
)
from .attention_inputs import Fp8Inputs, launch_attention_inputs, quantize_attention_ref
from .chips import chip_of


class Stream(NamedTuple):
    """Queries ``[B, Sq, H, d]``, keys and values ``[B, S, H, d]`` as projected, and the scales
    ``[d]`` of their norms."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_norm: Tensor
    k_norm: Tensor


def attend_ref(ops: Any, streams: Sequence[Stream], q_rope: Tensor, rope: Tensor) -> Tensor:
    """Attention ``[B, Sq, H * d]`` of one stream, or of two side by side, text first.

    ops: the KernelSet whose ``norm_rope`` and ``attention`` do it, one after the other. rope:
    angles ``[S, d / 2, 2]`` of all keys, as of :func:`~.norm_rope.rope_table`; q_rope: of the
    queries, which may be fewer where there is one stream.
    """
    q, k, v = _normed(ops, streams, q_rope, rope)
    out: Tensor = ops.attention(q, k, v)
    return out


def attend_fp8_ref(ops: Any, streams: Sequence[Stream], q_rope: Tensor, rope: Tensor) -> Tensor:
    """:func:`attend_ref` with attention's inputs quantised to FP8."""
    q, k, v = _normed(ops, streams, q_rope, rope)
    return attention_fp8_ref(quantize_attention_ref(q, k, v), q.dtype)


def _normed(
    ops: Any, streams: Sequence[Stream], q_rope: Tensor, rope: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q_ropes, ropes = [q_rope], [rope]
    if len(streams) == 2:
        text = streams[0].k.shape[1]
        q_ropes, ropes = ([table[:text], table[text:]] for table in (q_rope, rope))
    q = [ops.norm_rope(s.q, s.q_norm, part) for s, part in zip(streams, q_ropes, strict=True)]
    k = [ops.norm_rope(s.k, s.k_norm, part) for s, part in zip(streams, ropes, strict=True)]
    return _joined(q), _joined(k), _joined([s.v for s in streams])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def _result(q: Tensor, *_: Any) -> Tensor:
    """Memory for what queries ``[B, Sq, H, d]`` become, whatever else an op is given."""
    return q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3])


@torch.library.custom_op("fluxkontext::attend_fp8", mutates_args=())
def _attend_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scales: Tensor,
    text_tokens: int,
    q_rope: Tensor | None,
    rope: Tensor,
) -> Tensor:
    (batch, tokens, heads, dim), queries = k.shape, q.shape[1]
    inputs = Fp8Inputs.empty(batch, tokens, heads, dim, q.device, queries)
    launch_attention_inputs(inputs, q, k, v, scales, text_tokens, rope, q_rope)()
    out = _result(q)
    launch_attention_fp8(out, inputs, chip_of(q.device))()
    return out


_attend_fp8.register_fake(_result)


def attend_fp8(_: Any, streams: Sequence[Stream], q_rope: Tensor, rope: Tensor) -> Tensor:
    """:func:`attend_fp8_ref` as two kernels, the first of which also norms and rotates."""
    scales = torch.stack([torch.stack((s.q_norm, s.k_norm)) for s in reversed(streams)])
    q, k, v = (_joined([s[part] for s in streams]) for part in range(3))
    text = streams[0].k.shape[1] if len(streams) == 2 else 0
    # Where all tokens ask, their angles are those of the keys.
    some = q_rope if len(q_rope) < len(rope) else None
    out: Tensor = _attend_fp8(q, k, v, scales, text, some, rope)
    return out


@torch.library.custom_op("fluxkontext::attend_rotated", mutates_args=())
def _attend_rotated(
    q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor, k_norm: Tensor, q_rope: Tensor, k_rope: Tensor
) -> Tensor:
    out = _result(q)
    rotation = Rotation(q_norm, k_norm, q_rope, k_rope)
    launch_attention(out, q, k, v, chip_of(q.device), rotation)()
    return out


_attend_rotated.register_fake(_result)


def attend_rotated(ops: Any, streams: Sequence[Stream], q_rope: Tensor, rope: Tensor) -> Tensor:
    """:func:`attend_ref` as one kernel where there is one stream; of two, each has norms of its
    own, which the kernel does not tell apart."""
    if len(streams) == 2:
        return attend_ref(ops, streams, q_rope, rope)
    (s,) = streams
    out: Tensor = _attend_rotated(s.q, s.k, s.v, s.q_norm, s.k_norm, q_rope, rope)
    return out
