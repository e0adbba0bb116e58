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

from ..kernels import reference
from ..runtime.config import ClipConfig, T5Config, TransformerConfig, VaeConfig
from ..runtime.layouts import Locate, Piece, diffusers_transformer, diffusers_vae, identity
from ..runtime.loading import build
from ..runtime.models.clip import ClipText
from ..runtime.models.t5 import T5Encoder
from ..runtime.models.transformer import Flux
from ..runtime.models.vae import Vae

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
            _transformer_json(spec.transformer),
        ),
        "vae": (
            "diffusion_pytorch_model",
            diffusers_vae(len(spec.vae.block_out_channels)),
            "",
            _vae_json(spec.vae),
        ),
        "text_encoder": ("model", identity, "text_model.", _clip_json(spec.text_encoder)),
        "text_encoder_2": ("model", identity, "", _t5_json(spec.text_encoder_2)),
    }
    for name, (stem, locate, prefix, config) in layouts.items():
        stored = stored_tensors(networks[name], locate, spec.transformer.hidden_size)
        (folder / name).mkdir(exist_ok=True)
        file = folder / name / f"{stem}.safetensors"
        tensors = {prefix + key: value.to(dtype) for key, value in stored.items()}
        save_file(tensors, file, metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors writes for its owner only
        write_json(folder / name / "config.json", config)
    write_json(folder / "scheduler" / "scheduler_config.json", _SCHEDULER)
    classes = {**_CLASSES, "tokenizer_2": ["transformers", tokenizer_2_class]}
    write_json(folder / "model_index.json", {"_class_name": "FluxKontextPipeline", **classes})


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


def _transformer_json(config: TransformerConfig) -> dict[str, Any]:
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": config.in_channels,
        "num_layers": config.depth,
        "num_single_layers": config.depth_single_blocks,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_in_dim,
        "pooled_projection_dim": config.vec_in_dim,
        "guidance_embeds": config.guidance_embed,
        "axes_dims_rope": list(config.axes_dim),
    }


def _vae_json(config: VaeConfig) -> dict[str, Any]:
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "act_fn": "silu",
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_num_groups,
        "sample_size": config.sample_size,
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor,
        "force_upcast": config.force_upcast,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": True,
    }


def _clip_json(config: ClipConfig) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "projection_dim": config.hidden_size,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": config.layer_norm_eps,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": config.eos_token_id,
    }


def _t5_json(config: T5Config) -> dict[str, Any]:
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_kv": config.d_kv,
        "d_ff": config.d_ff,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.relative_attention_num_buckets,
        "relative_attention_max_distance": config.relative_attention_max_distance,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    }


_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
_CLASSES = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
