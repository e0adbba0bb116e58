"""Pointing at one thing of a scene with the fewest words that leave no doubt, or some more."""

from itertools import combinations

import numpy as np

from .lexicon import (
    COLOUR_WORDS,
    COVERED_BY_PLAIN,
    SHAPE_WORDS,
    SIZE_WORDS,
    THING_WORDS,
    at_place,
    place_name,
    usually_first,
)
from .scenes import Scene, Thing, pick

SHAPE, COLOUR, SIZE, PLACE = 1, 2, 4, 8
_ALL = (SHAPE, COLOUR, SIZE, PLACE)

# What a speaker would like to say at least: mostly colour and shape, as people do.
_WISHES = (
    *(SHAPE | COLOUR,) * 6,
    *(SHAPE,) * 3,
    *(0,) * 3,
    *(SHAPE | COLOUR | SIZE, SHAPE | SIZE, SHAPE | PLACE, SHAPE | COLOUR | PLACE, COLOUR, PLACE),
)


def _supersets(wish: int) -> tuple[tuple[int, ...], ...]:
    """All sets of attributes that contain the wish, in groups of equal size, smallest first."""
    rest = [bit for bit in _ALL if not wish & bit]
    return tuple(
        tuple(wish | sum(more) for more in combinations(rest, count))
        for count in range(len(rest) + 1)
    )


_SUPERSETS = tuple(_supersets(wish) for wish in range(16))


def shared(thing: Thing, other: Thing) -> int:
    """The attributes in which a description of ``thing`` would be true of ``other`` as well."""
    near = COVERED_BY_PLAIN.get(thing.cell, ())
    return (
        SHAPE * (thing.shape == other.shape)
        | COLOUR * (thing.colour == other.colour)
        | SIZE * (thing.size == other.size)
        | PLACE * (other.cell in near)
    )


def choose_attributes(rng: np.random.Generator, scene: Scene, thing: Thing) -> tuple[int, bool]:
    """The attributes to name, and whether the place must be exact for them to be unique.

    Takes the smallest set that contains what the speaker would like to say; when even all four
    attributes fit another thing (a twin in the corner next to an edge), the exact place decides.
    """
    rivals = [shared(thing, other) for other in scene.things if other != thing]
    for group in _SUPERSETS[pick(rng, _WISHES)]:
        unique = [bits for bits in group if all(bits & rival != bits for rival in rivals)]
        if unique:
            return pick(rng, unique), False
    return SHAPE | PLACE, True


def phrase(rng: np.random.Generator, thing: Thing, bits: int, exact: bool = False) -> str:
    """The named attributes in words: "the small red star in the top left"."""
    words = ["the"] if rng.random() < 0.93 else []
    place_last = rng.random() < 0.7
    if bits & PLACE and not place_last:
        words.append(place_name(rng, thing.cell, exact))
    if bits & SIZE:
        words.append(usually_first(rng, SIZE_WORDS[thing.size]))
    if bits & COLOUR:
        words.append(usually_first(rng, COLOUR_WORDS[thing.colour]))
    if bits & SHAPE:
        words.append(usually_first(rng, SHAPE_WORDS[thing.shape]))
    else:
        words.append(pick(rng, THING_WORDS))
    if bits & PLACE and place_last:
        words.append(at_place(rng, thing.cell, exact))
    return " ".join(words)


def describe(rng: np.random.Generator, scene: Scene, thing: Thing) -> str:
    """Words that are true of this thing of the scene and of no other; "it" if there is no other."""
    bits, exact = choose_attributes(rng, scene, thing)
    if not bits and rng.random() < 0.6:
        return "it"
    return phrase(rng, thing, bits, exact)
