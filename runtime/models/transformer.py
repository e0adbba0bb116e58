"""The FLUX diffusion transformer (DiT) with what its steps share taken out of the step.

Names are BFL's (`flux/model.py`, `flux/modules/layers.py`). D is the hidden size, H the heads, d
the channels of a head; S text tokens, T target tokens, C context tokens.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels import Before, KernelSet, Stream
from ...kernels.norm_rope import rope_table
from ...kernels.quantize import tokens_of
from ..config import TransformerConfig
from .quantised import side_by_side

_TIME_CHANNELS = 256
_MAX_PERIOD = 10_000.0
_TIME_FACTOR = 1000.0


class Flux(nn.Module):
    """The denoiser. An edit calls :meth:`modulation`, :meth:`rope`, ``txt_in`` and, for contexts,
    ``img_in`` once, then :meth:`forward` at every step."""

    def __init__(self, config: TransformerConfig, kernels: KernelSet) -> None:
        super().__init__()
        D = config.hidden_size
        self.config = config
        self.kernels = kernels
        self.img_in = nn.Linear(config.in_channels, D)
        self.txt_in = nn.Linear(config.context_in_dim, D)
        self.time_in = MLPEmbedder(_TIME_CHANNELS, D)
        self.vector_in = MLPEmbedder(config.vec_in_dim, D)
        self.guidance_in = MLPEmbedder(_TIME_CHANNELS, D) if config.guidance_embed else None
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(config, kernels) for _ in range(config.depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(config, kernels) for _ in range(config.depth_single_blocks)
        )
        self.final_layer = LastLayer(config)

    def modulation(self, sigmas: Tensor, guidance: Tensor, pooled: Tensor) -> Tensor:
        """Every shift, scale and gate of every step; 27% of the weights are used here alone.

        sigmas: ``[N]``, or ``[N, B]`` where pictures differ (in training). guidance: ``[1]`` or
        ``[B]``. Both float32. pooled: ``[B, vec_in_dim]``.
        Returns ``[N, R, B, 1, D]``: R rows in the order in which :meth:`forward` takes them.
        """
        dtype = pooled.dtype
        sigmas = sigmas if sigmas.ndim == 2 else sigmas[:, None]  # [N, 1 or B]
        vec = self.time_in(sinusoid(sigmas).to(dtype)) + self.vector_in(pooled)
        if self.guidance_in is not None:
            vec = vec + self.guidance_in(sinusoid(guidance).to(dtype))
        vec = F.silu(vec)  # [N, B, D]
        parts = [*self._modulations(), self.final_layer.adaLN_modulation[1]]
        rows = [row for part in parts for row in part(vec)]  # each [N, B, D]
        return torch.stack(rows, dim=1).unsqueeze(-2)

    def _modulations(self) -> "Iterator[Modulation]":
        return (m for m in self.modules() if isinstance(m, Modulation))

    def rope(
        self, positions: Tensor, text_tokens: int, angles: torch.dtype = torch.float64
    ) -> Tensor:
        """Rotation table ``[S + tokens, d / 2, 2]``; ``positions [tokens, 3]``, text lies at 0."""
        positions = F.pad(positions, (0, 0, text_tokens, 0))
        return rope_table(positions, self.config.axes_dim, self.config.theta, angles)

    def forward(
        self, latents: Tensor, context: Tensor, txt: Tensor, modulation: Tensor, rope: Tensor
    ) -> Tensor:
        """Velocity of one step.

        latents: ``[B, T, in_channels]``. context: ``[B, C, D]``, contexts after ``img_in``. txt:
        ``[B, S, D]``, text after ``txt_in``. modulation: ``[R, B, 1, D]``, this step's rows.
        Returns ``[B, T, in_channels]``.
        """
        img = torch.cat((self.img_in(latents), context), dim=1)
        rows = list(modulation.unbind(0))
        for block in self.double_blocks:
            img, txt = block(img, txt, rows[:12], rope)
            rows = rows[12:]
        x = torch.cat((txt, img), dim=1)
        target = slice(txt.shape[1], txt.shape[1] + latents.shape[1])
        # A block ends with the modulation of what the next one, or the last layer, takes.
        takers = [*(block.linear1 for block in self.single_blocks), self.final_layer.linear]
        normed = self.kernels.before(takers[0]).modulate(x, rows[0], rows[1])
        last = len(self.single_blocks) - 1
        for i, block in enumerate(self.single_blocks):
            keep = target if i == last else None
            x, normed = block(x, normed, rows[2:5], rope, keep, self.kernels.before(takers[i + 1]))
            rows = rows[3:]
        velocity: Tensor = self.final_layer.linear(normed if last >= 0 else normed[:, target])
        return velocity


class DoubleStreamBlock(nn.Module):
    """Image and text each with its own weights, joined in attention."""

    def __init__(self, config: TransformerConfig, kernels: KernelSet) -> None:
        super().__init__()
        D = config.hidden_size
        self.kernels = kernels
        self.img_mod = Modulation(D, 6)
        self.img_attn = SelfAttention(config)
        self.img_mlp = feed_forward(D, config.mlp_hidden)
        self.txt_mod = Modulation(D, 6)
        self.txt_attn = SelfAttention(config)
        self.txt_mlp = feed_forward(D, config.mlp_hidden)

    def forward(
        self, img: Tensor, txt: Tensor, rows: Sequence[Tensor], rope: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``img [B, T + C, D]``, ``txt [B, S, D]``; rows: twice shift, scale, gate, img first."""
        ops, before, text_tokens = self.kernels, self.kernels.before, txt.shape[1]
        img_up, txt_up = before(self.img_mlp["0"]), before(self.txt_mlp["0"])
        img_down, txt_down = before(self.img_mlp["2"]), before(self.txt_mlp["2"])
        img_shift, img_scale, img_gate, img_shift2, img_scale2, img_gate2 = rows[:6]
        txt_shift, txt_scale, txt_gate, txt_shift2, txt_scale2, txt_gate2 = rows[6:]

        img_normed = before(self.img_attn.qkv).modulate(img, img_shift, img_scale)
        txt_normed = before(self.txt_attn.qkv).modulate(txt, txt_shift, txt_scale)
        txt_qkv, img_qkv = self.side_by_side("attn.qkv", txt_normed, img_normed)
        streams = self.txt_attn.stream(*txt_qkv), self.img_attn.stream(*img_qkv)
        attended = ops.attend(ops, streams, rope, rope).tensor_split([text_tokens], dim=1)
        txt_y, img_y = self.side_by_side("attn.proj", *attended)

        img, img_normed = img_up.residual_modulate(img, img_gate, img_y, img_shift2, img_scale2)
        txt, txt_normed = txt_up.residual_modulate(txt, txt_gate, txt_y, txt_shift2, txt_scale2)
        txt_y, img_y = self.side_by_side("mlp.0", txt_normed, img_normed)
        txt_y, img_y = self.side_by_side("mlp.2", txt_down.gelu(txt_y), img_down.gelu(img_y))
        return ops.gate_residual(img, img_gate2, img_y), ops.gate_residual(txt, txt_gate2, txt_y)

    def side_by_side(self, layer: str, txt: Any, img: Any) -> tuple[Any, Any]:
        """What the layer of that name makes of each stream."""
        layers = [self.get_submodule(f"{stream}_{layer}") for stream in ("txt", "img")]
        txt_out, img_out = side_by_side(layers, (txt, img))
        return txt_out, img_out


class SingleStreamBlock(nn.Module):
    """Attention and feed-forward side by side on the joint sequence (text, target, contexts)."""

    def __init__(self, config: TransformerConfig, kernels: KernelSet) -> None:
        super().__init__()
        D = config.hidden_size
        self.kernels = kernels
        self.num_heads = config.num_heads
        self.linear1 = FusedLinear(D, [D, D, D, config.mlp_hidden])
        self.linear2 = nn.Linear(D + config.mlp_hidden, D)
        self.norm = QKNorm(config.head_dim)
        self.modulation = Modulation(D, 3)

    def forward(
        self,
        x: Tensor,
        normed: Any,
        rows: Sequence[Tensor],
        rope: Tensor,
        keep: slice | None,
        before_next: Before,
    ) -> tuple[Tensor, Any]:
        """``x [B, S + T + C, D]`` and that modulated, a Tensor or Rows, to the same for the next
        block or layer.

        rows: this block's gate, then what modulates the result, the next one's shift and scale.
        keep: the only tokens that are needed after this block, or None for all; keys and values
        come from all tokens either way. before_next: the ops of whoever takes the result.
        """
        ops, (gate, next_shift, next_scale) = self.kernels, rows
        q_rope = rope
        if keep is None:
            q, k, v, up = self.linear1(normed)
        else:
            k, v = self.linear1.part(normed, 1, 3)
            x, normed, q_rope = x[:, keep], tokens_of(normed, keep), rope[keep]
            (q,), (up,) = self.linear1.part(normed, 0, 1), self.linear1.part(normed, 3, 4)
        attended = ops.attend(ops, [self.norm.stream(q, k, v, self.num_heads)], q_rope, rope)
        y = self.linear2(ops.before(self.linear2).gelu_beside(attended, up))
        return before_next.residual_modulate(x, gate, y, next_shift, next_scale)


class SelfAttention(nn.Module):
    """What one stream has for attention; the block runs it, with that of the other stream."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_heads
        self.qkv = FusedLinear(D, [D, D, D])
        self.norm = QKNorm(config.head_dim)
        self.proj = nn.Linear(D, D)

    def stream(self, q: Tensor, k: Tensor, v: Tensor) -> Stream:
        """What projections ``[B, tokens, D]`` bring to attention."""
        return self.norm.stream(q, k, v, self.num_heads)


class LastLayer(nn.Module):
    """The projection back to latent channels, and the modulation of what it is given."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.linear = nn.Linear(D, config.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), FusedLinear(D, [D, D]))


class Modulation(nn.Module):
    """The linear map from the conditioning vector (after SiLU) to ``rows`` vectors."""

    def __init__(self, dim: int, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.lin = nn.Linear(dim, rows * dim)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.lin(vec).chunk(self.rows, dim=-1))


class FusedLinear(nn.Linear):
    """Several projections of one input as one matrix; ``widths`` are their rows in order."""

    def __init__(self, in_dim: int, widths: Sequence[int]) -> None:
        super().__init__(in_dim, sum(widths))
        self.widths = list(widths)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(super().forward(x).split(self.widths, dim=-1))

    def part(self, x: Tensor, start: int, stop: int) -> tuple[Tensor, ...]:
        """Only the projections ``start`` to ``stop``."""
        rows = slice(sum(self.widths[:start]), sum(self.widths[:stop]))
        out = F.linear(x, self.weight[rows], self.bias[rows])
        return tuple(out.split(self.widths[start:stop], dim=-1))


class MLPEmbedder(nn.Module):
    """Two linear layers that embed a timestep, a guidance scale or the pooled text."""

    def __init__(self, in_dim: int, hidden: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden)
        self.out_layer = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out_layer(F.silu(self.in_layer(x)))
        return out


class QKNorm(nn.Module):
    """Holds the scales of the query and key norms; the norm itself is fused with RoPE."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = RMSScale(dim)
        self.key_norm = RMSScale(dim)

    def stream(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Stream:
        """Projections ``[B, tokens, D]`` by heads, with the scales of their norms."""
        q, k, v = (t.unflatten(-1, (heads, -1)) for t in (q, k, v))
        return Stream(q, k, v, self.query_norm.scale, self.key_norm.scale)


class RMSScale(nn.Module):
    """The scale of an RMSNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))


def feed_forward(dim: int, hidden: int) -> nn.ModuleDict:
    """The layers of one stream, called 0 and 2 as in the checkpoint; GELU is between them."""
    return nn.ModuleDict({"0": nn.Linear(dim, hidden), "2": nn.Linear(hidden, dim)})


def sinusoid(x: Tensor) -> Tensor:
    """Embed ``x [...]`` (sigmas or guidance scales) as ``[..., 256]``: cosines, then sines, of
    ``1000 x`` at falling frequencies, in float32."""
    half = _TIME_CHANNELS // 2
    exponent = torch.arange(half, dtype=torch.float32, device=x.device) / half
    angle = (_TIME_FACTOR * x.float()).unsqueeze(-1) * torch.exp(-math.log(_MAX_PERIOD) * exponent)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)
