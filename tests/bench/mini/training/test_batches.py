"""What the stages train on: nothing held out, the same for the same step, in the right shares."""

import numpy as np
import pytest
import torch

from fluxkontext.bench.mini.paraphrases import PATTERNS, held_out
from fluxkontext.bench.mini.scenes import Codes, decode, holds_held_out
from fluxkontext.bench.mini.training.batches import (
    JOINT,
    TEXT_TO_IMAGE,
    EditSteps,
    SceneSteps,
    draw_group,
    stream,
)
from fluxkontext.bench.mini.training.distil_stage import DistilStage
from fluxkontext.bench.mini.training.editor import rope_for
from fluxkontext.bench.mini.training.flow_stage import disturb, draw_sigmas, weigh

from .conftest import Random


def steps_of(model: Random, **changes: int) -> EditSteps:
    settings = {"batch": 20, "seed": 1, **changes}
    return EditSteps(JOINT, tokenizers=model.folder, **settings)


def test_nothing_held_out_is_trained_on(random_model: Random) -> None:
    codes = [batch.codes for step in range(10) for batch in steps_of(random_model)[step]]
    codes += [SceneSteps(20, seed=0)[step] for step in range(5)]
    for things, backgrounds in codes:
        for scene in decode(Codes(things.numpy(), backgrounds.numpy())):
            assert not holds_held_out(scene.things)
    rng = np.random.default_rng(0)
    samples = [s for group in JOINT for s in draw_group(rng, group, 200, "train")]
    assert {sample.novelty for sample in samples} == {""}
    plain = {text for family in PATTERNS for text in held_out(family) if "{" not in text}
    assert not plain & {sample.text for sample in samples}


def test_a_step_follows_from_its_number(random_model: Random) -> None:
    first, again = steps_of(random_model)[7], steps_of(random_model)[7]
    assert all(
        torch.equal(a, b)
        for x, y in zip(first, again, strict=True)
        for a, b in zip(x, y, strict=True)
    )
    for other in (
        steps_of(random_model)[8],
        steps_of(random_model, seed=2)[7],
        steps_of(random_model, process=1)[7],
    ):
        assert not torch.equal(first[1].things, other[1].things)
    streamed = next(stream(steps_of(random_model), 7, workers=0, pin=False))
    assert torch.equal(first[1].t5, streamed[1].t5)


def test_groups_have_their_shares_and_contexts(random_model: Random) -> None:
    batches = steps_of(random_model)[0]
    assert [batch.things.shape[:2] for batch in batches] == [(4, 1), (13, 2), (3, 3)]
    for groups in (JOINT, TEXT_TO_IMAGE):
        assert sum(group.share for group in groups) == pytest.approx(1)
        for group in groups:
            for sample in draw_group(np.random.default_rng(0), group, 200, "train"):
                assert len(sample.contexts) == group.contexts
                if sample.kind == "blank" and sample.contexts:
                    assert sample.target == sample.contexts[0]


def test_noise_levels_lean_to_noise_and_cover_both_ends() -> None:
    sigmas = draw_sigmas(20_000, torch.Generator().manual_seed(0))
    assert 0.67 < sigmas.mean() < 0.73
    assert ((sigmas > 0.4) & (sigmas < 0.85)).float().mean() > 0.5
    assert (sigmas > 0.9).float().mean() > 0.15
    assert (sigmas < 0.05).float().mean() > 0.005
    assert (sigmas > 0.95).float().mean() > 0.01


def test_half_of_the_contexts_are_disturbed() -> None:
    contexts = torch.zeros(400, 1, 4, 8)
    noise = disturb(contexts, torch.Generator().manual_seed(0)).flatten(1).std(dim=1)
    assert 0.4 < (noise > 0).float().mean() < 0.6
    assert noise.max() < 0.4


def test_changed_tokens_weigh_more() -> None:
    target = torch.zeros(1, 4, 8)
    contexts = torch.zeros(1, 1, 4, 8)
    contexts[0, 0, 0] = 1.0
    error, read = torch.ones(1, 4), torch.zeros(1, 2, 4)
    loss, figures = weigh(error, read, target, contexts, share=0.5)
    assert loss.item() == pytest.approx(0.5 * (4 + 3) / 4)
    assert {name: value.item() for name, value in figures.items()} == {
        "edit_changed": 1,
        "edit_kept": 1,
        "edit_unread": 0,
        "edit_context_unread": 0,
    }


def test_what_is_misread_costs_less_in_contexts() -> None:
    target, contexts = torch.zeros(1, 4, 8), torch.zeros(1, 1, 4, 8)
    costs = []
    for picture in (0, 1):
        unread = torch.zeros(1, 2, 4)
        unread[:, picture] = 1.0
        loss, figures = weigh(torch.zeros(1, 4), unread, target, contexts, share=1.0)
        costs.append(loss.item())
        assert figures["edit_context_unread"].item() == picture
    assert costs == pytest.approx([0.3, 0.3 * 0.25])


def test_guidance_is_counted_from_the_plain_scale(random_model: Random) -> None:
    """At 2.5 the student's goal is the teacher with text, towards 0 the teacher without."""
    batch = steps_of(random_model)[0][1]
    stage = DistilStage.__new__(DistilStage)
    stage.teacher = random_model.editor
    stage.blank = tuple(torch.randint(0, 9, (1, ids.shape[1])) for ids in (batch.clip, batch.t5))
    rng = torch.Generator().manual_seed(0)
    noisy, given = (torch.randn(3, 64, 64, generator=rng) for _ in range(2))
    rope = rope_for(random_model.editor, 8, 1, batch.t5.shape[1])
    sigmas = torch.tensor([0.3, 0.6, 0.9])
    plain = torch.full((3,), 2.5)
    with torch.no_grad():
        with_text = random_model.editor(
            noisy, given, batch.clip[:3], batch.t5[:3], sigmas, plain, rope
        ).velocity
        without = random_model.editor(
            noisy, given, *(ids.expand(3, -1) for ids in stage.blank), sigmas, plain, rope
        ).velocity
    wanted = stage._guided(noisy, given, batch, sigmas, torch.tensor([2.5, 0.0, 5.0]), rope)
    torch.testing.assert_close(wanted[0], with_text[0])
    torch.testing.assert_close(wanted[1], without[1])
    torch.testing.assert_close(wanted[2], 2 * with_text[2] - without[2])
