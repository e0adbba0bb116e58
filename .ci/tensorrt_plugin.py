"""Run our TensorRT plugin as TensorRT's own Python code runs it, with symbols for sizes; no GPU.

The plugin is registered, created from a node's attributes and asked for its kernel, for every GPU
generation. What it would have TensorRT launch, evaluated for some sizes, has to be what the kernel
itself is launched with for tensors of these sizes, and its PTX has to assemble.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bindings import unpack

from fluxkontext.export.engines import plugin
from fluxkontext.export.engines.plugin_kernel import DTYPES, integers, ptx_of
from fluxkontext.kernels.chips import CHIPS
from fluxkontext.kernels.norm_rope import CONFIGS, launch_norm_rope
from fluxkontext.kernels.ptx import assemble

SIZES = ((1, 1), (1, 8704), (3, 77), (2, 9216))
"""Batch and tokens."""
HEADS = ((24, 128), (3, 64), (1, 128))
"""Heads, and channels of one: the published model's, the miniature's, one alone."""


def main() -> None:
    """All that is launched, for every chip, type and size."""
    with tempfile.TemporaryDirectory() as name:
        unpack(sys.executable, Path(name))
        sys.path.insert(0, name)
        import tensorrt_bindings as trt

        creators = {}
        registry = SimpleNamespace(
            register_creator=lambda it, space: creators.update({(space, it.name): it}),
            get_creator=lambda name, _version, space: creators[space, name],
        )
        trt.get_plugin_registry = lambda: registry
        checked = 0
        for precision in DTYPES:
            for heads, dim in HEADS:
                for sm in CHIPS:
                    forget()
                    check(trt, creators, precision, heads, dim, sm)
                    checked += 1
        refuses_others(trt, creators)
    sys.stdout.write(f"{checked} kernels: parameters, grids, integers are those of the launch\n")


def forget() -> None:
    """A process registers the plugin once; this one does again and again."""
    lib = sys.modules.get("tensorrt_bindings.plugin._lib")
    if lib is not None:
        lib.QDP_REGISTRY.clear()
        lib.QDP_CREATORS.clear()
        vars(lib.op).pop(plugin.NAMESPACE, None)


def job(precision: str, heads: int, dim: int, sm: int) -> dict[str, Any]:
    """What the compiler's process is told."""
    dtype, name = DTYPES[precision]
    ptx, config = ptx_of(heads, dim, dtype, sm), CONFIGS[dtype.itemsize]
    assert len(assemble(ptx, CHIPS[sm])) > 1000
    return {
        "name": ptx.name,
        "ptx": ptx.text,
        "threads": ptx.threads,
        "shared": ptx.shared,
        "integers": integers(ptx),
        "tokens": config.tokens,
        "heads_at_once": config.heads,
        "heads": heads,
        "dim": dim,
        "dtype": name,
    }


def check(trt: Any, creators: Any, precision: str, heads: int, dim: int, sm: int) -> None:
    """One kernel, at all sizes."""
    kernel = job(precision, heads, dim, sm)
    launched = launch(trt, creators, kernel, heads, dim)
    dtype, _ = DTYPES[precision]
    for batch, tokens in SIZES:
        with torch.device("meta"):
            x = torch.empty(batch, tokens, 1, heads, dim, dtype=dtype)
            scales, rope = torch.empty(1, 1, dim, dtype=dtype), torch.empty(tokens, dim // 2, 2)
            wanted = launch_norm_rope(torch.empty_like(x), x, scales, 0, rope)
        sizes = {"batch": batch, "tokens": tokens}
        assert launched.grid(sizes) == wanted.grid, (launched.grid(sizes), wanted.grid)
        assert launched.block(sizes) == (32 * wanted.warps, 1, 1)
        assert launched.shared(sizes) == kernel["shared"]
        passed = dict(zip(kernel["integers"], launched.integers(sizes), strict=True))
        assert passed == {name: wanted.args[name] for name in passed}, (passed, wanted.args)
        left_out = set(wanted.args) - set(passed) - {"x_ptr", "scale_ptr", "rope_ptr", "out_ptr"}
        fixed = {name: wanted.args[name] for name in left_out}
        # folded into the code: sizes of a tile, what is absent, and a lone head
        assert all(name.isupper() or fixed[name] in (None, 1) for name in fixed), fixed
    name, text = launched.kernel
    assert (name, text.decode()) == (kernel["name"], kernel["ptx"])
    # inputs, integers, outputs, and nothing else
    assert text.decode().count(".param .") == 3 + len(kernel["integers"]) + 1


def refuses_others(trt: Any, creators: Any) -> None:
    """A node that the kernel was not compiled for."""
    kernel = job("bf16", 24, 128, 120)
    for heads, dim, precision, epsilon in (
        *((12, 128, "bf16", 1e-6), (24, 64, "bf16", 1e-6)),
        *((24, 128, "fp16", 1e-6), (24, 128, "bf16", 1e-5)),
    ):
        forget()
        with pytest.raises(ValueError, match="NormRope: expected"):
            launch(trt, creators, kernel, heads, dim, precision, epsilon)


class Launched:
    """What TensorRT was told, as functions of the sizes that vary."""

    def __init__(self, params: Any, symbols: list[Any], kernel: tuple[str, bytes]) -> None:
        self.params, self.symbols, self.kernel = params, symbols, kernel

    def _values(self, sizes: dict[str, int], *names: str) -> tuple[int, ...]:
        return tuple(getattr(self.params, name).expr.value(sizes) for name in names)

    def grid(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """Blocks."""
        return self._values(sizes, "grid_x", "grid_y", "grid_z")

    def block(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """Threads."""
        return self._values(sizes, "block_x", "block_y", "block_z")

    def shared(self, sizes: dict[str, int]) -> int:
        """Bytes."""
        return self._values(sizes, "shared_mem")[0]

    def integers(self, sizes: dict[str, int]) -> list[int]:
        """Arguments between the addresses."""
        return [symbol.expr.value(sizes) for symbol in self.symbols]


def launch(
    trt: Any,
    creators: Any,
    kernel: dict[str, Any],
    heads: int,
    dim: int,
    precision: str | None = None,
    epsilon: float = 1e-6,
) -> Launched:
    """Register the plugin, make one of a node's attributes as the parser does, and ask it."""
    plugin.register(trt, kernel)
    creator = creators[plugin.NAMESPACE, plugin.NAME]
    fields = [
        trt.PluginField("epsilon", np.array([epsilon], np.float32), trt.PluginFieldType.FLOAT32),
        trt.PluginField("heads", np.array([heads], np.int32), trt.PluginFieldType.INT32),
    ]
    made = creator.create_plugin(
        plugin.NAME,
        plugin.NAMESPACE,
        trt.PluginFieldCollection(fields),
        trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.PREFER_AOT,
    )
    wide = getattr(trt.DataType, DTYPES[precision][1] if precision else kernel["dtype"])
    types = [wide, wide, trt.DataType.FLOAT]
    assert made.get_output_data_types(types, [4, 1, 3]) == [wide]
    symbolic = sys.modules["tensorrt_bindings.plugin._tensor"]
    # The last step into the library: it holds an expression that only the library can make.
    symbolic.SymExprImpl = lambda it: SimpleNamespace(expr=it._expr)
    builder = Builder(trt)
    symbolic.SymIntExpr._exprBuilder = builder
    batch, tokens = Size.of(trt, "batch"), Size.of(trt, "tokens")
    fixed = builder.constant
    shapes = [
        [batch, tokens, fixed(heads), fixed(dim)],
        [fixed(dim)],
        [tokens, fixed(dim // 2), fixed(2)],
    ]
    made.input_descs = [described(symbolic, *it) for it in zip(shapes, types, strict=True)]
    made.output_descs = [made.register_function(*made.input_descs, epsilon=epsilon, heads=heads)]
    made.set_tactic(0)
    described_types = [*types, wide]
    in_out = [trt.DynamicPluginTensorDesc() for _ in described_types]
    for tensor, kind in zip(in_out, described_types, strict=True):
        tensor.desc.type, tensor.desc.format = kind, trt.TensorFormat.LINEAR
    params, symbols = SimpleNamespace(), Symbols()
    made.get_launch_params(None, in_out, 3, params, symbols, builder)
    assert len(symbols) == symbols.nbSymExprs == len(kernel["integers"])
    found = made.get_kernel([it.desc for it in in_out[:3]], [it.desc for it in in_out[3:]])
    return Launched(params, [symbols[i] for i in range(len(symbols))], found)


class Symbols(dict[int, Any]):
    """Where TensorRT takes the integers from."""

    nbSymExprs = 0


def described(symbolic: Any, sides: list[Any], kind: Any) -> Any:
    """A tensor of symbolic sides."""
    tensor = symbolic.TensorDesc()
    tensor.dtype = kind
    tensor.shape_expr = symbolic.ShapeExprs(len(sides))
    for place, side in enumerate(sides):
        tensor.shape_expr[place] = symbolic.ShapeExpr(side)
    tensor._immutable = True
    return tensor


class Size:
    """Stands for TensorRT's expression of a side, a class that Python cannot make one of."""

    kind: Any = None

    def __init__(self, value: Callable[[dict[str, int]], int], constant: bool) -> None:
        self.value, self._constant = value, constant

    @property
    def __class__(self) -> Any:
        return self.kind

    @classmethod
    def of(cls, trt: Any, name: str) -> "Size":
        """A side that varies."""
        cls.kind = trt.IDimensionExpr
        return cls(lambda sizes: sizes[name], False)

    def is_constant(self) -> bool:
        """Whether it does not vary."""
        return self._constant

    def get_constant_value(self) -> int:
        """Of one that does not."""
        assert self._constant
        return self.value({})

    def is_size_tensor(self) -> bool:
        """Never."""
        return False


class Builder:
    """Stands for TensorRT's builder of expressions."""

    def __init__(self, trt: Any) -> None:
        kinds = trt.DimensionOperation
        self.operations: dict[Any, Callable[[int, int], int]] = {
            kinds.SUM: lambda a, b: a + b,
            kinds.PROD: lambda a, b: a * b,
            kinds.CEIL_DIV: lambda a, b: -(-a // b),
        }
        Size.kind = trt.IDimensionExpr

    def constant(self, value: int) -> Size:
        """A number."""
        return Size(lambda _: value, True)

    def operation(self, kind: Any, first: Size, second: Size) -> Size:
        """One of two."""
        function = self.operations[kind]
        constant = first.is_constant() and second.is_constant()
        return Size(lambda sizes: function(first.value(sizes), second.value(sizes)), constant)


if __name__ == "__main__":
    main()
