"""The noise schedule of a rectified flow: shifted sigmas for the Euler steps.

Equal to diffusers' ``FlowMatchEulerDiscreteScheduler`` with dynamic shifting and to BFL's
``get_schedule``: ``mu`` is linear in the number of *target* tokens, context tokens do not count.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arguments import shown, whole
from .errors import CheckpointError, InvalidInputError

MAX_STEPS = 10_000
_MOST_TOKENS = 2**18  # of the largest picture
_UNSUPPORTED = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "shift_terminal",
    "stochastic_sampling",
)


@dataclass(frozen=True)
class SchedulerConfig:
    """Fields of ``scheduler/scheduler_config.json`` that shape the sigmas."""

    use_dynamic_shifting: bool = True
    shift: float = 3.0
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> "SchedulerConfig":
        """Read a diffusers scheduler config; refuse options that would change the sigmas."""
        kind = values.get("_class_name", "FlowMatchEulerDiscreteScheduler")
        refused = [f"{name}={shown(values[name])}" for name in _UNSUPPORTED if values.get(name)]
        if values.get("time_shift_type", "exponential") != "exponential":
            refused.append(f"time_shift_type={shown(values['time_shift_type'])}")
        if kind != "FlowMatchEulerDiscreteScheduler" or refused:
            raise CheckpointError(
                "scheduler_config.json: expected FlowMatchEulerDiscreteScheduler with plain "
                f"shifting, found {shown(kind)} {' '.join(refused)}; use that of FLUX.1 Kontext"
            )
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        # diffusers defaults to static shifting when the file does not say otherwise
        known = {"use_dynamic_shifting": False, "shift": 1.0, **known}
        for name, found in known.items():
            flag = name == "use_dynamic_shifting"
            if not isinstance(found, bool if flag else int | float) or (
                not flag and (isinstance(found, bool) or not abs(found) <= 1e6)
            ):
                raise CheckpointError(
                    f"scheduler_config.json: expected {name} to be "
                    f"{'true or false' if flag else 'a number'}, found {shown(found)}"
                )
        config = cls(**known)  # type: ignore[arg-type]
        spread = config.max_image_seq_len - config.base_image_seq_len
        if config.shift <= 0 or not spread or not abs(config.mu(_MOST_TOKENS)) <= 100:
            raise CheckpointError(
                "scheduler_config.json: expected shifts as in FLUX.1 Kontext (0.5 and 1.15 for 256 "
                f"and 4096 tokens, or a shift above 0), found {shown(known)}"
            )
        return config

    def mu(self, target_tokens: int) -> float:
        """The exponent of the shift for a target of so many tokens."""
        slope = (self.max_shift - self.base_shift) / (
            self.max_image_seq_len - self.base_image_seq_len
        )
        return self.base_shift + slope * (target_tokens - self.base_image_seq_len)


def unshifted(sigmas: Any) -> tuple[float, ...]:
    """A user's own sigmas, checked: falling, from 1 at most, above 0."""
    try:
        values = tuple(float(sigma) for sigma in sigmas)
    except (TypeError, ValueError):
        values = ()
    if not 0 < len(values) <= MAX_STEPS or not all(0 < value <= 1 for value in values):
        raise InvalidInputError(
            f"sigmas: expected 1 to {MAX_STEPS} numbers above 0 and up to 1, found {shown(sigmas)}"
        )
    if any(after >= before for before, after in pairwise(values)):
        raise InvalidInputError(f"sigmas: expected falling values, found {shown(sigmas)}")
    return values


def sigmas_for(
    config: SchedulerConfig,
    target_tokens: int,
    num_inference_steps: int,
    sigmas: Sequence[float] | None = None,
) -> NDArray[np.float32]:
    """Shifted sigmas ``[steps + 1]``, from noise (about 1) down to 0.

    sigmas: unshifted values instead of ``linspace(1, 1 / steps, steps)``, as in diffusers.
    """
    if sigmas is None:
        whole("num_inference_steps", num_inference_steps, 1, MAX_STEPS)
        base = np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps)
    else:
        base = np.array(unshifted(sigmas))
    base = base.astype(np.float32)
    if config.use_dynamic_shifting:
        growth = math.exp(config.mu(target_tokens))
        shifted = growth / (growth + (1 / base - 1))
    else:
        shifted = config.shift * base / (1 + (config.shift - 1) * base)
    return np.append(shifted, 0).astype(np.float32)
