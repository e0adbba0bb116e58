"""Bodies of the nodes that read NVFP4, quantise inputs or attend in FP8, where no operator does."""

from typing import Any

import onnx_ir as ir
from onnxscript import OnnxFunction, opset23, script
from onnxscript.values import Opset

from ..kernels.nvfp4 import VALUES
from ..kernels.quantize import TINY

DOMAIN = "fluxkontext"
VERSION = 1
TENSORRT = "trt"
"""The domain of TensorRT's own operators."""

op: Any = opset23
"""Untyped, as attributes and results are not what its annotations say inside a script."""
_ours = Opset(DOMAIN, VERSION)
_FLOAT, _INT32 = int(ir.DataType.FLOAT), int(ir.DataType.INT32)
_E4M3, _E2M1 = int(ir.DataType.FLOAT8E4M3FN), int(ir.DataType.FLOAT4E2M1)
_CODES = [*VALUES, *(-value for value in VALUES)]
_TINY = TINY


@script(_ours, default_opset=op)
def _weight(packed, block_scale, scale):  # type: ignore[no-untyped-def]
    """``packed [N, K / 2]`` uint8, ``block_scale [N, K / 16]`` E4M3, a float32 ``scale`` ->
    float32 ``[N, K]``. The first number of a byte is in its lower half."""
    byte = op.Unsqueeze(op.Cast(packed, to=_INT32), op.Constant(value_ints=[-1]))
    sixteen = op.Cast(op.Constant(value_int=16), to=_INT32)
    high = op.Div(byte, sixteen)
    codes = op.Concat(byte - high * sixteen, high, axis=-1)
    values = op.Gather(op.Constant(value_floats=_CODES), codes)
    blocks = op.Reshape(values, op.Constant(value_ints=[0, -1, 16]))
    scales = op.Unsqueeze(op.DequantizeLinear(block_scale, scale), op.Constant(value_ints=[-1]))
    return op.Reshape(blocks * scales, op.Constant(value_ints=[0, -1]))


@script(_ours, default_opset=op)
def _rows(x):  # type: ignore[no-untyped-def]
    """``x`` float32 through E4M3 with a scale a row, as ``quantize_rows_ref`` does it."""
    largest = op.ReduceMax(op.Abs(x), op.Constant(value_ints=[-1]), keepdims=1)
    limit = op.Constant(value_float=448.0)
    scale = op.Max(largest, op.Constant(value_float=_TINY)) / limit
    return op.Cast(op.Cast(op.Clip(x / scale, op.Neg(limit), limit), to=_E4M3), to=_FLOAT) * scale


@script(_ours, default_opset=op)
def _blocks(x, scale):  # type: ignore[no-untyped-def]
    """``x [B, S, K]`` float32 through NVFP4 under ``scale``, as ``pack`` and ``unpack`` do it.

    Numbers below 2 are multiples of 1/2, below 4 of 1, up to 6 of 2; halfway, the even one wins.
    """
    blocks = op.Reshape(x, op.Constant(value_ints=[0, 0, -1, 16])) / scale
    six = op.Constant(value_float=6.0)
    wanted = op.ReduceMax(op.Abs(blocks), op.Constant(value_ints=[-1]), keepdims=1) / six
    least, most = op.Constant(value_float=0.001953125), op.Constant(value_float=448.0)
    block_scale = op.Cast(op.Cast(op.Clip(wanted, least, most), to=_E4M3), to=_FLOAT)
    scaled = blocks / block_scale
    size = op.Abs(scaled)
    two = op.Constant(value_float=2.0)
    coarse = op.Where(size < two + two, op.Round(size), op.Min(op.Round(size / two) * two, six))
    rounded = op.Where(size < two, op.Round(size * two) / two, coarse) * op.Sign(scaled)
    return op.Reshape(rounded * block_scale * scale, op.Shape(x))


@script(_ours, default_opset=op)
def _tensorrt_blocks(x, scale, axis: int, block_size: int, scale_type: int):  # type: ignore[no-untyped-def]
    """TensorRT's dynamic quantisation to NVFP4, for runtimes that lack it: ``x [B, S, K]`` ->
    E2M1 ``[B, S, K]`` and E4M3 ``[B, S, K / 16]``."""
    wide = op.Cast(x, to=_FLOAT)
    blocks = op.Reshape(wide, op.Constant(value_ints=[0, 0, -1, 16])) / scale
    last = op.Constant(value_ints=[-1])
    wanted = op.ReduceMax(op.Abs(blocks), last, keepdims=1) / op.Constant(value_float=6.0)
    least, most = op.Constant(value_float=0.001953125), op.Constant(value_float=448.0)
    block_scale = op.Cast(op.Clip(wanted, least, most), to=_E4M3)
    scaled = op.Reshape(blocks / op.Cast(block_scale, to=_FLOAT), op.Shape(x))
    return op.Cast(scaled, to=_E2M1), op.Squeeze(block_scale, last)


@script(_ours, default_opset=op)
def _tensorrt_attention(  # type: ignore[no-untyped-def]
    q, k, v, mask, p_scale, scale: float, normalization_quantize_to_type: int
):
    """TensorRT's attention whose probabilities are E4M3 under ``p_scale``, for runtimes that lack
    it: ``q [B, H, S, d]``, ``k`` and ``v [B, H, T, d]``, no ``mask`` -> as ``q``."""
    logits = op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2]))
    p = op.Softmax(logits * op.CastLike(op.Constant(value_float=scale), logits), axis=-1)
    zero = op.Cast(op.Constant(value_float=0.0), to=_E4M3)
    narrow = op.QuantizeLinear(p, p_scale, zero)
    return op.MatMul(op.CastLike(op.DequantizeLinear(narrow, p_scale), v), v)


QUANTISED: dict[tuple[str, str], OnnxFunction[..., Any]] = {
    (DOMAIN, "Nvfp4Weight"): _weight,
    (DOMAIN, "Fp8Rows"): _rows,
    (DOMAIN, "Nvfp4Blocks"): _blocks,
    (TENSORRT, "TRT_FP4DynamicQuantize"): _tensorrt_blocks,
    (TENSORRT, "TRT_QuantizedAttention"): _tensorrt_attention,
}
"""(domain, name) -> body."""
