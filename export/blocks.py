"""Blocks that repeat are traced once: the graph's size in time is one block of each kind.

In the trace of the whole, each such block is a single opaque node; then one block of a kind is
traced by itself as a function, and put in the place of its nodes with each block's own weights.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from torch import Tensor, nn

from ..runtime.models.clip import Layer as ClipLayer
from ..runtime.models.t5 import Block as T5Block
from ..runtime.models.transformer import DoubleStreamBlock, SingleStreamBlock

_DOMAIN = "fluxkontext.blocks"
RESULTS: dict[type[nn.Module], tuple[int, ...]] = {
    DoubleStreamBlock: (0, 1),
    SingleStreamBlock: (0, 1),
    T5Block: (0,),
    ClipLayer: (0,),
}
"""Kinds of blocks that repeat; each result is shaped like the argument of that number."""


@dataclass(frozen=True)
class Traced:
    """What to trace of one kind: a block, and arguments with the axes that vary."""

    block: nn.Module
    arguments: tuple[Tensor, ...]
    varying: tuple[set[int], ...]


@dataclass
class Blocks:
    """The kinds met in a trace, by name; the first block of each stands for all."""

    kinds: dict[str, Traced] = field(default_factory=dict)

    @contextmanager
    def opaque(self, module: nn.Module) -> Iterator[None]:
        """Within, blocks of ``module`` leave one node each, unless they are called with more than
        tensors (the last single block, which drops tokens)."""
        patched = [(name, m) for name, m in module.named_modules() if type(m) in RESULTS]
        try:
            for name, block in patched:
                block.forward = self._stand_in(name, block)
            yield
        finally:
            for _, block in patched:
                del block.forward

    def _stand_in(self, name: str, block: nn.Module) -> Callable[..., object]:
        kind = type(block)
        inline = block.forward

        def forward(*args: object) -> object:
            tensors = _flat(args)
            if tensors is None:
                return inline(*args)
            results = [tensors[i] for i in RESULTS[kind]]
            self.kinds.setdefault(kind.__name__, _traced(block, tensors, args))
            outputs = torch.onnx.ops.symbolic_multi_out(
                f"{_DOMAIN}::{kind.__name__}",
                tensors,
                {"block": name},
                dtypes=[result.dtype for result in results],
                shapes=[result.shape for result in results],
                version=1,
            )
            moved = tuple(output.to(tensors[0].device) for output in outputs)
            return moved if len(moved) > 1 else moved[0]

        return forward


class _Unflattened(nn.Module):
    """A block that takes its tensors one by one."""

    def __init__(self, block: nn.Module, args: Sequence[object]) -> None:
        super().__init__()
        self.block = block
        self.counts = [len(a) if isinstance(a, list | tuple) else None for a in args]
        self.absent = [a is None for a in args]

    def forward(self, *tensors: Tensor) -> object:
        rest = iter(tensors)
        args: list[Tensor | list[Tensor] | None] = []
        for count, absent in zip(self.counts, self.absent, strict=True):
            if absent:
                args.append(None)
            else:
                args.append(next(rest) if count is None else [next(rest) for _ in range(count)])
        return self.block(*args)


def _flat(args: Sequence[object]) -> list[Tensor] | None:
    """The tensors in ``args`` and its lists; None if there is anything else but None."""
    tensors: list[Tensor] = []
    for argument in args:
        for item in argument if isinstance(argument, list | tuple) else [argument]:
            if isinstance(item, Tensor):
                tensors.append(item)
            elif item is not None:
                return None
    return tensors


def _traced(block: nn.Module, tensors: Sequence[Tensor], args: Sequence[object]) -> Traced:
    """Arguments of the same sizes on the meta device."""
    arguments, varying = [], []
    for tensor in tensors:
        sides: list[Any] = list(tensor.shape)  # of which some are symbols here
        symbols = {i for i, side in enumerate(sides) if isinstance(side, torch.SymInt)}
        sizes = [side.node.hint if i in symbols else side for i, side in enumerate(sides)]
        arguments.append(torch.empty(sizes, dtype=tensor.dtype, device="meta"))
        varying.append(symbols)
    return Traced(_Unflattened(block, args), tuple(arguments), tuple(varying))


def inline(model: ir.Model, kinds: dict[str, ir.Model]) -> None:
    """Put the traced block of each kind in the place of the nodes of that kind.

    kinds: name -> a block by itself, its parameters initialisers without a value. The whole gets an
    initialiser for each block and parameter, under the parameter's full name.
    """
    weights: dict[str, list[ir.Value]] = {}
    for kind, block in kinds.items():
        graph = block.graph
        values = list(graph.initializers.values())
        graph.initializers.clear()
        for value in values:  # a function has no initialisers of its own
            if value.const_value is not None:
                constant = ir.node("Constant", [], {"value": value.const_value})
                ir.convenience.replace_all_uses_with(value, constant.outputs[0])
                graph.insert_before(graph[0], constant)
        weights[kind] = [value for value in values if value.const_value is None]
        graph.inputs.extend(weights[kind])
        model.functions[(_DOMAIN, kind, "")] = ir.Function(
            _DOMAIN, kind, graph=graph, attributes=[]
        )
        model.opset_imports.setdefault(_DOMAIN, 1)
    for node in list(model.graph):
        if node.domain != _DOMAIN:
            continue
        prefix = node.attributes["block"].as_string()
        own = []
        for weight in weights[node.op_type]:
            name = f"{prefix}.{str(weight.name).removeprefix('block.')}"
            if name not in model.graph.initializers:
                model.graph.initializers[name] = ir.Value(
                    name=name, shape=weight.shape, type=weight.type
                )
            own.append(model.graph.initializers[name])
        call = ir.node(
            node.op_type, [*node.inputs, *own], domain=_DOMAIN, num_outputs=len(node.outputs)
        )
        for old, new in zip(node.outputs, call.outputs, strict=True):
            new.type, new.shape = old.type, old.shape
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], [call], node.outputs, call.outputs
        )
    passes.InlinePass(lambda function: function.domain == _DOMAIN)(model)
    model.opset_imports.pop(_DOMAIN, None)
