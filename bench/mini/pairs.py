"""Edits with a second picture: its thing, its background or its colour comes into the first.

A thing that is taken over keeps its looks and its displacement from the cell's centre, so that it
is the same pixels some whole cells away.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from .edits import Draft
from .lexicon import at_place, to_place
from .reference import choose_attributes, describe, phrase
from .scenes import Scene, Split, Thing, looks, pick

Pair = Callable[[np.random.Generator, Scene, Scene, Split], Draft | None]
_SECOND = (
    "the second picture",
    "the second image",
    "the other picture",
    "the second picture",
    "the other image",
    "picture two",
    "image 2",
    "the 2nd picture",
)
_ONLY_THING = ("the object", "the thing", "the object", "the shape", "the item")


def _second_picture(rng: np.random.Generator) -> str:
    return pick(rng, _SECOND)


def from_second(rng: np.random.Generator, second: Scene, thing: Thing) -> str:
    """ "the star of the second picture": unique in the second picture, whatever is in the first."""
    bits, exact = choose_attributes(rng, second, thing)
    only = len(second.things) == 1 and rng.random() < 0.5
    name = pick(rng, _ONLY_THING) if only else phrase(rng, thing, bits, exact)
    return f"{name} {pick(rng, ('of', 'from', 'in'))} {_second_picture(rng)}"


def insert(rng: np.random.Generator, scene: Scene, second: Scene, split: Split) -> Draft | None:
    """Put the second picture's thing in the place of one of the first's."""
    old, new = pick(rng, scene.things), pick(rng, second.things)
    if (old.shape, old.colour, old.size) == (new.shape, new.colour, new.size):
        return None
    slots = {"x": describe(rng, scene, old), "z": from_second(rng, second, new)}
    return Draft(scene.with_things([old], [replace(new, cell=old.cell)]), "insert", slots)


def bring(rng: np.random.Generator, scene: Scene, second: Scene, split: Split) -> Draft | None:
    """Put the second picture's thing into an empty cell."""
    if not (cells := scene.empty_cells()):
        return None
    new = pick(rng, second.things)
    cell = pick(rng, cells)
    slots = {
        "z": from_second(rng, second, new),
        "at": at_place(rng, cell, exact=False),
        "to": to_place(rng, cell, start=cell),
    }
    return Draft(scene.with_things(add=[replace(new, cell=cell)]), "bring", slots)


def backdrop(rng: np.random.Generator, scene: Scene, second: Scene, split: Split) -> Draft | None:
    """Put the first picture's things before the second's background."""
    if scene.background == second.background:
        return None
    slots = {"second": _second_picture(rng)}
    return Draft(replace(scene, background=second.background), "backdrop", slots)


def match(rng: np.random.Generator, scene: Scene, second: Scene, split: Split) -> Draft | None:
    """Give a thing the colour of one in the second picture."""
    thing, model = pick(rng, scene.things), pick(rng, second.things)
    if thing.colour == model.colour or (thing.shape, model.colour) not in looks(split):
        return None
    slots = {"x": describe(rng, scene, thing), "z": from_second(rng, second, model)}
    changed = replace(thing, colour=model.colour)
    return Draft(scene.with_things([thing], [changed]), "match", slots)


PAIRS: Mapping[str, Pair] = {
    "insert": insert,
    "bring": bring,
    "backdrop": backdrop,
    "match": match,
}


def second_words() -> list[str]:
    """The phrases of this file, as material for the vocabulary."""
    return [*_SECOND, *_ONLY_THING, "of from in"]
