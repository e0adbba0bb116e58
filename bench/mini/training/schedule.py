"""How long a stage trains, and its learning rate along the way.

The rate follows the elapsed share of the budget, in steps or in minutes of wall-clock time alike:
exactness comes while it falls, so it has to reach zero exactly when the budget is spent.
"""

from dataclasses import dataclass

WARMUP_STEPS = 100
HOLD = 0.4
"""Share of the budget at the full rate; after it the rate falls in a straight line to zero."""


@dataclass(frozen=True)
class Budget:
    """Either is given: so many steps, or so many minutes."""

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("budget: expected either steps or minutes")

    def share(self, step: int, seconds: float) -> float:
        """How much of it is gone, in 0..1, after so many steps that took so many seconds."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        assert self.minutes is not None
        return min(1.0, seconds / (60 * self.minutes))


def rate(step: int, share: float) -> float:
    """The learning rate as a share of the largest: a short warm-up, a plateau, a ramp to zero."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * min(1.0, (1 - share) / (1 - HOLD))
