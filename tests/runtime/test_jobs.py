"""What a call has to do: the noise of each picture, and which are made together."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fluxkontext.runtime import KontextPipeline
from fluxkontext.runtime.jobs import Job, draw_noise, groups
from fluxkontext.runtime.noise import NoiseStream
from fluxkontext.runtime.request import Edit, Prompt

CHANNELS = 16


def jobs(grid: Any, *sizes: tuple[int, int]) -> list[Job]:
    edit = Edit(Prompt("", ""), None, ())
    return [Job(edit, size, (), (), []) for size in sizes]


@given(seeds=st.lists(st.integers(-(2**63), 2**64), min_size=1, max_size=4))
def test_a_seed_per_picture(pipe: KontextPipeline, seeds: list[int]) -> None:
    found = jobs(pipe.grid, *[(32, 16)] * len(seeds))
    draw_noise(found, pipe.grid, CHANNELS, seeds, None, None)
    alone = jobs(pipe.grid, (32, 16))
    for job, seed in zip(found, seeds, strict=True):
        draw_noise(alone, pipe.grid, CHANNELS, seed, None, None)
        np.testing.assert_array_equal(job.noise, alone[0].noise)
        assert job.seed == seed


def test_one_seed_is_one_stream(pipe: KontextPipeline) -> None:
    """As sequential draws of one generator; the sizes may differ."""
    found = jobs(pipe.grid, (32, 16), (16, 16), (32, 32))
    draw_noise(found, pipe.grid, CHANNELS, 5, None, None)
    stream = NoiseStream(5)
    generator = torch.Generator().manual_seed(5)
    drawn = jobs(pipe.grid, (32, 16), (16, 16), (32, 32))
    draw_noise(drawn, pipe.grid, CHANNELS, None, generator, None)
    for job, other in zip(found, drawn, strict=True):
        values = stream.normal(CHANNELS, job.target[1] // 8, job.target[0] // 8)
        assert sorted(values.ravel()) == sorted(job.noise.ravel())
        np.testing.assert_allclose(job.noise, other.noise, atol=2e-6)
        assert (job.seed, other.seed) == (5, None)


@pytest.mark.parametrize("most", [1, 2, None])
def test_groups_are_as_large_as_the_backend_takes(most: int | None) -> None:
    """In order of first appearance, whatever a group is cut into."""
    mixed = jobs(None, (64, 64), (32, 32), (64, 64), (64, 64), (32, 32))
    number = {id(job): i for i, job in enumerate(mixed)}
    cut = [[number[id(job)] for job in group] for group in groups(mixed, most)]
    assert (
        cut
        == {
            1: [[0], [2], [3], [1], [4]],
            2: [[0, 2], [3], [1, 4]],
            None: [[0, 2, 3], [1, 4]],
        }[most]
    )


def test_edits_beyond_the_largest_batch_follow_one_another(
    pipe: KontextPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    begin = pipe.backend.begin
    monkeypatch.setattr(
        pipe.backend, "begin", lambda batch: (begun.append(len(batch.noise)), begin(batch))[1]
    )
    call: dict[str, Any] = {"prompt": "x", "num_inference_steps": 1, "seed": 3}
    together = pipe(**call, num_images_per_prompt=3, output_type="np")
    monkeypatch.setattr(pipe.backend, "max_batch", 2)
    apart = pipe(**call, num_images_per_prompt=3, output_type="np")
    assert begun == [3, 2, 1]
    np.testing.assert_allclose(apart.images, together.images, atol=1.01 / 255)
    assert apart.settings == together.settings


def test_a_generator_per_picture(pipe: KontextPipeline) -> None:
    found = jobs(pipe.grid, (32, 16), (32, 16))
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    draw_noise(found, pipe.grid, CHANNELS, None, generators, None)
    seeded = jobs(pipe.grid, (32, 16), (32, 16))
    draw_noise(seeded, pipe.grid, CHANNELS, np.array([3, 4]), None, None)
    for job, other in zip(found, seeded, strict=True):
        np.testing.assert_allclose(job.noise, other.noise, atol=2e-6)
