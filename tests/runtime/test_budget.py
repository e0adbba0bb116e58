"""A budget in bytes, however it is written, and the edits that it admits."""

from dataclasses import replace

import pytest

from fluxkontext.runtime.budget import Budget, parse_bytes
from fluxkontext.runtime.errors import InvalidInputError, OutOfMemoryError
from fluxkontext.runtime.memory_model import Workload
from fluxkontext.runtime.plan import Planner
from fluxkontext.runtime.tensor_shapes import ModelShapes

GiB = 2**30
PUBLISHED = ModelShapes()
EDIT = Workload((1024, 1024), ((1024, 1024),))


def test_a_budget_admits_by_request() -> None:
    planner = Planner(PUBLISHED, "fp8")
    budget = Budget(12 * GiB, planner, EDIT)
    placed = budget.plan.placement
    budget.admit(replace(EDIT, contexts=()))
    assert budget.plan.placement == replace(placed, graphs=budget.plan.placement.graphs)
    budget.admit(replace(EDIT, target=(2048, 1024)))  # only in tiles
    assert budget.plan.placement.tile == 512
    with pytest.raises(OutOfMemoryError, match="one image at once"):
        budget.admit(replace(EDIT, batch=8))
    budget.admit(EDIT)
    assert budget.plan.placement == placed


def test_a_budget_too_small_for_the_native_size_still_takes_smaller_edits() -> None:
    planner = Planner(PUBLISHED, "bf16")
    limit = planner.least(EDIT).peak - 2**20
    budget = Budget(limit, planner, EDIT)
    with pytest.raises(OutOfMemoryError, match="use fp8 or "):
        budget.admit(EDIT)
    budget.admit(Workload((512, 512), ((512, 512),)))
    with pytest.raises(OutOfMemoryError):
        Budget(GiB, planner, EDIT)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GiB", 12 * GiB),
        ("8GB", 8 * 10**9),
        ("16384MiB", 16 * GiB),
        ("1.5 gib", 3 * GiB // 2),
        (1000, 1000),
        ("1000", 1000),
    ],
)
def test_budgets_as_text(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "12 apples", "-1GiB", "GiB", "0", 0, True, "1e9", "12Gi"])
def test_budgets_that_are_none(text: str | int) -> None:
    with pytest.raises(InvalidInputError, match="vram_budget"):
        parse_bytes(text)
