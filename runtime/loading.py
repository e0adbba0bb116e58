"""Stream a component's weights from safetensors into its torch module."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..kernels import KernelSet
from .checkpoint import Component
from .models.quantised import stand_in
from .reading import Reader
from .weights import match

Config = TypeVar("Config")
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Quantised:
    """How a component's quantised layers run.

    kernels: what they run with. recipe: one without calibration, by which plain weights are
    quantised while they are loaded; None loads weights as they are stored.
    """

    kernels: KernelSet
    recipe: str | None = None


def build(make: Callable[[], Module]) -> Module:
    """Make a module on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return make().eval().requires_grad_(False)


def kinds(module: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Name -> type of each tensor of ``module`` where it computes in ``dtype``: what it lists in
    ``fp16_exceptions`` stays float32 when that is float16."""
    wide = tuple(getattr(module, "fp16_exceptions", ())) if dtype == torch.float16 else ()
    return {name: torch.float32 if name.endswith(wide) else dtype for name in module.state_dict()}


def load(
    component: Component[Config],
    make: Callable[[Config], Module],
    device: torch.device,
    dtype: torch.dtype,
    quantised: Quantised | None = None,
) -> Module:
    """Make the module of ``component`` with its weights on ``device`` in ``dtype``.

    quantised: layers that are stored in FP8 or NVFP4, or that its recipe quantises, run as such
    (:mod:`.models.quantised`); None dequantises what is stored. Types are those of :func:`kinds`.

    Each tensor is allocated once, in its place, and filled from the memory-mapped file piece by
    piece; no second copy of the weights exists. Raises CheckpointError unless the names and shapes
    are exactly those of the module.
    """
    module = build(lambda: make(component.config))
    kind = kinds(module, dtype)
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    pieces = match(component.name, wanted, component.weights, component.locate)

    with ExitStack() as stack:
        reader = Reader(component, stack, device)
        state: dict[str, Tensor] = {}
        if quantised is not None:
            linears = {k: m for k, m in module.named_modules() if isinstance(m, nn.Linear)}
            for name, layer in linears.items():
                weight = f"{name}.weight"
                columns = layer.in_features
                if found := reader.quantised(pieces[weight], name, columns, quantised.recipe):
                    new = stand_in(layer, found, quantised.kernels, kind[weight])
                    module.set_submodule(name, new)
                    state |= {f"{name}.{k}": v for k, v in found.tensors.items()}
        for name, shape in wanted.items():
            if name not in state:
                state[name] = reader.floats(pieces[name], shape, kind[name])
    module.load_state_dict(state, assign=True)
    return module
