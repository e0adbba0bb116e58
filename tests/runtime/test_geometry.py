"""Sizes, positions and packing are those of BFL and diffusers."""

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from hypothesis import given
from hypothesis import strategies as st

from fluxkontext.runtime import InvalidInputError, Transform
from fluxkontext.runtime.geometry import MAX_SIDE, PREFERRED, Grid, pack, position_ids, unpack

GRID = Grid()
SIDES = st.integers(256, 4000)


def test_preferred_sizes() -> None:
    assert len(PREFERRED) == 17
    assert set(PREFERRED) == set(PREFERRED_KONTEXT_RESOLUTIONS)
    assert GRID.preferred == sorted(PREFERRED)
    assert all(w % 16 == h % 16 == 0 for w, h in PREFERRED)
    assert {(h, w) for w, h in PREFERRED} == set(PREFERRED)


@pytest.mark.parametrize("native", [128, 256, 512])
def test_preferred_sizes_scale(native: int) -> None:
    """A smaller model has the same shapes at its own scale, rounded to whole tokens."""
    sizes = Grid(native=native).preferred
    assert (native, native) in sizes
    for w, h in PREFERRED:
        scaled = w * native / 1024, h * native / 1024
        assert any(max(abs(a - scaled[0]), abs(b - scaled[1])) <= 8 for a, b in sizes)
    assert all(w % 16 == h % 16 == 0 and w > 0 and h > 0 for w, h in sizes)


@given(SIDES, SIDES)
def test_context_size_by_exact_aspect(width: int, height: int) -> None:
    """As BFL does: the aspect of the sides as they are."""
    aspect = width / height
    wanted = min((abs(aspect - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)[1:]
    assert GRID.context_size((width, height), auto_resize=True) == wanted


def test_context_size_is_not_diffusers_everywhere() -> None:
    """diffusers cuts the sides to multiples of 16 first, which changes the aspect of small ones."""
    differing = [
        (w, h)
        for w in range(300, 340)
        for h in range(500, 540)
        if GRID.context_size((w, h), auto_resize=True)
        != GRID.context_size((w // 16 * 16, h // 16 * 16), auto_resize=True)
    ]
    assert differing


@given(SIDES, SIDES)
def test_context_size_as_it_is(width: int, height: int) -> None:
    found = GRID.context_size((width, height), auto_resize=False)
    assert found == (width // 16 * 16, height // 16 * 16)


def test_tiny_contexts_have_a_token() -> None:
    assert GRID.context_size((1, 9), auto_resize=False) == (16, 16)
    assert GRID.context_size((1, 9), auto_resize=True) == (672, 1568)


def diffusers_target(height: int | None, width: int | None, area: int) -> tuple[int, int]:
    """``FluxKontextPipeline.__call__``, word by word."""
    height = height or 1024
    width = width or 1024
    aspect_ratio = width / height
    width = round((area * aspect_ratio) ** 0.5)
    height = round((area / aspect_ratio) ** 0.5)
    return width // 16 * 16, height // 16 * 16


@given(SIDES, SIDES, st.integers(512**2, 2048**2))
def test_target_size(height: int, width: int, area: int) -> None:
    wanted = diffusers_target(height, width, area)
    assert GRID.target_size(height, width, area, None) == wanted
    assert GRID.target_size(height, width, area, (752, 1392)) == wanted
    assert GRID.target_size(height, width, None, None) == diffusers_target(height, width, 1024**2)


@given(SIDES)
def test_target_size_of_one_side(side: int) -> None:
    assert GRID.target_size(side, None, None, None) == diffusers_target(side, None, 1024**2)
    assert GRID.target_size(None, side, None, None) == diffusers_target(None, side, 1024**2)


def test_target_size_of_itself() -> None:
    """An area that is the product of whole tokens gives exactly that size."""
    for width in range(16, 1600, 48):
        for height in range(16, 1600, 80):
            if 1 / 16 < width / height < 16:
                found = GRID.target_size(height, width, width * height, None)
                assert found == (width, height)


def test_target_size_without_any() -> None:
    """The first context's own grid, so that nothing shifts; or the native square."""
    assert GRID.target_size(None, None, None, (1392, 752)) == (1392, 752)
    assert GRID.target_size(None, None, None, None) == (1024, 1024)
    assert Grid(native=128).target_size(None, None, None, None) == (128, 128)
    assert GRID.target_size(None, None, 512**2, (1392, 752)) == (688, 368)


@pytest.mark.parametrize(
    ("height", "width", "area"),
    [
        (0, 64, None),
        (64, -1, None),
        (10**6, 64, None),
        (64, MAX_SIDE + 1, None),
        (64, 64, 0),
        (64, 64, 10**12),
        (1, 8000, None),
    ],
)
def test_bad_target_sizes(height: int, width: int, area: int | None) -> None:
    with pytest.raises(InvalidInputError, match="expected"):
        GRID.target_size(height, width, area, None)


def diffusers_ids(width: int, height: int, frame: int) -> np.ndarray:
    ids = FluxKontextPipeline._prepare_latent_image_ids(1, height, width, "cpu", torch.float32)
    ids[:, 0] = frame
    return ids.numpy()


@pytest.mark.parametrize("contexts", [[], [(5, 3)], [(5, 3), (2, 7)], [(1, 1), (4, 4), (9, 2)]])
def test_positions_by_index(contexts: list[tuple[int, int]]) -> None:
    found = position_ids((4, 6), contexts)
    wanted = [diffusers_ids(4, 6, 0)]
    wanted += [diffusers_ids(w, h, i + 1) for i, (w, h) in enumerate(contexts)]
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, np.concatenate(wanted))


def test_positions_by_offset() -> None:
    """All at frame 1: the second beside the tall first, the third below both."""
    found = position_ids((2, 2), [(2, 5), (3, 4), (5, 2)], "offset")
    blocks = [diffusers_ids(2, 2, 0)]
    for (w, h), (top, left) in zip([(2, 5), (3, 4), (5, 2)], [(0, 0), (0, 2), (5, 0)], strict=True):
        blocks.append(diffusers_ids(w, h, 1) + np.array([0, top, left]))
    np.testing.assert_array_equal(found, np.concatenate(blocks))


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=5))
def test_offset_contexts_never_overlap(contexts: list[tuple[int, int]]) -> None:
    found = position_ids((3, 3), contexts, "offset")
    assert len({tuple(row) for row in found.tolist()}) == len(found)


@pytest.mark.parametrize("size", [(2, 3), (1, 1), (5, 2)])
def test_packing(size: tuple[int, int]) -> None:
    width, height = size
    latents = np.random.default_rng(0).normal(size=(16, 2 * height, 2 * width))
    latents = latents.astype(np.float32)
    batch = torch.from_numpy(latents)[None]
    tokens = FluxKontextPipeline._pack_latents(batch, 1, 16, 2 * height, 2 * width)
    found = pack(latents)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, tokens[0].numpy())
    back = FluxKontextPipeline._unpack_latents(tokens, 16 * height, 16 * width, 8)
    np.testing.assert_array_equal(unpack(found, size), back[0].numpy())
    np.testing.assert_array_equal(unpack(found, size), latents)


@given(st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES), st.floats(0, 5000), st.floats(0, 5000))
def test_transform_round_trip(
    source: tuple[int, int], target: tuple[int, int], x: float, y: float
) -> None:
    transform = Transform(source, (1024, 1024), target)
    assert transform.to_source(*transform.to_target(x, y)) == pytest.approx((x, y))
    assert transform.to_target(0, 0) == (0, 0)
    assert transform.to_target(*source) == pytest.approx(target)
    assert transform.to_source(*target) == pytest.approx(source)
