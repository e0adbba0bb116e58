"""What the transformer is told to read while it learns."""

import numpy as np
import torch

from fluxkontext.bench.mini.backdrops import BACKGROUNDS, CANVAS
from fluxkontext.bench.mini.scenes import (
    COLOURS,
    MARGIN,
    SHAPES,
    SIZES,
    TILE,
    Scene,
    draw_scene,
    encode,
)
from fluxkontext.bench.mini.training.reader import (
    CLASSES,
    Reader,
    contents,
    misread,
    read_right,
)

SIDE = 8


def read(scenes: list[Scene]) -> torch.Tensor:
    codes = encode(scenes)
    return contents(torch.from_numpy(codes.things), torch.from_numpy(codes.backgrounds), SIDE)


def test_a_token_is_of_the_cell_of_its_centre() -> None:
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng, "held_out", (0, 3, 6, 9)) for _ in range(16)]
    found = read(scenes).unflatten(1, (SIDE, SIDE))
    span = CANVAS // SIDE
    for scene, tokens in zip(scenes, found, strict=True):
        for down in range(SIDE):
            for right in range(SIDE):
                row, column = ((span * i + span // 2 - MARGIN) // TILE for i in (down, right))
                thing = scene.at(3 * row + column)
                shape, colour, size, background = tokens[down, right].tolist()
                assert BACKGROUNDS[background] == scene.background
                if thing is None:
                    assert (shape, colour, size) == (0, 0, 0)
                else:
                    named = SHAPES[shape - 1], COLOURS[colour - 1], SIZES[size - 1]
                    assert named == (thing.shape, thing.colour, thing.size)


def test_what_is_read_right_costs_nothing_and_guessing_costs_the_odds() -> None:
    wanted = read([draw_scene(np.random.default_rng(1))])
    right = torch.cat(
        [
            100.0 * torch.nn.functional.one_hot(part, count)
            for part, count in zip(wanted.unbind(-1), CLASSES, strict=True)
        ],
        dim=-1,
    )
    assert misread(right, wanted).max() == 0
    assert read_right(right, wanted).all()
    for place in range(len(CLASSES)):  # one class of one token off
        other = wanted.clone()
        other[0, 5, place] = (other[0, 5, place] + 1) % CLASSES[place]
        seen = read_right(right, other)
        assert not seen[0, 5]
        assert seen.sum() == SIDE * SIDE - 1
    guess = misread(torch.zeros_like(right), wanted)
    assert guess.shape == (1, SIDE * SIDE)
    odds = torch.tensor(CLASSES).log().mean()
    torch.testing.assert_close(guess, odds.expand_as(guess))


def test_the_reader_heeds_a_token_not_its_scale() -> None:
    reader = Reader(16)
    tokens = torch.randn(2, 3, 16)
    assert reader(tokens).shape == (2, 3, sum(CLASSES))
    torch.testing.assert_close(reader(1000 * tokens), reader(tokens), atol=1e-3, rtol=1e-3)
