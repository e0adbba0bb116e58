"""Stream a component's weights from safetensors into its torch module."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .checkpoint import Component
from .layouts import Piece
from .weights import StoredTensor, match, open_safetensors

Config = TypeVar("Config")
Module = TypeVar("Module", bound=nn.Module)


def build(make: Callable[[], Module]) -> Module:
    """Make a module on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return make().eval().requires_grad_(False)


def load(
    component: Component[Config],
    make: Callable[[Config], Module],
    device: torch.device,
    dtype: torch.dtype,
) -> Module:
    """Make the module of ``component`` with its weights on ``device`` in ``dtype``.

    Tensors that the module lists in ``fp16_exceptions`` stay float32 when ``dtype`` is float16.

    Each tensor is allocated once, in its place, and filled from the memory-mapped file piece by
    piece; no second copy of the weights exists. Raises CheckpointError unless the names and shapes
    are exactly those of the module.
    """
    module = build(lambda: make(component.config))
    exceptions = getattr(module, "fp16_exceptions", ()) if dtype == torch.float16 else ()
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    pieces = match(component.name, wanted, component.weights, component.locate)
    with ExitStack() as stack:
        reader = _Reader(component, stack)
        state = {}
        for name, shape in wanted.items():
            kind = torch.float32 if name.endswith(tuple(exceptions)) else dtype
            tensor = torch.empty(shape, dtype=kind, device=device)
            row = 0
            for piece in pieces[name]:
                source = reader.read(piece)
                tensor[row : row + len(source)].copy_(source.reshape(len(source), *shape[1:]))
                row += len(source)
            state[name] = tensor
    module.load_state_dict(state, assign=True)
    return module


class _Reader:
    """Reads stored pieces; every file is opened once."""

    def __init__(self, component: Component[Any], stack: ExitStack) -> None:
        self.weights = component.weights
        self.stack = stack
        self.files: dict[Path, Any] = {}

    def read(self, piece: Piece) -> Tensor:
        """The rows of ``piece``, dequantised when the file has a scale for them."""
        tensor = self._tensor(self.weights.tensors[piece.key])
        if scale := self.weights.scales.get(piece.key):
            factor = self._tensor(scale).float()
            factor = factor.reshape(-1, *[1] * (tensor.ndim - 1)) if factor.numel() > 1 else factor
            tensor = tensor.float() * factor
        return tensor if piece.half is None else tensor.chunk(2)[piece.half]

    def _tensor(self, stored: StoredTensor) -> Tensor:
        if stored.file not in self.files:
            opened = open_safetensors(stored.file, "pt")
            self.files[stored.file] = self.stack.enter_context(opened)
        tensor: Tensor = self.files[stored.file].get_tensor(stored.key)
        return tensor
