"""The JSON files of a diffusers folder, written from what the runtime knows of a model."""

from collections.abc import Mapping
from typing import Any

from ..runtime.config import ClipConfig, T5Config, TransformerConfig, VaeConfig
from ..runtime.schedule import SchedulerConfig


def network_json(config: TransformerConfig | VaeConfig | ClipConfig | T5Config) -> dict[str, Any]:
    """A network's ``config.json``."""
    match config:
        case TransformerConfig():
            return _transformer_json(config)
        case VaeConfig():
            return _vae_json(config)
        case ClipConfig():
            return _clip_json(config)
        case T5Config():
            return _t5_json(config)


def scheduler_json(config: SchedulerConfig) -> dict[str, Any]:
    """``scheduler/scheduler_config.json``."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": config.shift,
        "use_dynamic_shifting": config.use_dynamic_shifting,
        "base_shift": config.base_shift,
        "max_shift": config.max_shift,
        "base_image_seq_len": config.base_image_seq_len,
        "max_image_seq_len": config.max_image_seq_len,
    }


def model_index_json(classes: Mapping[str, list[str]] | None = None) -> dict[str, Any]:
    """``model_index.json``; ``classes`` are parts whose classes are others than FLUX's."""
    return {"_class_name": "FluxKontextPipeline", **_CLASSES, **(classes or {})}


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


_CLASSES = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
