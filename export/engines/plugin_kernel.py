"""The Triton kernel that a graph's QK-norm + RoPE nodes need, as a plugin launches it."""

from pathlib import Path
from typing import Any

import onnx
import torch

from ...kernels.chips import CHIPS
from ...kernels.norm_rope import CONFIGS, launch_norm_rope
from ...kernels.ptx import Ptx, ptx_for
from ...runtime.errors import KontextError
from .plugin import NAME, NAMESPACE

DTYPES = {
    "fp32": (torch.float32, "FLOAT"),
    "bf16": (torch.bfloat16, "BF16"),
    "fp16": (torch.float16, "HALF"),
}
"""What graphs compute in -> torch's type, TensorRT's name of it."""
_ANY_TOKENS = 16
"""Tokens are not known when the kernel is compiled, and nothing of it depends on them."""
_INPUTS, _OUTPUTS = ("x_ptr", "scale_ptr", "rope_ptr"), ("out_ptr",)


def plugin_for(graph: Path, precision: str, target: str) -> dict[str, Any] | None:
    """What the compiler registers for ``graph``; None if it has no such node.

    precision: that the graph computes in. target: ``sm_120``. Raises KontextError for a GPU that no
    kernel is compiled for.
    """
    sides = _sides(graph)
    if sides is None:
        return None
    chip = CHIPS.get(int(target.removeprefix("sm_")))
    if chip is None:
        raise KontextError(
            f"--plugins: expected a GPU of one of {', '.join(f'sm_{sm}' for sm in CHIPS)}, found "
            f"{target}; leave --plugins out"
        )
    heads, dim = sides
    dtype, name = DTYPES[precision]
    ptx = ptx_of(heads, dim, dtype, chip.sm)
    config = CONFIGS[dtype.itemsize]
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


def ptx_of(heads: int, dim: int, dtype: torch.dtype, sm: int) -> Ptx:
    """The kernel for ``x [B, S, heads, dim]`` without gaps, of any batch and any length."""
    with torch.device("meta"):
        x = torch.empty(1, _ANY_TOKENS, 1, heads, dim, dtype=dtype)
        scales = torch.empty(1, 1, dim, dtype=dtype)
        rope = torch.empty(_ANY_TOKENS, dim // 2, 2)
        launch = launch_norm_rope(torch.empty_like(x), x, scales, 0, rope)
    return ptx_for(launch, CHIPS[sm])


def integers(ptx: Ptx) -> list[str]:
    """Names of the parameters between inputs and outputs. Raises ValueError unless the order is the
    one in which TensorRT passes them."""
    names = list(ptx.parameters)
    between = names[len(_INPUTS) : len(names) - len(_OUTPUTS)]
    kinds = [ptx.parameters[name] for name in between]
    if names != [*_INPUTS, *between, *_OUTPUTS] or kinds != ["int32"] * len(kinds):
        raise ValueError(f"{ptx.name}: expected inputs, integers, outputs, found {ptx.parameters}")
    return between


def _sides(graph: Path) -> tuple[int, int] | None:
    """Heads, and channels of a head, of the nodes of ``graph``, which share them."""
    model = onnx.load(str(graph), load_external_data=False).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in model.initializer}
    cast = {node.output[0]: node.input[0] for node in model.node if node.op_type == "Cast"}
    found = set()
    for node in model.node:
        if (node.domain, node.op_type) == (NAMESPACE, NAME):
            (heads,) = (it.i for it in node.attribute if it.name == "heads")
            scale = node.input[1]
            (dim,) = shapes[cast.get(scale, scale)]
            found.add((heads, dim))
    if len(found) > 1:
        raise KontextError(f"{graph.name}: expected heads of one size, found {sorted(found)}")
    return found.pop() if found else None
