"""The sigmas are those of diffusers' scheduler."""

from typing import Any

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift, retrieve_timesteps
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxkontext.runtime import CheckpointError, InvalidInputError
from fluxkontext.runtime.schedule import SchedulerConfig, sigmas_for

FLUX: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
TOKENS = [1, 36, 256, 1000, 4042, 4096, 4150, 16384]


def theirs(config: dict[str, Any], tokens: int, steps: int, sigmas: Any = None) -> np.ndarray:
    """As the Kontext pipeline asks for them."""
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    if sigmas is None:
        sigmas = np.linspace(1.0, 1 / steps, steps)
    limits = (config[k] for k in ("base_image_seq_len", "max_image_seq_len"))
    mu = calculate_shift(tokens, *limits, config["base_shift"], config["max_shift"])
    retrieve_timesteps(scheduler, steps, "cpu", sigmas=sigmas, mu=mu)
    return scheduler.sigmas.numpy()


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-7)
    assert found[-1] == 0
    assert np.all(np.diff(found) <= 0)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("steps", [1, 2, 3, 28, 50])
def test_steps_and_sizes(tokens: int, steps: int) -> None:
    config = SchedulerConfig.from_json({"_class_name": "FlowMatchEulerDiscreteScheduler", **FLUX})
    assert_close(sigmas_for(config, tokens, steps), theirs(FLUX, tokens, steps))


def test_defaults_are_those_of_flux() -> None:
    assert SchedulerConfig.from_json(FLUX) == SchedulerConfig()


@pytest.mark.parametrize("sigmas", [[1.0, 0.75, 0.5, 0.25], [0.9, 0.1], [1.0], [0.3, 0.02]])
def test_given_sigmas(sigmas: list[float]) -> None:
    found = sigmas_for(SchedulerConfig(), 1000, 28, sigmas)
    assert_close(found, theirs(FLUX, 1000, 28, list(sigmas)))
    assert len(found) == len(sigmas) + 1


@pytest.mark.parametrize("shift", [1.0, 1.15, 3.0])
def test_static_shift(shift: float) -> None:
    """Without dynamic shifting the number of tokens does not matter."""
    config = FLUX | {"use_dynamic_shifting": False, "shift": shift}
    for tokens in (256, 4096):
        found = sigmas_for(SchedulerConfig.from_json(config), tokens, 20)
        assert_close(found, theirs(config, tokens, 20))


def test_other_shift_limits() -> None:
    config = FLUX | {"base_shift": 0.3, "max_shift": 1.4, "max_image_seq_len": 8192}
    ours = SchedulerConfig.from_json(config)
    assert_close(sigmas_for(ours, 1234, 13), theirs(config, 1234, 13))


@settings(max_examples=40)
@given(st.integers(1, 70_000), st.integers(1, 100))
def test_any_size_and_steps(tokens: int, steps: int) -> None:
    assert_close(sigmas_for(SchedulerConfig(), tokens, steps), theirs(FLUX, tokens, steps))


@pytest.mark.parametrize(
    "option",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"invert_sigmas": True},
        {"shift_terminal": 0.02},
        {"stochastic_sampling": True},
        {"time_shift_type": "linear"},
        {"_class_name": "EulerDiscreteScheduler"},
    ],
)
def test_other_schedules_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=next(iter(option.values())).__str__()):
        SchedulerConfig.from_json(FLUX | option)


@pytest.mark.parametrize(
    "sigmas", [[], [0.0], [1.0, 1.0], [0.2, 0.5], [1.5, 0.5], [-0.5], [float("nan")], [[1.0]]]
)
def test_bad_sigmas(sigmas: Any) -> None:
    with pytest.raises(InvalidInputError, match="sigmas: expected"):
        sigmas_for(SchedulerConfig(), 256, 4, sigmas)


def test_no_steps() -> None:
    with pytest.raises(InvalidInputError, match="num_inference_steps: expected"):
        sigmas_for(SchedulerConfig(), 256, 0)
