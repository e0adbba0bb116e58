"""Scenarios under pytest-benchmark: ``pytest tests/bench/test_benchmark.py --benchmark-only``.

Any :class:`fluxkontext.bench.scenarios.Work` can be measured so; here the quickest one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fluxkontext.bench.scenarios import works
from fluxkontext.runtime import KontextPipeline


@pytest.mark.parametrize("scenario", ["text-to-image", "edit"])
def test_edit(small_model: Path, benchmark: Callable[..., Any], scenario: str) -> None:
    with KontextPipeline.from_pretrained(small_model, memo_entries=0) as pipe:
        (work,) = works([scenario], pipe.grid, [2], [1])
        result = benchmark.pedantic(  # type: ignore[attr-defined]
            pipe, kwargs=work.arguments(), warmup_rounds=1, rounds=3
        )
    assert result.images[0].size == work.target
