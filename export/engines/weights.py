"""What a graph's file says of its weights, which lie outside it."""

from pathlib import Path

import onnx

_FLOATS = (
    onnx.TensorProto.DOUBLE,
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.FLOAT16,
)


def weight_files(graph: Path) -> tuple[str, ...]:
    """Names, inside the bundle, of the files that a graph's weights are in."""
    return tuple(sorted({ranges["location"] for _, ranges in _external(graph)}))


def engine_bytes(graph: Path, precision: str) -> int:
    """About how large the engine of a graph becomes: its weights in the type they compute in.

    Plain floats take that of ``precision``; quantised weights stay as they are stored.
    """
    width = 4 if precision == "fp32" else 2
    total = 0
    for tensor, ranges in _external(graph):
        stored = int(ranges["length"])
        floats = tensor.data_type in _FLOATS
        total += (
            stored * width // onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            if floats
            else stored
        )
    return total


def _external(graph: Path) -> list[tuple[onnx.TensorProto, dict[str, str]]]:
    model = onnx.load(str(graph), load_external_data=False)
    return [
        (tensor, {entry.key: entry.value for entry in tensor.external_data})
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    ]
