"""Attention in FP8: products of E4M3 numbers, a softmax in 16 bits between them.

Scales are on queries, keys, values and probabilities (as in TensorRT, demo/Diffusion,
``SD_FP8_BF16_FLUX_MMDIT_BMM2_FP8_OUTPUT_CONFIG``). It is one node, TensorRT's own operator: a
pattern of products and a softmax that the compiler does not fuse becomes matrices of all tokens by
all tokens without a word, where it refuses a node (TensorRT-RTX 1.7 fuses neither for shapes that
may have fewer than 32 tokens).
"""

import numpy as np
import onnx_ir as ir

from ..runtime.errors import CheckpointError
from .calibration import Calibration
from .quantised_functions import TENSORRT
from .quantised_graph import constant, fp8_round

_E4M3_MAX = 448.0


def quantise_attention(graph: ir.Graph, calibration: Calibration, dtype: ir.DataType) -> None:
    """Replace every Attention of ``graph``, which computes in ``dtype``, by one in FP8. Raises
    CheckpointError if ``calibration`` lacks its inputs."""
    for node in [node for node in graph if node.op_type == "Attention" and not node.domain]:
        block = _block(node)
        q, k, v = node.inputs[:3]
        assert q is not None
        assert k is not None
        assert v is not None
        names = [f"{block}.{part}" for part in "qkv"]
        if absent := [name for name in names if name not in calibration.amax]:
            raise CheckpointError(
                f"expected the calibration of attention, found none for {', '.join(absent)}; "
                "make one with: fluxkontext calibrate"
            )
        amax = [calibration.amax[name] for name in names]
        probability = calibration.amax.get(f"{block}.p", 1.0)
        q, k, v = (
            fp8_round(graph, name, x, _scale(graph, f"{name}_scale", largest), dtype)
            for x, name, largest in zip((q, k, v), names, amax, strict=True)
        )
        mixed = ir.node(
            "TRT_QuantizedAttention",
            [q, k, v, None, _scale(graph, f"{block}.p_scale", probability)],
            {
                "scale": _head_dim(node) ** -0.5,
                "normalization_quantize_to_type": int(ir.DataType.FLOAT8E4M3FN),
            },
            domain=TENSORRT,
            name=f"{block}.attention",
        )
        graph.append(mixed)
        ir.convenience.replace_all_uses_with(node.outputs[0], mixed.outputs[0])
        graph.remove(node, safe=True)


def _scale(graph: ir.Graph, name: str, largest: float) -> ir.Value:
    return constant(graph, name, ir.Tensor(np.array(largest / _E4M3_MAX, np.float32)))


def _norm(node: ir.Node) -> ir.Node:
    """The norm that an Attention's queries come from."""
    value = node.inputs[0]
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type == "NormRope":
            return producer
        value = producer.inputs[0]
    raise AssertionError(f"{node.name}: attention without a norm of queries")


def _block(node: ir.Node) -> str:
    """The block of an Attention, by the name of its norm's weight."""
    value = _norm(node).inputs[1]
    while value is not None and (producer := value.producer()) is not None:  # a cast
        value = producer.inputs[0]
    assert value is not None
    return ".".join(str(value.name).removeprefix("network.").split(".")[:2])


def _head_dim(node: ir.Node) -> int:
    scale = _norm(node).inputs[1]
    assert scale is not None
    assert scale.shape is not None
    return int(scale.shape.numpy()[0])
