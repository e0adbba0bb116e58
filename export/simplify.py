"""Make a traced graph small: constants folded, arithmetic on shapes gone, duplicates shared."""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript.optimizer import fold_constants_ir


def simplify(model: ir.Model) -> None:
    """Fold constants and drop what is left over. onnxscript's whole optimiser also matches
    patterns, which takes minutes on 20,000 nodes and which runtimes do themselves."""
    _reshape_by_constants(model.graph)
    fold_constants_ir(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.IdentityEliminationPass()(model)


def tidy(model: ir.Model) -> None:
    """Share what is equal in a graph that is complete but for its weights."""
    for step in (
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.CommonSubexpressionEliminationPass(),
        passes.DeduplicateInitializersPass(),
        _GatherRows(),
        passes.RemoveUnusedNodesPass(),
    ):
        step(model)


def _reshape_by_constants(graph: ir.Graph) -> None:
    """Where all axes but one are known or equal the input's at their place, the new shape needs
    no arithmetic: 0 copies an axis, -1 is what remains. A step of a small model spends a good part
    of its time on such arithmetic otherwise."""
    for node in list(graph):
        if node.op_type != "Reshape" or node.domain:
            continue
        before, after = node.inputs[0], node.outputs[0]
        if before is None or before.shape is None or after.shape is None:
            continue
        wanted = [
            size
            if isinstance(size, int)
            else 0
            if i < len(before.shape) and size == before.shape[i] and size.value is not None
            else -1
            for i, size in enumerate(after.shape)
        ]
        if wanted.count(-1) > 1 or 0 in after.shape:
            continue
        constant = ir.node("Constant", [], {"value": ir.tensor(np.array(wanted, np.int64))})
        graph.insert_before(node, constant)
        node.replace_input_with(1, constant.outputs[0])
        node.attributes.pop("allowzero", None)


class _GatherRows(ir.passes.InPlacePass):
    """One row of an axis as one node: tracing writes a slice and a squeeze."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, changed = model.graph, False
        for node in list(graph):
            squeezed_value = node.inputs[0] if node.op_type == "Squeeze" else None
            rows = None if squeezed_value is None else squeezed_value.producer()
            if rows is None or rows.op_type != "Slice" or len(rows.inputs) != 4:
                continue
            start, stop, axis, squeezed = map(_scalar, (*rows.inputs[1:], node.inputs[1]))
            if start is None or axis is None or min(start, axis) < 0:
                continue
            if (stop, squeezed) != (start + 1, axis):
                continue
            index = ir.tensor(np.array(start, np.int64), name=f"row_{start}")
            value = graph.initializers.get(str(index.name))
            if value is None:
                value = ir.Value(
                    name=index.name,
                    shape=ir.Shape([]),
                    type=ir.TensorType(ir.DataType.INT64),
                    const_value=index,
                )
                graph.register_initializer(value)
            gather = ir.node("Gather", [rows.inputs[0], value], {"axis": axis})
            gather.outputs[0].type = node.outputs[0].type
            ir.convenience.replace_nodes_and_values(
                graph, node, [node], [gather], node.outputs, gather.outputs
            )
            changed = True
        return ir.passes.PassResult(model, modified=changed)


def _scalar(value: ir.Value | None) -> int | None:
    """The only number of a constant."""
    constant = None if value is None else value.const_value
    return int(constant.numpy().item()) if constant is not None and constant.size == 1 else None
