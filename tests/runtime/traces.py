"""Run an edit on either pipeline and keep what is compared: inside the first step, and the end."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from fluxkontext.runtime import KontextPipeline

from .peers import TEXT_LENGTH

LATENTS = VELOCITY = 1e-5
FEED_FORWARD = 5e-6


@dataclass
class Trace:
    """latents: after the last step, packed. velocity, feed_forward: the target's velocity and the
    first image feed-forward's output at the first step. pixels: 0..255."""

    latents: NDArray[np.float32]
    velocity: Tensor
    feed_forward: Tensor
    pixels: NDArray[np.int16]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coarse random colours, so that resizing changes little and positions matter."""
    cells = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


def size(width: int, height: int) -> dict[str, int]:
    """Arguments that make the target exactly this large, in both pipelines."""
    return {"width": width, "height": height, "max_area": width * height}


@contextmanager
def first_output(module: nn.Module) -> Iterator[list[Tensor]]:
    """What ``module`` returns when it is first called."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if not kept:
            kept.append((output[0] if isinstance(output, tuple) else output).detach().clone())

    handle = module.register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


def run_ours(pipe: KontextPipeline, **call: Any) -> Trace:
    """One call of our pipeline; ``auto_resize`` is off unless asked for."""
    latents: list[NDArray[np.float32]] = []

    def keep(_pipe: Any, _i: int, _t: float, tensors: Mapping[str, Any]) -> None:
        latents[:] = [tensors["latents"]]

    flux = pipe.backend._flux  # type: ignore[attr-defined]
    with first_output(flux) as velocity, first_output(flux.double_blocks[0].img_mlp["2"]) as ff:
        result = pipe(
            **{"auto_resize": False, "num_inference_steps": 3, "output_type": "np", **call},
            callback_on_step_end=keep,
        )
    return Trace(latents[0], velocity[0].float(), ff[0].float(), levels(result.images))


def run_peer(peer: Any, **call: Any) -> Trace:
    """The same call of diffusers' pipeline; ``seed`` becomes a CPU generator."""
    latents: list[Tensor] = []

    def keep(_pipe: Any, _i: int, _t: float, tensors: dict[str, Any]) -> dict[str, Any]:
        latents[:] = [tensors["latents"]]
        return {}

    if "seed" in call:
        call["generator"] = torch.Generator().manual_seed(call.pop("seed"))
    call["_auto_resize"] = call.pop("auto_resize", False)
    defaults = {
        "max_sequence_length": TEXT_LENGTH,
        "guidance_scale": 2.5,
        "num_inference_steps": 3,
        "output_type": "np",
    }
    ff = peer.transformer.transformer_blocks[0].ff
    with first_output(peer.transformer) as velocity, first_output(ff) as feed_forward:
        images = peer(**{**defaults, **call}, callback_on_step_end=keep).images
    final = latents[0].float().numpy()
    target = velocity[0][:, : final.shape[1]]
    return Trace(final, target.float(), feed_forward[0].float(), levels(images))


def levels(images: Any) -> NDArray[np.int16]:
    """Pictures in 0..1 as 8-bit levels; latents are none."""
    if isinstance(images, Tensor):
        return np.empty(0, np.int16)
    return (np.asarray(images) * 255).round().astype(np.int16)


def error(found: Any, wanted: Any) -> float:
    """Root mean square of the difference, relative to that of ``wanted``."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    return float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)))


def errors(ours: Trace, theirs: Trace) -> dict[str, float]:
    """All that is compared, as numbers."""
    return {
        "latents": error(ours.latents, theirs.latents),
        "velocity": error(ours.velocity, theirs.velocity),
        "feed_forward": error(ours.feed_forward, theirs.feed_forward),
        "pixels": float(np.abs(ours.pixels - theirs.pixels).max()),
    }


def assert_equal(ours: Trace, theirs: Trace) -> None:
    """Equal as two programs in fp32 can be."""
    assert theirs.pixels.std() > 20, "a flat picture would compare equal to anything"
    found = errors(ours, theirs)
    print(" ".join(f"{name} {value:.2g}" for name, value in found.items()))
    assert found["latents"] < LATENTS, found
    assert found["velocity"] < VELOCITY, found
    assert found["feed_forward"] < FEED_FORWARD, found
    assert found["pixels"] <= 1, found
