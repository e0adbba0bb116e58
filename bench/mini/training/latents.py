"""Between scenes, pictures and the latent tokens that the transformer works on."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ....runtime.models.vae import Vae, pack, scale, unpack, unscale
from ..render_torch import render_batch

_CHUNK = 512  # at most so many pictures go through the autoencoder together


class Autoencoder(nn.Module):
    """The VAE with the forward pass of its training; parameters are named ``vae.<canonical>``."""

    def __init__(self, vae: Vae) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels ``[B, 3, H, W]`` in -1..1 and unit noise of the latents' shape.

        Returns the reconstruction of a random latent, and the divergence of its distribution from
        the unit normal, per number; both float32.
        """
        moments = self.vae.encoder(pixels.to(noise.dtype)).float()
        mean, log_variance = moments.chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 10)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        latents = mean + (0.5 * log_variance).exp() * noise.float()
        return self.vae.decoder(latents.to(noise.dtype)).float(), divergence


def to_pixels(pictures: Tensor) -> Tensor:
    """uint8 ``[n, H, W, 3]`` to float32 ``[n, 3, H, W]`` in -1..1."""
    return pictures.permute(0, 3, 1, 2).float() / 255 * 2 - 1


def to_pictures(pixels: Tensor) -> Tensor:
    """The inverse, rounded and clipped."""
    levels = (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1)


class Latents:
    """A trained VAE at work, without gradients, in the dtype of its weights."""

    def __init__(self, vae: Vae) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.dtype = vae.decoder.conv_in.weight.dtype

    @torch.no_grad()
    def means(self, pictures: Tensor) -> Tensor:
        """uint8 ``[n, H, W, 3]`` to unscaled mean latents ``[n, C, h, w]`` float32."""
        count = -(-len(pictures) // _CHUNK)  # of equal size where possible: one shape to compile
        parts = (to_pixels(part).to(self.dtype) for part in pictures.chunk(count))
        return torch.cat([self.vae.encode(part).float() for part in parts])

    def encode(self, pictures: Tensor) -> Tensor:
        """uint8 ``[n, H, W, 3]`` to packed, scaled tokens ``[n, tokens, 4 C]`` float32."""
        return pack(scale(self.means(pictures), self.vae.config))

    def encode_scenes(self, things: Tensor, backgrounds: Tensor) -> Tensor:
        """Things ``[n, 9, 3]`` and backgrounds ``[n]`` to tokens ``[n, tokens, 4 C]``."""
        return self.encode(render_batch(things, backgrounds))

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Packed tokens of square pictures ``[n, tokens, 4 C]`` to uint8 ``[n, H, W, 3]``."""
        side = round(tokens.shape[1] ** 0.5)
        latents = unscale(unpack(tokens, side, side), self.vae.config).to(self.dtype)
        return torch.cat([to_pictures(self.vae.decode(part)) for part in latents.split(_CHUNK)])

    def set_constants(self, means: Tensor) -> None:
        """Shift and scale so that latents have mean 0 and deviation 1 over all these."""
        shift, factor = float(means.mean()), 1 / float(means.std())
        self.vae.config = replace(self.vae.config, shift_factor=shift, scaling_factor=factor)
