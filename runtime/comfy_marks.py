"""The marks by which ComfyUI's files say how each layer was quantised.

First form: a tensor ``scaled_fp8`` in the file; of two elements if products must take inputs in
full precision. Newer: JSON ``{"format": ...}`` for each layer, as bytes in ``X.comfy_quant`` or,
for all layers together, in the metadata as ``_quantization_metadata`` (ComfyUI, QUANTIZATION.md).
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .errors import CheckpointError

METADATA_KEY = "_quantization_metadata"
FORMATS = ("float8_e4m3fn", "float8_e5m2", "nvfp4")
"""Those that are read; ComfyUI has others, with other arithmetic."""


def marked_layers(
    file: Path, metadata: Mapping[str, str], marks: Mapping[str, bytes]
) -> dict[str, bool]:
    """Weight -> whether its inputs stay in full precision, for the layers that JSON marks.

    marks: ``X.comfy_quant`` -> its bytes. Raises CheckpointError for a format that is not read.
    """
    layers: dict[str, Any] = {}
    if METADATA_KEY in metadata:
        about = _parse(file, METADATA_KEY, metadata[METADATA_KEY])
        named = about.get("layers")
        if not isinstance(named, dict):
            raise CheckpointError(f"{file}: expected layers in {METADATA_KEY}, found none")
        layers |= named
    layers |= {key.rpartition(".")[0]: _parse(file, key, mark) for key, mark in marks.items()}
    found = {}
    for layer, about in layers.items():
        kind = about.get("format") if isinstance(about, dict) else about
        if kind not in FORMATS:
            raise CheckpointError(
                f"{file}: expected layers quantised as {', '.join(FORMATS)}, found {kind!r} "
                f"({layer}); use another file of this model"
            )
        found[f"{layer}.weight"] = bool(about.get("full_precision_matrix_mult"))
    return found


def first_form(shape: tuple[int, ...], scaled: Iterable[str]) -> dict[str, bool]:
    """The same for a file with ``scaled_fp8`` of that shape, and scales for ``scaled``."""
    return dict.fromkeys(scaled, shape == (2,))


def _parse(file: Path, name: str, text: str | bytes) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: expected a JSON object in {name}, found none")
    return values
