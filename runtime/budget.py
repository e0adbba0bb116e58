"""A limit on memory that a loaded model keeps, whatever it is asked; no torch."""

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from .backend import Embeddings
from .errors import InvalidInputError, OutOfMemoryError
from .jobs import Job
from .memory_model import Workload
from .plan import Planner
from .result import Sampling

_UNITS = {
    "": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
    **{f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)},
}


def parse_bytes(value: str | int) -> int:
    """``12GiB``, ``8GB``, ``16384MiB`` or a number of bytes."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]{0,3})\s*", str(value))
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    if not match or match[2].lower() not in units or isinstance(value, bool):
        raise InvalidInputError(
            f"vram_budget: expected a size such as 12GiB, 8GB or 16384MiB, found {str(value)!r}"
        )
    if (size := int(float(match[1]) * units[match[2].lower()])) < 1:
        raise InvalidInputError("vram_budget: expected more than 0 bytes, found none")
    return size


class Budget:
    """A model that was placed within a limit; every request is checked against it before it runs.

    ``plan`` is that of the request that runs; where weights lie was settled at load, tiles and
    graphs are settled by request. Calls come from one thread at a time.
    """

    def __init__(self, limit: int, planner: Planner, usual: Workload) -> None:
        """limit: bytes. usual: the edit to place weights for; where none of that size fits, they
        lie so that the largest possible one does. Raises OutOfMemoryError where none would."""
        self.limit = limit
        self.planner = planner
        multiple = 2 * planner.shapes.vae.downscale
        smallest = replace(usual, target=(multiple, multiple), contexts=())
        try:
            self.plan = planner.plan(usual, limit)
        except OutOfMemoryError:
            self.plan = replace(planner.least(usual), budget=limit)
            if planner.evaluate(self.plan.placement, smallest).peak > limit:
                raise

    def admit(self, work: Workload) -> None:
        """Settle the plan of a request. Raises OutOfMemoryError, which says what would fit."""
        placed = self.plan.placement
        graphs = (True, False) if self.planner.graphs and not placed.streamed_blocks else (False,)
        for tiled, captured in product((0, self.planner.tile), graphs):
            variant = replace(placed, tile=tiled, graphs=captured)
            plan = self.planner.evaluate(variant, work, self.limit)
            if plan.fits:
                self.plan = plan
                return
        raise self.planner.refusal(work, self.limit)


def workload(jobs: Sequence[Job], sampling: Sampling, remembered: int) -> Workload:
    """What jobs of equal shape ask for when they run as one batch."""
    first = jobs[0]
    texts = [text for text in (first.edit.text, first.edit.negative) if text is not None]
    lengths = [
        len(text.tokens) if isinstance(text, Embeddings) else sampling.max_sequence_length
        for text in texts
    ]
    return Workload(
        target=first.target,
        contexts=first.context_sizes,
        batch=len(jobs),
        steps=sampling.num_inference_steps,
        text_tokens=max(lengths),
        branches=len(texts),
        remembered=remembered,
    )
