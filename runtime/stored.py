"""Tensors as they lie in safetensors files: types, shapes, and how quantised ones are stored.

A quantised weight ``X.weight`` has its scales beside it. FP8 is E4M3 ``[N, K]`` with a scale a row
or one for all. NVFP4 is two numbers a byte ``[N, K / 2]``, with an E4M3 scale for every 16 columns
and one float32 scale for all (:mod:`fluxkontext.kernels.nvfp4`).

ModelOpt, BFL and this project store NVFP4 in plain order, and the first number of a byte in its
lower half; ComfyUI the first in the upper half, and block scales in cuBLAS' tiles of 128 × 4,
padded with zeros. No shape tells them apart, but ComfyUI marks the layers that it quantised.
(Sources: diffusers 0.42 ``quantizers/bfl``; comfy-kitchen 0.2.40 ``quantize_nvfp4`` and
``to_blocked``.)
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .recipes import MULTIPLE, PARTS, RECIPES, recipe_of

Entry = TypeVar("Entry")

_SCALE_DTYPES = ("F32", "F64", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its safetensors dtype name, its shape, and where it is.

    made: gives the tensor on a device, in place of a file that is not there.
    """

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    made: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class WeightIndex:
    """The tensors of one component by name, what belongs to quantised ones, the files' metadata.

    scales: of rows, of a whole tensor, or of NVFP4 blocks (``weight_scale``, ``scale_weight``).
    global_scales: NVFP4's second (``weight_scale_2``). input_scales: of activations. All by the
    name of the weight. comfy: the weights that ComfyUI's marks name, and whether their products
    must take inputs in full precision.
    """

    tensors: Mapping[str, StoredTensor]
    scales: Mapping[str, StoredTensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    global_scales: Mapping[str, StoredTensor] = field(default_factory=dict)
    input_scales: Mapping[str, StoredTensor] = field(default_factory=dict)
    comfy: Mapping[str, bool] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what is stored: a packed matrix has all its columns."""
        return {name: self.shape(name) for name in self.tensors}

    @property
    def recipe(self) -> str | None:
        """The recipe that the metadata names; raises CheckpointError if it is not a known one."""
        file = next(iter(self.tensors.values())).file if self.tensors else "no file"
        return recipe_of(self.metadata, file)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor ``name``, unpacked."""
        shape = self.tensors[name].shape
        return (*shape[:-1], 2 * shape[-1]) if self.form(name) == "nvfp4" else shape

    def form(self, name: str) -> str:
        """How tensor ``name`` is stored: ``fp8`` (with scales), ``nvfp4`` or ``float``."""
        stored = self.tensors[name]
        marked = any(name in hints for hints in (self.scales, self.global_scales, self.comfy))
        if not marked or len(stored.shape) != 2:
            return "float"
        return {"U8": "nvfp4", "F8_E4M3": "fp8"}.get(stored.dtype, "float")

    def forms(self, part: str) -> frozenset[str]:
        """All forms that ``part`` would run as they are stored; empty for plain weights."""
        found = {self.form(name) for name in self.scales if name in self.tensors}
        return frozenset(found - {"float"}) if part in PARTS else frozenset()

    def under(self, prefix: str) -> "WeightIndex":
        """The tensors whose names start with ``prefix``, under their names without it."""

        def cut(named: Mapping[str, Entry]) -> dict[str, Entry]:
            return {k.removeprefix(prefix): v for k, v in named.items() if k.startswith(prefix)}

        return WeightIndex(
            cut(self.tensors),
            cut(self.scales),
            self.metadata,
            cut(self.global_scales),
            cut(self.input_scales),
            cut(self.comfy),
        )


def absent_scales(part: str, index: WeightIndex, name: str) -> Iterator[str]:
    """Keys of the scales that tensor ``name`` needs and that are not there."""
    stored, module = index.tensors[name], index.tensors[name].key.removesuffix(".weight")
    form = index.form(name)
    ours = index.recipe if name.endswith(".weight") else None
    if name not in index.scales and (form != "float" or (ours and stored.dtype == "F8_E4M3")):
        yield f"{module}.weight_scale"
    if form == "nvfp4" and name not in index.global_scales:
        yield f"{module}.weight_scale_2"
    static = ours and RECIPES[ours].static and part == "transformer"
    if static and form != "float" and name not in index.input_scales:
        yield f"{module}.input_scale"


def wrong_scales(index: WeightIndex, name: str) -> Iterator[tuple[str, str]]:
    """Scales of tensor ``name`` that are of another shape or type, each with what is wrong."""
    shape = index.shape(name)
    packed = index.form(name) == "nvfp4"
    if scale := index.scales.get(name):
        if packed:
            wanted = shape[0], shape[1] // MULTIPLE
            if name in index.comfy:
                wanted = -(-wanted[0] // 128) * 128, -(-wanted[1] // 4) * 4
            fits = scale.shape == wanted and shape[1] % MULTIPLE == 0
        else:
            fits = math.prod(scale.shape) in (1, shape[0] if shape else 1)
        if not fits:
            yield scale.key, f"{list(scale.shape)} for {list(shape)}"
        if scale.dtype not in (("F8_E4M3",) if packed else _SCALE_DTYPES):
            yield scale.key, f"{scale.dtype} for {index.tensors[name].dtype}"
    # Input scales of other writers are not used.
    inputs = index.input_scales.get(name) if index.recipe else None
    for single in (index.global_scales.get(name), inputs):
        if single and (math.prod(single.shape) != 1 or single.dtype not in _SCALE_DTYPES):
            yield single.key, f"{single.dtype} {list(single.shape)} for one number"
