"""Scenarios: sizes that follow the model's, and the same pictures every time."""

import pytest

from fluxkontext.bench.scenarios import SCENARIOS, Work, works
from fluxkontext.runtime.errors import InvalidInputError
from fluxkontext.runtime.geometry import Grid


def test_scenarios_scale_with_the_model() -> None:
    full = {w.scenario: w for w in works(list(SCENARIOS), Grid(), [28], [1])}
    assert full["edit"] == Work("edit", (1024, 1024), ((1024, 1024),), 28)
    assert full["wide-edit"].target == (1392, 752)
    assert full["edit"].tokens(Grid(), 512) == {"target": 4096, "context": 4096, "text": 512}
    small = {w.scenario: w for w in works(list(SCENARIOS), Grid(16, 128), [28], [1])}
    assert small["two-contexts"].contexts == ((128, 128), (128, 128))
    assert small["wide-edit"].target == (176, 96)
    with pytest.raises(InvalidInputError, match="found sketch"):
        works(["sketch"], Grid(), [1], [1])


def test_work_is_the_same_every_time_and_differs_within_a_batch() -> None:
    work = Work("two-contexts", (64, 48), ((64, 48), (32, 32)), 4, batch=2)
    first, again = work.arguments(), work.arguments()
    assert [p.tobytes() for e in first["image"] for p in e] == [
        p.tobytes() for e in again["image"] for p in e
    ]
    assert [[p.shape for p in e] for e in first["image"]] == [[(48, 64, 3), (32, 32, 3)]] * 2
    assert len({p.tobytes() for e in first["image"] for p in e}) == 4
    assert first["prompt"][0] != first["prompt"][1]
    assert first["image"][0][0].std() > 20
