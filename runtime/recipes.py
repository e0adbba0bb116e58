"""What quantised weights can be: recipes, the layers that take part, and stored formats by name.

A recipe says how weights are stored and what happens to the inputs of their products. A file that
``fluxkontext quantize`` wrote names its recipe; files of others are recognised by their tensors.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import CheckpointError

FORMAT_KEY, RECIPE_KEY = "fluxkontext.format", "fluxkontext.recipe"
FORMAT = "1"
"""Version of the layout of a quantised file; one that is not known is refused."""

MULTIPLE = 16
"""Columns of a quantised matrix are a multiple of this: the block of NVFP4, and what FP8 matrix
instructions and copies are aligned to."""

CALIBRATION_VERSION = 1
"""``schema_version`` of a calibration file."""


@dataclass(frozen=True)
class Recipe:
    """precision: what a user calls it. static: inputs are quantised by calibrated scales."""

    name: str
    precision: str
    static: bool


RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("fp8-dynamic", "fp8", static=False),
        Recipe("fp8-static", "fp8", static=True),
        Recipe("nvfp4-w4a16", "nvfp4", static=False),
        Recipe("nvfp4-w4a4", "nvfp4", static=True),
    )
}
DEFAULT: Mapping[str, str] = {"fp8": "fp8-dynamic", "nvfp4": "nvfp4-w4a16"}
"""Precision -> the recipe that needs no calibration."""

# Two thirds of a FLUX model, and nearly all of a step's work. Embedders, modulations and the last
# layer are small, used once, or what every error passes through: they stay as they are.
_TRANSFORMER = re.compile(
    r"double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02])|single_blocks\.\d+\.linear[12]"
)
_T5 = re.compile(
    r"encoder\.block\.\d+\.layer\.\d+\.(SelfAttention\.[qkvo]|DenseReluDense\.(wi_0|wi_1|wo))"
)
_LAYERS = {"transformer": _TRANSFORMER, "text_encoder_2": _T5}
PARTS = tuple(_LAYERS)
"""The networks that run quantised weights; the others load any stored type by a cast."""


def takes_part(part: str, module: str, columns: int) -> bool:
    """Whether recipes quantise the linear layer ``module`` (its canonical name) of ``part``."""
    layers = _LAYERS.get(part)
    return bool(layers and layers.fullmatch(module)) and columns % MULTIPLE == 0


def weight_format(part: str, recipe: str) -> str:
    """``fp8`` or ``nvfp4``: how a recipe stores the weights of ``part``. T5 is FP8 in all."""
    return "fp8" if part == "text_encoder_2" else RECIPES[recipe].precision


def inputs(part: str, recipe: str) -> str:
    """What a recipe does to the inputs of a product: nothing (``plain``), or quantise them under
    scales of their own (``dynamic``) or calibrated ones (``static``)."""
    if part == "text_encoder_2":
        return "plain"
    if RECIPES[recipe].static:
        return "static"
    return "dynamic" if RECIPES[recipe].precision == "fp8" else "plain"


def recipe_of(metadata: Mapping[str, str], file: Path | str) -> str | None:
    """The recipe that a file's metadata names, or None if it was not written by us.

    Raises CheckpointError for a recipe or a version of the format that is not known.
    """
    if RECIPE_KEY not in metadata and FORMAT_KEY not in metadata:
        return None
    version, recipe = metadata.get(FORMAT_KEY), metadata.get(RECIPE_KEY)
    if version != FORMAT:
        raise CheckpointError(
            f"{file}: expected {FORMAT_KEY} {FORMAT!r}, found {version!r}; "
            "use the version of fluxkontext that wrote it, or quantise again"
        )
    if recipe not in RECIPES:
        raise CheckpointError(
            f"{file}: expected {RECIPE_KEY} to be one of {', '.join(RECIPES)}, found {recipe!r}; "
            "use the version of fluxkontext that wrote it, or quantise again"
        )
    return recipe
