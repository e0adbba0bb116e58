"""Words for what a scene holds: shapes, colours, sizes, backgrounds, and the nine places.

The first word of each entry is the usual one; every other is a synonym that means the same.
"""

from collections.abc import Mapping

import numpy as np

from .scenes import Thing, pick

SHAPE_WORDS: Mapping[str, tuple[str, ...]] = {
    "circle": ("circle", "disc", "disk", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "diamond": ("diamond", "rhombus"),
    "star": ("star",),
    "heart": ("heart",),
    "cross": ("cross", "plus"),
}
COLOUR_WORDS: Mapping[str, tuple[str, ...]] = {
    "red": ("red",),
    "orange": ("orange",),
    "yellow": ("yellow",),
    "green": ("green",),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "pink": ("pink",),
    "white": ("white",),
}
SIZE_WORDS: Mapping[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "big": ("big", "large", "huge"),
}
THING_WORDS = ("object", "thing", "one", "shape", "item")

# A background as a name ("... to sand"), as an adjective ("a sandy background"), and as a place
# ("everything on the beach").
BACKGROUND_NAMES: Mapping[str, tuple[str, ...]] = {
    "sky": ("sky", "the sky", "a blue sky", "a cloudy sky", "clouds"),
    "sand": ("sand", "a beach", "the beach", "a desert", "a sandy beach"),
    "grass": ("grass", "a meadow", "a lawn", "green grass", "a field"),
    "water": ("water", "the sea", "the ocean", "a lake", "blue water"),
    "night": ("night", "a night sky", "the night sky", "a starry night", "a starry sky"),
    "paper": ("paper", "squared paper", "a sheet of paper", "notebook paper"),
}
BACKGROUND_ADJECTIVES: Mapping[str, tuple[str, ...]] = {
    "sky": ("sky", "cloudy", "cloud", "blue sky"),
    "sand": ("sand", "sandy", "beach", "desert"),
    "grass": ("grass", "grassy", "meadow", "lawn"),
    "water": ("water", "sea", "ocean", "lake"),
    "night": ("night", "night sky", "starry"),
    "paper": ("paper", "squared paper", "notebook"),
}
BACKGROUND_PLACES: Mapping[str, tuple[str, ...]] = {
    "sky": ("in the sky", "in a blue sky", "in the clouds"),
    "sand": ("on sand", "on the sand", "on the beach", "in the desert"),
    "grass": ("on grass", "on the grass", "on a lawn", "in a meadow"),
    "water": ("on water", "on the water", "in the sea", "in the water"),
    "night": ("at night", "in the night", "in the night sky"),
    "paper": ("on paper", "on squared paper", "on a sheet of paper"),
}

# The plain word for an edge, "left", is also true of its corners; the second table is exact.
PLAIN_PLACES: Mapping[int, tuple[str, ...]] = {
    1: ("top",),
    3: ("left",),
    5: ("right",),
    7: ("bottom",),
}
EXACT_PLACES: tuple[tuple[str, ...], ...] = (
    ("top left", "upper left"),
    ("top middle", "top centre", "top center", "upper middle"),
    ("top right", "upper right"),
    ("middle left", "centre left", "center left"),
    ("middle", "centre", "center"),
    ("middle right", "centre right", "center right"),
    ("bottom left", "lower left"),
    ("bottom middle", "bottom centre", "bottom center", "lower middle"),
    ("bottom right", "lower right"),
)
CORNERS = (0, 2, 6, 8)
MIDDLE = 4
COVERED_BY_PLAIN: Mapping[int, frozenset[int]] = {
    1: frozenset({0, 1, 2}),
    3: frozenset({0, 3, 6}),
    5: frozenset({2, 5, 8}),
    7: frozenset({6, 7, 8}),
}


def usually_first(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    """The usual word three times in four, else any."""
    return words[0] if rng.random() < 0.75 else pick(rng, words)


def place_name(rng: np.random.Generator, cell: int, exact: bool) -> str:
    """ "top left", "left", "middle left": the plain word of an edge only where that will do."""
    plain = PLAIN_PLACES.get(cell)
    if plain and not exact and rng.random() < 0.6:
        return plain[0]
    return pick(rng, EXACT_PLACES[cell])


def at_place(rng: np.random.Generator, cell: int, exact: bool) -> str:
    """ "in the top left corner", "on the left", "at the top"."""
    name = place_name(rng, cell, exact)
    forms: tuple[str, ...]
    if cell in CORNERS:
        forms = ("in the {}", "at the {}", "in the {} corner", "on the {}")
    elif name in ("left", "right"):
        forms = ("on the {}", "on the {} side", "at the {}")
    elif cell == MIDDLE:
        forms = ("in the {}", "at the {}", "in the {} of the picture")
    elif name in ("top", "bottom"):
        forms = ("at the {}",)
    else:
        forms = ("at the {}", "in the {}")
    return pick(rng, forms).format(name)


def to_place(rng: np.random.Generator, cell: int, start: int) -> str:
    """ "to the top left corner", from the cell ``start``.

    "To the top" keeps the column in most readers' minds, and "to the left" is one step, so the
    plain words appear only where every reading ends in the same cell.
    """
    if cell in (1, 7) and start % 3 == 1 and rng.random() < 0.5:
        return f"to the {PLAIN_PLACES[cell][0]}"
    if cell in (3, 5) and start // 3 == 1 and rng.random() < 0.5:
        return f"to the {PLAIN_PLACES[cell][0]} {pick(rng, ('side', 'edge'))}"
    name = pick(rng, EXACT_PLACES[cell])
    if cell in CORNERS:
        return pick(rng, ("to the {}", "to the {} corner", "into the {} corner")).format(name)
    return (
        pick(rng, ("to the {}", "into the {}")).format(name)
        if cell == MIDDLE
        else (f"to the {name}")
    )


def look(rng: np.random.Generator, thing: Thing, say_size: bool, article: bool = True) -> str:
    """ "a big orange star": the looks of a thing that is new to the scene."""
    words = [usually_first(rng, SIZE_WORDS[thing.size])] if say_size else []
    words.append(usually_first(rng, COLOUR_WORDS[thing.colour]))
    words.append(usually_first(rng, SHAPE_WORDS[thing.shape]))
    if article:
        words.insert(0, "an" if words[0][0] == "o" else "a")
    return " ".join(words)


_STEP_WORDS: Mapping[tuple[int, int], tuple[str, ...]] = {
    (-1, 0): ("left", "to the left"),
    (1, 0): ("right", "to the right"),
    (0, -1): ("up", "upwards", "higher"),
    (0, 1): ("down", "downwards", "lower"),
}
_ONE_STEP = (
    *("one step {}", "one place {}", "by one step {}", "a step {}", "1 step {}"),
    *("a bit {}", "a little {}"),
)
_TWO_STEPS = ("two steps {}", "two places {}", "2 steps {}")


def steps(rng: np.random.Generator, right: int, down: int) -> str:
    """ "one step to the left": a move along a row or a column by one or two cells."""
    count = abs(right) + abs(down)
    words = _STEP_WORDS[right // count, down // count]
    if count == 1 and rng.random() < 0.45:
        return pick(rng, words)
    return pick(rng, _ONE_STEP if count == 1 else _TWO_STEPS).format(pick(rng, words[:2]))


def lexicon_phrases() -> list[str]:
    """Every phrase that this file can put into a text, as material for the vocabulary."""
    tables = (
        *(SHAPE_WORDS, COLOUR_WORDS, SIZE_WORDS),
        *(BACKGROUND_NAMES, BACKGROUND_ADJECTIVES, BACKGROUND_PLACES),
        *(PLAIN_PLACES, _STEP_WORDS),
    )
    phrases = [phrase for table in tables for entry in table.values() for phrase in entry]
    phrases += [name for names in EXACT_PLACES for name in names]
    phrases += [*THING_WORDS, "a an the it", "in at on into to corner side edge of picture"]
    return phrases + [form.replace("{}", "") for form in (*_ONE_STEP, *_TWO_STEPS)]
