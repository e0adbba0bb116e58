"""Read tensors out of safetensors files: dequantised, as they are stored, or quantised.

What writers order differently (:mod:`.stored`) comes out in one order, that of
:mod:`fluxkontext.kernels.nvfp4`.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.nvfp4 import NvFp4, swap_nibbles, unpack, unswizzle_scales
from ..kernels.quantize import FP8
from .checkpoint import Component
from .errors import CheckpointError
from .layouts import Piece
from .models.quantised import CHUNK, QuantisedWeight, quantise
from .recipes import MULTIPLE, PARTS, inputs, takes_part, weight_format
from .stored import StoredTensor
from .weights import open_safetensors


class Reader:
    """Reads the tensors of one component; every file is opened once."""

    def __init__(self, component: Component[Any], stack: ExitStack, device: torch.device) -> None:
        self.part = component.name
        self.weights = component.weights
        self.recipe = component.weights.recipe
        self.device = device
        self._stack = stack
        self._files: dict[Path, Any] = {}

    def floats(self, pieces: Sequence[Piece], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The rows of all pieces as ``shape`` in ``dtype``, dequantised where they have scales."""
        parts = (self.piece(piece) for piece in pieces)
        return self._filled(shape, dtype, (p.reshape(len(p), *shape[1:]) for p in parts))

    def piece(self, piece: Piece) -> Tensor:
        """The rows of ``piece`` in the type of the file, float32 if they are dequantised."""
        key = piece.key
        tensor = self._raw(self.weights.tensors[key])
        if self.weights.form(key) == "nvfp4":
            packed, scale = self._plain_order(key)
            blocks = zip(packed.split(CHUNK), scale.split(CHUNK), strict=True)
            whole = self._number(self.weights.global_scales[key])
            tensor = torch.cat([unpack(NvFp4(p, s, whole)) for p, s in blocks])
        elif stored := self.weights.scales.get(key):
            factor = self._raw(stored).float()
            factor = factor.reshape(-1, *[1] * (tensor.ndim - 1)) if factor.numel() > 1 else factor
            tensor = tensor.float() * factor
        return tensor if piece.half is None else tensor.chunk(2)[piece.half]

    def quantised(
        self, pieces: Sequence[Piece], module: str, columns: int, recipe: str | None
    ) -> QuantisedWeight | None:
        """A linear layer's weight to run as it is, or None for one that is to be plain.

        module: its canonical name. recipe: None for what is stored, else what to quantise it to.
        Stored rows in halves, of mixed formats, or in NVFP4 under several scales are plain, that
        is, dequantised: none of the writers known makes such layers.
        """
        if self.part not in PARTS:
            return None
        forms = {self.weights.form(piece.key) for piece in pieces}
        if recipe is None:
            halved = any(piece.half is not None for piece in pieces)
            if len(forms) > 1 or halved or columns % MULTIPLE:
                return None
            return self._stored(pieces, forms.pop(), columns)
        if forms != {"float"}:
            raise CheckpointError(
                f"{self.part}: expected plain weights to quantise as {recipe}, found {module} in "
                f"{', '.join(sorted(forms))}; load it as it is stored, with precision auto"
            )
        if not takes_part(self.part, module, columns):
            return None
        form = weight_format(self.part, recipe)
        rows = torch.cat([self.piece(piece) for piece in pieces])
        return QuantisedWeight(
            form, inputs(self.part, recipe), quantise(rows.to(self.device), form)
        )

    def _stored(self, pieces: Sequence[Piece], form: str, columns: int) -> QuantisedWeight | None:
        if form == "float":
            return None
        keys = [piece.key for piece in pieces]
        rows = [self.weights.shape(key)[0] for key in keys]
        tensors: dict[str, Tensor] = {}
        if form == "fp8":
            raw = (self._raw(self.weights.tensors[key]) for key in keys)
            tensors["weight"] = self._filled((sum(rows), columns), FP8, raw)
            scales = (self._raw(self.weights.scales[key]).flatten() for key in keys)
            per_row = (scale.expand(n) for scale, n in zip(scales, rows, strict=True))
            tensors["weight_scale"] = self._filled((sum(rows),), torch.float32, per_row)
        else:
            whole = [self._number(self.weights.global_scales[key]) for key in keys]
            if len({scale.item() for scale in whole}) > 1:
                return None
            tensors["weight_scale_2"] = whole[0].to(self.device)
            packed, scale = zip(*map(self._plain_order, keys), strict=True)
            tensors["weight"] = self._filled((sum(rows), columns // 2), torch.uint8, packed)
            shape = (sum(rows), columns // MULTIPLE)
            tensors["weight_scale"] = self._filled(shape, FP8, scale)
        if self.recipe is not None:
            takes = inputs(self.part, self.recipe)
        elif form == "nvfp4" or self.part == "text_encoder_2" or self.weights.comfy.get(keys[0]):
            takes = "plain"
        else:
            takes = "dynamic"  # no worse than the one scale that others calibrated, where they did
        if takes == "static":
            scale_of_inputs = self._number(self.weights.input_scales[keys[0]])
            tensors["input_scale"] = scale_of_inputs.to(self.device)
        return QuantisedWeight(form, takes, tensors)

    def _plain_order(self, key: str) -> tuple[Tensor, Tensor]:
        """Packed numbers and block scales of an NVFP4 matrix."""
        packed, scale = self._raw(self.weights.tensors[key]), self._raw(self.weights.scales[key])
        if key in self.weights.comfy:
            rows, columns = self.weights.shape(key)
            scale = unswizzle_scales(scale, rows, columns // MULTIPLE)
            packed = swap_nibbles(packed)
        return packed, scale

    def _filled(
        self, shape: tuple[int, ...], dtype: torch.dtype, parts: Iterable[Tensor]
    ) -> Tensor:
        """A tensor whose rows are those of ``parts``, one after the other."""
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        row = 0
        for part in parts:
            tensor[row : row + len(part)].copy_(part)
            row += len(part)
        return tensor

    def _number(self, stored: StoredTensor) -> Tensor:
        return self._raw(stored).float().reshape(()).clone()

    def _raw(self, stored: StoredTensor) -> Tensor:
        tensor: Tensor
        if stored.made is not None:
            tensor = stored.made(self.device)
            return tensor
        if stored.file not in self._files:
            opened = open_safetensors(stored.file, "pt")
            self._files[stored.file] = self._stack.enter_context(opened)
        tensor = self._files[stored.file].get_tensor(stored.key)
        return tensor
