"""The score: what happened, what else happened, and how runs and chains are summed up."""

import json
from dataclasses import replace

import numpy as np
import pytest

from fluxkontext.bench.mini.instructions import EDIT_KINDS, draw_chain, draw_sample
from fluxkontext.bench.mini.scenes import Scene, Thing, render
from fluxkontext.bench.mini.score import (
    EditScore,
    chain_summary,
    compare,
    score_all,
    score_chain,
    score_edit,
    summary,
    touched_cells,
)

STAR, HEART = Thing("star", "red", "big", 0), Thing("heart", "blue", "small", 8, (2, -1))
BEFORE = Scene("grass", (STAR, HEART))
TARGET = BEFORE.with_things([STAR], [replace(STAR, colour="blue")])


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_the_right_picture_is_exact_and_the_old_one_is_not(kind):
    rng = np.random.default_rng(0)
    for _ in range(20):
        sample = draw_sample(rng, kind)
        (before,) = sample.contexts
        good = score_edit(before, sample.target, render(sample.target))
        assert good.exact
        assert good.changed_ok
        assert good.untouched_ok
        assert not good.garbled
        idle = score_edit(before, sample.target, render(before))
        assert not idle.exact
        assert not idle.changed_ok
        assert idle.untouched_ok


def test_another_change_beside_the_right_one_is_not_exact():
    output = render(TARGET.with_things([HEART]))
    score = score_edit(BEFORE, TARGET, output)
    assert score.changed_ok
    assert not score.untouched_ok
    assert not score.exact
    elsewhere = score_edit(BEFORE, TARGET, render(replace(TARGET, background="sand")))
    assert elsewhere.changed_ok
    assert not elsewhere.untouched_ok


def test_a_displacement_costs_nothing_in_the_exact_score():
    moved = TARGET.with_things([HEART], [replace(HEART, jitter=(-2, 2))])
    score = score_edit(BEFORE, TARGET, render(moved))
    assert score.exact
    assert score.psnr_untouched < 40


def test_psnr_looks_only_at_what_the_edit_leaves_alone():
    assert touched_cells(BEFORE, TARGET) == {0}
    output = render(TARGET)
    clean = score_edit(BEFORE, TARGET, output).psnr_untouched
    output[4:44, 4:44] = 0
    assert score_edit(BEFORE, TARGET, output).psnr_untouched == clean > 60
    off_by_one = np.where(render(TARGET) < 255, render(TARGET) + 1, 254).astype(np.uint8)
    assert score_edit(BEFORE, TARGET, off_by_one).psnr_untouched == pytest.approx(48.13, abs=0.01)


def test_captions_and_backgrounds_concern_every_pixel():
    assert score_edit(None, TARGET, render(TARGET)) == EditScore(True, True, True, False, None)
    assert not score_edit(None, TARGET, render(BEFORE)).changed_ok
    night = replace(BEFORE, background="night")
    assert score_edit(BEFORE, night, render(night)).psnr_untouched is None
    assert score_edit(BEFORE, night, render(replace(night, things=(STAR,)))).changed_ok


def test_a_summary_counts_by_kind_and_is_json():
    outputs = [render(TARGET), render(BEFORE), render(TARGET)]
    scores = score_all([BEFORE] * 3, [TARGET] * 3, outputs)
    table = json.loads(json.dumps(summary(["a", "a", "b"], scores)))
    assert [table[kind]["n"] for kind in ("all", "a", "b")] == [3, 2, 1]
    assert [table[kind]["exact"] for kind in ("all", "a", "b")] == [66.67, 50.0, 100.0]
    empty = summary([], [])["all"]
    assert empty["n"] == 0
    assert empty["psnr_untouched"] is None


def test_a_comparison_counts_what_was_lost_and_gained():
    right, wrong = (
        EditScore(ok, ok, True, False, ratio) for ok, ratio in ((True, 40.0), (False, 37.0))
    )
    result = compare([right, right, wrong], [wrong, right, right])
    assert result == {"n": 3, "lost": 1, "gained": 1, "psnr_change": 0.0}


def test_a_chain_is_correct_up_to_its_first_mistake():
    chain = draw_chain(np.random.default_rng(0), 4)
    targets = [turn.target for turn in chain]
    pictures = [render(target) for target in targets]
    assert score_chain(targets, pictures) == [True] * 4
    pictures[1] = render(chain[1].contexts[0])
    assert score_chain(targets, pictures) == [True, False, False, False]
    assert chain_summary([[True] * 4, [True, False, False, False]]) == [100.0, 50.0, 50.0, 50.0]
