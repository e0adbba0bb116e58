"""The noise of a seed is torch's, within the last bits of its logarithm and cosine."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxkontext.runtime.noise import NoiseStream

SHAPES = [(16,), (17,), (31,), (32,), (33,), (1000,), (2, 24), (3, 5, 7), (16, 12, 16), (4099,)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def assert_close(found: np.ndarray, wanted: torch.Tensor) -> None:
    assert found.dtype == np.float32
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_shapes(shape: tuple[int, ...], seed: int) -> None:
    assert_close(NoiseStream(seed).normal(*shape), torch.randn(shape, generator=generator(seed)))


def test_a_full_picture() -> None:
    """The noise of 1024 x 1024 pixels."""
    wanted = torch.randn(1, 16, 128, 128, generator=generator(42))
    assert_close(NoiseStream(42).normal(1, 16, 128, 128), wanted)


def test_several_draws_from_one_stream() -> None:
    """Also when draws in between do not fill whole blocks."""
    stream, torchs = NoiseStream(7), generator(7)
    for shape in ((16, 4, 4), (17,), (16, 4, 4), (50,), (31,), (2, 16, 6, 4)):
        assert_close(stream.normal(*shape), torch.randn(shape, generator=torchs))


def test_a_batch_is_drawn_in_order() -> None:
    """One draw of two pictures is two draws of one: what a batch relies on."""
    stream = NoiseStream(9)
    parts = np.stack([stream.normal(16, 6, 4), stream.normal(16, 6, 4)])
    assert_close(parts, torch.randn(2, 16, 6, 4, generator=generator(9)))


@pytest.mark.parametrize("seed", [-1, -(2**31), -(2**63), 2**32, 2**32 + 5, 2**63 - 1, 2**64 - 1])
def test_seeds_beyond_32_bits(seed: int) -> None:
    assert_close(NoiseStream(seed).normal(64), torch.randn(64, generator=generator(seed)))


@settings(max_examples=60)
@given(st.integers(-(2**63), 2**64 - 1), st.integers(16, 200))
def test_any_seed_and_count(seed: int, count: int) -> None:
    assert_close(NoiseStream(seed).normal(count), torch.randn(count, generator=generator(seed)))


def test_seeds_differ() -> None:
    assert np.abs(NoiseStream(0).normal(64) - NoiseStream(1).normal(64)).max() > 0.5


@pytest.mark.parametrize("shape", [(), (0,), (15,), (3, 5)])
def test_fewer_than_a_block_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least 16"):
        NoiseStream(0).normal(*shape)
