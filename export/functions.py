"""Nodes of our own domain, and the function bodies that make them run anywhere.

A graph holds QK-norm + RoPE and norm + modulate as one node each. Its body, of standard operators,
lies in the same file: every runtime can inline it, and TensorRT can put a plugin of that name in
its place. No name may equal an operator of ONNX or TensorRT, whose parser ignores the domain then.
"""

from dataclasses import replace
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import OnnxFunction, opset23, script
from onnxscript.values import Opset
from torch import Tensor

from ..kernels import KernelSet, reference
from ..kernels.gate_residual import gate_residual_ref
from ..kernels.modulate import EPS as LAYER_EPS
from ..kernels.norm_rope import EPS as RMS_EPS
from .quantised_functions import DOMAIN, QUANTISED, VERSION

op: Any = opset23
_ours = Opset(DOMAIN, VERSION)
_FLOAT = int(ir.DataType.FLOAT)


def graph_ops() -> KernelSet:
    """Ops that leave a node of our domain in a graph; what they compute is in the bodies."""
    return replace(
        reference(),
        name="graph",
        norm_rope=_norm_rope,
        modulate=_modulate,
        residual_modulate=_residual_modulate,
    )


def _norm_rope(x: Tensor, scale: Tensor, rope: Tensor) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::NormRope",
        (x, scale, rope),
        {"epsilon": RMS_EPS, "heads": x.shape[2]},
        dtype=x.dtype,
        shape=x.shape,
        version=VERSION,
    ).to(x.device)  # of a symbolic node it is the CPU


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::NormModulate",
        (x, shift, scale),
        {"epsilon": LAYER_EPS, "width": [x.shape[2]]},
        dtype=x.dtype,
        shape=x.shape,
        version=VERSION,
    ).to(x.device)  # of a symbolic node it is the CPU


def _residual_modulate(
    x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    x = gate_residual_ref(x, gate, y)
    return x, _modulate(x, shift, scale)


def bodies(flavour: str) -> list[ir.Function]:
    """The bodies of all nodes that graphs of a flavour may have."""
    modulate = _modulate_at_once if flavour == "cpu" else _modulate_in_turn
    named: dict[tuple[str, str], OnnxFunction[..., Any]] = {
        (DOMAIN, "NormRope"): _rotate,
        (DOMAIN, "NormModulate"): modulate,
        **QUANTISED,
    }
    made = []
    for (domain, name), function in named.items():
        proto = function.to_function_proto()
        proto.domain, proto.name = domain, name
        for node in proto.node:  # a name would be there once for every place that it is inlined in
            node.ClearField("name")
        made.append(ir.serde.deserialize_function(proto))
    return made


@script(_ours, default_opset=op)
def _rotate(x, scale, rope, epsilon: float, heads: int):  # type: ignore[no-untyped-def]
    """``x [B, S, H, d]``, ``scale [d]``, ``rope [S, d / 2, 2]`` float32 -> as ``x``."""
    normed = op.RMSNormalization(x, scale, axis=-1, epsilon=epsilon)
    cos, sin = op.Split(rope, axis=-1, num_outputs=2)
    shape = op.Concat(op.Shape(x, start=0, end=1), op.Shape(rope, start=0, end=2), axis=0)
    flat = op.Reshape(op.Cast(normed, to=_FLOAT), op.Constant(value_ints=[0, 0, -1]))
    rotated = op.RotaryEmbedding(
        flat,
        op.Expand(op.Squeeze(cos, op.Constant(value_ints=[-1])), shape),
        op.Expand(op.Squeeze(sin, op.Constant(value_ints=[-1])), shape),
        interleaved=1,
        num_heads=heads,
    )
    return op.CastLike(op.Reshape(rotated, op.Shape(x)), x)


@script(_ours, default_opset=op)
def _modulate_at_once(x, shift, scale, epsilon: float, width: list[int]):  # type: ignore[no-untyped-def]
    """``x [B, S, D]``, ``shift`` and ``scale [B, 1, D]`` -> as ``x``. One pass over memory; ONNX
    lets the affine parameters of a norm be broadcast, which TensorRT does not."""
    one = op.CastLike(op.Constant(value_float=1.0), scale)
    return op.LayerNormalization(x, op.Add(scale, one), shift, axis=-1, epsilon=epsilon)


@script(_ours, default_opset=op)
def _modulate_in_turn(x, shift, scale, epsilon: float, width: list[int]):  # type: ignore[no-untyped-def]
    """The same, rounded after each operation as torch does."""
    one = op.CastLike(op.Constant(value_float=1.0), scale)
    ones = op.Expand(one, op.Constant(value_ints=width))
    normed = op.LayerNormalization(x, ones, axis=-1, epsilon=epsilon)
    return op.Add(op.Mul(normed, op.Add(scale, one)), shift)
