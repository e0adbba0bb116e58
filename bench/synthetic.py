"""A checkpoint of random weights in the published layout, for trying, testing and timing.

``python -m fluxkontext.bench.synthetic OUT`` writes a tiny one, a few megabytes. It is loaded by
the same code, from the same files, as the real model; its pictures are noise.
"""

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from ..kernels import reference
from ..runtime.config import ClipConfig, T5Config, TransformerConfig, VaeConfig
from ..runtime.layouts import Locate, diffusers_transformer, diffusers_vae, identity
from ..runtime.loading import build
from ..runtime.models.clip import ClipText
from ..runtime.models.t5 import T5Encoder
from ..runtime.models.transformer import Flux
from ..runtime.models.vae import Vae

CLIP_LENGTH = 77


@dataclass(frozen=True)
class Spec:
    """The shapes of a synthetic model."""

    transformer: TransformerConfig
    vae: VaeConfig
    text_encoder: ClipConfig
    text_encoder_2: T5Config
    text_length: int


TINY = Spec(
    transformer=TransformerConfig(
        hidden_size=256,
        num_heads=2,
        depth=2,
        depth_single_blocks=2,
        context_in_dim=64,
        vec_in_dim=64,
        mlp_hidden=1024,
    ),
    vae=VaeConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1, sample_size=128),
    text_encoder=ClipConfig(
        vocab_size=514,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
    ),
    text_encoder_2=T5Config(
        vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4
    ),
    text_length=64,
)
"""Two blocks of each kind, with the real head size and RoPE axes."""


def write_checkpoint(folder: Path, spec: Spec = TINY, seed: int = 0) -> None:
    """Write a diffusers folder of random float32 weights; the folder must not exist."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    ops = reference()
    levels = len(spec.vae.block_out_channels)
    _write_network(
        folder / "transformer",
        "diffusion_pytorch_model",
        _random(build(lambda: Flux(spec.transformer, ops)), diffusers_transformer, rng),
        _transformer_json(spec.transformer),
    )
    _write_network(
        folder / "vae",
        "diffusion_pytorch_model",
        _random(build(lambda: Vae(spec.vae)), diffusers_vae(levels), rng),
        _vae_json(spec.vae),
    )
    _write_network(
        folder / "text_encoder",
        "model",
        _random(build(lambda: ClipText(spec.text_encoder)), identity, rng, "text_model."),
        _clip_json(spec.text_encoder),
    )
    _write_network(
        folder / "text_encoder_2",
        "model",
        _random(build(lambda: T5Encoder(spec.text_encoder_2)), identity, rng),
        _t5_json(spec.text_encoder_2),
    )
    _write_clip_tokenizer(folder / "tokenizer")
    _write_t5_tokenizer(folder / "tokenizer_2", spec)
    _write_json(folder / "scheduler" / "scheduler_config.json", _SCHEDULER)
    _write_json(folder / "model_index.json", _MODEL_INDEX)


def _random(
    module: Any, locate: Locate, rng: np.random.Generator, prefix: str = ""
) -> dict[str, NDArray[np.float32]]:
    """Random stored tensors of every parameter: matrices keep the variance, scales are near 1."""
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, parameter in module.state_dict().items():
        shape = tuple(parameter.shape)
        if len(shape) > 1:
            fan_in = shape[1] if "shared" in name or "embedding" in name else math.prod(shape[1:])
            values = rng.standard_normal(shape) / math.sqrt(fan_in)
        else:
            values = 0.1 * rng.standard_normal(shape) + (0 if name.endswith("bias") else 1)
        pieces = locate(name)
        if pieces[0].half is not None:  # halves of one stored tensor, in swapped order
            rows = np.split(values, 2)
            tensors[pieces[0].key] = np.concatenate([rows[p] for p in _order(pieces)]).astype(
                np.float32
            )
            continue
        first = shape[0] // 3 if len(pieces) == 3 else shape[1] if len(shape) > 1 else 0
        if (
            len(pieces) == 4 and len(shape) == 1
        ):  # the bias of q, k, v and mlp: widths of its weight
            first = len(tensors[locate(name.replace("bias", "weight"))[0].key])
        cuts = [first * (i + 1) for i in range(len(pieces) - 1)]
        for piece, part in zip(pieces, np.split(values, cuts), strict=True):
            tensors[prefix + piece.key] = part.astype(np.float32)
    matrices = ("to_q", "to_k", "to_v", "to_out.0")
    return {
        key: np.ascontiguousarray(
            value[:, :, 0, 0]
            if value.ndim == 4 and key.split(".weight")[0].endswith(matrices)
            else value,
            dtype=np.float32,
        )
        for key, value in tensors.items()
    }


def _order(pieces: Any) -> list[int]:
    """Which canonical half comes first in the stored tensor."""
    return [next(i for i, piece in enumerate(pieces) if piece.half == half) for half in (0, 1)]


def _write_network(
    folder: Path, stem: str, tensors: Mapping[str, NDArray[np.float32]], config: dict[str, Any]
) -> None:
    folder.mkdir()
    save_file(dict(tensors), folder / f"{stem}.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config)


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
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
_MODEL_INDEX = {
    "_class_name": "FluxKontextPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _write_clip_tokenizer(folder: Path) -> None:
    """Byte-level BPE without merges: every byte a token, and again as the end of a word."""
    from tokenizers.pre_tokenizers import ByteLevel

    symbols = sorted(ByteLevel.alphabet())
    words = [*symbols, *(f"{s}</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    _write_json(folder / "vocab.json", {word: i for i, word in enumerate(words)})
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": CLIP_LENGTH,
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
        },
    )


def _write_t5_tokenizer(folder: Path, spec: Spec) -> None:
    """A unigram model whose pieces are single printable characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *map(chr, range(33, 127))]
    tokenizer = Tokenizer(models.Unigram([(piece, -2.0) for piece in pieces], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="\u2581", prepend_scheme="always"
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(pieces[:3])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "T5TokenizerFast",
            "model_max_length": spec.text_length,
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "extra_ids": 0,
        },
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out}: expected a folder that does not exist, found one")
    write_checkpoint(args.out, seed=args.seed)
    print(f"{args.out}: a tiny model with random weights; what it draws is noise")


if __name__ == "__main__":
    main()
