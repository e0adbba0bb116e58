"""Scenes of up to nine things on a 3 x 3 grid: described, drawn at random, and rendered.

Every cell owns a tile of 40 x 40 pixels and nothing drawn for it leaves the tile, so cells can be
judged one by one; the tiles lie 40 = 5 * 8 pixels apart, so that a move is a whole number of VAE
latents. Around the grid runs a margin of 4 pixels where there is only background.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from .artwork import COLOURS as PALETTE
from .artwork import OUTLINES, RADII, SPRITE, layers
from .backdrops import BACKGROUNDS, CANVAS, backdrop

SHAPES = tuple(OUTLINES)
COLOURS = tuple(PALETTE)
SIZES = tuple(RADII)
CELLS = 9
TILE = 40
MARGIN = (CANVAS - 3 * TILE) // 2
JITTER = (TILE - SPRITE) // 2  # largest displacement from a cell's centre, in pixels

Split = Literal["train", "held_out"]
T = TypeVar("T")


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options, each equally likely; several times faster than ``rng.choice``."""
    return options[int(rng.random() * len(options))]


@dataclass(frozen=True, slots=True)
class Thing:
    """One object; cell counts 0..8 row by row, jitter is (right, down) in pixels."""

    shape: str
    colour: str
    size: str
    cell: int
    jitter: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Scene:
    """A background and at most one thing per cell, ordered by cell."""

    background: str
    things: tuple[Thing, ...]

    def at(self, cell: int) -> Thing | None:
        """What lies in a cell."""
        return next((thing for thing in self.things if thing.cell == cell), None)

    def empty_cells(self) -> tuple[int, ...]:
        """The cells in which nothing lies."""
        taken = {thing.cell for thing in self.things}
        return tuple(cell for cell in range(CELLS) if cell not in taken)

    def with_things(self, remove: Iterable[Thing] = (), add: Iterable[Thing] = ()) -> "Scene":
        """The same scene with some things gone and others there instead."""
        gone = tuple(remove)
        kept = [thing for thing in self.things if thing not in gone]
        return Scene(self.background, tuple(sorted([*kept, *add], key=lambda t: t.cell)))


def is_held_out(shape: str, colour: str) -> bool:
    """Whether this pair never occurs in training: one colour of each shape, seven pairs in all."""
    return COLOURS.index(colour) == (3 * SHAPES.index(shape) + 1) % len(COLOURS)


@cache
def looks(split: Split) -> tuple[tuple[str, str], ...]:
    """The (shape, colour) pairs of a split; "held_out" has those of "train" as well."""
    pairs = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    return tuple(pair for pair in pairs if split == "held_out" or not is_held_out(*pair))


def holds_held_out(things: Iterable[Thing]) -> bool:
    """Whether any of the things has a pair of shape and colour that training never shows."""
    return any(is_held_out(thing.shape, thing.colour) for thing in things)


def draw_scene(
    rng: np.random.Generator,
    split: Split = "train",
    counts: Sequence[int] = (1, 2, 3, 4, 5, 6),
    jitter: int = JITTER,
) -> Scene:
    """A random scene; ``counts`` are how many things it may have (dense: ``range(5, 10)``).

    Later things often repeat the shape or colour of an earlier one: otherwise nearly every shape
    would be alone of its kind, and nobody would learn to heed the other words of a description.
    """
    pairs = looks(split)
    count = pick(rng, counts)
    order = rng.permutation(CELLS)[:count]
    things: list[Thing] = []
    for cell in sorted(int(cell) for cell in order):
        shape, colour = pick(rng, pairs)
        if things and (luck := rng.random()) < 0.5:
            model = pick(rng, things)
            pair = (model.shape, colour) if luck < 0.25 else (shape, model.colour)
            shape, colour = pair if pair in pairs else (shape, colour)
        things.append(Thing(shape, colour, pick(rng, SIZES), cell, draw_jitter(rng, jitter)))
    return Scene(pick(rng, BACKGROUNDS), tuple(things))


def draw_jitter(rng: np.random.Generator, most: int = JITTER) -> tuple[int, int]:
    """A random displacement of at most so many pixels either way."""
    span = 2 * most + 1
    return int(rng.random() * span) - most, int(rng.random() * span) - most


class Sprites(NamedTuple):
    """Every thing there is, by ``sprite_index``: two uint16 arrays (n, SPRITE, SPRITE, 3).

    A pixel becomes ``(background * through + 127) // 255 + paint``; entry 0 is nothing at all.
    """

    through: NDArray[np.uint16]
    paint: NDArray[np.uint16]


def sprite_index(thing: Thing) -> int:
    """The entry of a thing in the tables of ``sprites``; 0 stands for an empty cell."""
    pair = SHAPES.index(thing.shape) * len(COLOURS) + COLOURS.index(thing.colour)
    return 1 + pair * len(SIZES) + SIZES.index(thing.size)


@cache
def sprites() -> Sprites:
    """Build the tables (about 2 MB); read-only, shared by all callers."""
    through = [np.full((SPRITE, SPRITE, 3), 255.0)]
    paint = [np.zeros((SPRITE, SPRITE, 3))]
    for shape in SHAPES:
        for colour in COLOURS:
            for size in SIZES:
                layer = layers(shape, size)
                tinted = layer.tint[..., None] * np.asarray(PALETTE[colour])
                paint.append(tinted + 255 * layer.gloss[..., None])
                through.append(np.repeat(255 * (1 - layer.alpha[..., None]), 3, axis=-1))
    tables = Sprites(*(np.rint(np.stack(table)).astype(np.uint16) for table in (through, paint)))
    for table in tables:
        table.flags.writeable = False
    return tables


@cache
def _indices() -> dict[tuple[str, str, str], int]:
    things = [Thing(s, c, z, 0) for s in SHAPES for c in COLOURS for z in SIZES]
    return {(t.shape, t.colour, t.size): sprite_index(t) for t in things}


def corner(cell: int) -> tuple[int, int]:
    """The (top, left) pixel of a cell's tile."""
    return MARGIN + TILE * (cell // 3), MARGIN + TILE * (cell % 3)


def render(scene: Scene) -> NDArray[np.uint8]:
    """Draw a scene: uint8 (CANVAS, CANVAS, 3)."""
    picture = backdrop(scene.background).copy()
    tables, indices = sprites(), _indices()
    for thing in scene.things:
        index = indices[thing.shape, thing.colour, thing.size]
        top, left = corner(thing.cell)
        top, left = top + JITTER + thing.jitter[1], left + JITTER + thing.jitter[0]
        patch = picture[top : top + SPRITE, left : left + SPRITE]
        blend = patch * tables.through[index]
        blend += 127
        blend //= 255
        blend += tables.paint[index]
        patch[:] = blend
    return picture


class Codes(NamedTuple):
    """Many scenes as small integers, to keep them in memory and to draw them on a device.

    ``things`` uint8 (n, 9, 3): sprite index or 0, jitter right + JITTER, jitter down + JITTER;
    ``backgrounds`` uint8 (n,).
    """

    things: NDArray[np.uint8]
    backgrounds: NDArray[np.uint8]


def encode(scenes: Sequence[Scene]) -> Codes:
    """Scenes as integers."""
    indices = _indices()
    things = np.zeros((len(scenes), CELLS, 3), np.uint8)
    things[:, :, 1:] = JITTER
    for row, scene in zip(things, scenes, strict=True):
        for thing in scene.things:
            index = indices[thing.shape, thing.colour, thing.size]
            row[thing.cell] = index, thing.jitter[0] + JITTER, thing.jitter[1] + JITTER
    backgrounds = [BACKGROUNDS.index(scene.background) for scene in scenes]
    return Codes(things, np.array(backgrounds, np.uint8))


def decode(codes: Codes) -> list[Scene]:
    """The scenes that ``encode`` was given."""
    names = {index: look for look, index in _indices().items()}
    scenes = []
    for row, background in zip(codes.things.tolist(), codes.backgrounds.tolist(), strict=True):
        things = tuple(
            Thing(*names[index], cell, (right - JITTER, down - JITTER))
            for cell, (index, right, down) in enumerate(row)
            if index
        )
        scenes.append(Scene(BACKGROUNDS[background], things))
    return scenes
