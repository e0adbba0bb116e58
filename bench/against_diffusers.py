"""Time a whole edit against diffusers' on the same machine, weights, noise and threads.

``python -m fluxkontext.bench.against_diffusers`` makes a tiny checkpoint and prints a JSON object.
Rounds are interleaved (A B, B A, ...), fp32 on both sides, nothing memoised; the pictures are
compared, so that both did the same work.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..runtime import KontextPipeline
from .synthetic import TINY, write_checkpoint


def compare(model: Path, size: tuple[int, int], steps: int, rounds: int) -> dict[str, Any]:
    """Medians and samples in seconds of both, for an edit of a (width, height) picture."""
    from diffusers import FluxKontextPipeline

    peer = FluxKontextPipeline.from_pretrained(model)
    peer.set_progress_bar_config(disable=True)
    ours = KontextPipeline.from_pretrained(model, precision="fp32", device="cpu", memo_entries=0)
    width, height = size
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    length = ours.tokenizer_2.model_max_length
    shared: dict[str, Any] = {
        "image": picture,
        "prompt": "make the red circle blue",
        "height": height,
        "width": width,
        "max_area": width * height,
        "num_inference_steps": steps,
        "guidance_scale": 2.5,
        "max_sequence_length": length,
    }

    def edit_peer() -> Any:
        generator = torch.Generator().manual_seed(0)
        return peer(**shared, generator=generator, _auto_resize=False).images[0]

    def edit_ours() -> Any:
        return ours(**shared, seed=0, auto_resize=False).images[0]

    edits: dict[str, Callable[[], Any]] = {"fluxkontext": edit_ours, "diffusers": edit_peer}
    pictures = {name: np.asarray(edit(), np.int16) for name, edit in edits.items()}  # also warms up
    difference = int(np.abs(pictures["fluxkontext"] - pictures["diffusers"]).max())
    if difference > 1:
        raise SystemExit(f"expected pictures within 1 level, found {difference}: not the same work")
    samples: dict[str, list[float]] = {name: [] for name in edits}
    for i in range(rounds):
        for name in list(edits)[:: 1 if i % 2 == 0 else -1]:
            start = time.perf_counter()
            edits[name]()
            samples[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return {
        "ratio_of_medians": medians["diffusers"] / medians["fluxkontext"],
        "median_s": medians,
        "samples_s": samples,
        "largest_pixel_difference": difference,
        "width": width,
        "height": height,
        "steps": steps,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "numpy")},
    }


def main() -> None:
    """Command line; exits with 1 when diffusers was faster."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "tiny"
        # at the real model's native size, so that no picture here is large enough to be tiled
        write_checkpoint(model, replace(TINY, vae=replace(TINY.vae, sample_size=1024)))
        report = compare(model, (args.width, args.height), args.steps, args.rounds)
    print(json.dumps(report, indent=2))
    if report["ratio_of_medians"] < 1:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
