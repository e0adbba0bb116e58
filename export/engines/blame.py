"""The node that a compiler means when it names none.

The parser names nodes; what comes after it works on fused graphs, and speaks of operators.
"""

from pathlib import Path

import onnx

_OPERATORS = {
    "fp4": {"TRT_FP4DynamicQuantize"},
    "Attention operation": {"Attention", "TRT_QuantizedAttention"},
}
"""What a message says -> the operators that it is about."""


def blamed(graph: Path, message: str) -> str | None:
    """Name and operator of the first node that ``message`` is about; None if nothing tells."""
    operators = {name for word, names in _OPERATORS.items() if word in message for name in names}
    for node in onnx.load(str(graph), load_external_data=False).graph.node:
        if node.op_type in operators:
            return f"node {node.name or node.output[0]} ({node.op_type})"
    return None
