"""A memo: the most recent values, counted, and never a failure."""

import pytest

from fluxkontext.runtime.memo import Memo


def test_a_memo_keeps_the_most_recent() -> None:
    made: list[str] = []

    def make(key: str) -> str:
        return memo.get(key, lambda: made.append(key) or key.upper())  # type: ignore[func-returns-value]

    memo: Memo[str] = Memo(2)
    assert [make(key) for key in "abab"] == ["A", "B", "A", "B"]
    make("a")
    make("c")  # b has waited longest
    make("a")
    make("b")
    assert made == ["a", "b", "c", "b"]
    assert (memo.hits, memo.misses) == (4, 4)
    memo.clear()
    make("a")
    assert made[-1] == "a"


def test_a_memo_of_none_keeps_nothing() -> None:
    memo: Memo[int] = Memo(0)
    assert [memo.get("a", lambda i=i: i) for i in range(3)] == [0, 1, 2]  # type: ignore[misc]
    assert memo.hits == 0


def test_a_memo_keeps_no_failure() -> None:
    memo: Memo[int] = Memo(2)
    with pytest.raises(ZeroDivisionError):
        memo.get("a", lambda: 1 // 0)
    assert memo.get("a", lambda: 5) == 5
