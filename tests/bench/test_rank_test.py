"""The rank test, against counting every arrangement and against its own normal limit."""

import itertools

import numpy as np
import pytest

from fluxkontext.bench import rank_test
from fluxkontext.bench.rank_test import (
    chance_of_larger,
    chance_of_larger_in_all,
    rank_sum,
    smallest_chance,
)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("old", "new"), [(1, 1), (3, 4), (5, 3), (6, 6)])
def test_counts_every_arrangement(old: int, new: int, ties: bool) -> None:
    """The definition: of all ways to pick the new ones among all samples, how many rank as high."""
    rng = np.random.default_rng(old * new + ties)
    values = rng.normal(size=old + new)
    values = np.round(values) if ties else values
    before, after = values[:old].tolist(), values[old:].tolist()
    order = np.sort(values)
    rank = {v: float(np.flatnonzero(order == v).mean()) + 1 for v in order}
    seen = sum(rank[v] for v in after)
    sums = [sum(rank[v] for v in some) for some in itertools.combinations(values, new)]
    expected = np.mean([total >= seen - 1e-9 for total in sums])
    assert chance_of_larger(before, after) == pytest.approx(expected, rel=1e-12)


def test_the_normal_limit_is_close_where_counting_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    half = rank_test.EXACT // 2
    for shift in (0.0, 0.3, 0.6, 0.9):
        old, new = rng.normal(size=half).tolist(), (rng.normal(size=half) + shift).tolist()
        monkeypatch.setattr(rank_test, "EXACT", 2 * half)
        exact = chance_of_larger(old, new)
        monkeypatch.setattr(rank_test, "EXACT", 0)
        assert chance_of_larger(old, new) == pytest.approx(exact, rel=0.05, abs=2e-4)


def test_the_two_directions_share_what_is_between_them() -> None:
    rng = np.random.default_rng(2)
    old, new = rng.normal(size=7).tolist(), rng.normal(size=9).tolist()
    both = chance_of_larger(old, new) + chance_of_larger(new, old)
    assert 1 < both < 1.1  # what was seen itself is counted twice


def test_the_least_it_can_say() -> None:
    assert chance_of_larger([1, 2, 3], [4, 5, 6, 7]) == pytest.approx(smallest_chance(3, 4))
    assert chance_of_larger([4, 5, 6], [1, 2, 3]) == 1


def test_equal_samples_are_no_evidence() -> None:
    assert chance_of_larger([1.0] * 5, [1.0] * 5) == 1
    assert chance_of_larger([1.0] * 50, [1.0] * 50) == 1
    assert rank_sum([1.0] * 5, [1.0] * 5).variance == 0
    assert chance_of_larger_in_all([([1.0], [1.0])]) == 1


def test_small_shifts_add_up() -> None:
    """Three samples a side can never say less than 1 in 20; ten such pairs together can."""
    pairs = [([1.0 + 10 * i, 1.1 + 10 * i, 1.2 + 10 * i], [x + 10 * i for x in (1.15, 1.25, 1.3)])
             for i in range(10)]  # fmt: skip
    assert min(chance_of_larger(*pair) for pair in pairs) >= 0.05
    assert chance_of_larger_in_all(pairs) < 1e-4
