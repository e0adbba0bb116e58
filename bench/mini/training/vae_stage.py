"""Stage one: the autoencoder, and the gate that it has to pass before anything is built on it."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....runtime.models.vae import Vae
from ...checkpoint_writer import Spec
from ..parser import parse_all, truth
from ..render_torch import render_batch
from ..scenes import Scene, draw_scene, encode
from .batches import SceneSteps, dense_scenes
from .latents import Autoencoder, Latents, to_pixels
from .run import Run

GATE = 99.0
"""Percent of scenes that the parser must read exactly after a round trip."""
_STAGE = 0

# Squared error for the surfaces; absolute error and that of differences between neighbours for
# edges, by which shapes are told apart. The KL term decides how much noise a decoder has to bear:
# at this weight about what is 42 dB in pixels, less than a good transformer's own error.
_ABSOLUTE, _EDGE, _KL = 0.25, 0.125, 5e-4


class VaeStage:
    """Learns to copy dense scenes."""

    name = "vae"

    def __init__(self, spec: Spec, run: Run) -> None:
        torch.manual_seed(run.seed)
        self.spec, self.run = spec, run
        self.module = Autoencoder(Vae(spec.vae)).to(run.device, run.dtype)
        if run.compile:
            self.module.vae.encoder.compile(dynamic=False)
            self.module.vae.decoder.compile(dynamic=False)

    def steps(self) -> SceneSteps:
        return SceneSteps(self.run.local_batch, self.run.seed, self.run.process)

    def losses(
        self, item: tuple[Tensor, Tensor], step: int
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        things, backgrounds = (part.to(self.run.device, non_blocking=True) for part in item)
        pixels = to_pixels(render_batch(things, backgrounds))
        if pixels.device.type == "cpu":
            # rendered pixels are channels last, in which a step takes twice as long there
            pixels = pixels.contiguous()
        config = self.spec.vae
        side = pixels.shape[-1] // config.downscale
        noise = torch.randn(
            (len(pixels), config.latent_channels, side, side),
            generator=self.run.generator(_STAGE, step),
            device=self.run.device,
        )
        copy, kl = self.module(pixels, noise.to(self.run.dtype))
        error = copy - pixels
        squared = error.square().mean()
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        # the KL term comes in slowly: at first it would only silence channels not yet in use
        warm = min(1.0, step / 1000)
        loss = squared + _ABSOLUTE * error.abs().mean() + _EDGE * edges + _KL * warm * kl
        yield loss, {"squared": squared, "edges": edges, "kl": kl}

    def probe(self, weights: dict[str, Tensor]) -> dict[str, float]:
        """Round trips of held-out scenes, dense ones and usual ones."""
        rng = np.random.default_rng(2)
        half = self.run.probe_samples // 2
        scenes = dense_scenes(rng, half, "held_out")
        scenes += [draw_scene(rng, "held_out") for _ in range(half)]
        return round_trip(self._latents(weights), scenes, self.run.device)

    def result(self, weights: dict[str, Tensor]) -> dict[str, Any]:
        latents = self._latents(weights)
        rng = np.random.default_rng(1)
        count = 4 * self.run.probe_samples
        usual = [draw_scene(rng, "train") for _ in range(count)]
        latents.set_constants(latents.means(_render(usual, self.run.device)))
        held_out = [draw_scene(rng, "held_out", range(1, 10)) for _ in range(count)]
        scores = round_trip(latents, held_out, self.run.device)
        config = latents.vae.config
        return {
            "scaling_factor": config.scaling_factor,
            "shift_factor": config.shift_factor,
            "gate": GATE,
            "passed": scores["exact"] >= GATE,
            **scores,
        }

    def _latents(self, weights: dict[str, Tensor]) -> Latents:
        return load_latents(self.spec, weights, self.run)


def with_constants(spec: Spec, result: Mapping[str, Any]) -> Spec:
    """The spec with the latent constants that a finished stage has measured."""
    constants = {name: result[name] for name in ("scaling_factor", "shift_factor")}
    return replace(spec, vae=replace(spec.vae, **constants))


def load_latents(spec: Spec, weights: dict[str, Tensor], run: Run) -> Latents:
    """The autoencoder of some weights, in the run's dtype and on its device."""
    vae = Vae(spec.vae)
    vae.load_state_dict({k.removeprefix("vae."): v for k, v in weights.items()})
    return Latents(vae.to(torch.bfloat16).to(run.device, run.dtype))  # bf16 is what will ship


def round_trip(latents: Latents, scenes: list[Scene], device: torch.device) -> dict[str, float]:
    """Percent of scenes and of cells read exactly after encoding and decoding, and PSNR in dB."""
    pictures = _render(scenes, device)
    copies = latents.decode(latents.encode(pictures))
    error = (copies.float() - pictures.float()).square().mean((1, 2, 3))
    seen = parse_all(list(copies.cpu().numpy()))
    wanted = [truth(scene) for scene in scenes]
    pairs = list(zip(seen, wanted, strict=True))
    cells = [s == w for p, t in pairs for s, w in zip(p.cells, t.cells, strict=True)]
    return {
        "exact": round(100 * float(np.mean([p == t for p, t in pairs])), 2),
        "cells": round(100 * float(np.mean(cells)), 2),
        "psnr": round(float((10 * torch.log10(255**2 / error)).mean()), 2),
        "scenes": len(scenes),
    }


def _render(scenes: list[Scene], device: torch.device) -> Tensor:
    codes = encode(scenes)
    things, backgrounds = (torch.from_numpy(part).to(device) for part in codes)
    return render_batch(things, backgrounds)
