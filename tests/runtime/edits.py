"""A small edit and its pictures, and how many calls a pipeline holds."""

from typing import Any

import numpy as np

from fluxkontext.runtime import KontextPipeline


def photo(seed: int = 0, width: int = 64, height: int = 64) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


EDIT: dict[str, Any] = {
    "image": photo(),
    "prompt": "make it red",
    "num_inference_steps": 3,
    "seed": 7,
    "output_type": "latent",
}


def waiting(pipe: KontextPipeline) -> int:
    """Calls inside and in the queue."""
    return len(pipe._turnstile._line)
