"""The set of implementations that a model is built with, chosen once, at load."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import CONFIGS, attention, attention_ref
from .attention_tma import CONFIGS as TMA_CONFIGS
from .chips import chip_of, unsupported
from .gate_residual import gate_residual, gate_residual_ref
from .gelu import gelu, gelu_ref
from .modulate import modulate, modulate_ref
from .norm_rope import norm_rope, norm_rope_ref


@dataclass(frozen=True)
class KernelSet:
    """One implementation of every fused op; signatures are those of the ``*_ref`` functions."""

    name: str
    modulate: Callable[[Tensor, Tensor, Tensor], Tensor]
    norm_rope: Callable[[Tensor, Tensor, Tensor], Tensor]
    attention: Callable[[Tensor, Tensor, Tensor], Tensor]
    gate_residual: Callable[[Tensor, Tensor, Tensor], Tensor]
    gelu: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Situation:
    """What implementations are chosen for."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int


@dataclass(frozen=True)
class Candidate:
    """An implementation, and why it cannot be used in a situation; None if it can."""

    name: str
    run: Callable[..., Tensor]
    supports: Callable[[Situation], str | None]


def reference() -> KernelSet:
    """Plain torch for every op: runs on any device and dtype, and is what kernels are held to."""
    return KernelSet(
        name="reference",
        modulate=modulate_ref,
        norm_rope=norm_rope_ref,
        attention=attention_ref,
        gate_residual=gate_residual_ref,
        gelu=gelu_ref,
    )


def _anywhere(_: Situation) -> str | None:
    return None


def _on_gpu(situation: Situation) -> str | None:
    if reason := unsupported(situation.device):
        return reason
    if situation.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"kernels take float32, float16 and bfloat16, not {situation.dtype}"
    return None


def _norm_rope(situation: Situation) -> str | None:
    dim = situation.head_dim
    power = dim >= 16 and not dim & (dim - 1)
    return _on_gpu(situation) or (None if power else f"a head of {dim} is no power of two")


def _attention(situation: Situation) -> str | None:
    if reason := _on_gpu(situation):
        return reason
    key = (chip_of(situation.device).sm, situation.dtype.itemsize, situation.head_dim)
    if key not in CONFIGS and key not in TMA_CONFIGS:
        return f"no configuration for heads of {situation.head_dim} in {situation.dtype}"
    return None


CANDIDATES: Mapping[str, tuple[Candidate, ...]] = {
    "modulate": (
        Candidate("triton", modulate, _on_gpu),
        Candidate("torch", modulate_ref, _anywhere),
    ),
    "norm_rope": (
        Candidate("triton", norm_rope, _norm_rope),
        Candidate("torch", norm_rope_ref, _anywhere),
    ),
    # torch has cuDNN's and FlashAttention's kernels, which published figures put ahead of Triton's
    # in 16 bits: 600 and 370 TFLOP/s against 392 on an H100 at 8k tokens (flash-attention, assets).
    "attention": (
        Candidate("torch", attention_ref, _anywhere),
        Candidate("triton", attention, _attention),
    ),
    "gate_residual": (
        Candidate("triton", gate_residual, _on_gpu),
        Candidate("torch", gate_residual_ref, _anywhere),
    ),
    "gelu": (
        Candidate("triton", gelu, _on_gpu),
        Candidate("torch", gelu_ref, _anywhere),
    ),
}
"""Implementations of every op, the best one first."""


def select(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int = 128,
    named: Mapping[str, str] | None = None,
) -> KernelSet:
    """The best implementation of every op, or of some ops the one that is ``named``.

    Raises ValueError where what is named does not exist or cannot be used, and says why.
    """
    situation = Situation(device, dtype, head_dim)
    named = named or {}
    if unknown := named.keys() - CANDIDATES.keys():
        raise ValueError(f"no op is called {sorted(unknown)}; there are {sorted(CANDIDATES)}")
    chosen = {op: _choose(op, situation, named.get(op)) for op in CANDIDATES}
    name = " ".join(f"{op}={candidate.name}" for op, candidate in chosen.items())
    return KernelSet(name=name, **{op: candidate.run for op, candidate in chosen.items()})


def _choose(op: str, situation: Situation, name: str | None) -> Candidate:
    candidates = [c for c in CANDIDATES[op] if name in (None, c.name)]
    if not candidates:
        known = [c.name for c in CANDIDATES[op]]
        raise ValueError(f"{op} has no implementation {name!r}; it has {known}")
    reasons = [candidate.supports(situation) for candidate in candidates]
    for candidate, reason in zip(candidates, reasons, strict=True):
        if reason is None:
            return candidate
    raise ValueError(f"{op}: {name} cannot be used: {'; '.join(map(str, reasons))}")
