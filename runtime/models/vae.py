"""The autoencoder between pixels and latents (FLUX ``ae.safetensors``, ``AutoencoderKL``).

Names are BFL's (`flux/modules/autoencoder.py`). Latents here are unscaled; the pipeline's constants
are applied by :func:`scale` and :func:`unscale`.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels import reference
from ..config import VaeConfig

NormOp = Callable[..., Tensor]
MakeNorm = Callable[..., "GroupNorm"]

_EPS = 1e-6
_OVERLAP = 0.25
"""Share of a tile that its neighbour covers too (diffusers ``tile_overlap_factor``)."""


class Vae(nn.Module):
    """Encoder and decoder. norm_op: GroupNorm with or without SiLU, torch's if None."""

    def __init__(self, config: VaeConfig, norm_op: NormOp | None = None) -> None:
        super().__init__()
        self.config = config
        # the decoder leaves fp16's range, as the checkpoint's config warns
        self.fp16_exceptions = (".weight", ".bias") if config.force_upcast else ()
        norm = partial(GroupNorm, norm_op or reference().group_norm_silu, config.norm_num_groups)
        self.encoder = Encoder(config, norm)
        self.decoder = Decoder(config, norm)

    def encode(self, pixels: Tensor, tile: int = 0) -> Tensor:
        """``[B, 3, H, W]`` in -1..1 to the mean latents ``[B, C, H / 8, W / 8]``.

        tile: side in pixels of tiles that save memory; 0 for tiles of large pictures alone.
        """
        moments = self._tiled(self.encoder, pixels, 1 / self.config.downscale, tile)
        return moments.chunk(2, dim=1)[0]

    def decode(self, latents: Tensor, tile: int = 0) -> Tensor:
        """``[B, C, h, w]`` to pixels ``[B, 3, 8 h, 8 w]`` around -1..1; tile: as for encode."""
        return self._tiled(self.decoder, latents, self.config.downscale, tile)

    def _tiled(
        self, part: Callable[[Tensor], Tensor], x: Tensor, factor: float, side: int
    ) -> Tensor:
        """Apply ``part`` at once, or to large pictures tile by tile.

        A tile is the native size; a picture of at most twice that a side is small enough to go
        whole, which is exact: a tile's norms see only the tile. With a ``side`` of its own a tile
        is the limit too. Blending is that of diffusers.
        """
        tile = (side or self.config.sample_size) // (self.config.downscale if factor > 1 else 1)
        if max(x.shape[-2:]) <= (tile if side else 2 * tile):
            return part(x)
        stride = int(tile * (1 - _OVERLAP))
        blend = int(tile * factor * _OVERLAP)
        keep = int(tile * factor) - blend
        rows: list[list[Tensor]] = []
        for top in range(0, x.shape[-2], stride):
            row = [
                part(x[..., top : top + tile, left : left + tile])
                for left in range(0, x.shape[-1], stride)
            ]
            if rows:
                for above, here in zip(rows[-1], row, strict=True):
                    _blend(above, here, blend, -2)
            for before, here in pairwise(row):
                _blend(before, here, blend, -1)
            rows.append(row)
        strips = [torch.cat([t[..., :keep, :keep] for t in row], dim=-1) for row in rows]
        return torch.cat(strips, dim=-2)


def _blend(before: Tensor, here: Tensor, extent: int, dim: int) -> None:
    """Fade from the end of ``before`` into the start of ``here``, in place, along ``dim``."""
    extent = min(extent, before.shape[dim], here.shape[dim])
    ramp = torch.arange(extent, device=here.device, dtype=here.dtype) / extent
    ramp = ramp[:, None] if dim == -2 else ramp
    start = here.narrow(dim, 0, extent)
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    start.copy_(end * (1 - ramp) + start * ramp)


def scale(latents: Tensor, config: VaeConfig) -> Tensor:
    """Mean latents to what the transformer works on."""
    return (latents - config.shift_factor) * config.scaling_factor


def unscale(latents: Tensor, config: VaeConfig) -> Tensor:
    """The inverse of :func:`scale`."""
    return latents / config.scaling_factor + config.shift_factor


def pack(latents: Tensor) -> Tensor:
    """``[B, C, h, w]`` to ``[B, (h / 2)(w / 2), 4 C]``, as :func:`..geometry.pack`."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * 4)


def unpack(tokens: Tensor, width: int, height: int) -> Tensor:
    """The inverse of :func:`pack` for a grid of ``width x height`` tokens."""
    batch, _, features = tokens.shape
    patches = tokens.reshape(batch, height, width, features // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, features // 4, height * 2, width * 2)


class Encoder(nn.Module):
    """Pixels to mean and log-variance."""

    def __init__(self, config: VaeConfig, norm: MakeNorm) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for i, (inner, outer) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            last = i == len(widths) - 1
            blocks = _stack(inner, outer, config.layers_per_block, norm)
            self.down.append(Level(blocks, downsample=None if last else Downsample(outer)))
        self.mid = Middle(widths[-1], norm)
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        x = self.mid(x)
        x = self.conv_out(self.norm_out(x))
        return x


class Decoder(nn.Module):
    """Latents to pixels; ``up`` is numbered from the finest resolution, so it runs backwards."""

    def __init__(self, config: VaeConfig, norm: MakeNorm) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], norm)
        self.up = nn.ModuleList()
        for i, (outer, inner) in enumerate(zip(widths, (*widths[1:], widths[-1]), strict=True)):
            blocks = _stack(inner, outer, config.layers_per_block + 1, norm)
            self.up.append(Level(blocks, upsample=Upsample(outer) if i > 0 else None))
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x: Tensor = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        x = self.conv_out(self.norm_out(x))
        return x


class Level(nn.Module):
    """One resolution: its blocks, then the way to the next."""

    def __init__(
        self,
        block: nn.Sequential,
        downsample: "Downsample | None" = None,
        upsample: "Upsample | None" = None,
    ) -> None:
        super().__init__()
        self.block = block
        self.downsample = downsample
        self.upsample = upsample

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        for resample in (self.downsample, self.upsample):
            x = x if resample is None else resample(x)
        return x


def _stack(inner: int, outer: int, depth: int, norm: MakeNorm) -> nn.Sequential:
    return nn.Sequential(
        *(ResnetBlock(inner if i == 0 else outer, outer, norm) for i in range(depth))
    )


class Middle(nn.Module):
    """The lowest resolution: a block, attention over all places, a block."""

    def __init__(self, width: int, norm: MakeNorm) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(width, width, norm)
        self.attn_1 = AttnBlock(width, norm)
        self.block_2 = ResnetBlock(width, width, norm)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block_2(self.attn_1(self.block_1(x)))
        return x


class GroupNorm(nn.GroupNorm):
    """GroupNorm and, but for attention, the SiLU after it, by one op."""

    def __init__(self, op: NormOp, groups: int, channels: int, silu: bool = True) -> None:
        super().__init__(groups, channels, _EPS)
        self.op, self.silu = op, silu

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.num_groups, self.weight, self.bias, self.eps, self.silu)


class ResnetBlock(nn.Module):
    """Two convolutions around a skip."""

    def __init__(self, inner: int, outer: int, norm: MakeNorm) -> None:
        super().__init__()
        self.norm1 = norm(inner)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2 = norm(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(self.norm1(x))
        hidden = self.conv2(self.norm2(hidden))
        x = x if self.nin_shortcut is None else self.nin_shortcut(x)
        return torch.add(x, hidden)


class AttnBlock(nn.Module):
    """Single-head attention over all places of a feature map."""

    def __init__(self, width: int, norm: MakeNorm) -> None:
        super().__init__()
        self.norm = norm(width, silu=False)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (
            # contiguous: torch's fused attention takes nothing else, and the other one needs a
            # matrix of places x places
            proj(normed).flatten(2).transpose(1, 2).contiguous()
            for proj in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        out: Tensor = x + self.proj_out(mixed.transpose(1, 2).unflatten(2, x.shape[-2:]))
        return out


class Downsample(nn.Module):
    """Halve each side; the padding is on the right and below only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.pad(x, (0, 1, 0, 1)))
        return x


class Upsample(nn.Module):
    """Double each side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x
