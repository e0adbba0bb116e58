"""Scenes: drawn as asked, the same for the same seed, and the same pixels from both renderers."""

import numpy as np
import pytest

from fluxkontext.bench.mini.artwork import OUTLINES, RADII, layers
from fluxkontext.bench.mini.backdrops import BACKGROUNDS, CANVAS, backdrop
from fluxkontext.bench.mini.parser import margin_mask, tile_slices
from fluxkontext.bench.mini.scenes import (
    CELLS,
    COLOURS,
    JITTER,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    decode,
    draw_scene,
    encode,
    holds_held_out,
    is_held_out,
    looks,
    render,
)


def test_a_seed_gives_one_sequence_of_scenes():
    first, second = (
        [draw_scene(np.random.default_rng(7), "held_out") for _ in range(2)] for _ in range(2)
    )
    assert first == second
    assert first[0] != draw_scene(np.random.default_rng(8), "held_out")


def test_scenes_use_every_value_and_at_most_one_thing_per_cell():
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng, "held_out", range(1, 10)) for _ in range(2000)]
    things = [thing for scene in scenes for thing in scene.things]
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {(t.shape, t.colour) for t in things} == set(looks("held_out"))
    assert {t.size for t in things} == set(SIZES)
    assert {len(scene.things) for scene in scenes} == set(range(1, 10))
    for scene in scenes:
        cells = [thing.cell for thing in scene.things]
        assert cells == sorted(set(cells))
        assert all(abs(offset) <= JITTER for t in scene.things for offset in t.jitter)


def test_one_colour_of_each_shape_is_held_out_of_training():
    for shape in SHAPES:
        assert sum(is_held_out(shape, colour) for colour in COLOURS) == 1
    rng = np.random.default_rng(1)
    assert not any(holds_held_out(draw_scene(rng).things) for _ in range(3000))


def test_the_smallest_thing_reaches_ten_pixels_from_its_centre():
    assert min(RADII.values()) >= 10
    for outline in OUTLINES.values():
        reach = np.hypot(*outline.polygon.T).max() + outline.rounding
        assert reach * min(RADII.values()) >= 10


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_sprites_fade_out_before_their_edge(shape, size):
    alpha = layers(shape, size).alpha
    edge = np.concatenate([alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]])
    assert edge.max() < 0.1
    assert alpha.min() >= 0
    assert alpha.max() <= 1.001


def test_nothing_is_drawn_outside_a_things_tile():
    for cell in range(CELLS):
        for jitter in ((-JITTER, -JITTER), (JITTER, JITTER)):
            picture = render(Scene("sand", (Thing("star", "blue", "big", cell, jitter),)))
            changed = (picture != backdrop("sand")).any(-1)
            assert changed[tile_slices(cell)].any()
            changed[tile_slices(cell)] = False
            assert not changed.any()
    assert not margin_mask()[tile_slices(4)].any()


def test_rendering_leaves_the_shared_background_alone():
    before = backdrop("night").copy()
    picture = render(Scene("night", (Thing("heart", "red", "big", 4),)))
    assert picture.shape == (CANVAS, CANVAS, 3)
    assert picture.dtype == np.uint8
    assert np.array_equal(backdrop("night"), before)
    with pytest.raises(ValueError, match="read-only"):
        backdrop("night")[0] = 0


def test_codes_hold_the_whole_scene():
    rng = np.random.default_rng(2)
    scenes = [draw_scene(rng, "held_out", range(1, 10)) for _ in range(200)]
    assert decode(encode(scenes)) == scenes


def test_the_torch_renderer_draws_the_same_pixels():
    torch = pytest.importorskip("torch")
    from fluxkontext.bench.mini.render_torch import render_batch

    rng = np.random.default_rng(3)
    scenes = [draw_scene(rng, "held_out", range(1, 10)) for _ in range(96)]
    things, backgrounds = (torch.from_numpy(part) for part in encode(scenes))
    drawn = render_batch(things, backgrounds).numpy()
    expected = np.stack([render(scene) for scene in scenes])
    assert drawn.dtype == np.uint8
    assert np.abs(drawn.astype(int) - expected).max() <= 1
