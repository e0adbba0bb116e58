"""The run that is committed to go on from: its autoencoder is what its record says."""

from pathlib import Path

import numpy as np
import torch

from fluxkontext.bench.mini import train
from fluxkontext.bench.mini.scenes import draw_scene
from fluxkontext.bench.mini.training.run import Run
from fluxkontext.bench.mini.training.schedule import Budget
from fluxkontext.bench.mini.training.spec import MINI
from fluxkontext.bench.mini.training.vae_stage import GATE, load_latents, round_trip

START = Path(train.__file__).with_name("start")


def test_the_autoencoder_passes_its_gate() -> None:
    """On scenes that neither training nor its record has seen."""
    spec, weights = train.finished_vae(MINI, START, ignore_gate=False)
    run = Run(START, torch.device("cpu"), Budget(steps=1), batch=1, rate=0.0, dtype=torch.float32)
    rng = np.random.default_rng(123)
    scenes = [draw_scene(rng, "held_out", range(1, 10)) for _ in range(100)]
    latents = load_latents(spec, weights, run)
    found = round_trip(latents, scenes, run.device)
    assert found["exact"] >= GATE
    assert found["psnr"] > 40
    assert spec.vae.scaling_factor != MINI.vae.scaling_factor  # it was measured
