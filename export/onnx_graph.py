"""From a torch module on the meta device to an ONNX graph whose weights stay where they are.

No weight is ever read: an initialiser is a range of bytes of the checkpoint's own safetensors file.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript.optimizer import fold_constants_ir
from torch import nn

from ..runtime.contract import TensorSpec
from ..runtime.weights import StoredTensor
from .components import Graph
from .split import SplitLinear

OPSET = 23
"""The first with Attention and RMSNormalization as operators."""
_ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
STORED_TYPES = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "BF16": ir.DataType.BFLOAT16,
    "F16": ir.DataType.FLOAT16,
}

Place = Callable[[StoredTensor], PurePosixPath]
Offset = Callable[[StoredTensor], int]


@dataclass(frozen=True)
class Rows:
    """Some rows of a stored tensor: the bytes of one parameter."""

    tensor: StoredTensor
    start: int
    stop: int


def export_graph(graph: Graph, place: Place, offset: Offset) -> ir.Model:
    """Trace ``graph`` and point its initialisers at the stored weights.

    place: where in the bundle a stored tensor's file is. offset: where its data starts in there.
    """
    model = _trace(graph)
    weights = rows_of(graph)
    for name in weights:  # without a value nothing that depends on a weight is folded
        if name in model.graph.initializers:
            model.graph.initializers[name].const_value = None
    with _quiet():
        _simplify(model)
    for name, rows in weights.items():
        if name in model.graph.initializers:
            _attach(model.graph, name, rows, place, offset)
    _name_axes(model.graph, {**graph.inputs, **graph.outputs})
    passes.ClearMetadataAndDocStringPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    model.producer_name = "fluxkontext"
    model.graph.name = graph.name
    return model


def _simplify(model: ir.Model) -> None:
    """Fold constants and drop what is left over. onnxscript's whole optimiser also matches
    patterns, which takes minutes on 20,000 nodes and which runtimes do themselves."""
    fold_constants_ir(model)
    for tidy in (
        passes.RemoveUnusedNodesPass(),
        passes.IdentityEliminationPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.CommonSubexpressionEliminationPass(),
        passes.DeduplicateInitializersPass(),
        passes.RemoveUnusedNodesPass(),
    ):
        tidy(model)


def _trace(graph: Graph) -> ir.Model:
    dynamic = tuple(
        {i: torch.export.Dim.AUTO for i, axis in enumerate(spec.shape) if isinstance(axis, str)}
        for spec in graph.inputs.values()
    )
    with _quiet():
        program = torch.onnx.export(
            graph.module.eval(),
            graph.example(),
            dynamic_shapes=dynamic,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    return program.model


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


def rows_of(graph: Graph) -> dict[str, Rows]:
    """Parameter name -> the stored rows that hold it."""
    index, locate = graph.component.weights, graph.component.locate
    found = {}
    for name, parameter in graph.module.named_parameters():
        canonical, first, part = _canonical(graph.module, name)
        pieces = locate(canonical)
        count = parameter.shape[0]
        if len(pieces) == 1:  # stored as one: rows from `first`
            found[name] = Rows(index.tensors[pieces[0].key], first, first + count)
        else:
            piece = pieces[part]
            start = 0 if piece.half is None else piece.half * count
            found[name] = Rows(index.tensors[piece.key], start, start + count)
    return found


def _canonical(module: nn.Module, name: str) -> tuple[str, int, int]:
    """Canonical name of a parameter, and for a split projection its first row and its number."""
    owner, _, leaf = name.rpartition(".")
    parent, _, number = owner.rpartition(".")
    split = module.get_submodule(parent)
    if not isinstance(split, SplitLinear):
        return name.removeprefix("network."), 0, 0
    part = int(number)
    first = sum(linear.out_features for linear in list(split)[:part])  # type: ignore[misc]
    return f"{parent.removeprefix('network.')}.{leaf}", first, part


def _attach(graph: ir.Graph, name: str, rows: Rows, place: Place, offset: Offset) -> None:
    """Make an initialiser a range of the file; one of another type is cast in the graph."""
    tensor, value = rows.tensor, graph.initializers[name]
    assert value.shape is not None
    row_bytes = _ITEM_BYTES[tensor.dtype]
    for side in tensor.shape[1:]:
        row_bytes *= side
    external = ir.ExternalTensor(
        str(place(tensor)),
        offset(tensor) + rows.start * row_bytes,
        (rows.stop - rows.start) * row_bytes,
        STORED_TYPES[tensor.dtype],
        shape=ir.Shape(value.shape.numpy()),
        name=name,
    )
    wanted = value.dtype
    if wanted == external.dtype:
        value.const_value = external
        return
    assert wanted is not None
    stored = ir.Value(
        name=f"{name}.stored",
        shape=external.shape,
        type=ir.TensorType(external.dtype),
        const_value=external,
    )
    cast = ir.node("Cast", [stored], {"to": int(wanted)}, name=f"{name}.cast")
    cast.outputs[0].shape, cast.outputs[0].type = value.shape, value.type
    ir.convenience.replace_all_uses_with(value, cast.outputs[0])
    del graph.initializers[name]
    graph.register_initializer(stored)
    graph.insert_before(graph[0], cast)


def _name_axes(graph: ir.Graph, specs: Mapping[str, TensorSpec]) -> None:
    """Give the boundary's varying axes the contract's names; inner shapes are inferred anew."""
    for node in graph:
        for output in node.outputs:
            if output not in graph.outputs:
                output.shape = None
    for value in (*graph.inputs, *graph.outputs):
        value.shape = ir.Shape(specs[str(value.name)].shape)
