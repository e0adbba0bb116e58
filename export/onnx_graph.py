"""From a torch module on the meta device to an ONNX graph whose weights stay where they are.

No weight is ever read: an initialiser is a range of bytes of the checkpoint's own safetensors file.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from torch import nn

from ..runtime.contract import TensorSpec
from .attention_fp8 import quantise_attention
from .blocks import Blocks, inline
from .calibration import Calibration
from .components import Graph
from .functions import bodies
from .quantised_graph import attach_weights
from .simplify import simplify, tidy
from .weights import Places

OPSET = 23
"""The first with Attention and RMSNormalization as operators."""
_TYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float16: ir.DataType.FLOAT16,
}


def export_graph(
    graph: Graph, flavour: str, places: Places, calibration: Calibration | None = None
) -> ir.Model:
    """Trace ``graph`` and point its initialisers at the stored weights.

    flavour: ``cpu`` or ``gpu``: how quantised weights are read, and the bodies of our nodes.
    calibration: with magnitudes of attention's inputs; it is then computed in FP8.
    """
    return attached(trace_graph(graph), graph, flavour, places, calibration)


def trace_graph(graph: Graph) -> ir.Model:
    """``graph`` with initialisers that have a name, a shape and no value."""
    blocks = Blocks()
    dynamic = [
        {i for i, axis in enumerate(spec.shape) if isinstance(axis, str)}
        for spec in graph.inputs.values()
    ]
    module = graph.module.eval()
    with _quiet():
        with blocks.opaque(module):
            model = _trace(
                module, graph.example(), dynamic, list(graph.inputs), list(graph.outputs)
            )
        kinds = {
            kind: _trace(traced.block, traced.arguments, traced.varying)
            for kind, traced in blocks.kinds.items()
        }
        inline(model, kinds)
        tidy(model)
    model.producer_name = "fluxkontext"
    model.graph.name = graph.name
    return model


def attached(
    model: ir.Model, graph: Graph, flavour: str, places: Places, calibration: Calibration | None
) -> ir.Model:
    """``model``, traced from ``graph``, with its weights and the bodies of its nodes; in place."""
    attach_weights(model.graph, graph, flavour, places)
    if calibration is not None:
        dtype = next(graph.module.parameters()).dtype
        quantise_attention(model.graph, calibration, _TYPES[dtype])
    model.graph.sort()
    _name_axes(model.graph, {**graph.inputs, **graph.outputs})
    passes.ClearMetadataAndDocStringPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    _add_bodies(model, flavour)
    return model


def _trace(
    module: nn.Module,
    example: tuple[torch.Tensor, ...],
    dynamic: Sequence[set[int]],
    inputs: list[str] | None = None,
    outputs: list[str] | None = None,
) -> ir.Model:
    """The graph of a module, simplified; its parameters are initialisers without a value.

    dynamic: of each example, the axes that vary.
    """
    shapes = tuple(dict.fromkeys(axes, torch.export.Dim.AUTO) for axes in dynamic)
    program = torch.onnx.export(
        module.eval(),
        example,
        dynamic_shapes=shapes if inputs else (shapes,),  # blocks take *tensors
        input_names=inputs,
        output_names=outputs,
        opset_version=OPSET,
        dynamo=True,
        optimize=False,
        verbose=False,
    )
    assert program is not None
    for name, _ in module.named_parameters():
        if name in program.model.graph.initializers:  # else what depends on it would be folded
            program.model.graph.initializers[name].const_value = None
    simplify(program.model)
    return program.model


def _add_bodies(model: ir.Model, flavour: str) -> None:
    """The functions of those of our nodes that are there."""
    used = {(node.domain, node.op_type) for node in model.graph}
    for body in bodies(flavour):
        if (body.domain, body.name) in used:
            model.functions[body.identifier()] = body
            model.opset_imports[body.domain] = 1


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' remarks about themselves: torchvision is not there, torch deprecates
    what torch calls, and the optimiser wonders about initialisers without a value."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _name_axes(graph: ir.Graph, specs: Mapping[str, TensorSpec]) -> None:
    """Give the boundary's varying axes the contract's names; inner shapes are inferred anew."""
    for node in graph:
        for output in node.outputs:
            if output not in graph.outputs:
                output.shape = None
    for value in (*graph.inputs, *graph.outputs):
        value.shape = ir.Shape(specs[str(value.name)].shape)
