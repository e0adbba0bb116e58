"""The golden edit of a bundle: one small edit, step by step, that every backend has to reproduce.

``golden.safetensors`` holds what goes in (token ids, a picture, noise, positions, sigmas) and what
comes out in fp32 on a CPU: the latents before and after every step, and the pixels.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .backend import Backend, Batch, Floats, TokenIds
from .bundle import Bundle, file_entry, update_manifest
from .errors import CorruptedError
from .files import whole_file
from .geometry import Grid, Size, position_ids
from .images import Pixels
from .noise import NoiseStream
from .schedule import SchedulerConfig, sigmas_for
from .tokenizer import load_tokenizer

GOLDEN = "golden.safetensors"
STEPS = 4
GUIDANCE = 2.5
PROMPT = "make the circle blue"
VELOCITY_LIMITS = {"fp32": 1e-3, "fp16": 2**-7, "bf16": 2**-4, "fp8": 0.25, "nvfp4": 0.5}
"""Relative RMS error that the velocity of one step may have against fp32, by precision: 16 units of
roundoff for the 16-bit formats (native torch shows 2 to 3 with a block of each kind); a wrong graph
is off by 1 and more."""
PIXEL_LIMITS = {"fp32": 0.1, "fp16": 0.5, "bf16": 4.0, "fp8": 4.0, "nvfp4": 4.0}
"""Levels of 255 that decoded pixels may be off on average; the decoder is never quantised, and is
off by 0.4 in bf16 on random weights."""


@dataclass(frozen=True)
class Golden:
    """The edit. Shapes: ``clip [77]``, ``t5 [S]`` int64; ``picture [H, W, 3]`` uint8, which is
    every context; ``positions [T + C, 3]`` int32; ``sigmas [N + 1]``; ``latents
    [N + 1, B, T, 4 C]``, the first of which are the noise; ``pixels [B, H, W, 3]`` uint8."""

    clip: NDArray[np.int64]
    t5: NDArray[np.int64]
    picture: Pixels
    positions: NDArray[np.int32]
    sigmas: Floats
    latents: Floats
    pixels: Pixels
    contexts: int
    target: Size

    def batch(self, backend: Backend) -> Batch:
        """What a backend begins with."""
        count = len(self.latents[0])
        text = backend.encode_text(TokenIds(self.clip, self.t5))
        context = [backend.encode_image(self.picture)] * self.contexts if self.contexts else []
        return Batch(
            text=[text] * count,
            negative=[],
            contexts=[context] * count,
            noise=self.latents[0],
            positions=self.positions,
            target=self.target,
            sigmas=self.sigmas,
            guidance_scale=GUIDANCE,
            true_cfg_scale=1.0,
        )

    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Component -> input -> its shape in this edit."""
        _, batch, tokens, features = self.latents.shape
        width, height = self.target
        context = (batch, len(self.positions) - tokens, features)
        shapes: dict[str, dict[str, tuple[int, ...]]] = {
            "clip": {"ids": (1, len(self.clip))},
            "t5": {"ids": (1, len(self.t5))},
            "modulation": {"sigmas": (len(self.sigmas) - 1,)},
            "transformer": {"latents": self.latents.shape[1:], "context": context},
            "vae_decoder": {"latents": (1, height, width, features)},
        }
        if self.contexts:
            shapes["vae_encoder"] = {"pixels": (1, *self.picture.shape)}
        return shapes


@dataclass(frozen=True)
class Outcome:
    """How far a backend was off: relative RMS error of each step's velocity, each step begun at the
    golden latents; mean difference of the pixels in levels, decoded from the golden ones; seconds
    of encoding (with what the steps share), of a step (median), and of decoding."""

    velocity: tuple[float, ...]
    pixels: float
    seconds: Mapping[str, float]

    def facts(self) -> dict[str, Any]:
        """For the manifest and for reports."""
        return {
            "velocity_error": max(self.velocity),
            "pixel_error": self.pixels,
            "seconds": dict(self.seconds),
        }

    def check(self, precision: str, where: str) -> None:
        """Raise CorruptedError unless within the limits of ``precision``."""
        found = {"velocity": max(self.velocity), "pixels": self.pixels}
        limits = {"velocity": VELOCITY_LIMITS[precision], "pixels": PIXEL_LIMITS[precision]}
        for name, limit in limits.items():
            if not found[name] <= limit:  # neither is NaN
                raise CorruptedError(
                    f"{where}: expected the golden edit with an error of {name} up to {limit:g} in "
                    f"{precision}, found {found[name]:.4g}; do not use it: build or export it anew"
                )


def golden_size(grid: Grid) -> Size:
    """An eighth of the model's native side, but 4 tokens at least."""
    side = max(grid.native // 8 // grid.multiple, 4) * grid.multiple
    return side, side


def record(
    bundle: Bundle,
    backend: Backend,
    scheduler: SchedulerConfig,
    size: Size,
    contexts: int,
    batch: int,
) -> None:
    """Run the golden edit in fp32 on ``backend`` and put it in the bundle, replacing any other."""
    grid = bundle.grid()
    target = grid.tokens(size)
    tokens = target[0] * target[1]
    t5 = load_tokenizer(bundle.root / "tokenizer_2", 512)
    features = bundle.inputs("transformer")["latents"].shape[2]
    assert isinstance(features, int)
    start = Golden(
        clip=load_tokenizer(bundle.root / "tokenizer", 77)(PROMPT),
        t5=t5(PROMPT),
        picture=_picture(size),
        positions=position_ids(target, [target] * contexts),
        sigmas=sigmas_for(scheduler, tokens, STEPS),
        latents=NoiseStream(0).normal(1, batch, tokens, features),
        pixels=np.empty(0, np.uint8),
        contexts=contexts,
        target=target,
    )
    state = backend.begin(start.batch(backend))
    latents = [start.latents[0]]
    for i in range(STEPS):
        backend.step(state, i)
        latents.append(backend.read(state).copy())
    pixels = np.stack(backend.decode(state))
    tensors: dict[str, NDArray[Any]] = {
        "clip": start.clip,
        "t5": start.t5,
        "picture": start.picture,
        "positions": start.positions,
        "sigmas": start.sigmas,
        "latents": np.stack(latents),
        "pixels": pixels,
    }
    about = {"contexts": contexts, "target": target, "guidance": GUIDANCE, "prompt": PROMPT}
    with whole_file(bundle.root / GOLDEN) as file:
        file.write(save(tensors, {key: json.dumps(value) for key, value in about.items()}))
    update_manifest(
        bundle.root,
        lambda manifest: manifest["files"].update({GOLDEN: file_entry(bundle.root / GOLDEN)}),
    )


def load_golden(root: Path) -> Golden | None:
    """The golden edit of a bundle, or None if it has none."""
    try:
        with safe_open(root / GOLDEN, "np") as file:
            about = {key: json.loads(value) for key, value in file.metadata().items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        width, height = about["target"]
        return Golden(**tensors, contexts=about["contexts"], target=(width, height))
    except FileNotFoundError:
        return None
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        raise CorruptedError(
            f"{root / GOLDEN}: expected a golden edit, found something else; "
            "export the bundle again"
        ) from None


def replay(backend: Backend, golden: Golden) -> Outcome:
    """Run the golden edit on ``backend``, each step from the golden latents, so that an error is
    that of one step and not of all before it."""
    clock = [perf_counter()]
    state = backend.begin(golden.batch(backend))
    backend.read(state)  # which waits for the device
    clock.append(perf_counter())
    errors, steps = [], []
    for i in range(len(golden.sigmas) - 1):
        before, after = golden.latents[i], golden.latents[i + 1]
        backend.write(state, before)
        started = perf_counter()
        backend.step(state, i)
        found = backend.read(state)
        steps.append(perf_counter() - started)
        errors.append(_relative(found - before, after - before))
    backend.write(state, golden.latents[-1])
    clock.append(perf_counter())
    pixels = np.stack(backend.decode(state)).astype(np.float32)
    clock.append(perf_counter())
    return Outcome(
        velocity=tuple(errors),
        pixels=float(np.abs(pixels - golden.pixels).mean()),
        seconds={
            "encode": clock[1] - clock[0],
            "step": median(steps),
            "decode": clock[3] - clock[2],
        },
    )


def _relative(found: Floats, wanted: Floats) -> float:
    return float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)))


def _picture(size: Size) -> Pixels:
    """A red disc on a gradient."""
    y, x = np.mgrid[: size[1], : size[0]].astype(np.float32)
    rows: Sequence[NDArray[np.float32]] = (x / size[0], y / size[1], np.full_like(x, 0.5))
    picture = np.stack(rows, axis=-1) * 255
    inside = (x - size[0] / 2) ** 2 + (y - size[1] / 2) ** 2 < (min(size) / 4) ** 2
    picture[inside] = (200, 30, 30)
    return picture.astype(np.uint8)
