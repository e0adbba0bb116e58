"""The autoencoder is diffusers' ``AutoencoderKL``, whole and in tiles."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fluxkontext.runtime.config import VaeConfig
from fluxkontext.runtime.models.vae import Vae, scale, unscale

from .. import peers
from ..traces import error

SMALL = {"widths": (8, 16, 16, 24), "norm_num_groups": 8}


def ours(theirs: Any) -> Vae:
    """Our module with the same weights, its shape read from their config."""
    config = {**theirs.config, "_class_name": "AutoencoderKL"}
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
    model = Vae(VaeConfig.from_json(listed)).eval()
    model.load_state_dict(peers.bfl_vae(theirs.state_dict()))
    return model


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (48, 80), (16, 16), (112, 32)])
@pytest.mark.parametrize("depth", [1, 2])
def test_whole(size: tuple[int, int], depth: int) -> None:
    theirs = peers.vae(layers_per_block=depth)
    model = ours(theirs)
    pixels = noise(2, 3, *size).clamp(-1, 1)
    wanted = theirs.encode(pixels).latent_dist.mode()
    found = model.encode(pixels)
    assert found.shape == (2, 16, size[0] // 8, size[1] // 8)
    assert error(found, wanted) < 1e-5
    assert error(model.decode(wanted), theirs.decode(wanted).sample) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("size", [(144, 144), (208, 160), (48, 256), (256, 96)])
def test_tiled(size: tuple[int, int]) -> None:
    """Large pictures go tile by tile, blended as diffusers blends them."""
    theirs = peers.vae(sample_size=64, **SMALL)
    model = ours(theirs)
    theirs.enable_tiling()
    pixels = noise(1, 3, *size).clamp(-1, 1)
    wanted = theirs.encode(pixels).latent_dist.mode()
    assert error(model.encode(pixels), wanted) < 1e-5
    picture = theirs.decode(wanted).sample
    found = model.decode(wanted)
    assert found.shape == (1, 3, *size)
    assert error(found, picture) < 1e-5
    theirs.disable_tiling()
    assert error(theirs.decode(wanted).sample, picture) > 1e-3, "tiles that make no difference"


@torch.no_grad()
def test_tiles_only_what_is_large() -> None:
    """Up to twice the native size a side a picture goes whole, which is exact."""
    theirs = peers.vae(sample_size=64, **SMALL)
    model = ours(theirs)
    for size in ((128, 128), (80, 128)):
        pixels = noise(1, 3, *size).clamp(-1, 1)
        wanted = theirs.encode(pixels).latent_dist.mode()
        assert error(model.encode(pixels), wanted) < 1e-5
        assert error(model.decode(wanted), theirs.decode(wanted).sample) < 1e-5


@torch.no_grad()
def test_attention_can_be_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strided queries make torch build the matrix of all places with all: 1 GB at 1024 x 1024."""
    strides = []
    attention = F.scaled_dot_product_attention

    def look(*qkv: Tensor, **options: Any) -> Tensor:
        strides.extend(x.stride(-1) for x in qkv)
        return attention(*qkv, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", look)
    model = ours(peers.vae(**SMALL))
    model.decode(model.encode(noise(1, 3, 64, 48)))
    assert strides == [1] * 6


def test_scaling() -> None:
    """FLUX's constants: what the transformer sees, and back."""
    config = VaeConfig()
    latents = noise(4, 4)
    torch.testing.assert_close(scale(latents, config), (latents - 0.1159) * 0.3611)
    torch.testing.assert_close(unscale(scale(latents, config), config), latents)


@torch.no_grad()
def test_bf16() -> None:
    """No further from fp32 than diffusers is."""
    theirs: nn.Module = peers.vae(**SMALL)
    pixels = noise(1, 3, 64, 48).clamp(-1, 1)
    latents = theirs.encode(pixels).latent_dist.mode()
    picture = theirs.decode(latents).sample
    model = ours(theirs).bfloat16()
    theirs = theirs.bfloat16()
    low = pixels.bfloat16()
    mode = theirs.encode(low).latent_dist.mode()
    assert error(model.encode(low).float(), latents) < 1.5 * error(mode.float(), latents)
    low = latents.bfloat16()
    limit = 1.5 * error(theirs.decode(low).sample.float(), picture)
    assert error(model.decode(low).float(), picture) < limit
