"""The benchmarks under pytest-benchmark: ``pytest tests/bench/test_benchmark.py --benchmark-only``.

Each measures the very callable that its command measures, on the smallest model.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fluxkontext.bench import kernel_cpu
from fluxkontext.bench.contestants import ours, peer
from fluxkontext.bench.drawn import Drawn
from fluxkontext.bench.load import closed_loop
from fluxkontext.bench.models import opened
from fluxkontext.bench.peers import PEERS
from fluxkontext.bench.scenarios import works
from fluxkontext.bench.synthetic import write_tokenizers
from fluxkontext.runtime import KontextPipeline

from ..conftest import small_spec

Benchmark = Any
"""pytest-benchmark's fixture has no public type."""


def measured(benchmark: Benchmark, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of a few rounds."""
    return benchmark.pedantic(call, args, kwargs, warmup_rounds=1, rounds=3)


@pytest.mark.parametrize("scenario", ["text-to-image", "edit"])
def test_edit(small_model: Path, benchmark: Benchmark, scenario: str) -> None:
    with KontextPipeline.from_pretrained(small_model, memo_entries=0) as pipe:
        (work,) = works([scenario], pipe.grid, [2], [1])
        result = measured(benchmark, pipe, **work.arguments())
    assert result.images[0].size == work.target


def test_gpu(benchmark: Benchmark) -> None:
    """The model that `bench gpu` draws where it runs, here a small one on the CPU."""
    spec = small_spec()
    small = Drawn("small", spec, lambda where: write_tokenizers(where, spec.text_length))
    with small.pipeline("fp32", "cpu") as pipe:
        (work,) = works(["edit"], pipe.grid, [2], [1])
        result = measured(benchmark, pipe, **work.arguments())
    assert result.images[0].size == work.target


@pytest.mark.parametrize("who", ["fluxkontext", "diffusers"])
def test_compare(small_model: Path, benchmark: Benchmark, who: str) -> None:
    with (
        opened(str(small_model)) as model,
        ours("fluxkontext", small_model, "native", "fp32", "cpu") as (us, pipe),
    ):
        (work,) = works(["edit"], pipe.grid, [2], [1])
        length = pipe.tokenizer_2.model_max_length
        one = us if who == us.name else peer(PEERS[who], model, "cpu", length)
        picture = measured(benchmark, one.edit, work)
        assert np.abs(picture.astype(int) - us.edit(work)).max() <= 1


def test_load(small_model: Path, benchmark: Benchmark) -> None:
    with KontextPipeline.from_pretrained(small_model, memo_entries=0) as pipe:
        (work,) = works(["text-to-image"], pipe.grid, [1], [1])
        arguments = work.arguments()
        served = measured(
            benchmark, closed_loop, lambda: pipe(**arguments).timings["queue"], 2, 0.05
        )
    assert served.arrivals >= 2


@pytest.mark.parametrize("op", ["modulate", "norm_rope", "attention", "gelu"])
def test_kernels(benchmark: Benchmark, op: str) -> None:
    problem = next(p for p in kernel_cpu.problems() if p.kernel == op)
    assert measured(benchmark, next(iter(problem.runs.values()))) is not None
