"""What a file or folder holds: networks, from their headers, or the settings of a picture."""

import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .bundle import MANIFEST, read_manifest
from .checkpoint import KINDS, TOKENIZERS, Component, open_component, recognise
from .errors import CheckpointError
from .images import open_picture, read_settings
from .weights import WeightIndex, read_headers

_BYTES = {"64": 8, "32": 4, "16": 2}


def inspect(path: Path) -> dict[str, Any]:
    """Describe ``path`` as JSON; weights are not read, only headers."""
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise CheckpointError(f"{path}: expected a file or folder, found none")
    if path.suffix in (".safetensors", ".sft"):
        return _single_file(path)
    return _picture(path)


def _folder(path: Path) -> dict[str, Any]:
    """A bundle, a diffusers folder, or the folder of one of its networks."""
    if (path / MANIFEST).exists():
        return _bundle(path)
    if (path / "model_index.json").exists():
        networks = {part: _network(open_component(part, path / part)) for part in KINDS}
        tokenizers = [name for name in TOKENIZERS if (path / name).is_dir()]
        return {"kind": "diffusers folder", "networks": networks, "tokenizers": tokenizers}
    for part in KINDS:
        if part == path.name:
            return {"kind": "network", "networks": {part: _network(open_component(part, path))}}
    raise CheckpointError(
        f"{path}: expected a diffusers folder (with model_index.json) or one of its networks "
        f"({', '.join(KINDS)}), found neither"
    )


def _bundle(path: Path) -> dict[str, Any]:
    """What a manifest says; only the manifest itself is verified (doctor verifies the files)."""
    manifest = read_manifest(path)
    return {
        "kind": "bundle",
        **{key: manifest[key] for key in ("software", "model", "precision", "components")},
        **{key: manifest[key] for key in ("licence", "engines") if manifest.get(key)},
        "files": len(manifest["files"]),
        "bytes": sum(entry["size"] for entry in manifest["files"].values()),
    }


def _single_file(path: Path) -> dict[str, Any]:
    """A safetensors file with one network, several, or something else."""
    weights = read_headers([path])
    found = {part: component for part in KINDS if (component := recognise(part, weights, None))}
    return {
        "kind": "single file" if found else "safetensors file of no known network",
        "networks": {part: _network(component) for part, component in found.items()},
        **({} if found else {"tensors": _tensors(weights)}),
        "metadata": dict(weights.metadata),
    }


def _network(component: Component[Any]) -> dict[str, Any]:
    """Of its configuration, what its file says or its tensors tell."""
    config = asdict(component.config)
    known = {name: config[name] for name in config if name not in component.assumed}
    return {
        "layout": component.layout,
        **({"config": known} if known else {}),
        **_tensors(component.weights),
        "quantised": len(component.weights.scales),
        **({"recipe": component.weights.recipe} if component.weights.recipe else {}),
        "files": sorted({t.file.name for t in component.weights.tensors.values()}),
    }


def _tensors(weights: WeightIndex) -> dict[str, Any]:
    tensors = weights.tensors.values()
    return {
        "tensors": len(tensors),
        "parameters": sum(map(math.prod, weights.shapes.values())),
        "bytes": sum(math.prod(t.shape) * _BYTES.get(t.dtype[-2:], 1) for t in tensors),
        "dtypes": dict(Counter(t.dtype for t in tensors)),
    }


def _picture(path: Path) -> dict[str, Any]:
    with open_picture(path) as picture:
        return {
            "kind": "picture",
            "format": picture.format,
            "size": f"{picture.width}x{picture.height}",
            "mode": picture.mode,
            "settings": read_settings(picture),
        }
