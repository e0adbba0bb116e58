"""Samples of the task: pictures, a text, and the one scene that is the right answer."""

from dataclasses import dataclass

import numpy as np

from .captions import caption
from .edits import EDITS, Draft
from .pairs import PAIRS
from .paraphrases import say
from .refusals import refusal
from .scenes import Scene, Split, Thing, draw_scene, holds_held_out, pick
from .tokens import MAX_WORDS, words

EDIT_KINDS = tuple(EDITS)
PAIR_KINDS = tuple(PAIRS)
KINDS = (*EDIT_KINDS, "nothing", "caption", *PAIR_KINDS)


@dataclass(frozen=True, slots=True)
class Sample:
    """One request. ``contexts`` are the pictures given: none for a caption, else one or two.

    ``novelty`` names what training never shows of it: "", "look", "wording" or "look, wording".
    """

    kind: str
    text: str
    contexts: tuple[Scene, ...]
    target: Scene
    novelty: str = ""


# Where looks and wordings come from.
_KNOWN: tuple[Split, Split] = ("train", "train")
_NOVELTIES: tuple[tuple[Split, Split], ...] = (
    ("held_out", "train"),
    ("train", "held_out"),
    ("held_out", "held_out"),
)


def draw_sample(rng: np.random.Generator, kind: str, split: Split = "train") -> Sample:
    """A random sample of one of the KINDS.

    In "train" no scene holds a held-out pair of shape and colour and no text is a held-out
    paraphrase. Every sample of "held_out" has a new look (a held-out pair that the edit concerns),
    a new wording, or both, a third of them each.
    """
    looks, wording = _KNOWN if split == "train" else pick(rng, _NOVELTIES)
    while True:
        scene = draw_scene(rng, looks)
        sample = _attempt(rng, kind, scene, looks, wording)
        if sample is not None:
            return sample


def _attempt(
    rng: np.random.Generator, kind: str, scene: Scene, looks: Split, wording: Split
) -> Sample | None:
    """A sample of this kind on this scene, or None if the scene or the dice do not allow one."""
    contexts: tuple[Scene, ...] = (scene,)
    target, concerned = scene, set(scene.things)
    if kind == "caption":
        contexts, text = (), caption(rng, scene, wording)
    elif kind == "nothing":
        text = refusal(rng, scene, looks, wording)
    else:
        if kind in PAIRS:
            second = draw_scene(rng, looks, (1,) if rng.random() < 0.65 else (2, 3, 4))
            contexts = (scene, second)
            draft = PAIRS[kind](rng, scene, second, looks)
        else:
            draft = EDITS[kind](rng, scene, looks)
        if draft is None:
            return None
        target, concerned = draft.target, edited_things(scene, draft)
        text = say(rng, draft.family, wording, draft.slots)
    if text is None or len(words(text)) > MAX_WORDS:
        return None
    if looks == "held_out" and not holds_held_out(concerned):
        return None
    return Sample(kind, text, contexts, target, _novelty(looks, wording))


def _novelty(looks: Split, wording: Split) -> str:
    names = (("look", looks), ("wording", wording))
    return ", ".join(name for name, pool in names if pool == "held_out")


def edited_things(scene: Scene, draft: Draft) -> set[Thing]:
    """The things that an edit takes away or brings; all of them if only the background changes."""
    return set(scene.things) ^ set(draft.target.things) or set(scene.things)


def draw_chain(rng: np.random.Generator, turns: int = 10, split: Split = "train") -> list[Sample]:
    """Edits in a row, each on the outcome of the last; between two and six things remain.

    A "held_out" chain mixes in what training never shows rather than insisting on it every turn.
    """
    scene = draw_scene(rng, split, counts=(3, 4, 5))
    chain: list[Sample] = []
    while len(chain) < turns:
        kind = pick(rng, EDIT_KINDS)
        draft = EDITS[kind](rng, scene, split)
        if draft is None or not 2 <= len(draft.target.things) <= 6:
            continue
        wording: Split = "train" if rng.random() < 0.5 else split
        text = say(rng, draft.family, wording, draft.slots)
        looks: Split = "held_out" if holds_held_out(edited_things(scene, draft)) else "train"
        chain.append(Sample(kind, text, (scene,), draft.target, _novelty(looks, wording)))
        scene = draft.target
    return chain
