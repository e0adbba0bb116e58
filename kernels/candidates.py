"""Which implementations every op has, where each can run, and which of them is chosen."""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .attend import attend_fp8, attend_fp8_ref, attend_ref, attend_rotated
from .attention import CONFIGS, attention, attention_ref
from .attention_libraries import FA3_HEAD_DIM, attention_cudnn, attention_fa3, has_fa3
from .attention_tma import CONFIGS as TMA_CONFIGS
from .chips import chip_of, unsupported
from .gate_residual import gate_residual, gate_residual_ref
from .gelu import (
    gelu,
    gelu_beside,
    gelu_beside_ref,
    gelu_beside_rows,
    gelu_beside_rows_ref,
    gelu_beside_sigmoid,
    gelu_ref,
    gelu_rows,
    gelu_rows_ref,
    gelu_sigmoid,
)
from .group_norm import group_norm_silu, group_norm_silu_ref
from .kernel_set import KernelSet
from .linear_fp8 import CONFIGS as FP8_CONFIGS
from .linear_fp8 import linear_fp8, linear_fp8_ref, linear_fp8_scaled_mm, linear_fp8_upcast
from .linear_w4a4 import CONFIGS as W4A4_CONFIGS
from .linear_w4a4 import linear_w4a4, linear_w4a4_ref, linear_w4a4_upcast
from .linear_w4a16 import CONFIGS as W4A16_CONFIGS
from .linear_w4a16 import linear_w4a16, linear_w4a16_ref
from .modulate import (
    modulate,
    modulate_ref,
    modulate_rows,
    modulate_rows_ref,
    residual_modulate,
    residual_modulate_ref,
    residual_modulate_rows,
    residual_modulate_rows_ref,
)
from .norm_rope import norm_rope, norm_rope_complex, norm_rope_ref
from .quantize import quantize_rows, quantize_rows_ref, quantize_tensor, quantize_tensor_ref

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Situation:
    """What implementations are chosen for. channels: of the VAE's levels."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    channels: tuple[int, ...] = (128,)


@dataclass(frozen=True)
class Candidate:
    """An implementation, and why it cannot be used in a situation; None if it can.

    plain: what it is held to, where that is not the op's reference, since it computes something
    else; such a one is used only where it is asked for by name.
    """

    name: str
    run: Callable[..., Any]
    supports: Callable[[Situation], str | None]
    plain: Callable[..., Any] | None = None


def _anywhere(_: Situation) -> str | None:
    return None


def _on_gpu(situation: Situation) -> str | None:
    if reason := unsupported(situation.device):
        return reason
    if situation.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"kernels take float32, float16 and bfloat16, not {situation.dtype}"
    return None


def _on_cpu(*dtypes: torch.dtype) -> Callable[[Situation], str | None]:
    def reason(situation: Situation) -> str | None:
        if situation.device.type == "cpu" and situation.dtype in dtypes:
            return None
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"it is for {names} on a CPU, found {situation.dtype} on {situation.device.type}"

    return reason


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


def _half(situation: Situation) -> str | None:
    if reason := _on_gpu(situation):
        return reason
    wide = situation.dtype == torch.float32
    return "it takes float16 and bfloat16, not float32" if wide else None


def _attention_cudnn(situation: Situation) -> str | None:
    if reason := _half(situation):
        return reason
    sm = chip_of(situation.device).sm
    return None if sm in (90, 100) else f"on sm_{sm} it is left to torch which kernel runs"


def _attention_fa3(situation: Situation) -> str | None:
    if reason := _half(situation):
        return reason
    if (sm := chip_of(situation.device).sm) != 90:
        return f"FlashAttention-3 is for sm_90, not sm_{sm}"
    if situation.head_dim != FA3_HEAD_DIM:
        return f"its kernels are for heads of {FA3_HEAD_DIM}, not {situation.head_dim}"
    return None if has_fa3() else "fa3-fwd is not installed: pip install --no-deps fa3-fwd einops"


def _attend_rotated(situation: Situation) -> str | None:
    if reason := _half(situation):
        return reason
    dim = situation.head_dim
    return None if dim in (64, 128) else f"no configuration for heads of {dim}"


def _attend_fp8(situation: Situation) -> str | None:
    if reason := _fp8(situation):
        return reason
    key = (chip_of(situation.device).sm, 1, situation.head_dim)
    if key not in CONFIGS and key not in TMA_CONFIGS:
        return f"no configuration for heads of {situation.head_dim} in FP8"
    return None


def _group_norm(situation: Situation) -> str | None:
    odd = [c for c in situation.channels if c & (c - 1)]
    return _on_gpu(situation) or (f"{odd[0]} channels are no power of two" if odd else None)


def _fp8(situation: Situation) -> str | None:
    if reason := _on_gpu(situation):
        return reason
    chip = chip_of(situation.device)
    return None if chip.fp8 and chip.sm in FP8_CONFIGS else f"sm_{chip.sm} does not multiply FP8"


def _linear_fp8(situation: Situation) -> str | None:
    # Hopper's and Blackwell's shared memory has no room for tiles of float32 results.
    return _half(situation) or _fp8(situation)


def _scaled_mm(situation: Situation) -> str | None:
    if reason := _fp8(situation):
        return reason
    plain = situation.dtype == torch.bfloat16
    return None if plain else f"torch scales rows for bfloat16 results, not {situation.dtype}"


def _w4a16(situation: Situation) -> str | None:
    if reason := _on_gpu(situation):
        return reason
    if situation.dtype not in (torch.float16, torch.bfloat16):
        return f"the kernel takes float16 and bfloat16, not {situation.dtype}"
    sm = chip_of(situation.device).sm
    return None if sm in W4A16_CONFIGS else f"no configuration for sm_{sm}"


def _w4a4(situation: Situation) -> str | None:
    if reason := _on_gpu(situation):
        return reason
    chip = chip_of(situation.device)
    return None if chip.fp4 and chip.sm in W4A4_CONFIGS else f"sm_{chip.sm} does not multiply FP4"


def _triton(
    kernel: Callable[..., Any],
    supports: Callable[[Situation], str | None],
    plain: Callable[..., Any],
) -> tuple[Candidate, ...]:
    """Our kernel where it can run, else torch."""
    return Candidate("triton", kernel, supports), Candidate("torch", plain, _anywhere)


CANDIDATES: Mapping[str, tuple[Candidate, ...]] = {
    "modulate": _triton(modulate, _on_gpu, modulate_ref),
    "modulate_rows": _triton(modulate_rows, _on_gpu, modulate_rows_ref),
    "residual_modulate": _triton(residual_modulate, _on_gpu, residual_modulate_ref),
    "residual_modulate_rows": _triton(residual_modulate_rows, _on_gpu, residual_modulate_rows_ref),
    "norm_rope": (
        Candidate("triton", norm_rope, _norm_rope),
        Candidate(
            "complex", norm_rope_complex, _on_cpu(torch.float32, torch.bfloat16, torch.float16)
        ),
        Candidate("torch", norm_rope_ref, _anywhere),
    ),
    "attention": (
        Candidate("fa3", attention_fa3, _attention_fa3),
        Candidate("cudnn", attention_cudnn, _attention_cudnn),
        Candidate("torch", attention_ref, _anywhere),
        Candidate("triton", attention, _attention),
    ),
    "attend": (
        Candidate("apart", attend_ref, _anywhere),
        Candidate("rotated", attend_rotated, _attend_rotated),
        Candidate("fp8", attend_fp8, _attend_fp8, attend_fp8_ref),
    ),
    "gate_residual": _triton(gate_residual, _on_gpu, gate_residual_ref),
    "gelu": (
        Candidate("triton", gelu, _on_gpu),
        Candidate("sigmoid", gelu_sigmoid, _on_cpu(torch.float32)),
        Candidate("torch", gelu_ref, _anywhere),
    ),
    "gelu_rows": _triton(gelu_rows, _on_gpu, gelu_rows_ref),
    "gelu_beside": (
        Candidate("triton", gelu_beside, _on_gpu),
        Candidate("sigmoid", gelu_beside_sigmoid, _on_cpu(torch.float32)),
        Candidate("torch", gelu_beside_ref, _anywhere),
    ),
    "gelu_beside_rows": _triton(gelu_beside_rows, _on_gpu, gelu_beside_rows_ref),
    "group_norm_silu": _triton(group_norm_silu, _group_norm, group_norm_silu_ref),
    "quantize_rows": _triton(quantize_rows, _on_gpu, quantize_rows_ref),
    "quantize_tensor": _triton(quantize_tensor, _on_gpu, quantize_tensor_ref),
    "linear_fp8": (
        Candidate("triton", linear_fp8, _linear_fp8),
        Candidate("scaled_mm", linear_fp8_scaled_mm, _scaled_mm),
        Candidate("upcast", linear_fp8_upcast, _half),
        Candidate("torch", linear_fp8_ref, _anywhere),
    ),
    "linear_w4a16": _triton(linear_w4a16, _w4a16, linear_w4a16_ref),
    "linear_w4a4": (
        Candidate("triton", linear_w4a4, _w4a4),
        Candidate("upcast", linear_w4a4_upcast, _w4a16),
        Candidate("torch", linear_w4a4_ref, _anywhere),
    ),
}
"""Implementations of every op, the best one first."""


def assembled(
    chosen: Mapping[str, Candidate], situation: Situation, layers: Collection[str] = ()
) -> KernelSet:
    """A set of one implementation for every op; says which of ``layers``, the ops of the layers
    that a model has, a GPU has none for."""
    plain = [op for op in chosen if op in layers and chosen[op].name == "torch"]
    if plain and situation.device.type == "cuda" and situation.dtype.itemsize == 2:
        _log.warning(
            "%s: expected a kernel that can be used, found none; layers of this kind run in "
            "float32",
            ", ".join(plain),
        )
    name = " ".join(f"{op}={candidate.name}" for op, candidate in chosen.items())
    return KernelSet(name=name, **{op: candidate.run for op, candidate in chosen.items()})


def usable(
    op: str,
    situation: Situation,
    name: str | None,
    known: Mapping[str, tuple[Candidate, ...]] = CANDIDATES,
) -> list[Candidate]:
    """What can run ``op``, the best first; only what is called ``name``, if that is not None.
    What computes something else than ``op``'s reference has to be called by name.

    Raises ValueError if nothing can.
    """
    candidates = [c for c in known[op] if (c.plain is None if name is None else name == c.name)]
    if not candidates:
        names = [c.name for c in known[op]]
        raise ValueError(f"{op} has no implementation {name!r}; it has {names}")
    reasons = [candidate.supports(situation) for candidate in candidates]
    found = [c for c, reason in zip(candidates, reasons, strict=True) if reason is None]
    if not found:
        raise ValueError(f"{op}: {name} cannot be used: {'; '.join(map(str, reasons))}")
    return found
