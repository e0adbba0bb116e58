"""Frozen shapes of the four networks, read from a diffusers config or from the tensors.

``ASSUMED`` are what the tensors do not tell: these fields are then FLUX's own.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .arguments import shown
from .errors import CheckpointError
from .fields import Fields

_MOST_LAYERS = 128
_MOST_LEVELS = 8
"""Limits far above any real model: a damaged number must not become hours or terabytes."""

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name -> shape, in the canonical names of :mod:`.layouts`."""


@dataclass(frozen=True)
class TransformerConfig:
    """The FLUX DiT. Defaults are FLUX.1 Kontext [dev] (BFL ``util.py``, ``flux-dev-kontext``)."""

    in_channels: int = 64
    hidden_size: int = 3072
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    context_in_dim: int = 4096
    vec_in_dim: int = 768
    mlp_hidden: int = 12288
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: float = 10_000.0
    guidance_embed: bool = True
    ASSUMED: ClassVar = frozenset({"axes_dim", "theta"})

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @classmethod
    def from_json(
        cls, values: Mapping[str, Any], file: str = "transformer/config.json"
    ) -> "TransformerConfig":
        """Read ``transformer/config.json`` (``FluxTransformer2DModel``)."""
        read = Fields(file, values)
        read.expect("_class_name", "FluxTransformer2DModel")
        read.expect("patch_size", 1)
        in_channels = read.integer("in_channels", 64)
        read.expect("out_channels", in_channels)
        heads = read.integer("num_attention_heads", 24)
        head_dim = read.integer("attention_head_dim", 128)
        if heads * head_dim > 2**20:
            raise CheckpointError(
                f"{file}: expected a width of at most {2**20}, found {heads} heads of {head_dim}"
            )
        axes = tuple(read.integers("axes_dims_rope", [16, 56, 56]))
        if sum(axes) != head_dim or any(dim % 2 for dim in axes) or len(axes) != 3:
            raise CheckpointError(
                f"{file}: expected three even axes_dims_rope that sum to "
                f"attention_head_dim {head_dim}, found {list(axes)}"
            )
        return cls(
            in_channels=in_channels,
            hidden_size=heads * head_dim,
            num_heads=heads,
            depth=read.integer("num_layers", 19, _MOST_LAYERS),
            depth_single_blocks=read.integer("num_single_layers", 38, _MOST_LAYERS),
            context_in_dim=read.integer("joint_attention_dim", 4096),
            vec_in_dim=read.integer("pooled_projection_dim", 768),
            mlp_hidden=4 * heads * head_dim,
            axes_dim=axes,
            guidance_embed=read.boolean("guidance_embeds", False),
        )

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> "TransformerConfig":
        """Derive the config of a single file; the RoPE axes are those of FLUX."""
        hidden, in_channels = shapes["img_in.weight"]
        head_dim = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
        if head_dim != sum(cls.axes_dim):
            raise CheckpointError(
                f"transformer: expected heads of {sum(cls.axes_dim)} channels (RoPE axes "
                f"{cls.axes_dim}), found {head_dim}; a single file of another shape cannot say how "
                "its heads rotate, use a diffusers folder"
            )
        return cls(
            in_channels=in_channels,
            hidden_size=hidden,
            num_heads=hidden // head_dim,
            depth=_count(shapes, r"double_blocks\.(\d+)\."),
            depth_single_blocks=_count(shapes, r"single_blocks\.(\d+)\."),
            context_in_dim=shapes["txt_in.weight"][1],
            vec_in_dim=shapes["vector_in.in_layer.weight"][1],
            mlp_hidden=shapes["double_blocks.0.img_mlp.0.weight"][0],
            guidance_embed="guidance_in.in_layer.weight" in shapes,
        )


@dataclass(frozen=True)
class VaeConfig:
    """The autoencoder. Defaults are FLUX's ``ae.safetensors``."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16
    norm_num_groups: int = 32
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159
    force_upcast: bool = True
    sample_size: int = 1024
    ASSUMED: ClassVar = frozenset(
        {"norm_num_groups", "scaling_factor", "shift_factor", "force_upcast", "sample_size"}
    )

    @property
    def downscale(self) -> int:
        """Pixels per latent along one side."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @classmethod
    def from_json(cls, values: Mapping[str, Any], file: str = "vae/config.json") -> "VaeConfig":
        """Read ``vae/config.json`` (``AutoencoderKL``)."""
        read = Fields(file, values)
        read.expect("_class_name", "AutoencoderKL")
        read.expect("in_channels", 3)
        read.expect("out_channels", 3)
        read.expect("act_fn", "silu")
        read.expect("mid_block_add_attention", True)
        for conv in ("use_quant_conv", "use_post_quant_conv"):
            if read.boolean(conv, True):  # diffusers' default
                raise CheckpointError(f"{file}: expected {conv} false as in FLUX, found true")
        blocks = tuple(read.integers("block_out_channels", [64]))
        groups = read.integer("norm_num_groups", 32)
        if len(blocks) > _MOST_LEVELS or any(width % groups for width in blocks):
            raise CheckpointError(
                f"{file}: expected up to {_MOST_LEVELS} block_out_channels, multiples of "
                f"norm_num_groups {groups}, found {shown(list(blocks))}"
            )
        for name, block in (("down_block_types", "Down"), ("up_block_types", "Up")):
            read.expect(
                name, [f"{block}{'En' if block == 'Down' else 'De'}coderBlock2D"] * len(blocks)
            )
        return cls(
            block_out_channels=blocks,
            layers_per_block=read.integer("layers_per_block", 1, _MOST_LAYERS),
            latent_channels=read.integer("latent_channels", 4),
            norm_num_groups=groups,
            scaling_factor=read.positive("scaling_factor", 0.18215),
            shift_factor=read.number("shift_factor", 0.0),
            force_upcast=read.boolean("force_upcast", True),
            sample_size=read.integer("sample_size", 32, 8192, 2 ** len(blocks)),
        )

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> "VaeConfig":
        """Derive the config of a single file; the latent constants are those of FLUX."""
        levels = _count(shapes, r"encoder\.down\.(\d+)\.")
        return cls(
            block_out_channels=tuple(
                shapes[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in range(levels)
            ),
            layers_per_block=_count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
            latent_channels=shapes["decoder.conv_in.weight"][1],
        )


@dataclass(frozen=True)
class ClipConfig:
    """The CLIP text encoder. Defaults are CLIP-L (openai/clip-vit-large-patch14)."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 2
    ASSUMED: ClassVar = frozenset({"num_attention_heads", "layer_norm_eps", "eos_token_id"})

    @classmethod
    def from_json(
        cls, values: Mapping[str, Any], file: str = "text_encoder/config.json"
    ) -> "ClipConfig":
        """Read ``text_encoder/config.json`` (``CLIPTextModel``)."""
        read = Fields(file, values)
        read.expect("hidden_act", "quick_gelu")
        hidden = read.integer("hidden_size", 512)
        heads = read.integer("num_attention_heads", 8)
        if hidden % heads:
            raise CheckpointError(
                f"{file}: expected hidden_size to be a multiple of "
                f"num_attention_heads {heads}, found {hidden}"
            )
        return cls(
            vocab_size=read.integer("vocab_size", 49408),
            hidden_size=hidden,
            intermediate_size=read.integer("intermediate_size", 2048),
            num_hidden_layers=read.integer("num_hidden_layers", 12, _MOST_LAYERS),
            num_attention_heads=heads,
            max_position_embeddings=read.integer("max_position_embeddings", 77),
            layer_norm_eps=read.positive("layer_norm_eps", 1e-5),
            eos_token_id=read.integer("eos_token_id", 49407, least=0),
        )

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> "ClipConfig":
        """Derive the config of a single file; heads have 64 channels as in CLIP-L."""
        vocab_size, hidden = shapes["embeddings.token_embedding.weight"]
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=shapes["encoder.layers.0.mlp.fc1.weight"][0],
            num_hidden_layers=_count(shapes, r"encoder\.layers\.(\d+)\."),
            num_attention_heads=hidden // 64,
            max_position_embeddings=shapes["embeddings.position_embedding.weight"][0],
        )


@dataclass(frozen=True)
class T5Config:
    """The T5 encoder. Defaults are T5-v1.1-XXL."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    ASSUMED: ClassVar = frozenset({"relative_attention_max_distance", "layer_norm_epsilon"})

    @classmethod
    def from_json(
        cls, values: Mapping[str, Any], file: str = "text_encoder_2/config.json"
    ) -> "T5Config":
        """Read ``text_encoder_2/config.json`` (``T5EncoderModel``)."""
        read = Fields(file, values)
        read.expect("feed_forward_proj", "gated-gelu")
        buckets = read.integer("relative_attention_num_buckets", 32, least=4)
        distance = read.integer("relative_attention_max_distance", 128)
        if distance <= buckets // 4:  # the buckets beyond are logarithmic in what is left
            raise CheckpointError(
                f"{file}: expected relative_attention_max_distance above "
                f"{buckets // 4}, found {distance}"
            )
        return cls(
            vocab_size=read.integer("vocab_size", 32128),
            d_model=read.integer("d_model", 512),
            d_kv=read.integer("d_kv", 64),
            d_ff=read.integer("d_ff", 2048),
            num_layers=read.integer("num_layers", 6, _MOST_LAYERS),
            num_heads=read.integer("num_heads", 8),
            relative_attention_num_buckets=buckets,
            relative_attention_max_distance=distance,
            layer_norm_epsilon=read.positive("layer_norm_epsilon", 1e-6),
        )

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> "T5Config":
        """Derive the config of a single file."""
        vocab_size, d_model = shapes["shared.weight"]
        attention = "encoder.block.0.layer.0.SelfAttention"
        buckets, heads = shapes[f"{attention}.relative_attention_bias.weight"]
        return cls(
            vocab_size=vocab_size,
            d_model=d_model,
            d_kv=shapes[f"{attention}.q.weight"][0] // heads,
            d_ff=shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
            num_layers=_count(shapes, r"encoder\.block\.(\d+)\."),
            num_heads=heads,
            relative_attention_num_buckets=buckets,
        )


def _count(shapes: Shapes, pattern: str) -> int:
    """How many numbered parts there are: one more than the highest number that matches."""
    numbers = [int(match[1]) for name in shapes if (match := re.match(pattern, name))]
    return max(numbers, default=-1) + 1
