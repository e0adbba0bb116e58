"""Instructions that must leave the picture alone: impossible, done already, or not understood."""

from dataclasses import replace

import numpy as np

from .edits import EDITS, Draft, background_slots
from .lexicon import COLOUR_WORDS, SHAPE_WORDS, steps, usually_first
from .paraphrases import punctuate, say
from .reference import COLOUR, PLACE, SHAPE, SIZE, describe, phrase
from .scenes import SIZES, Scene, Split, Thing, looks, pick

# None of these words is in the vocabulary: a tokenizer turns every one into "unknown". Random
# letters stand in for the words that nobody thought of.
_UNKNOWN = (
    "turquoise magenta teal silver golden transparent shiny fluffy wooden striped happy angry "
    "octagon pyramid dragon house tree dog cat car person rabbit flower boat mountain bridge "
    "rotate flip sharpen blur crop sing dance explain translate cook photograph melt tilt hello "
    "why when how who weather cinematic watercolor anime realistic style rainbow mirror "
    "brightness contrast resolution tomorrow yesterday music python banana seven hundred"
)
UNKNOWN_WORDS = tuple(_UNKNOWN.split())
_CHATTER = (
    "{u}",
    "{u} {u}",
    "{u} {u} {u}",
    "{u} the picture",
    "make it {u}",
    "make the picture {u}",
    "{u} {x}",
    "a {u} {u}",
    "{u} everything",
    "add {u} {u}",
    "add a {u}",
    "remove the {u}",
    "",
)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_ON_ONE_THING = ("recolour", "remove", "replace", "reshape", "resize", "move")


def unknown_word(rng: np.random.Generator) -> str:
    """A word outside the vocabulary."""
    if rng.random() < 0.7:
        return pick(rng, UNKNOWN_WORDS)
    return "".join(pick(rng, _LETTERS) for _ in range(4 + int(rng.random() * 5))) + "qx"


def refusal(rng: np.random.Generator, scene: Scene, split: Split, wording: Split) -> str:
    """A text to which the scene itself, unchanged, is the only right answer."""
    luck = rng.random()
    if luck < 0.2:
        return _chatter(rng, scene)
    if luck < 0.55:
        draft = _about_absent(rng, scene, split)
    elif luck < 0.8:
        draft = _already_so(rng, scene)
    else:
        draft = _unknown_in_slot(rng, scene, split)
    return say(rng, draft.family, wording, draft.slots)


def _chatter(rng: np.random.Generator, scene: Scene) -> str:
    text = pick(rng, _CHATTER)
    while "{u}" in text:
        text = text.replace("{u}", unknown_word(rng), 1)
    return punctuate(rng, text.replace("{x}", describe(rng, scene, pick(rng, scene.things))))


def _some_edit(
    rng: np.random.Generator, scene: Scene, split: Split, kinds: tuple[str, ...]
) -> Draft:
    """A possible edit, to be spoilt."""
    while (draft := EDITS[pick(rng, kinds)](rng, scene, split)) is None:
        pass
    return draft


def absent_phrase(rng: np.random.Generator, scene: Scene, split: Split) -> str:
    """A description that is true of nothing in the scene: absent looks, or an empty place."""
    if (cells := scene.empty_cells()) and rng.random() < 0.2:
        nobody = Thing("", "", "", pick(rng, cells))
        return phrase(rng, nobody, PLACE, exact=True)
    here = {(thing.shape, thing.colour) for thing in scene.things}
    shape, colour = pick(rng, [pair for pair in looks(split) if pair not in here])
    choices = [SHAPE | COLOUR, SHAPE | COLOUR, SHAPE | COLOUR | SIZE]
    if all(shape != other for other, _ in here):
        choices += [SHAPE, SHAPE]
    if all(colour != other for _, other in here):
        choices += [COLOUR]
    return phrase(rng, Thing(shape, colour, pick(rng, SIZES), cell=0), pick(rng, choices))


def _about_absent(rng: np.random.Generator, scene: Scene, split: Split) -> Draft:
    draft = _some_edit(rng, scene, split, _ON_ONE_THING)
    return replace(draft, slots={**draft.slots, "x": absent_phrase(rng, scene, split)})


def _already_so(rng: np.random.Generator, scene: Scene) -> Draft:
    thing = pick(rng, scene.things)
    x = describe(rng, scene, thing)
    luck = rng.random()
    if luck < 0.25:
        colour = usually_first(rng, COLOUR_WORDS[thing.colour])
        return Draft(scene, "recolour", {"x": x, "c": colour, "o": thing.colour})
    if luck < 0.4:
        return Draft(scene, "reshape", {"x": x, "s": pick(rng, SHAPE_WORDS[thing.shape])})
    if luck < 0.6:
        return Draft(scene, "grow" if thing.size == "big" else "shrink", {"x": x})
    across, along = thing.cell % 3, thing.cell // 3
    off = [(side - 1, 0) for side in (0, 2) if side == across]
    off += [(0, side - 1) for side in (0, 2) if side == along]
    if luck < 0.8 and off:
        return Draft(scene, "step", {"x": x, "step": steps(rng, *pick(rng, off))})
    return Draft(scene, "background", background_slots(rng, scene.background, scene.background))


def _unknown_in_slot(rng: np.random.Generator, scene: Scene, split: Split) -> Draft:
    kinds = ("recolour", "recolour", "reshape", "add", "replace", "background", "remove")
    draft = _some_edit(rng, scene, split, kinds)
    word = unknown_word(rng)
    spoilt = {
        "recolour": {"c": word},
        "reshape": {"s": word},
        "add": {"n": f"a {word}"},
        "replace": {"n": f"a {word}"},
        "background": {"b": f"the {word}", "ba": word, "bp": f"in the {word}"},
        "remove": {"x": f"the {word}"},
    }
    return replace(draft, slots={**draft.slots, **spoilt[draft.family]})


def chatter_words() -> tuple[str, ...]:
    """The known words around the unknown ones, as material for the vocabulary."""
    return _CHATTER
