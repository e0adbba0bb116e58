"""How many bytes a model's weights take, by the unit in which they may leave the device; no torch.

Exact: every tensor's bytes as the formats store it.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .config import Shapes, VaeConfig
from .recipes import DEFAULT, takes_part, weight_format
from .tensor_shapes import ModelShapes

PRECISIONS = ("fp32", "bf16", "fp16", "fp8", "nvfp4")
"""From the largest to the smallest."""

ALIGN = 256
"""Bytes to which a tensor's place in a staging buffer is rounded up, as CUDA's allocations are."""

GROUPS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "transformer": (
        ("modulation", r"(double_blocks\.\d+\.(?:img|txt)_mod|single_blocks\.\d+\.modulation)\."),
        ("blocks", r"((?:double|single)_blocks\.\d+)\."),
    ),
    "text_encoder": (
        ("lookup", r"(embeddings\.token_embedding)\."),
        ("text", r"(encoder\.layers\.\d+)\."),
    ),
    "text_encoder_2": (
        ("lookup", r"(shared)\."),
        # all layers share the bias of the first, which is read before that layer runs
        ("text", r"(encoder\.block\.\d+)\.(?!.*relative_attention_bias)"),
    ),
    "vae": (("vae", r"(encoder|decoder)\."),),
}
"""Component -> what may leave the device: a group, and which module of it holds a tensor.

``modulation``, ``blocks`` and ``text`` pass through staging buffers unit by unit; ``lookup`` are
tables of which a prompt needs a few rows; ``vae`` comes whole, one half at a time.
"""

_FP4_BLOCK = 16
"""Numbers that share a scale of one byte in NVFP4."""


def unit_of(component: str, tensor: str) -> tuple[str, str] | None:
    """The group and the module that hold ``tensor``, or None if it never leaves the device."""
    for group, pattern in GROUPS[component]:
        if match := re.match(pattern, tensor):
            return group, match[1]
    return None


def aligned(size: int) -> int:
    """``size`` rounded up to :data:`ALIGN`."""
    return -(-size // ALIGN) * ALIGN


def stored_bytes(
    component: str, name: str, shape: tuple[int, ...], precision: str, plain: str = "bf16"
) -> int:
    """Bytes of one tensor as it lies on the device, its scales included.

    ``fp8`` and ``nvfp4`` are as :mod:`.recipes` has them; what takes no part is in ``plain``.
    In ``fp16`` T5's ``wo`` stays float32 (:mod:`.models.t5`); for the VAE see
    :func:`vae_element_bytes`.
    """
    numbers = math.prod(shape)
    module, _, kind = name.rpartition(".")
    recipe = DEFAULT.get(precision)
    if recipe is None or kind != "weight" or not takes_part(component, module, shape[-1]):
        compute = computes_in(precision, plain)
        wide = compute == "fp16" and name.endswith(".wo.weight")
        return numbers * (4 if wide else element_bytes(compute))
    if weight_format(component, recipe) == "nvfp4":
        return numbers // 2 + numbers // _FP4_BLOCK + 4
    return numbers + 4 * shape[0]


def computes_in(precision: str, plain: str) -> str:
    """What an activation is in, and a weight that is not quantised: ``precision`` itself, but
    ``plain`` where that is of quantised weights."""
    return plain if precision in DEFAULT else precision


def element_bytes(compute: str) -> int:
    """Bytes of a number in ``fp32``, ``bf16`` or ``fp16``."""
    return 4 if compute == "fp32" else 2


def vae_element_bytes(config: VaeConfig, compute: str) -> int:
    """Bytes of a number in the VAE, which fp16 overflows in published checkpoints."""
    return 4 if compute == "fp16" and config.force_upcast else element_bytes(compute)


@dataclass(frozen=True)
class Weights:
    """Bytes of every unit by group, and of all that never leaves the device."""

    groups: Mapping[str, Mapping[str, int]]
    fixed: int

    @property
    def total(self) -> int:
        return self.fixed + sum(sum(units.values()) for units in self.groups.values())


def weigh(shapes: ModelShapes, precision: str, plain: str = "bf16") -> Weights:
    """Weights of a whole model in ``precision``. plain: as :func:`computes_in` has it."""
    groups: dict[str, dict[str, int]] = {
        group: {} for kinds in GROUPS.values() for group, _ in kinds
    }
    fixed = 0
    for component, tensors in shapes.tensors().items():
        for name, shape in tensors.items():
            size = _bytes(shapes, component, name, shape, precision, plain)
            if (unit := unit_of(component, name)) is None:
                fixed += size
            else:
                units, key = groups[unit[0]], f"{component}.{unit[1]}"
                units[key] = units.get(key, 0) + aligned(size)
    return Weights(groups, fixed)


def _bytes(
    shapes: ModelShapes,
    component: str,
    name: str,
    shape: tuple[int, ...],
    precision: str,
    plain: str,
) -> int:
    if component == "vae":
        return math.prod(shape) * vae_element_bytes(shapes.vae, computes_in(precision, plain))
    return stored_bytes(component, name, shape, precision, plain)


def component_bytes(shapes: ModelShapes, precision: str) -> dict[str, int]:
    """Bytes of the weights of each component, on a GPU that computes in bf16."""
    every: Mapping[str, Shapes] = shapes.tensors()
    return {
        component: sum(
            _bytes(shapes, component, n, s, precision, "bf16") for n, s in tensors.items()
        )
        for component, tensors in every.items()
    }
