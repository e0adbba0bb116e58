"""Captions that fix a whole scene but for the displacements: what text to image is asked for.

Left out of a caption, a size is big. Six things in a terse caption fill the text length of 32.
"""

import numpy as np

from .edits import background_slots
from .lexicon import (
    COLOUR_WORDS,
    EXACT_PLACES,
    PLAIN_PLACES,
    SHAPE_WORDS,
    SIZE_WORDS,
    at_place,
    look,
    usually_first,
)
from .paraphrases import say
from .scenes import Scene, Split, Thing
from .tokens import MAX_WORDS, words


def _terse(rng: np.random.Generator, thing: Thing) -> str:
    """ "small red star top left": at most five words."""
    place = PLAIN_PLACES[thing.cell] if thing.cell in PLAIN_PLACES else EXACT_PLACES[thing.cell]
    parts = [
        SIZE_WORDS[thing.size][0],
        usually_first(rng, COLOUR_WORDS[thing.colour]),
        usually_first(rng, SHAPE_WORDS[thing.shape]),
        usually_first(rng, place),
    ]
    return " ".join(parts)


def _full(rng: np.random.Generator, thing: Thing) -> str:
    """ "a small red star in the top left corner"; a big thing's size is sometimes left out."""
    say_size = thing.size == "small" or rng.random() < 0.7
    return f"{look(rng, thing, say_size)} {at_place(rng, thing.cell, exact=False)}"


def caption(rng: np.random.Generator, scene: Scene, wording: Split) -> str | None:
    """A caption in full phrases, or terse if that is too long; None if even that is."""
    things = list(scene.things)
    if rng.random() < 0.3:
        things = [things[i] for i in rng.permutation(len(things))]
    slots = background_slots(rng, scene.background, scene.background)
    if rng.random() < 0.75:
        parts = [_full(rng, thing) for thing in things]
        joined = ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]
        text = say(rng, "caption", wording, {**slots, "list": joined})
        if len(words(text)) <= MAX_WORDS:
            return text
    parts = [_terse(rng, thing) for thing in things]
    text = say(rng, "caption", wording, {**slots, "list": ", ".join(parts)})
    return text if len(words(text)) <= MAX_WORDS else None
