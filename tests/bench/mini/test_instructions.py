"""Instructions: each kind does what it says, names one thing only, and keeps what it holds out."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from fluxkontext.bench.mini import lexicon
from fluxkontext.bench.mini.instructions import (
    EDIT_KINDS,
    KINDS,
    PAIR_KINDS,
    draw_chain,
    draw_sample,
)
from fluxkontext.bench.mini.paraphrases import PATTERNS, paraphrases
from fluxkontext.bench.mini.reference import describe
from fluxkontext.bench.mini.refusals import UNKNOWN_WORDS, absent_phrase
from fluxkontext.bench.mini.scenes import draw_scene, holds_held_out
from fluxkontext.bench.mini.tokens import MAX_WORDS, words
from fluxkontext.bench.mini.vocabulary import VOCABULARY


def samples(kind, count=400, split="train", seed=0):
    rng = np.random.default_rng(seed)
    return [draw_sample(rng, kind, split) for _ in range(count)]


def differences(sample):
    """The things only before and the things only after."""
    before, after = set(sample.contexts[0].things), set(sample.target.things)
    return sorted(before - after, key=lambda t: t.cell), sorted(
        after - before, key=lambda t: t.cell
    )


def altered(old, new):
    """The attributes in which two things differ."""
    names = ("shape", "colour", "size", "cell", "jitter")
    return {name for name in names if getattr(old, name) != getattr(new, name)}


def says(sample, table, value):
    return any(f" {name} " in f" {' '.join(words(sample.text))} " for name in table[value])


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_only_background_edits_change_the_background(kind):
    for sample in samples(kind, 200):
        changed = sample.contexts[0].background != sample.target.background
        assert changed == (kind == "background")


@pytest.mark.parametrize(
    ("kind", "attributes"),
    [("recolour", {"colour"}), ("reshape", {"shape"}), ("resize", {"size"}), ("move", {"cell"})],
)
def test_changing_one_thing_changes_one_attribute(kind, attributes):
    for sample in samples(kind):
        (old,), (new,) = differences(sample)
        assert altered(old, new) == attributes
        if kind == "recolour":
            assert says(sample, lexicon.COLOUR_WORDS, new.colour)
        if kind == "reshape":
            assert says(sample, lexicon.SHAPE_WORDS, new.shape)


def test_remove_takes_one_thing_and_add_brings_one():
    for sample in samples("remove"):
        gone, new = differences(sample)
        assert len(gone) == 1
        assert not new
    for sample in samples("add"):
        gone, (new,) = differences(sample)
        assert not gone
        assert new.jitter == (0, 0)
        assert says(sample, lexicon.COLOUR_WORDS, new.colour)
        assert says(sample, lexicon.SHAPE_WORDS, new.shape)
        assert new.size == "big" or says(sample, lexicon.SIZE_WORDS, "small")


def test_replace_changes_shape_and_colour_in_place():
    for sample in samples("replace"):
        (old,), (new,) = differences(sample)
        assert {"shape", "colour"} <= altered(old, new) <= {"shape", "colour", "size"}
        if "size" in altered(old, new):
            assert says(sample, lexicon.SIZE_WORDS, new.size)


def test_swap_exchanges_the_cells_of_two_different_things():
    for sample in samples("swap"):
        (a, b), (c, d) = differences(sample)
        assert {replace(a, cell=b.cell), replace(b, cell=a.cell)} == {c, d}
        assert altered(a, b) & {"shape", "colour", "size"}


def test_background_edits_keep_every_thing():
    for sample in samples("background"):
        assert sample.contexts[0].things == sample.target.things
        tables = (
            lexicon.BACKGROUND_NAMES,
            lexicon.BACKGROUND_ADJECTIVES,
            lexicon.BACKGROUND_PLACES,
        )
        assert any(says(sample, table, sample.target.background) for table in tables)


def test_what_is_not_understood_changes_nothing():
    unknown = 0
    for sample in samples("nothing"):
        assert (sample.target,) == sample.contexts
        unknown += any(word not in VOCABULARY for word in words(sample.text))
    assert 100 < unknown < 300
    assert not set(UNKNOWN_WORDS) & set(VOCABULARY)


def test_two_image_edits_take_only_what_they_say_from_the_second_picture():
    for kind in PAIR_KINDS:
        for sample in samples(kind, 200):
            first, second = sample.contexts
            gone, new = differences(sample)
            lent = {(t.shape, t.colour, t.size, t.jitter) for t in second.things}
            if kind == "backdrop":
                assert sample.target == replace(first, background=second.background) != first
                continue
            assert sample.target.background == first.background
            assert len(new) == 1
            if kind == "match":
                assert altered(gone[0], new[0]) == {"colour"}
                assert new[0].colour in {thing.colour for thing in second.things}
            else:
                assert (new[0].shape, new[0].colour, new[0].size, new[0].jitter) in lent
                assert [thing.cell for thing in gone] == [new[0].cell] * (kind == "insert")


def read_reference(text):
    """An independent reading of a description: a predicate on things."""
    rest = f" {' '.join(words(text))} "
    cells = set(range(9))
    exact = [(name, {c}) for c, names in enumerate(lexicon.EXACT_PLACES) for name in names]
    plain = [(lexicon.PLAIN_PLACES[c][0], cells) for c, cells in lexicon.COVERED_BY_PLAIN.items()]
    for name, named in sorted([*exact, *plain], key=lambda entry: -len(entry[0])):
        if f" {name} " in rest:
            cells = named
            break
    wanted = {}
    for field, table in (
        ("shape", lexicon.SHAPE_WORDS),
        ("colour", lexicon.COLOUR_WORDS),
        ("size", lexicon.SIZE_WORDS),
    ):
        for value, names in table.items():
            if any(f" {name} " in rest for name in names):
                wanted[field] = value
    return lambda t: t.cell in cells and all(getattr(t, f) == v for f, v in wanted.items())


def test_a_description_is_true_of_exactly_one_thing():
    rng = np.random.default_rng(5)
    for _ in range(6000):
        scene = draw_scene(rng, "held_out", range(1, 10))
        thing = scene.things[int(rng.random() * len(scene.things))]
        text = describe(rng, scene, thing)
        assert [t for t in scene.things if read_reference(text)(t)] == [thing], text


def test_an_absent_thing_is_not_there():
    rng = np.random.default_rng(6)
    for _ in range(2000):
        scene = draw_scene(rng)
        text = absent_phrase(rng, scene, "train")
        assert not any(read_reference(text)(thing) for thing in scene.things), text


def test_a_caption_names_every_thing_and_the_background():
    counts = Counter()
    for sample in samples("caption"):
        assert sample.contexts == ()
        counts[len(sample.target.things)] += 1
        for thing in sample.target.things:
            assert says(sample, lexicon.SHAPE_WORDS, thing.shape)
            assert says(sample, lexicon.COLOUR_WORDS, thing.colour)
    assert set(counts) == {1, 2, 3, 4, 5, 6}
    assert min(counts.values()) > 30


@pytest.mark.parametrize("family", PATTERNS)
def test_every_family_has_many_paraphrases_and_holds_some_out(family):
    train, held_out = (
        {text for group in paraphrases(family, split) for text in group}
        for split in ("train", "held_out")
    )
    assert len(train) >= 20
    assert len(held_out) >= 3
    assert not train & held_out


def test_training_never_shows_what_is_held_out():
    rng = np.random.default_rng(7)
    for i in range(20000):
        sample = draw_sample(rng, KINDS[i % len(KINDS)])
        assert sample.novelty == ""
        for scene in (*sample.contexts, sample.target):
            assert not holds_held_out(scene.things)


@pytest.mark.parametrize("kind", KINDS)
def test_every_held_out_sample_is_new_in_some_way(kind):
    seen = Counter()
    for sample in samples(kind, 150, "held_out"):
        seen[sample.novelty] += 1
        scenes = (*sample.contexts, sample.target)
        has_new_look = any(holds_held_out(scene.things) for scene in scenes)
        assert has_new_look == ("look" in sample.novelty)
    assert set(seen) == {"look", "wording", "look, wording"}


def test_the_vocabulary_is_complete_and_no_larger_than_what_training_shows():
    assert list(VOCABULARY) == sorted(set(VOCABULARY))
    assert len(VOCABULARY) < 400
    used = set()
    for kind in KINDS:
        for split in ("train", "held_out"):
            for sample in samples(kind, 2500 if split == "train" else 300, split, seed=8):
                found = words(sample.text)
                assert len(found) <= MAX_WORDS
                if kind != "nothing":
                    assert set(found) <= set(VOCABULARY)
                if split == "train":
                    used.update(found)
    assert set(VOCABULARY) <= used


@pytest.mark.parametrize(
    "text",
    [
        "make the red circle blue",
        "Change the star to green.",
        "paint the small square in purple",
        "remove the heart",
        "Please delete the big white triangle",
        "get rid of the object in the top left corner",
        "add a small yellow star at the bottom right",
        "put a red heart in the centre",
        "replace the square with a pink diamond",
        "turn the circle into a square",
        "make the star bigger",
        "shrink the heart",
        "move the star to the bottom left",
        "move the circle one step up",
        "swap the circle and the heart",
        "change the background to night",
        "put everything on the beach",
        "put the object of the second picture where the star is",
        "use the background of the second picture",
    ],
)
def test_what_a_user_might_write_is_in_the_vocabulary(text):
    assert set(words(text)) <= set(VOCABULARY)


def test_words_ignore_case_and_marks():
    assert words("Make the TOP-LEFT circle blue!") == [
        "make",
        "the",
        "top",
        "left",
        "circle",
        "blue",
    ]
    assert words("") == []


def test_samples_repeat_with_their_seed():
    for kind in KINDS:
        assert samples(kind, 20, seed=3) == samples(kind, 20, seed=3)


def test_a_chain_continues_where_the_last_turn_ended():
    for seed in range(30):
        chain = draw_chain(np.random.default_rng(seed), 10, "held_out")
        assert len(chain) == 10
        for turn, following in pairwise(chain):
            assert following.contexts == (turn.target,)
            assert 2 <= len(turn.target.things) <= 6
