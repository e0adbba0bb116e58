"""``fluxkontext quantize``: a checkpoint to a quantised one, layer by layer.

The folder is built under another name and takes its own only when it is whole. Layers that recipes
leave out, and biases, become BF16; see :mod:`fluxkontext.runtime.recipes`.
"""

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..kernels import reference
from ..kernels.nvfp4 import BLOCK
from ..runtime.checkpoint import Checkpoint, Component
from ..runtime.errors import CheckpointError, InvalidInputError
from ..runtime.files import whole_folder
from ..runtime.loading import build
from ..runtime.models.quantised import input_scale
from ..runtime.models.t5 import T5Encoder
from ..runtime.models.transformer import Flux
from ..runtime.reading import Reader
from ..runtime.recipes import (
    DEFAULT,
    FORMAT,
    FORMAT_KEY,
    RECIPE_KEY,
    RECIPES,
    inputs,
    takes_part,
    weight_format,
)
from ..runtime.weights import match
from .calibration import read_calibration
from .model_folder import link_network, write_config, write_small_files
from .safetensors_file import SafetensorsFile, Spec

CALIBRATION = "calibration.json"
"""Where the result keeps the calibration that it was made with."""
_FILES = {"transformer": "diffusion_pytorch_model", "text_encoder_2": "model"}
_CPU = torch.device("cpu")
_BF16, _F32, _E4M3, _U8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.uint8


def write_quantised(
    checkpoint: Checkpoint,
    out: Path,
    precision: str,
    recipe: str | None = None,
    calibration: Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Quantise ``checkpoint`` to the folder ``out``, which must not exist; returns what was done.

    precision: ``fp8`` or ``nvfp4``. recipe: one of :data:`~fluxkontext.runtime.recipes.RECIPES` of
    that precision; by default the one without calibration. calibration: a file of
    ``fluxkontext calibrate``, for the recipes that need one.
    Raises InvalidInputError for what does not go together, CheckpointError for an input that is
    quantised already or a calibration of another model.
    """
    chosen = _recipe(precision, recipe, calibration)
    if out.exists():
        raise InvalidInputError(f"{out}: expected a folder that does not exist, found one")
    networks = {part: getattr(checkpoint, part) for part in _FILES}
    for network in networks.values():
        _check_plain(network)
    with whole_folder(out) as building:
        facts: dict[str, Any] = {"checkpoint": str(out), "precision": precision, "recipe": chosen}
        modules = {
            "transformer": build(lambda: Flux(checkpoint.transformer.config, reference())),
            "text_encoder_2": build(lambda: T5Encoder(checkpoint.text_encoder_2.config)),
        }
        for part, module in modules.items():
            layers = _layers(part, module)
            amax = {}
            if calibration is not None and inputs(part, chosen) == "static":
                amax = read_calibration(calibration).of(layers, calibration)
            (building / part).mkdir()
            file = building / part / f"{_FILES[part]}.safetensors"
            _write_network(networks[part], module, layers, chosen, amax, file, progress)
            write_config(networks[part], building / part)
            facts[part] = {
                "quantised": len(layers),
                "format": weight_format(part, chosen),
                "bytes": file.stat().st_size,
            }
        for part in ("vae", "text_encoder"):
            link_network(getattr(checkpoint, part), building / part)
        write_small_files(checkpoint, building)
        if calibration is not None:
            shutil.copyfile(calibration, building / CALIBRATION)
    return facts


def _recipe(precision: str, recipe: str | None, calibration: Path | None) -> str:
    if precision not in DEFAULT:
        raise InvalidInputError(
            f"precision: expected one of {', '.join(DEFAULT)}, found {precision!r}"
        )
    chosen = recipe or DEFAULT[precision]
    fitting = [r.name for r in RECIPES.values() if r.precision == precision]
    if chosen not in fitting:
        raise InvalidInputError(
            f"recipe: expected one of {', '.join(fitting)} for {precision}, found {chosen!r}"
        )
    if RECIPES[chosen].static and calibration is None:
        raise InvalidInputError(
            f"recipe: expected a calibration file for {chosen}, found none; make one with "
            "fluxkontext calibrate MODEL -o FILE, and name it with --calibration FILE"
        )
    if not RECIPES[chosen].static and calibration is not None:
        raise InvalidInputError(
            f"calibration: expected none for {chosen}, which scales inputs as they come, found "
            f"{calibration}; leave it out, or use {next(r for r in fitting if RECIPES[r].static)}"
        )
    return chosen


def _check_plain(network: Component[Any]) -> None:
    forms = network.weights.forms(network.name)
    if forms or network.weights.recipe:
        found = network.weights.recipe or ", ".join(sorted(forms))
        raise CheckpointError(
            f"{network.name}: expected plain weights to quantise, found {found}; "
            "quantise the checkpoint that they were made from"
        )


def _layers(part: str, module: nn.Module) -> dict[str, nn.Linear]:
    """The layers that take part, by canonical name."""
    linears = {k: m for k, m in module.named_modules() if isinstance(m, nn.Linear)}
    return {k: m for k, m in linears.items() if takes_part(part, k, m.in_features)}


def _write_network(
    network: Component[Any],
    module: nn.Module,
    layers: Mapping[str, nn.Linear],
    recipe: str,
    amax: Mapping[str, float],
    file: Path,
    progress: bool,
) -> None:
    """Write one safetensors file under canonical names; one layer at a time is in memory."""
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    pieces = match(network.name, wanted, network.weights, network.locate)
    form = weight_format(network.name, recipe)
    specs: dict[str, Spec] = {}
    for name, shape in wanted.items():
        layer = name.removesuffix(".weight")
        if layer != name and layer in layers:
            specs |= {f"{layer}.{k}": spec for k, spec in _specs(form, shape).items()}
            if amax:
                specs[f"{layer}.input_scale"] = Spec(_F32, ())
        else:
            specs[name] = Spec(_BF16, shape)
    metadata = {"format": "pt", FORMAT_KEY: FORMAT, RECIPE_KEY: recipe}
    with ExitStack() as stack:
        reader = Reader(network, stack, _CPU)
        written = stack.enter_context(SafetensorsFile(file, specs, metadata))
        for name, shape in tqdm(wanted.items(), desc=network.name, disable=not progress):
            layer = name.removesuffix(".weight")
            if layer == name or layer not in layers:
                written.write(name, reader.floats(pieces[name], shape, _BF16))
                continue
            if weights := reader.quantised(pieces[name], layer, layers[layer].in_features, recipe):
                for kind, tensor in weights.tensors.items():
                    written.write(f"{layer}.{kind}", tensor)
            if amax:
                scale = torch.tensor(input_scale(amax[layer], form), dtype=_F32)
                written.write(f"{layer}.input_scale", scale)


def _specs(form: str, shape: tuple[int, ...]) -> dict[str, Spec]:
    """Types and shapes of what :func:`~fluxkontext.runtime.models.quantised.quantise` makes."""
    rows, columns = shape
    if form == "fp8":
        return {"weight": Spec(_E4M3, shape), "weight_scale": Spec(_F32, (rows,))}
    return {
        "weight": Spec(_U8, (rows, columns // 2)),
        "weight_scale": Spec(_E4M3, (rows, columns // BLOCK)),
        "weight_scale_2": Spec(_F32, ()),
    }
