"""A model of the published shapes whose weights take no space: sparse files, read as zeros."""

import json
import math
import shutil
from pathlib import Path

import numpy as np

from fluxkontext.kernels import reference
from fluxkontext.runtime.config import TransformerConfig
from fluxkontext.runtime.loading import build
from fluxkontext.runtime.models.transformer import Flux
from fluxkontext.runtime.recipes import FORMAT, FORMAT_KEY, RECIPE_KEY, RECIPES, takes_part
from fluxkontext.runtime.weights import data_offsets

_PUBLISHED = json.loads(
    (Path(__file__).parents[1] / "runtime" / "flux_dev_shapes.json").read_text(encoding="utf-8")
)
_PARTS = {
    "transformer": ("diffusers", "diffusion_pytorch_model"),
    "vae": ("vae_diffusers", "diffusion_pytorch_model"),
    "text_encoder": ("clip_l", "model"),
    "text_encoder_2": ("t5_xxl_encoder", "model"),
}
_ITEM_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1}

Tensors = dict[str, tuple[str, list[int]]]
"""Name -> safetensors dtype and shape."""


def write_full_model(folder: Path, small: Path) -> None:
    """A diffusers folder of FLUX.1 Kontext's shapes in bf16, else like the folder ``small``."""
    shutil.copytree(small, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for part, (shapes, stem) in _PARTS.items():
        tensors: Tensors = {name: ("BF16", shape) for name, shape in _PUBLISHED[shapes].items()}
        write_sparse(folder / part / f"{stem}.safetensors", tensors)
        values = _PUBLISHED["_meta"]["configs"][shapes]["value"]
        (folder / part / "config.json").write_text(json.dumps(values), encoding="utf-8")


def write_blocks(folder: Path, small: Path, recipe: str | None) -> None:
    """A double and a single block of full size, in a recipe or in bf16, with all else of the folder
    ``small``. What the recipes quantise is noise, scales are 1, the rest is zeros."""
    shutil.copytree(small, folder, ignore=shutil.ignore_patterns("diffusion_pytorch_model*"))
    shutil.copytree(small / "vae", folder / "vae", dirs_exist_ok=True)
    file = small / "transformer" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | {
        "num_attention_heads": 24,
        "num_layers": 1,
        "num_single_layers": 1,
    }
    (folder / "transformer" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = build(lambda: Flux(TransformerConfig.from_json(config), reference())).state_dict()
    tensors: Tensors = {}
    for name, tensor in shapes.items():
        module, shape = name.removesuffix(".weight"), list(tensor.shape)
        if recipe is None or not takes_part("transformer", module, shape[-1]):
            tensors[name] = ("BF16", shape)
        elif RECIPES[recipe].precision == "fp8":
            tensors[name] = ("F8_E4M3", shape)
            tensors[f"{module}.weight_scale"] = ("F32", shape[:1])
        else:
            rows, columns = shape
            tensors[name] = ("U8", [rows, columns // 2])
            tensors[f"{module}.weight_scale"] = ("F8_E4M3", [rows, columns // 16])
            tensors[f"{module}.weight_scale_2"] = ("F32", [])
        if (
            recipe is not None
            and RECIPES[recipe].static
            and name in tensors
            and tensors[name][0] != "BF16"
        ):
            tensors[f"{module}.input_scale"] = ("F32", [])
    metadata = {FORMAT_KEY: FORMAT, RECIPE_KEY: recipe} if recipe else None
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    write_sparse(file, tensors, metadata)
    noise = np.random.default_rng(0).integers(0, 0x3C, 2**22, np.uint8).tobytes()
    ones = {"F32": np.ones(1, np.float32).tobytes(), "F8_E4M3": b"\x38"}
    offsets = data_offsets(file)
    with file.open("r+b") as opened:
        for name, (dtype, shape) in tensors.items():
            module, _, leaf = name.rpartition(".")
            size = math.prod(shape) * _ITEM_BYTES[dtype]
            if not takes_part("transformer", module, 16) or leaf == "bias":
                continue
            pattern = noise if leaf == "weight" else ones[dtype] * math.prod(shape)
            opened.seek(offsets[name])
            for start in range(0, size, len(pattern)):
                opened.write(pattern[: size - start])


def write_sparse(file: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file of zeros: the header, then a hole of the right size."""
    header: dict[str, object] = {"__metadata__": metadata or {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * _ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)
