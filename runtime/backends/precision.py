"""What the native backend computes in, and what it does with quantised weights."""

from dataclasses import dataclass
from typing import Any

import torch

from ...kernels import KernelSet
from ...kernels.chips import chip_of, unsupported
from ..checkpoint import Checkpoint, Component
from ..errors import BackendUnavailableError
from ..loading import Quantised
from ..recipes import DEFAULT, RECIPES, weight_format

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = (*DTYPES, *DEFAULT)
_OPS = {
    "fp8-dynamic": "linear_fp8",
    "fp8-static": "linear_fp8",
    "nvfp4-w4a16": "linear_w4a16",
    "nvfp4-w4a4": "linear_w4a4",
}


@dataclass(frozen=True)
class Precision:
    """name: as reported. dtype: of all that is not quantised. recipe: of the denoiser's layers, or
    None. quantise: the recipe for weights that are plain as yet. as_stored: whether quantised
    weights run as such; otherwise they are dequantised while they are loaded."""

    name: str
    dtype: torch.dtype
    recipe: str | None = None
    quantise: str | None = None
    as_stored: bool = True

    @property
    def layers(self) -> tuple[str, ...]:
        """Ops that run the denoiser's quantised layers."""
        return tuple(op for name, op in _OPS.items() if name == self.recipe)

    def weights(self, component: Component[Any], kernels: KernelSet) -> Quantised | None:
        """How to load ``component``."""
        if not self.as_stored:
            return None
        stored = component.weights.forms(component.name)
        return Quantised(kernels, None if stored else self.quantise)


def choose_precision(precision: str, checkpoint: Checkpoint, device: torch.device) -> Precision:
    """From what is asked for and what is stored.

    precision: ``auto`` runs what is stored. ``fp8`` and ``nvfp4`` run what is stored in that
    format, and quantise plain weights as they are loaded (recipes ``fp8-dynamic`` and
    ``nvfp4-w4a16``; T5 in FP8). ``fp32``, ``bf16`` and ``fp16`` dequantise quantised weights as
    they are loaded, and so need the memory of plain ones. What is not quantised computes in fp32 on
    a CPU, and in bf16 (fp16 before Ampere) on a GPU.
    """
    if precision in DTYPES:
        return Precision(precision, DTYPES[precision], as_stored=False)
    if precision not in ("auto", *DEFAULT):
        raise BackendUnavailableError(
            f"precision: expected auto or one of {', '.join(PRECISIONS)} for the native backend, "
            f"found {precision}"
        )
    compute = plain(device)
    stored = stored_recipe(checkpoint.transformer)
    if precision == "auto":
        if stored is None:
            return Precision(compute, DTYPES[compute])
        name = weight_format("transformer", stored) if stored in RECIPES else "fp8"
        return Precision(name, DTYPES[compute], stored)
    if stored is None:
        recipe = DEFAULT[precision]
        return Precision(precision, DTYPES[compute], recipe, recipe)
    if not stored.startswith(precision):
        raise BackendUnavailableError(
            f"precision: expected auto, or a transformer that is stored plain or in {precision}, "
            f"found {precision} and one in {stored}"
        )
    return Precision(precision, DTYPES[compute], stored, DEFAULT[precision])


def stored_recipe(transformer: Component[Any]) -> str | None:
    """What the stored denoiser runs as, or None if it is plain.

    Of other writers' files this is ``nvfp4-w4a16``, ``fp8-dynamic``, or ``fp8-w8a16`` where the
    file wants inputs in full precision.
    """
    weights = transformer.weights
    forms = weights.forms("transformer")
    if not forms:
        return None
    if weights.recipe is not None:
        return weights.recipe
    if "nvfp4" in forms:
        return "nvfp4-w4a16"
    return "fp8-w8a16" if any(weights.comfy.values()) else "fp8-dynamic"


def plain(device: torch.device) -> str:
    """What a device computes in where nothing is asked for, and beside quantised weights."""
    if device.type == "cpu":
        return "fp32"
    nvidia = device.type == "cuda" and torch.version.hip is None
    # torch.cuda.is_bf16_supported looks at the current device, which may be another.
    old = nvidia and torch.cuda.get_device_capability(device) < (8, 0)
    return "fp16" if old else "bf16"


def upcast(device: torch.device) -> tuple[str, ...]:
    """Precisions whose numbers kernels multiply in 16 bits, for want of tensor cores for them."""
    if unsupported(device):
        return ()
    chip = chip_of(device)
    return tuple(name for name, has in (("fp8", chip.fp8), ("nvfp4", chip.fp4)) if not has)
