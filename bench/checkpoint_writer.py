"""Write a model as a diffusers folder: the inverse of what the runtime reads.

Tensors come in under their canonical names and go out under the published ones, split and
reordered by the same table (:mod:`fluxkontext.runtime.layouts`) that finds them again.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..export.configs import model_index_json, network_json, scheduler_json
from ..kernels import reference
from ..runtime.config import ClipConfig, T5Config, TransformerConfig, VaeConfig
from ..runtime.layouts import Locate, Piece, diffusers_transformer, diffusers_vae, identity
from ..runtime.loading import build
from ..runtime.models.clip import ClipText
from ..runtime.models.t5 import T5Encoder
from ..runtime.models.transformer import Flux
from ..runtime.models.vae import Vae
from ..runtime.schedule import SchedulerConfig

State = Mapping[str, Tensor]
"""Canonical tensor name -> values."""

NETWORKS = ("transformer", "vae", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Spec:
    """The shapes of a whole model. text_length: tokens of a prompt for the second encoder."""

    transformer: TransformerConfig
    vae: VaeConfig
    text_encoder: ClipConfig
    text_encoder_2: T5Config
    text_length: int


def meta_networks(spec: Spec) -> dict[str, nn.Module]:
    """The four networks by component, without memory: names and shapes of all tensors."""
    return {
        "transformer": build(lambda: Flux(spec.transformer, reference())),
        "vae": build(lambda: Vae(spec.vae)),
        "text_encoder": build(lambda: ClipText(spec.text_encoder)),
        "text_encoder_2": build(lambda: T5Encoder(spec.text_encoder_2)),
    }


def write_model(
    folder: Path,
    spec: Spec,
    networks: Mapping[str, State],
    dtype: torch.dtype,
    tokenizer_2_class: str = "T5TokenizerFast",
) -> None:
    """Write all but the tokenizers, which differ more than in numbers, into an existing folder.

    networks: a state for each of :data:`NETWORKS`.
    """
    layouts: dict[str, tuple[str, Locate, str, dict[str, Any]]] = {
        "transformer": (
            "diffusion_pytorch_model",
            diffusers_transformer,
            "",
            network_json(spec.transformer),
        ),
        "vae": (
            "diffusion_pytorch_model",
            diffusers_vae(len(spec.vae.block_out_channels)),
            "",
            network_json(spec.vae),
        ),
        "text_encoder": ("model", identity, "text_model.", network_json(spec.text_encoder)),
        "text_encoder_2": ("model", identity, "", network_json(spec.text_encoder_2)),
    }
    for name, (stem, locate, prefix, config) in layouts.items():
        stored = stored_tensors(networks[name], locate, spec.transformer.hidden_size)
        (folder / name).mkdir(exist_ok=True)
        file = folder / name / f"{stem}.safetensors"
        tensors = {prefix + key: value.to(dtype) for key, value in stored.items()}
        save_file(tensors, file, metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors writes for its owner only
        write_json(folder / name / "config.json", config)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_json(SchedulerConfig()))
    classes = {"tokenizer_2": ["transformers", tokenizer_2_class]}
    write_json(folder / "model_index.json", model_index_json(classes))


def stored_tensors(state: State, locate: Locate, rows: int) -> dict[str, Tensor]:
    """The tensors of a file, contiguous, from canonical ones.

    rows: of every piece of a tensor that is stored in several, but for the last.
    """
    stored: dict[str, Tensor] = {}
    for name, value in state.items():
        pieces = locate(name)
        if pieces[0].half is not None:  # halves of one stored tensor, in another order
            halves = value.chunk(2)
            stored[pieces[0].key] = torch.cat([halves[i] for i in _order(pieces)])
            continue
        widths = [rows] * (len(pieces) - 1)
        parts = value.split([*widths, len(value) - sum(widths)])
        stored |= {piece.key: part for piece, part in zip(pieces, parts, strict=True)}
    return {key: _as_stored(key, value).contiguous().clone() for key, value in stored.items()}


def _order(pieces: Iterable[Piece]) -> list[int]:
    """Which canonical half is the first in the stored tensor, and which the second."""
    order = {piece.half: i for i, piece in enumerate(pieces)}
    return [order[0], order[1]]


def _as_stored(key: str, value: Tensor) -> Tensor:
    """diffusers keeps the VAE's attention, 1 x 1 convolutions here, as matrices."""
    matrix = key.removesuffix(".weight").endswith(("to_q", "to_k", "to_v", "to_out.0"))
    return value.flatten(1) if matrix and value.ndim == 4 else value


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object, with its folder if need be."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
