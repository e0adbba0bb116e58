"""Kernels equal their references on a CPU, by Triton's interpreter, once that is corrected."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("already interpreting", allow_module_level=True)


def run(*arguments: str | Path) -> str:
    """Python in a process whose kernels are interpreted; its stdout."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_canary_the_interpreter_as_shipped_is_wrong() -> None:
    """Where a newer Triton makes this fail, that part of the correction can go."""
    found = json.loads(run(HERE / "canary.py"))
    right = [name for name, error in found.items() if isinstance(error, float) and error < 1e-6]
    assert right == ["e4m3 dot"], found


def test_canary_the_corrected_interpreter_is_right() -> None:
    found = json.loads(run(HERE / "canary.py", "--corrected"))
    short, twice = found.pop("e4m3 dot"), found.pop("float32 to e4m3")
    assert 1e-6 < short < 2**-13, short  # some GPUs' accumulators
    assert 0 < twice < 2**-4, twice  # some GPUs round to float16 before
    assert found.pop("float32 fma") < 1e-6  # the difference is rounded too
    wrong = {name: error for name, error in found.items() if error != 0}
    assert wrong.keys() <= {"bfloat16 dot"}, wrong  # whose sums are in another order
    assert wrong.get("bfloat16 dot", 0) < 1e-6, wrong


def test_every_kernel_equals_its_reference() -> None:
    summary = run("-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "equality")
    assert " passed" in summary, summary
