"""The set of implementations that a model is built with, chosen once, at load."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .attention import attention_ref
from .gate_residual import gate_residual_ref
from .gelu import gelu_ref
from .modulate import modulate_ref
from .norm_rope import norm_rope_ref


@dataclass(frozen=True)
class KernelSet:
    """One implementation of every fused op; signatures are those of the ``*_ref`` functions."""

    name: str
    modulate: Callable[[Tensor, Tensor, Tensor], Tensor]
    norm_rope: Callable[[Tensor, Tensor, Tensor], Tensor]
    attention: Callable[[Tensor, Tensor, Tensor], Tensor]
    gate_residual: Callable[[Tensor, Tensor, Tensor], Tensor]
    gelu: Callable[[Tensor], Tensor]


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
