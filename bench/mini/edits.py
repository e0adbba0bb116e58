"""What each kind of edit does to a scene. Nothing here draws or parses.

The conventions that make every outcome unique: a thing that changes stays where it is, to the
pixel; one that moves keeps its displacement from the cell's centre; a new one is big unless the
text says otherwise, and sits at the exact centre of its cell. A replacement of unsaid size keeps
the old size, one of unsaid colour the old colour.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from .backdrops import BACKGROUNDS
from .lexicon import (
    BACKGROUND_ADJECTIVES,
    BACKGROUND_NAMES,
    BACKGROUND_PLACES,
    COLOUR_WORDS,
    SHAPE_WORDS,
    at_place,
    look,
    steps,
    to_place,
    usually_first,
)
from .reference import describe
from .scenes import SIZES, Scene, Split, Thing, looks, pick


@dataclass(frozen=True, slots=True)
class Draft:
    """An edit before it is put into words: the outcome, the family of paraphrases, the slots."""

    target: Scene
    family: str
    slots: Mapping[str, str]


Edit = Callable[[np.random.Generator, Scene, Split], Draft | None]


def recolour(rng: np.random.Generator, scene: Scene, split: Split) -> Draft | None:
    """Give a thing another colour."""
    thing = pick(rng, scene.things)
    colours = [c for s, c in looks(split) if s == thing.shape and c != thing.colour]
    changed = replace(thing, colour=pick(rng, colours))
    slots = {
        "x": describe(rng, scene, thing),
        "c": usually_first(rng, COLOUR_WORDS[changed.colour]),
        "o": thing.colour,
    }
    return Draft(scene.with_things([thing], [changed]), "recolour", slots)


def remove(rng: np.random.Generator, scene: Scene, split: Split) -> Draft | None:
    """Take a thing away."""
    thing = pick(rng, scene.things)
    return Draft(scene.with_things([thing]), "remove", {"x": describe(rng, scene, thing)})


def add(rng: np.random.Generator, scene: Scene, split: Split) -> Draft | None:
    """Put a new thing into an empty cell."""
    if not (cells := scene.empty_cells()):
        return None
    shape, colour = pick(rng, looks(split))
    size = "big" if rng.random() < 0.6 else "small"
    thing = Thing(shape, colour, size, pick(rng, cells))
    say_size = size == "small" or rng.random() < 0.5
    new = look(rng, thing, say_size, article=rng.random() < 0.9)
    slots = {"n": new, "at": at_place(rng, thing.cell, exact=False)}
    return Draft(scene.with_things(add=[thing]), "add", slots)


def replace_thing(rng: np.random.Generator, scene: Scene, split: Split) -> Draft | None:
    """Put a thing of another shape and colour in the place of one."""
    thing = pick(rng, scene.things)
    pairs = [(s, c) for s, c in looks(split) if s != thing.shape and c != thing.colour]
    shape, colour = pick(rng, pairs)
    say_size = rng.random() < 0.5
    size = pick(rng, SIZES) if say_size else thing.size
    new = replace(thing, shape=shape, colour=colour, size=size)
    slots = {"x": describe(rng, scene, thing), "n": look(rng, new, say_size)}
    return Draft(scene.with_things([thing], [new]), "replace", slots)


def reshape(rng: np.random.Generator, scene: Scene, split: Split) -> Draft | None:
    """Give a thing another shape."""
    thing = pick(rng, scene.things)
    shapes = [s for s, c in looks(split) if c == thing.colour and s != thing.shape]
    changed = replace(thing, shape=pick(rng, shapes))
    slots = {
        "x": describe(rng, scene, thing),
        "s": usually_first(rng, SHAPE_WORDS[changed.shape]),
    }
    return Draft(scene.with_things([thing], [changed]), "reshape", slots)


def resize(rng: np.random.Generator, scene: Scene, split: Split) -> Draft | None:
    """Make a big thing small or a small one big."""
    thing = pick(rng, scene.things)
    grows = thing.size == "small"
    changed = replace(thing, size="big" if grows else "small")
    slots = {"x": describe(rng, scene, thing)}
    return Draft(scene.with_things([thing], [changed]), "grow" if grows else "shrink", slots)


def move(rng: np.random.Generator, scene: Scene, split: Split) -> Draft | None:
    """Move a thing to an empty cell: by name, or by one or two steps along a row or column."""
    if not (cells := scene.empty_cells()):
        return None
    thing = pick(rng, scene.things)
    across, along = thing.cell % 3, thing.cell // 3
    aligned = [cell for cell in cells if cell % 3 == across or cell // 3 == along]
    if aligned and rng.random() < 0.45:
        cell = pick(rng, aligned)
        family = "step"
        slots = {"step": steps(rng, cell % 3 - across, cell // 3 - along)}
    else:
        cell = pick(rng, cells)
        family, slots = "move", {"to": to_place(rng, cell, thing.cell)}
    slots["x"] = describe(rng, scene, thing)
    return Draft(scene.with_things([thing], [replace(thing, cell=cell)]), family, slots)


def swap(rng: np.random.Generator, scene: Scene, split: Split) -> Draft | None:
    """Let two things that differ change places."""
    first = pick(rng, scene.things)
    others = [
        thing
        for thing in scene.things
        if (thing.shape, thing.colour, thing.size) != (first.shape, first.colour, first.size)
    ]
    if not others:
        return None
    second = pick(rng, others)
    moved = [replace(first, cell=second.cell), replace(second, cell=first.cell)]
    slots = {"x": describe(rng, scene, first), "y": describe(rng, scene, second)}
    return Draft(scene.with_things([first, second], moved), "swap", slots)


def background_slots(rng: np.random.Generator, new: str, old: str) -> dict[str, str]:
    """The words of a background as a name, an adjective and a place, and the old one's."""
    return {
        "b": usually_first(rng, BACKGROUND_NAMES[new]),
        "ba": usually_first(rng, BACKGROUND_ADJECTIVES[new]),
        "bp": usually_first(rng, BACKGROUND_PLACES[new]),
        "ob": old,
    }


def background(rng: np.random.Generator, scene: Scene, split: Split) -> Draft | None:
    """Put the things, as they are, before another background."""
    new = pick(rng, [name for name in BACKGROUNDS if name != scene.background])
    slots = background_slots(rng, new, scene.background)
    return Draft(replace(scene, background=new), "background", slots)


EDITS: Mapping[str, Edit] = {
    "recolour": recolour,
    "remove": remove,
    "add": add,
    "replace": replace_thing,
    "reshape": reshape,
    "resize": resize,
    "move": move,
    "swap": swap,
    "background": background,
}
