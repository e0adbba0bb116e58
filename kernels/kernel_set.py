"""The set of implementations that a model is built with, chosen once, at load."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from .attend import Stream, attend_ref
from .attention import attention_ref
from .gate_residual import gate_residual_ref
from .gelu import (
    gelu_beside_ref,
    gelu_beside_rows_ref,
    gelu_ref,
    gelu_rows_ref,
)
from .group_norm import group_norm_silu_ref
from .linear_fp8 import Fp8Product, linear_fp8_ref
from .linear_w4a4 import linear_w4a4_ref
from .linear_w4a16 import linear_w4a16_ref
from .modulate import (
    modulate_ref,
    modulate_rows_ref,
    residual_modulate_ref,
    residual_modulate_rows_ref,
)
from .norm_rope import norm_rope_ref
from .nvfp4 import NvFp4
from .quantize import Rows, quantize_rows_ref, quantize_tensor_ref


@dataclass(frozen=True)
class KernelSet:
    """One implementation of every fused op; signatures are those of the ``*_ref`` functions, and of
    :func:`~.attend.attend_ref`, which is given the set."""

    name: str
    modulate: Callable[[Tensor, Tensor, Tensor], Tensor]
    modulate_rows: Callable[[Tensor, Tensor, Tensor], Rows]
    residual_modulate: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    residual_modulate_rows: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Rows]]
    norm_rope: Callable[[Tensor, Tensor, Tensor], Tensor]
    attention: Callable[[Tensor, Tensor, Tensor], Tensor]
    attend: Callable[["KernelSet", Sequence[Stream], Tensor, Tensor], Tensor]
    gate_residual: Callable[[Tensor, Tensor, Tensor], Tensor]
    gelu: Callable[[Tensor], Tensor]
    gelu_rows: Callable[[Tensor], Rows]
    gelu_beside: Callable[[Tensor, Tensor], Tensor]
    gelu_beside_rows: Callable[[Tensor, Tensor], Rows]
    group_norm_silu: Callable[..., Tensor]
    quantize_rows: Callable[[Tensor], Rows]
    quantize_tensor: Callable[[Tensor, Tensor], Rows]
    linear_fp8: Callable[[Sequence[Fp8Product]], list[Tensor]]
    linear_w4a16: Callable[[Tensor, NvFp4, Tensor], Tensor]
    linear_w4a4: Callable[[Tensor, Tensor, NvFp4, Tensor], Tensor]

    def before(self, layer: Any) -> "Before":
        """The ops whose result is ``layer``'s input, in the form that it takes: an FP8 layer has
        rows quantised by what makes them, where another pass would read them again."""
        return self._rows if getattr(layer, "takes_rows", False) else self._plain

    @cached_property
    def _plain(self) -> "Before":
        return Before(self.modulate, self.residual_modulate, self.gelu, self.gelu_beside)

    @cached_property
    def _rows(self) -> "Before":
        return Before(
            self.modulate_rows, self.residual_modulate_rows, self.gelu_rows, self.gelu_beside_rows
        )


@dataclass(frozen=True)
class Before:
    """Ops that stand before a linear layer; results are a Tensor, or Rows."""

    modulate: Callable[[Tensor, Tensor, Tensor], Any]
    residual_modulate: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Any]]
    gelu: Callable[[Tensor], Any]
    gelu_beside: Callable[[Tensor, Tensor], Any]


def reference() -> KernelSet:
    """Plain torch for every op: runs on any device and dtype, and is what kernels are held to."""
    return KernelSet(
        name="reference",
        modulate=modulate_ref,
        modulate_rows=modulate_rows_ref,
        residual_modulate=residual_modulate_ref,
        residual_modulate_rows=residual_modulate_rows_ref,
        norm_rope=norm_rope_ref,
        attention=attention_ref,
        attend=attend_ref,
        gate_residual=gate_residual_ref,
        gelu=gelu_ref,
        gelu_rows=gelu_rows_ref,
        gelu_beside=gelu_beside_ref,
        gelu_beside_rows=gelu_beside_rows_ref,
        group_norm_silu=group_norm_silu_ref,
        quantize_rows=quantize_rows_ref,
        quantize_tensor=quantize_tensor_ref,
        linear_fp8=linear_fp8_ref,
        linear_w4a16=linear_w4a16_ref,
        linear_w4a4=linear_w4a4_ref,
    )
