"""The CLIP text encoder, as far as FLUX uses it: one pooled vector a prompt.

Names are those of transformers' ``CLIPTextModel`` without the ``text_model.`` prefix.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ClipConfig

_LEGACY_EOS = 2
"""Published configs carry this id; the end token is the highest one (transformers #24773)."""


class ClipText(nn.Module):
    """Causal transformer over token ids."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids ``[B, tokens]`` to the state at the end token, ``[B, hidden_size]``."""
        x = self.final_layer_norm(self.encoder(self.embeddings(ids)))
        if self.config.eos_token_id == _LEGACY_EOS:
            end = ids.argmax(dim=-1)
        else:
            end = (ids == self.config.eos_token_id).int().argmax(dim=-1)
        pooled: Tensor = x[torch.arange(ids.shape[0], device=ids.device), end]
        return pooled


class Embeddings(nn.Module):
    """Token and position embeddings."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
        return x


class Encoder(nn.Module):
    """The layers in order."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Layer(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        x = x + self.mlp(self.layer_norm2(x))
        return x


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """Feed-forward with the sigmoid approximation of GELU ("quick_gelu")."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        out: Tensor = self.fc2(hidden * torch.sigmoid(1.702 * hidden))
        return out
