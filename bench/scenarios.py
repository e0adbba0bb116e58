"""The fixed work of the benchmarks. Sizes scale with the model's native side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime import KontextPipeline
from ..runtime.errors import InvalidInputError
from ..runtime.geometry import Grid, Size
from .document import Json

SUITE = ("scenarios", 1)
"""Name and version of what is defined here. Any change that changes a figure raises the version."""
GUIDANCE = 2.5
PROMPTS = (
    "make the red circle blue",
    "move the green square to the left",
    "remove the yellow triangle",
    "put a white star above the circle",
)
_WIDE = (1392, 752)
"""A 16:9 picture at FLUX.1 Kontext's size, which has the native square's area."""
_FULL = 1024


@dataclass(frozen=True)
class Scenario:
    """Pictures (w, h) of a model whose native side is 1024: the result, and its contexts."""

    name: str
    target: Size
    contexts: tuple[Size, ...]


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("text-to-image", (_FULL, _FULL), ()),
        Scenario("edit", (_FULL, _FULL), ((_FULL, _FULL),)),
        Scenario("wide-edit", _WIDE, (_WIDE,)),
        Scenario("two-contexts", (_FULL, _FULL), ((_FULL, _FULL), (_FULL, _FULL))),
    )
}


@dataclass(frozen=True)
class Work:
    """One call of a pipeline. Sizes (w, h) are pixels of the model's own grid; nothing resizes."""

    scenario: str
    target: Size
    contexts: tuple[Size, ...]
    steps: int
    batch: int = 1
    seed: int = 0

    @property
    def name(self) -> str:
        width, height = self.target
        return f"{self.scenario} {width}x{height}, {self.steps} steps, batch {self.batch}"

    def arguments(self) -> dict[str, Any]:
        """For a pipeline of ours: every edit of the batch has its own pictures and prompt."""
        width, height = self.target
        return {
            "image": self.pictures() if self.contexts else None,
            "prompt": [PROMPTS[i % len(PROMPTS)] for i in range(self.batch)],
            "width": width,
            "height": height,
            "max_area": width * height,
            "num_inference_steps": self.steps,
            "guidance_scale": GUIDANCE,
            "seed": self.seed,
            "auto_resize": False,
        }

    def pictures(self) -> list[list[NDArray[np.uint8]]]:
        """The contexts of every edit of the batch."""
        rng = np.random.default_rng(self.seed)
        return [[picture(rng, size) for size in self.contexts] for _ in range(self.batch)]

    def tokens(self, grid: Grid, text: int) -> dict[str, int]:
        """Of one picture of the batch."""
        target, *contexts = (w * h for w, h in map(grid.tokens, (self.target, *self.contexts)))
        return {"target": target, "context": sum(contexts), "text": text}

    def parameters(self, pipe: KontextPipeline) -> Json:
        """As the schema's ``parameters``, when ``pipe`` does the work."""
        about = pipe.about
        return {
            **self.shape(pipe.grid, pipe.tokenizer_2.model_max_length),
            "precision": about["precision"],
            "backend": about["backend"],
            "device": about["device"],
            "implementation": "fluxkontext",
        }

    def shape(self, grid: Grid, text: int) -> Json:
        """Those parameters that do not depend on what does the work. text: tokens of a prompt."""
        return {
            "width": self.target[0],
            "height": self.target[1],
            "steps": self.steps,
            "batch": self.batch,
            "contexts": [{"width": w, "height": h} for w, h in self.contexts],
            "guidance": GUIDANCE,
            "seeds": [self.seed],
            "tokens": self.tokens(grid, text),
        }


def picture(rng: np.random.Generator, size: Size) -> NDArray[np.uint8]:
    """Coarse patches with some grain: neither flat, which is too easy for a chip, nor noise."""
    width, height = size
    coarse = rng.integers(0, 224, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    patches = coarse.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    grain = rng.integers(0, 32, (height, width, 3), np.uint8)
    pixels: NDArray[np.uint8] = np.add(patches, grain, dtype=np.uint8)
    return pixels


def works(
    names: Sequence[str], grid: Grid, steps: Sequence[int], batches: Sequence[int]
) -> list[Work]:
    """Scenarios at a model's scale, with every number of steps and every batch."""
    if unknown := [name for name in names if name not in SCENARIOS]:
        raise InvalidInputError(
            f"scenarios: expected some of {', '.join(SCENARIOS)}, found {unknown[0]}"
        )

    def scaled(size: Size) -> Size:
        across, down = (side * grid.native / _FULL / grid.multiple for side in size)
        return grid.multiple * max(1, round(across)), grid.multiple * max(1, round(down))

    return [
        Work(name, scaled(chosen.target), tuple(map(scaled, chosen.contexts)), count, batch)
        for name, chosen in ((name, SCENARIOS[name]) for name in names)
        for batch in batches
        for count in steps
    ]
