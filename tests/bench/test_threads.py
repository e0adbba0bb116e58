"""One number of threads binds every library, and new processes, and is undone afterwards."""

import os
import subprocess
import sys

import pytest
import torch

from fluxkontext.bench.environment import cores
from fluxkontext.bench.threads import threads
from fluxkontext.runtime.errors import InvalidInputError

ASK = "import os, torch; print(torch.get_num_threads(), len(os.sched_getaffinity(0)))"
linux = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="needs Linux's CPU affinity"
)


@linux
def test_one_thread_for_all() -> None:
    before = torch.get_num_threads(), os.sched_getaffinity(0), os.environ.get("OMP_NUM_THREADS")
    with threads(1, "cpu"):
        assert torch.get_num_threads() == 1
        assert cores() == 1
        asked = subprocess.run(
            [sys.executable, "-P", "-c", ASK], capture_output=True, text=True, check=True
        )
        assert asked.stdout.split() == ["1", "1"]
    after = torch.get_num_threads(), os.sched_getaffinity(0), os.environ.get("OMP_NUM_THREADS")
    assert after == before


@linux
def test_the_usual_number_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with threads(None, "cpu"):
        assert cores() == 1


def test_a_gpu_is_left_alone() -> None:
    before = torch.get_num_threads(), cores()
    with threads(None, "cuda:0"):
        assert (torch.get_num_threads(), cores()) == before


def test_more_threads_than_cpus_are_refused() -> None:
    with (
        pytest.raises(InvalidInputError, match="--threads: expected at most"),
        threads(9999, "cpu"),
    ):
        pass
