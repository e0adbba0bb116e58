"""Number formats that a GPU lacks, found before a compiler is started, by node."""

from pathlib import Path

import onnx
from onnx import TensorProto

from ..runtime.errors import KontextError

LEAST = {TensorProto.FLOAT4E2M1: 100, TensorProto.FLOAT8E4M3FN: 89}
"""The first compute capability that multiplies a format (NVIDIA: FP8 from Ada, FP4 from Blackwell).
TensorRT-RTX says that a model has such numbers, but not where."""


def check_types(graph: Path, target: str) -> None:
    """Raise KontextError for the first node of ``graph`` whose numbers ``target`` (``sm_89``) does
    not multiply."""
    capability = int(target.removeprefix("sm_"))
    model = onnx.load(str(graph), load_external_data=False).graph
    kinds = {tensor.name: tensor.data_type for tensor in model.initializer}
    for node in model.node:
        for name in node.input:
            kind = kinds.get(name)
            least = LEAST.get(kind, 0) if kind is not None else 0
            if capability < least:
                where = f"node {node.name or node.output[0]} ({node.op_type})"
                raise KontextError(
                    f"{graph.name}: expected number formats of {target}, found "
                    f"{TensorProto.DataType.Name(kind)} in {where}; "
                    f"choose a target from sm_{least} on, or another recipe"
                )
