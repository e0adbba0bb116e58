"""A graph's initialisers as ranges of bytes of the checkpoint's own safetensors files."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import onnx_ir as ir
from torch import nn

from ..runtime.weights import StoredTensor, data_offsets
from .components import Graph
from .split import SplitLinear

STORED_TYPES = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "BF16": ir.DataType.BFLOAT16,
    "F16": ir.DataType.FLOAT16,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
    "U8": ir.DataType.UINT8,
}
Places = Mapping[Path, PurePosixPath]
"""Where in the bundle each file of weights is."""


class Rows(NamedTuple):
    """Some rows of a stored tensor: the bytes of one parameter. name: of the tensor in its
    component's index."""

    name: str
    tensor: StoredTensor
    start: int
    stop: int


def rows_of(graph: Graph) -> dict[str, Rows]:
    """Parameter name -> the stored rows that hold it."""
    index, locate = graph.component.weights, graph.component.locate
    found = {}
    for name, parameter in graph.module.named_parameters():
        canonical, first, part = _canonical(graph.module, name)
        pieces = locate(canonical)
        count = parameter.shape[0]
        if len(pieces) == 1:  # stored as one: rows from `first`
            key = pieces[0].key
            found[name] = Rows(key, index.tensors[key], first, first + count)
        else:
            piece = pieces[part]
            start = 0 if piece.half is None else piece.half * count
            found[name] = Rows(piece.key, index.tensors[piece.key], start, start + count)
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


@dataclass
class Initialisers:
    """Stored tensors as initialisers of a graph. Where they lie in a file is read once."""

    graph: ir.Graph
    places: Places
    _offsets: dict[Path, Mapping[str, int]] = field(default_factory=dict)

    def add(
        self,
        tensor: StoredTensor,
        rows: slice | None = None,
        kind: ir.DataType | None = None,
        shape: tuple[int, ...] | None = None,
        name: str | None = None,
    ) -> ir.Value:
        """An initialiser that is ``tensor``, or ``rows`` of it, where it lies.

        kind, shape: what its bytes are read as, where that is not what the file says.
        """
        stored = STORED_TYPES[tensor.dtype]
        row_bytes = round(stored.itemsize)
        for side in tensor.shape[1:]:
            row_bytes *= side
        count = tensor.shape[0] if tensor.shape else 1
        rows = rows or slice(0, count)
        whole = rows == slice(0, count)
        name = name or tensor.key + ("" if whole else f"[{rows.start}:{rows.stop}]")
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        own = (rows.stop - rows.start, *tensor.shape[1:]) if tensor.shape else ()
        data = ir.ExternalTensor(
            str(self.places[tensor.file]),
            self._offset(tensor) + rows.start * row_bytes,
            (rows.stop - rows.start) * row_bytes,
            kind or stored,
            shape=ir.Shape(shape or own),
            name=name,
        )
        typed = ir.TensorType(data.dtype)
        value = ir.Value(name=name, shape=data.shape, type=typed, const_value=data)
        self.graph.register_initializer(value)
        return value

    def _offset(self, tensor: StoredTensor) -> int:
        """Of its first byte in its file."""
        if tensor.file not in self._offsets:
            self._offsets[tensor.file] = data_offsets(tensor.file)
        return self._offsets[tensor.file][tensor.key]
