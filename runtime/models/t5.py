"""The T5-v1.1 encoder: a prompt's tokens to its text embeddings.

Names are those of transformers' ``T5EncoderModel``. Nothing is masked: padding attends and is
attended to, as FLUX was trained.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import T5Config


class T5Encoder(nn.Module):
    """Token embeddings and the stack over them."""

    fp16_exceptions = (".wo.weight",)  # its output leaves fp16's range

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids ``[B, tokens]`` to embeddings ``[B, tokens, d_model]``."""
        out: Tensor = self.encoder(self.shared(ids))
        return out


class Stack(nn.Module):
    """Bidirectional blocks with one relative position bias for all; the first block holds it."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.block = nn.ModuleList(Block(config, has_bias=i == 0) for i in range(config.num_layers))
        self.final_layer_norm = RMSNorm(config)

    def forward(self, x: Tensor) -> Tensor:
        table = self.get_submodule("block.0.layer.0.SelfAttention.relative_attention_bias")
        bias = table(self._buckets(x.shape[1], x.device)).permute(2, 0, 1).unsqueeze(0)
        for block in self.block:
            x = block(x, bias)
        x = self.final_layer_norm(x)
        return x

    def _buckets(self, tokens: int, device: torch.device) -> Tensor:
        """Bucket of each query and key ``[tokens, tokens]``: near distances have one each, far
        ones share, logarithmically; half of the buckets are for keys after the query."""
        config = self.config
        at = torch.arange(tokens, device=device)
        distance = at[None, :] - at[:, None]
        half = config.relative_attention_num_buckets // 2
        exact = half // 2
        near = distance.abs()
        ratio = torch.log(near.clamp(min=1).float() / exact)
        ratio = ratio / math.log(config.relative_attention_max_distance / exact)
        far = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
        return torch.where(near < exact, near, far) + half * (distance > 0)


class Block(nn.Module):
    """Pre-norm attention and gated feed-forward, under the names ``layer.0`` and ``layer.1``."""

    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(config, has_bias), FeedForwardLayer(config)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attend, feed_forward = self.layer
        x = _clamp(x + attend(x, bias))
        return _clamp(x + feed_forward(x))


def _clamp(x: Tensor) -> Tensor:
    """T5 was trained in bf16; in fp16 its largest activations would become infinite."""
    return x.clamp(-64504, 64504) if x.dtype == torch.float16 else x


class AttentionLayer(nn.Module):
    """Norm and attention."""

    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        self.SelfAttention = SelfAttention(config, has_bias)
        self.layer_norm = RMSNorm(config)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = self.SelfAttention(self.layer_norm(x), bias)
        return out


class SelfAttention(nn.Module):
    """Attention without scaling: T5 folds that into its initialisation."""

    def __init__(self, config: T5Config, has_bias: bool) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if has_bias:
            self.relative_attention_bias = nn.Embedding(
                config.relative_attention_num_buckets, config.num_heads
            )

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        out: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return out


class FeedForwardLayer(nn.Module):
    """Norm and feed-forward."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = GatedGelu(config)
        self.layer_norm = RMSNorm(config)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.DenseReluDense(self.layer_norm(x))
        return out


class GatedGelu(nn.Module):
    """Feed-forward with a gate. ``wo`` stays in fp32 when the rest is fp16."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = WideLinear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)
        out: Tensor = self.wo(hidden)
        return out.to(x.dtype)


class WideLinear(nn.Linear):
    """Computes in the type of its weight, whatever that of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class RMSNorm(nn.Module):
    """T5's layer norm: no mean, no bias, the variance in float32."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.eps = config.layer_norm_epsilon
        self.weight = nn.Parameter(torch.ones(config.d_model))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype) * self.weight
