"""Linear layers that run quantised weights as they are stored; no dequantised copy is kept.

Each stands in for an ``nn.Linear``, or for a
:class:`~fluxkontext.runtime.models.transformer.FusedLinear` with its ``part``, under the same name.
Its tensors have the names and the layout of a quantised file (:mod:`fluxkontext.runtime.stored`):
``weight``, ``weight_scale`` and, by recipe, ``weight_scale_2`` and ``input_scale``; the bias is in
the type that the model computes in. N and K are the rows and columns of the whole weight.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels import KernelSet
from ...kernels.linear_fp8 import Fp8Product
from ...kernels.nvfp4 import BLOCK, E2M1_MAX, E4M3_MAX, NvFp4, pack
from ...kernels.quantize import FP8, FP8_MAX, TINY, Rows, quantize_rows_ref

CHUNK = 2048
"""Rows that are quantised or dequantised at once: float32 copies of more are never made."""


@dataclass(frozen=True)
class QuantisedWeight:
    """form: ``fp8`` or ``nvfp4``. inputs: ``plain``, ``dynamic`` or ``static``, as in
    :func:`~fluxkontext.runtime.recipes.inputs`. tensors: those of a module but for the bias."""

    form: str
    inputs: str
    tensors: Mapping[str, Tensor]


class QuantisedLinear(nn.Module, ABC):
    """Rows of a quantised matrix times ``x [B, tokens, K]``.

    widths: the rows of each projection of a fused layer, whose results are a tuple; None for a
    plain layer. takes_rows: whether ``x`` may come as quantised rows, which then it should, from
    the op before (:meth:`~fluxkontext.kernels.KernelSet.before`).
    """

    takes_rows = False

    def __init__(self, columns: int, rows: int, widths: Sequence[int] | None, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = columns, rows
        self.widths = widths
        self.bias = _held(torch.empty(rows)) if bias else None

    @abstractmethod
    def product(self, x: Any, rows: slice) -> Tensor:
        """``[B, tokens, rows]``, with the bias, in the type of ``x`` or, for Rows, the bias."""

    def forward(self, x: Tensor | Rows) -> Tensor | tuple[Tensor, ...]:
        return self.parted(self.product(x, slice(0, self.out_features)))

    def parted(self, out: Tensor) -> Tensor | tuple[Tensor, ...]:
        """A product of all rows by projections."""
        return out if self.widths is None else tuple(out.split(list(self.widths), dim=-1))

    def part(self, x: Tensor | Rows, start: int, stop: int) -> tuple[Tensor, ...]:
        """Only the projections ``start`` to ``stop`` of a fused layer."""
        widths = list(self.widths or ())
        out = self.product(x, slice(sum(widths[:start]), sum(widths[:stop])))
        return tuple(out.split(widths[start:stop], dim=-1))

    def rows_of_bias(self, rows: slice, like: Tensor) -> Tensor:
        """The kernels take a bias in any case."""
        if self.bias is None:
            return like.new_zeros(rows.stop - rows.start)
        return self.bias[rows]


class Fp8Linear(QuantisedLinear):
    """E4M3 weights and inputs: a scale a token, or one calibrated ``input_scale`` for all.

    weight: ``[N, K]``. weight_scale: float32 ``[N]``.
    """

    def __init__(
        self,
        columns: int,
        rows: int,
        widths: Sequence[int] | None,
        bias: bool,
        kernels: KernelSet,
        static: bool,
    ) -> None:
        super().__init__(columns, rows, widths, bias)
        self.kernels = kernels
        self.weight = _held(torch.empty(rows, columns, dtype=FP8))
        self.weight_scale = _held(torch.empty(rows))
        self.input_scale = _held(torch.empty(())) if static else None
        self.takes_rows = bias and not static  # the bias has the result's type

    def product(self, x: Tensor | Rows, rows: slice) -> Tensor:
        (out,) = self.kernels.linear_fp8([self.operands(x, rows)])
        return out

    def operands(self, x: Tensor | Rows, rows: slice) -> Fp8Product:
        """``x``, quantised where it is not yet, and some rows of the weight."""
        weight, weight_scale = self.weight[rows], self.weight_scale[rows]
        if isinstance(x, Rows):
            assert self.bias is not None
            return Fp8Product(*x, weight, weight_scale, self.bias[rows])
        if self.input_scale is None:
            quantised = self.kernels.quantize_rows(x)
        else:
            quantised = self.kernels.quantize_tensor(x, self.input_scale)
        return Fp8Product(*quantised, weight, weight_scale, self.rows_of_bias(rows, x))


class Fp8WeightLinear(QuantisedLinear):
    """E4M3 weights; inputs as they come. For T5, which is run once a prompt.

    The product is that of the dequantised weight, which exists while it runs. dtype: what it
    computes in; that of the input if None.
    """

    def __init__(
        self,
        columns: int,
        rows: int,
        widths: Sequence[int] | None,
        bias: bool,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(columns, rows, widths, bias)
        self.dtype = dtype
        self.weight = _held(torch.empty(rows, columns, dtype=FP8))
        self.weight_scale = _held(torch.empty(rows))

    def product(self, x: Tensor, rows: slice) -> Tensor:
        x = x if self.dtype is None else x.to(self.dtype)
        weight = self.weight[rows].to(x.dtype)  # exact: E4M3 is part of every wider type
        torch.mul(weight, self.weight_scale[rows, None], out=weight)
        return F.linear(x, weight, None if self.bias is None else self.bias[rows])


class NvFp4Linear(QuantisedLinear):
    """NVFP4 weights; inputs as they come, or in NVFP4 too, under a calibrated ``input_scale``.

    weight: uint8 ``[N, K / 2]``. weight_scale: E4M3 ``[N, K / 16]``. weight_scale_2: a float32.
    """

    def __init__(
        self,
        columns: int,
        rows: int,
        widths: Sequence[int] | None,
        bias: bool,
        kernels: KernelSet,
        static: bool,
    ) -> None:
        super().__init__(columns, rows, widths, bias)
        self.kernels = kernels
        self.weight = _held(torch.empty(rows, columns // 2, dtype=torch.uint8))
        self.weight_scale = _held(torch.empty(rows, columns // BLOCK, dtype=FP8))
        self.weight_scale_2 = _held(torch.empty(()))
        self.input_scale = _held(torch.empty(())) if static else None

    def product(self, x: Tensor, rows: slice) -> Tensor:
        weight = NvFp4(self.weight[rows], self.weight_scale[rows], self.weight_scale_2)
        bias = self.rows_of_bias(rows, x)
        if self.input_scale is None:
            return self.kernels.linear_w4a16(x, weight, bias)
        return self.kernels.linear_w4a4(x, self.input_scale, weight, bias)


def side_by_side(layers: Sequence[Any], inputs: Sequence[Tensor | Rows]) -> tuple[Any, ...]:
    """What layers of equal shape make of an input each; those in FP8 as one product."""
    pairs = list(zip(layers, inputs, strict=True))
    if not all(isinstance(layer, Fp8Linear) for layer in layers):
        return tuple(layer(x) for layer, x in pairs)
    rows = slice(0, layers[0].out_features)
    outs = layers[0].kernels.linear_fp8([layer.operands(x, rows) for layer, x in pairs])
    return tuple(layer.parted(out) for layer, out in zip(layers, outs, strict=True))


def stand_in(
    layer: nn.Linear, weight: QuantisedWeight, kernels: KernelSet, dtype: torch.dtype
) -> QuantisedLinear:
    """The module that runs ``weight`` in the place of ``layer``, on the meta device.

    dtype: what it computes in where nothing is quantised but the weight.
    """
    columns, rows, bias = layer.in_features, layer.out_features, layer.bias is not None
    widths: Sequence[int] | None = getattr(layer, "widths", None)
    static = weight.inputs == "static"
    with torch.device("meta"):
        if weight.form == "nvfp4":
            return NvFp4Linear(columns, rows, widths, bias, kernels, static)
        if weight.inputs == "plain":
            return Fp8WeightLinear(columns, rows, widths, bias, dtype)
        return Fp8Linear(columns, rows, widths, bias, kernels, static)


def quantise(weight: Tensor, form: str) -> dict[str, Tensor]:
    """``weight [N, K]`` in ``form``, ``fp8`` or ``nvfp4``: the tensors of a module by name.

    Every number becomes the nearest that its scale allows. FP8: the largest of a row becomes 448.
    NVFP4: the largest of a block becomes 6, and the largest scale of a block 448.
    """
    chunks = weight.split(CHUNK)
    if form == "fp8":
        parts = [quantize_rows_ref(chunk) for chunk in chunks]
        return {
            "weight": torch.cat([values for values, _ in parts]),
            "weight_scale": torch.cat([scale.squeeze(-1) for _, scale in parts]),
        }
    largest = torch.stack([chunk.abs().amax() for chunk in chunks]).amax().float()
    scale = largest.clamp(min=TINY) / (E2M1_MAX * E4M3_MAX)
    packed = [pack(chunk, scale) for chunk in chunks]
    return {
        "weight": torch.cat([p.packed for p in packed]),
        "weight_scale": torch.cat([p.block_scale for p in packed]),
        "weight_scale_2": scale,
    }


def input_scale(amax: float, form: str) -> float:
    """The scale under which inputs of at most ``amax`` fill the range of ``form``."""
    return amax / (FP8_MAX if form == "fp8" else E2M1_MAX * E4M3_MAX)


def _held(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
