"""The many ways to ask for one thing, as patterns with alternatives: "(make|turn) {x} {c}".

Slots: {x} and {y} things of the picture, {c} a colour, {o} the old colour, {s} a shape, {n} a new
thing, {z} a thing of the second picture, {at} and {to} a place, {step} a relative move, {b}, {ba}
and {bp} a background as name, adjective and place, {ob} the old background, {list} a list of
things, {second} the second picture. Of the paraphrases whose words all occur in others of the
family, every fifth is held out of training.
"""

import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from itertools import product

import numpy as np

from .scenes import Split, pick

HELD_OUT_EVERY, HELD_OUT_PHASE = 5, 2

PATTERNS: Mapping[str, tuple[str, ...]] = {
    "recolour": (
        "(make|turn|paint|colour|color) {x} {c}",
        "(make|paint|turn) {x} {c}",
        "(paint|colour|color|draw) {x} in {c}",
        "(change|switch|set|turn) {x} (to|into) {c}",
        "(change|set|switch|alter|modify) the (colour|color) of {x} to {c}",
        "(recolour|recolor|repaint|dye|tint) {x} (|in |to ){c}",
        "{x} (should|must) (be|become|turn) {c}",
        "give {x} a {c} (colour|color|shade)",
        "(let|have) {x} (be|become|turn) {c}",
        "i (want|need) {x} (|in |to be ){c}",
        "(use {c} for|apply {c} to) {x}",
        "(fill|cover) {x} with {c}",
        "make {x} {c} instead( of {o}|)",
        "(change|turn) {x} from {o} (to|into) {c}",
    ),
    "remove": (
        "(remove|delete|erase|drop|clear|eliminate|hide) {x}",
        "(remove|delete|erase) {x}",
        "get rid of {x}",
        "take {x} (away|out|off)",
        "(take away|take out|cut out|wipe out|wipe away) {x}",
        "(remove|delete|erase|cut|take) {x} from the (picture|image|scene|photo)",
        "make {x} (disappear|vanish|go away)",
        "{x} (should|must) (disappear|vanish|go away|go|be gone)",
        "i (do not|no longer) want {x}",
        "(throw|wipe) {x} (away|out)",
        "show the (picture|scene) without {x}",
        "leave {x} out",
    ),
    "add": (
        "(add|put|place|draw|insert|paint|create|include) {n} {at}",
        "(add|put|place|draw) {n} {at}",
        "(add|put|place|draw|insert) {at} {n}",
        "{at} (add|put|draw|insert|create|paint) {n}",
        "there (should|must) be {n} {at}",
        "i (want|need) {n} {at}",
        "(give me|show me|make|show|let me have|let me see) {n} {at}",
        "let there be {n} {at}",
        "(add|draw) (another thing|something): {n} {at}",
    ),
    "replace": (
        "(replace|substitute) {x} (with|by) {n}",
        "replace {x} (with|by) {n}",
        "(change|turn|transform|convert|morph) {x} (to|into) {n}",
        "make {x} into {n}",
        "(put|draw|place) {n} (in place of|instead of) {x}",
        "(put|draw|place) {n} where {x} is",
        "(swap|exchange|trade) {x} for {n}",
        "{x} (should|must) (be|become) {n}",
        "make {x} {n}",
        "use {n} (instead of|in place of) {x}",
        "i (want|need) {n} (instead of|in place of) {x}",
        "(remove|delete|erase) {x} and (put|draw|add) {n} (there|instead)",
    ),
    "reshape": (
        "(turn|change|transform|convert|morph|make) {x} into a {s}",
        "(change|switch|turn) {x} to a {s}",
        "make {x} a {s}",
        "make {x} a {s}",
        "(change|set|turn) the shape of {x} (to|into) a {s}",
        "{x} (should|must) (be|become) a {s}",
        "reshape {x} (into|to|as) a {s}",
        "make {x} {s} shaped",
        "give {x} the (shape|form) of a {s}",
        "(let|have) {x} (be|become) a {s}",
        "make a {s} (out of|from) {x}",
        "i (want|need) {x} to be a {s}",
        "keep the (colour|color) of {x} but make (it|that) a {s}",
        "replace {x} (with|by) a {s}",
    ),
    "grow": (
        "make {x} (bigger|larger|big|large|huge)",
        "make {x} (|a bit |much |a lot )(bigger|larger)",
        "(enlarge|grow|expand|magnify|increase) {x}",
        "(scale|blow|size) up {x}",
        "(scale|blow|size) {x} up",
        "(increase|double) the size of {x}",
        "{x} (should|must) be (bigger|larger|big|large)",
        "i (want|need) {x} (|to be )(bigger|larger)",
        "(let|have|make) {x} grow",
        "turn {x} into a (big|large|bigger|larger) one",
    ),
    "shrink": (
        "make {x} (smaller|small|little|tiny)",
        "make {x} (|a bit |much |a lot )smaller",
        "(shrink|reduce|decrease) {x}",
        "(scale|size) down {x}",
        "(scale|size) {x} down",
        "(decrease|reduce|halve) the size of {x}",
        "{x} (should|must) be (smaller|small|little|tiny)",
        "i (want|need) {x} (|to be )(smaller|small)",
        "(let|have|make) {x} shrink",
        "turn {x} into a (small|little|smaller) one",
    ),
    "move": (
        "(move|shift|slide|push|drag|bring|put|place) {x} {to}",
        "(move|shift|put) {x} {to}",
        "(take|carry|send) {x} {to}",
        "{x} (should|must) (go|move) {to}",
        "(let|have|make) {x} (go|move) {to}",
        "i (want|need) {x} (moved|to go|to move) {to}",
        "change the (position|place) of {x} {to}",
        "{x} (goes|moves) {to}",
    ),
    "step": (
        "(move|shift|slide|push|drag|nudge|pull) {x} {step}",
        "(move|shift) {x} {step}",
        "{x} (should|must) (go|move) {step}",
        "(let|have|make) {x} (go|move) {step}",
        "i (want|need) {x} (moved|to go|to move) {step}",
        "{x} (goes|moves) {step}",
    ),
    "swap": (
        "(swap|exchange|switch|interchange) {x} (and|with) {y}",
        "swap {x} (and|with) {y}",
        "(swap|exchange|switch) the (places|positions) of {x} and {y}",
        "(let|have|make) {x} and {y} (swap|trade|change|switch|exchange) (places|positions)",
        "{x} and {y} (should|must) (swap|trade|switch) (places|positions)",
        "(swap|exchange|switch|trade) (places|positions) between {x} and {y}",
        "{x} (trades|swaps|switches) (places|positions) with {y}",
        "put {x} where {y} is and the other way (round|around)",
    ),
    "background": (
        "(change|set|switch|turn) the background (to|into) {b}",
        "make the background {b}",
        "(change|replace|swap|exchange) the background (to|with|for|by) {b}",
        "(use|take|put|draw|paint) {b} (as|for) the background",
        "(put|place|move|set|show|draw|have) (everything|all|all of it|the whole scene) {bp}",
        "the background (should|must) (be|become|show) {b}",
        "(use|add|make|draw|show) a {ba} background",
        "give (it|the picture|the scene|the image) a {ba} background",
        "i (want|need) a {ba} background",
        "(change|switch) to a {ba} background",
        "(turn|change|transform) the {ob} into {b}",
        "replace the {ob} (with|by) {b}",
        "{b} (as|for) background",
        "a {ba} background( instead of the {ob}|)",
        "background: {b}",
        "let the scene be {bp}",
    ),
    "caption": (
        "{list} {bp}",
        "{list} {bp}",
        "{bp}: {list}",
        "{bp} {list}",
        "{b}: {list}",
        "{b} with {list}",
        "{list}(, |; ){ba} background",
        "{list} (with|on|before) a {ba} background",
        "(a picture|an image|a photo|a drawing|a scene) of {list} {bp}",
        "(a picture|an image|a photo|a drawing|a scene) with {list} {bp}",
        "(draw|show|paint|create|make) {list} {bp}",
        "(draw|show|paint|create|make) {list} (with|before) a {ba} background",
    ),
    "insert": (
        "(put|place|insert|draw|paste) {z} where {x} is",
        "(replace|substitute) {x} (with|by) {z}",
        "(swap|exchange|trade) {x} for {z}",
        "(put|place|draw|use) {z} (in place of|instead of) {x}",
        "(turn|change|transform|make) {x} into {z}",
        "{x} (should|must) (be|become) {z}",
    ),
    "bring": (
        "(add|put|place|insert|draw|paste|copy|bring|show) {z} {at}",
        "(add|put|place|insert) {z} {at}",
        "{at} (add|put|insert|paste|draw) {z}",
        "{z} (should|must) (be|go|appear) {at}",
        "i (want|need) {z} {at}",
        "(move|bring|copy) {z} {to}",
    ),
    "backdrop": (
        "(use|take|copy|apply) the background (of|from|in) {second}",
        "(change|set|switch) the background to (that|the one) (of|from|in) {second}",
        "replace the background (with|by) (that|the one) (of|from|in) {second}",
        "(put|place|move|show) (everything|all) (on|onto|in) the background of {second}",
        "(make the background|the background should be) (that|the one) (of|from|in) {second}",
        "(make the background look|background) like (in |){second}",
        "give it the background (of|from|in) {second}",
    ),
    "match": (
        "(make|paint) {x} the (same |)(colour|color) (of|as) {z}",
        "(paint|colour|color|draw) {x} in the (colour|color) of {z}",
        "give {x} the (colour|color) of {z}",
        "(change|set) the (colour|color) of {x} to that of {z}",
        "(make|colour|color|paint|recolour|recolor) {x} like {z}",
        "(use|take|apply) the (colour|color) of {z} for {x}",
    ),
}

_PREFIXES = (
    "please ",
    "can you ",
    "could you ",
    "now ",
    "just ",
    "please ",
    "would you please ",
    "kindly ",
)
_SUFFIXES = (" please", " now", " thanks", " for me")
_ASKABLE = re.compile(r"(?!\{|i |there |background|a |the |an )")


def expand(pattern: str) -> tuple[str, ...]:
    """All texts of a pattern, in order: "(a|b) c" gives "a c" and "b c"."""
    parts = re.split(r"\(([^()]*)\)", pattern)
    choices = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    return tuple(" ".join("".join(words).split()) for words in product(*choices))


@cache
def held_out(family: str) -> frozenset[str]:
    """The paraphrases that training never shows: none holds a word that training does not."""
    texts = list(dict.fromkeys(text for form in PATTERNS[family] for text in expand(form)))
    counts = Counter(word for text in texts for word in set(text.split()))
    common = [text for text in texts if all(counts[word] > 1 for word in text.split())]
    chosen = common[HELD_OUT_PHASE::HELD_OUT_EVERY]
    known = {word for text in texts if text not in chosen for word in text.split()}
    return frozenset(text for text in chosen if known.issuperset(text.split()))


@cache
def paraphrases(family: str, split: Split) -> tuple[tuple[str, ...], ...]:
    """The paraphrases of a family in a split, grouped by pattern; the two splits share none."""
    hidden = held_out(family)
    groups = (
        tuple(text for text in expand(form) if (text in hidden) == (split == "held_out"))
        for form in PATTERNS[family]
    )
    return tuple(group for group in groups if group)


def say(rng: np.random.Generator, family: str, split: Split, slots: Mapping[str, str]) -> str:
    """A random paraphrase with its slots filled, now and then polite, capitalised or punctuated."""
    form = pick(rng, pick(rng, paraphrases(family, split)))
    text = form.format_map(slots)
    luck = rng.random()
    if luck < 0.24 and family != "caption":
        if luck < 0.16 and _ASKABLE.match(form):
            text = pick(rng, _PREFIXES) + text
        else:
            text += pick(rng, _SUFFIXES)
    return punctuate(rng, text)


def punctuate(rng: np.random.Generator, text: str) -> str:
    """Vary what a tokenizer should not see: capitals and the final mark."""
    luck = rng.random()
    if luck < 0.45:
        text = text[:1].upper() + text[1:]
    elif luck < 0.5:
        text = text.upper()
    return text + ("", "", ".", "!")[int(rng.random() * 4)]


def politeness() -> tuple[str, ...]:
    """What may stand before or after a paraphrase, as material for the vocabulary."""
    return _PREFIXES + _SUFFIXES
