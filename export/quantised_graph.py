"""Weights of every stored form in a graph, and the quantisation of what they are multiplied with.

A stored float is cast. FP8 and NVFP4 are dequantised by standard nodes, which compilers fuse into
the product; ONNX Runtime's CPU has no FP4, so there a function looks numbers up.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from ..kernels.nvfp4 import BLOCK
from ..runtime.errors import CheckpointError
from ..runtime.recipes import inputs as inputs_of
from ..runtime.weights import StoredTensor, WeightIndex
from .components import Graph
from .quantised_functions import DOMAIN, TENSORRT
from .weights import Initialisers, Places, Rows, rows_of

_FLOAT = ir.DataType.FLOAT


def check_exportable(part: str, index: WeightIndex) -> None:
    """Graphs refer to stored bytes: plain floats, or what ``fluxkontext quantize`` writes."""
    kinds = {tensor.dtype for tensor in index.tensors.values()}
    plain = {"F64", "F32", "BF16", "F16"}
    if index.recipe is None and (index.scales or index.comfy or not kinds <= plain):
        raise CheckpointError(
            f"{part}: expected weights in {', '.join(sorted(plain))}, or a folder that fluxkontext "
            f"quantize wrote, to export, found "
            f"{', '.join(sorted(kinds - plain)) or 'scaled weights'}; "
            "export the checkpoint that they were quantised from"
        )


def attach_weights(model: ir.Graph, graph: Graph, flavour: str, places: Places) -> None:
    """Give every initialiser of ``model`` that is a parameter of ``graph`` its value."""
    writer = _Writer(model, graph, flavour, Initialisers(model, places))
    for name, rows in rows_of(graph).items():
        if name in model.initializers:
            writer.attach(name, rows)


@dataclass
class _Writer:
    model: ir.Graph
    graph: Graph
    flavour: str
    stored: Initialisers
    quantised: dict[tuple[ir.Value, str], ir.Value] = field(default_factory=dict)
    parameter: str = ""
    """What is being attached: its nodes are called after it."""

    @property
    def index(self) -> WeightIndex:
        return self.graph.component.weights

    def attach(self, name: str, rows: Rows) -> None:
        """Replace initialiser ``name`` by what computes it from the file."""
        self.parameter = name
        value = self.model.initializers[name]
        assert value.shape is not None
        assert value.dtype is not None
        form = self.index.form(rows.name)
        if form == "float":
            shape = tuple(value.shape.numpy())
            del self.model.initializers[name]
            stored = self.stored.add(rows.tensor, slice(*rows[2:]), shape=shape, name=name)
            self._replace(value, self._cast(stored, value.dtype))
            return
        recipe = self.index.recipe
        assert recipe is not None
        consumers = [use.node for use in value.uses()]
        weight = {"fp8": self._fp8, "nvfp4": self._nvfp4}[form](rows)
        del self.model.initializers[name]
        self._replace(value, self._cast(weight, value.dtype))
        kind = inputs_of(self.graph.component.name, recipe)
        if kind == "plain":
            return
        for consumer in consumers:
            product = consumer
            while product.op_type not in ("MatMul", "Gemm"):
                (product,) = {use.node for use in product.outputs[0].uses()}
            x = product.inputs[0]
            assert x is not None
            key = (x, rows.name)
            if key not in self.quantised:
                self.quantised[key] = self._quantise(x, rows.name, form, kind, value.dtype)
            product.replace_input_with(0, self.quantised[key])

    def _replace(self, old: ir.Value, new: ir.Value) -> None:
        if new is not old:
            ir.convenience.replace_all_uses_with(old, new)

    def _fp8(self, rows: Rows) -> ir.Value:
        part = slice(rows.start, rows.stop)
        weight = self.stored.add(rows.tensor, part)
        stored = self.index.scales[rows.name]
        single = not stored.shape or stored.shape == (1,)
        scale = self.stored.add(stored, None if single else part, shape=() if single else None)
        return self._node("dequantize", "DequantizeLinear", [weight, scale], {"axis": 0})

    def _nvfp4(self, rows: Rows) -> ir.Value:
        part, columns = slice(rows.start, rows.stop), self.index.shape(rows.name)[1]
        scales = self.stored.add(self.index.scales[rows.name], part)
        scale = self._scalar(self.index.global_scales[rows.name])
        if self.flavour == "cpu":
            packed = self.stored.add(rows.tensor, part)
            return self._node("dequantize", "Nvfp4Weight", [packed, scales, scale], domain=DOMAIN)
        shape = (rows.stop - rows.start, columns)
        weight = self.stored.add(rows.tensor, part, ir.DataType.FLOAT4E2M1, shape)
        scales = self._node("scales", "DequantizeLinear", [scales, scale])
        blocks = {"axis": -1, "block_size": BLOCK}
        return self._node("dequantize", "DequantizeLinear", [weight, scales], blocks)

    def _quantise(
        self, x: ir.Value, name: str, form: str, kind: str, dtype: ir.DataType
    ) -> ir.Value:
        """``x``, of ``dtype``, as the product takes it, at the accuracy that is left."""
        if kind == "dynamic":
            return self._node("input", "Fp8Rows", [x], domain=DOMAIN)
        scale = self._scalar(self.index.input_scales[name])
        if form == "fp8":
            return fp8_round(self.model, f"{self.parameter}.input", x, scale, dtype)
        if self.flavour == "cpu":
            return self._node("input", "Nvfp4Blocks", [x, scale], domain=DOMAIN)
        values = ir.node(
            "TRT_FP4DynamicQuantize",
            [x, scale],
            {"axis": -1, "block_size": BLOCK, "scale_type": int(ir.DataType.FLOAT8E4M3FN)},
            domain=TENSORRT,
            num_outputs=2,
            name=f"{self.parameter}.input.quantize",
        )
        self.model.append(values)
        fours, eights = values.outputs
        scales = self._node("input.scales", "DequantizeLinear", [eights, scale])
        blocks = {"axis": -1, "block_size": BLOCK}
        wide = self._node("input.dequantize", "DequantizeLinear", [fours, scales], blocks)
        return self._cast(wide, dtype)

    def _scalar(self, tensor: StoredTensor) -> ir.Value:
        return self.stored.add(tensor, shape=())

    def _cast(self, x: ir.Value, wanted: ir.DataType) -> ir.Value:
        if x.dtype == wanted:
            return x
        out = self._node(f"cast{len(self.model)}", "Cast", [x], {"to": int(wanted)})
        out.shape, out.type = x.shape, ir.TensorType(wanted)
        return out

    def _node(
        self,
        name: str,
        op: str,
        inputs: list[ir.Value],
        attributes: Mapping[str, int] | None = None,
        domain: str = "",
    ) -> ir.Value:
        """The float32 result of a new node; nodes are sorted when all are there."""
        name = f"{self.parameter}.{name}"
        node = ir.node(op, inputs, dict(attributes or {}), domain=domain, name=name)
        node.outputs[0].type = ir.TensorType(_FLOAT)
        self.model.append(node)
        return node.outputs[0]


def fp8_round(
    graph: ir.Graph, name: str, x: ir.Value, scale: ir.Value, dtype: ir.DataType
) -> ir.Value:
    """``x`` of ``dtype`` through E4M3 under ``scale`` and back, by nodes called after ``name``."""
    zero = constant(graph, "zero_e4m3", ir.Tensor(np.zeros((), ir.DataType.FLOAT8E4M3FN.numpy())))
    narrow = ir.node("QuantizeLinear", [x, scale, zero], name=f"{name}.quantize")
    wide = ir.node("DequantizeLinear", [narrow.outputs[0], scale, zero], name=f"{name}.dequantize")
    nodes = [narrow, wide]
    if dtype != _FLOAT:
        nodes.append(ir.node("Cast", [wide.outputs[0]], {"to": int(dtype)}))
    graph.extend(nodes)
    return nodes[-1].outputs[0]


def constant(graph: ir.Graph, name: str, tensor: ir.Tensor[Any]) -> ir.Value:
    """The initialiser ``name``, made if it is not there."""
    if name not in graph.initializers:
        value = ir.Value(
            name=name,
            shape=tensor.shape,
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        graph.register_initializer(value)
    return graph.initializers[name]
