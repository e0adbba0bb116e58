"""Several contexts of one edit, against a loop over diffusers' own modules: its pipeline has none.

What diffusers does have is the transformer, the scheduler, the autoencoder and the packing; the
positions of the contexts are written out by hand here.
"""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift, retrieve_timesteps
from PIL import Image
from torch import Tensor

from fluxkontext.runtime import KontextPipeline

from .peers import TEXT_LENGTH
from .traces import error, first_output, picture, run_ours, run_peer, size

Origin = tuple[int, int, int]
"""Frame, row and column of a context's first token."""


def block(origin: Origin, width: int, height: int) -> Tensor:
    rows = torch.arange(height)[:, None].expand(height, width).flatten()
    columns = torch.arange(width).repeat(height)
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=1) + torch.tensor(origin)


@torch.no_grad()
def loop(
    peer: Any,
    contexts: list[tuple[Image.Image, Origin]],
    prompt: str,
    width: int,
    height: int,
    seed: int,
    steps: int = 3,
) -> tuple[Tensor, Tensor]:
    """Final latents and the first velocity of one edit."""
    embeds, pooled, text_ids = peer.encode_prompt(prompt, max_sequence_length=TEXT_LENGTH)
    encoded, positions = [], [block((0, 0, 0), width // 16, height // 16)]
    for image, origin in contexts:
        pixels = peer.image_processor.preprocess(image)
        latents = peer._encode_vae_image(pixels, None)
        encoded.append(peer._pack_latents(latents, 1, *latents.shape[1:]))
        positions.append(block(origin, latents.shape[3] // 2, latents.shape[2] // 2))
    noise = torch.randn(
        1, 16, height // 8, width // 8, generator=torch.Generator().manual_seed(seed)
    )
    x = peer._pack_latents(noise, *noise.shape)
    timesteps, _ = retrieve_timesteps(
        peer.scheduler,
        sigmas=np.linspace(1.0, 1 / steps, steps),
        mu=calculate_shift(x.shape[1]),
    )
    peer.scheduler.set_begin_index(0)
    velocities = []
    for t in timesteps:
        velocity = peer.transformer(
            hidden_states=torch.cat([x, *encoded], dim=1),
            timestep=t[None] / 1000,
            guidance=torch.tensor([2.5]),
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=torch.cat(positions).float(),
            return_dict=False,
        )[0][:, : x.shape[1]]
        velocities.append(velocity)
        x = peer.scheduler.step(velocity, t, x, return_dict=False)[0]
    return x, velocities[0]


SIZES = [(96, 64), (64, 96), (80, 80)]
PICTURES = [picture(*size, seed) for seed, size in enumerate(SIZES)]
# offset: the second lies below the first (side by side it would be 10 tokens either way), the
# third beside both
ORIGINS = {
    "index": [(1, 0, 0), (2, 0, 0), (3, 0, 0)],
    "offset": [(1, 0, 0), (1, 4, 0), (1, 0, 6)],
}


@pytest.mark.parametrize("layout", ORIGINS)
@pytest.mark.parametrize("count", [2, 3])
def test_equals_the_loop(hub_pipe: KontextPipeline, peer: Any, layout: str, count: int) -> None:
    ours = run_ours(
        hub_pipe,
        image=PICTURES[:count],
        prompt="make the circle blue",
        context_layout=layout,
        seed=4,
        **size(112, 80),
    )
    contexts = list(zip(PICTURES, ORIGINS[layout], strict=True))[:count]
    latents, velocity = loop(peer, contexts, "make the circle blue", 112, 80, seed=4)
    found = error(ours.latents, latents), error(ours.velocity, velocity)
    print(found)
    assert max(found) < 1e-5


def test_the_layouts_differ(hub_pipe: KontextPipeline) -> None:
    """Otherwise the comparison above says nothing about positions."""
    call = {"image": PICTURES, "prompt": "red", "seed": 4, **size(112, 80)}
    index, offset = (run_ours(hub_pipe, **call, context_layout=layout) for layout in ORIGINS)
    assert error(offset.latents, index.latents) > 1e-3


def test_the_loop_is_the_pipeline(peer: Any) -> None:
    """With one context the loop above is diffusers' own pipeline."""
    theirs = run_peer(peer, image=PICTURES[0], prompt="red", seed=4, **size(112, 80))
    with first_output(peer.transformer):
        latents, velocity = loop(peer, [(PICTURES[0], (1, 0, 0))], "red", 112, 80, seed=4)
    assert error(latents, theirs.latents) < 1e-6
    assert error(velocity, theirs.velocity) < 1e-6


def test_each_edit_has_its_own_contexts(hub_pipe: KontextPipeline, peer: Any) -> None:
    """A list of lists: the contexts of each edit, whose number may differ."""
    prompts = ["make it red", "a blue square"]
    given = [PICTURES[:2], PICTURES[2:]]
    result = hub_pipe(
        image=given,
        prompt=prompts,
        seed=[4, 5],
        output_type="latent",
        num_inference_steps=3,
        auto_resize=False,
        **size(112, 80),
    )
    for i, (prompt, pictures) in enumerate(zip(prompts, given, strict=True)):
        contexts = list(zip(pictures, ORIGINS["index"], strict=False))
        latents, _ = loop(peer, contexts, prompt, 112, 80, seed=4 + i)
        assert error(result.images[i], latents[0]) < 1e-5
