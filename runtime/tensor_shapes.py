"""Names and shapes of every tensor of the four networks, from their configs alone; no torch.

Names are the canonical ones of :mod:`.layouts`; the tests hold these tables to the modules.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .config import ClipConfig, Shapes, T5Config, TransformerConfig, VaeConfig

_TIME_CHANNELS = 256
"""Sinusoid channels of a timestep or guidance scale (BFL ``model.py``)."""

Entry = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class ModelShapes:
    """The configs of a whole model. Defaults are the published FLUX.1 Kontext [dev]."""

    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    text_encoder: ClipConfig = field(default_factory=ClipConfig)
    text_encoder_2: T5Config = field(default_factory=T5Config)

    def tensors(self) -> Mapping[str, Shapes]:
        """Component -> tensor -> shape."""
        return {
            "transformer": dict(_transformer(self.transformer)),
            "vae": dict(_vae(self.vae)),
            "text_encoder": dict(_clip(self.text_encoder)),
            "text_encoder_2": dict(_t5(self.text_encoder_2)),
        }

    @classmethod
    def of(cls, checkpoint: Any) -> "ModelShapes":
        """Those of a :class:`.checkpoint.Checkpoint`."""
        return cls(
            checkpoint.transformer.config,
            checkpoint.vae.config,
            checkpoint.text_encoder.config,
            checkpoint.text_encoder_2.config,
        )


def _affine(name: str, *shape: int) -> Iterator[Entry]:
    """A weight and a bias of as many rows."""
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _transformer(c: TransformerConfig) -> Iterator[Entry]:
    D, M = c.hidden_size, c.mlp_hidden
    yield from _affine("img_in", D, c.in_channels)
    yield from _affine("txt_in", D, c.context_in_dim)
    embedders = {"time_in": _TIME_CHANNELS, "vector_in": c.vec_in_dim}
    if c.guidance_embed:
        embedders["guidance_in"] = _TIME_CHANNELS
    for name, width in embedders.items():
        yield from _affine(f"{name}.in_layer", D, width)
        yield from _affine(f"{name}.out_layer", D, D)
    for i in range(c.depth):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            yield from _affine(f"{block}_mod.lin", 6 * D, D)
            yield from _affine(f"{block}_attn.qkv", 3 * D, D)
            yield from _qk_norm(f"{block}_attn", c)
            yield from _affine(f"{block}_attn.proj", D, D)
            yield from _affine(f"{block}_mlp.0", M, D)
            yield from _affine(f"{block}_mlp.2", D, M)
    for i in range(c.depth_single_blocks):
        block = f"single_blocks.{i}"
        yield from _affine(f"{block}.linear1", 3 * D + M, D)
        yield from _affine(f"{block}.linear2", D, D + M)
        yield from _qk_norm(block, c)
        yield from _affine(f"{block}.modulation.lin", 3 * D, D)
    yield from _affine("final_layer.linear", c.in_channels, D)
    yield from _affine("final_layer.adaLN_modulation.1", 2 * D, D)


def _qk_norm(owner: str, c: TransformerConfig) -> Iterator[Entry]:
    for norm in ("query_norm", "key_norm"):
        yield f"{owner}.norm.{norm}.scale", (c.head_dim,)


def _vae(c: VaeConfig) -> Iterator[Entry]:
    widths = c.block_out_channels
    top, last = widths[-1], len(widths) - 1
    for half, ins, outs in (
        ("encoder", 3, 2 * c.latent_channels),
        ("decoder", c.latent_channels, 3),
    ):
        first, final = (widths[0], top) if half == "encoder" else (top, widths[0])
        yield from _affine(f"{half}.conv_in", first, ins, 3, 3)
        for block in ("block_1", "block_2"):
            yield from _resnet(f"{half}.mid.{block}", top, top)
        yield from _affine(f"{half}.mid.attn_1.norm", top)
        for proj in ("q", "k", "v", "proj_out"):
            yield from _affine(f"{half}.mid.attn_1.{proj}", top, top, 1, 1)
        yield from _affine(f"{half}.norm_out", final)
        yield from _affine(f"{half}.conv_out", outs, final, 3, 3)
    for i, (inner, outer) in enumerate(zip((widths[0], *widths), widths, strict=False)):
        for j in range(c.layers_per_block):
            yield from _resnet(f"encoder.down.{i}.block.{j}", inner if j == 0 else outer, outer)
        if i < last:
            yield from _affine(f"encoder.down.{i}.downsample.conv", outer, outer, 3, 3)
    for i, (outer, inner) in enumerate(zip(widths, (*widths[1:], top), strict=True)):
        for j in range(c.layers_per_block + 1):
            yield from _resnet(f"decoder.up.{i}.block.{j}", inner if j == 0 else outer, outer)
        if i > 0:
            yield from _affine(f"decoder.up.{i}.upsample.conv", outer, outer, 3, 3)


def _resnet(name: str, inner: int, outer: int) -> Iterator[Entry]:
    yield from _affine(f"{name}.norm1", inner)
    yield from _affine(f"{name}.conv1", outer, inner, 3, 3)
    yield from _affine(f"{name}.norm2", outer)
    yield from _affine(f"{name}.conv2", outer, outer, 3, 3)
    if inner != outer:
        yield from _affine(f"{name}.nin_shortcut", outer, inner, 1, 1)


def _clip(c: ClipConfig) -> Iterator[Entry]:
    D = c.hidden_size
    yield "embeddings.token_embedding.weight", (c.vocab_size, D)
    yield "embeddings.position_embedding.weight", (c.max_position_embeddings, D)
    for i in range(c.num_hidden_layers):
        layer = f"encoder.layers.{i}"
        for proj in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _affine(f"{layer}.self_attn.{proj}", D, D)
        yield from _affine(f"{layer}.layer_norm1", D)
        yield from _affine(f"{layer}.layer_norm2", D)
        yield from _affine(f"{layer}.mlp.fc1", c.intermediate_size, D)
        yield from _affine(f"{layer}.mlp.fc2", D, c.intermediate_size)
    yield from _affine("final_layer_norm", D)


def _t5(c: T5Config) -> Iterator[Entry]:
    D, inner = c.d_model, c.num_heads * c.d_kv
    yield "shared.weight", (c.vocab_size, D)
    for i in range(c.num_layers):
        attend, feed = (f"encoder.block.{i}.layer.{j}" for j in range(2))
        for proj in "qkv":
            yield f"{attend}.SelfAttention.{proj}.weight", (inner, D)
        yield f"{attend}.SelfAttention.o.weight", (D, inner)
        if i == 0:
            bias = f"{attend}.SelfAttention.relative_attention_bias.weight"
            yield bias, (c.relative_attention_num_buckets, c.num_heads)
        yield f"{attend}.layer_norm.weight", (D,)
        for proj in ("wi_0", "wi_1"):
            yield f"{feed}.DenseReluDense.{proj}.weight", (c.d_ff, D)
        yield f"{feed}.DenseReluDense.wo.weight", (D, c.d_ff)
        yield f"{feed}.layer_norm.weight", (D,)
    yield "encoder.final_layer_norm.weight", (D,)
