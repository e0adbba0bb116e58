"""The parser: exact on clean pictures, steady under noise, blur and JPEG, and not to be fooled."""

import io
import time

import numpy as np
import pytest
from PIL import Image, ImageFilter

from fluxkontext.bench.mini.backdrops import BACKGROUNDS
from fluxkontext.bench.mini.parser import GARBLED, parse, parse_all, truth
from fluxkontext.bench.mini.scenes import (
    COLOURS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    draw_jitter,
    draw_scene,
    render,
)


def some_scenes(seed, count, counts=range(1, 10)):
    rng = np.random.default_rng(seed)
    return [draw_scene(rng, "held_out", counts) for _ in range(count)]


def exact_share(scenes, pictures):
    seen = parse_all(pictures)
    return np.mean([p == truth(s) for p, s in zip(seen, scenes, strict=True)])


def noisy(sigma):
    rng = np.random.default_rng(9)

    def spoil(picture):
        noise = rng.normal(0, sigma, picture.shape)
        return np.clip(np.rint(picture + noise), 0, 255).astype(np.uint8)

    return spoil


def blurred(radius):
    blur = ImageFilter.GaussianBlur(radius)
    return lambda picture: np.asarray(Image.fromarray(picture).filter(blur))


def jpeg(quality):
    def spoil(picture):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file))

    return spoil


def test_every_clean_picture_is_read_exactly(capsys):
    scenes = some_scenes(0, 2200, range(1, 7)) + some_scenes(1, 1000, range(5, 10))
    pictures = [render(scene) for scene in scenes]
    start = time.perf_counter()
    assert exact_share(scenes, pictures) == 1
    with capsys.disabled():
        print(f"\nparser: {1000 * (time.perf_counter() - start) / len(scenes):.2f} ms per picture")


def test_every_thing_is_read_on_every_background():
    rng = np.random.default_rng(2)
    looks = [(s, c, z) for s in SHAPES for c in COLOURS for z in SIZES]
    scenes = [
        Scene(
            name, tuple(Thing(*looks[(i + k) % len(looks)], k, draw_jitter(rng)) for k in range(9))
        )
        for name in BACKGROUNDS
        for i in range(0, len(looks), 9)
    ]
    assert exact_share(scenes, [render(scene) for scene in scenes]) == 1


@pytest.mark.parametrize(
    ("spoil", "least"),
    [
        pytest.param(noisy(4), 1.0, id="noise 4"),
        pytest.param(noisy(6), 1.0, id="noise 6, 33 dB"),
        pytest.param(noisy(10), 0.99, id="noise 10, 28 dB"),
        pytest.param(blurred(0.6), 1.0, id="blur 0.6, 39 dB"),
        pytest.param(blurred(0.8), 1.0, id="blur 0.8, 36 dB"),
        pytest.param(blurred(1.0), 0.98, id="blur 1.0, 33 dB"),
        pytest.param(jpeg(90), 1.0, id="jpeg 90"),
        pytest.param(jpeg(75), 0.99, id="jpeg 75"),
    ],
)
def test_slightly_spoilt_pictures_are_read_exactly(spoil, least):
    scenes = some_scenes(3, 240)
    assert exact_share(scenes, [spoil(render(scene)) for scene in scenes]) >= least


def mixed(first, second, share):
    blend = render(first) * (1.0 - share) + render(second) * share
    return np.rint(blend).astype(np.uint8)


STAR = Thing("star", "red", "big", 4)
SAND = Scene("sand", ())


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(Scene("sand", ()), id="half gone"),
        pytest.param(Scene("sand", (Thing("star", "blue", "big", 4),)), id="two colours"),
        pytest.param(Scene("sand", (Thing("circle", "red", "big", 4),)), id="two shapes"),
        pytest.param(Scene("sand", (Thing("star", "red", "small", 4),)), id="two sizes"),
    ],
)
def test_a_thing_halfway_between_two_is_garbled(other):
    seen = parse(mixed(Scene("sand", (STAR,)), other, 0.5))
    assert seen.cells[4] == (GARBLED,)
    assert seen.garbled
    assert seen.background == "sand"
    assert all(cell == () for k, cell in enumerate(seen.cells) if k != 4)


def test_leftovers_and_damage_are_garbled():
    speck = render(SAND)
    speck[60:67, 60:67] = (40, 90, 220)
    assert parse(speck).cells[4] == (GARBLED,)
    bitten = render(Scene("sand", (STAR,)))
    bitten[46:56, 58:70] = render(SAND)[46:56, 58:70]
    assert parse(bitten).cells[4] == (GARBLED,)


def test_an_unknown_background_is_garbled():
    seen = parse(np.full((128, 128, 3), (200, 30, 200), np.uint8))
    assert seen.background == GARBLED
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert parse(noise).garbled
