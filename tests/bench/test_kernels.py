"""The benchmark of the kernels, as far as it goes without a GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fluxkontext.bench import kernel_timed, kernels
from fluxkontext.kernels.chips import CHIPS, Chip
from fluxkontext.kernels.launch import Launch


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: f"sm_{chip.sm}")
def test_every_problem_can_be_set_up(chip: Chip, monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake tensors: shapes and strides fit, and references run, cuDNN's excepted."""
    monkeypatch.setattr(Launch, "__call__", lambda self: None)
    names = set()
    with FakeTensorMode():
        for problem in kernel_timed.problems(chip):
            assert problem.kernel not in names
            names.add(problem.kernel)
            assert problem.bytes > 0
            for name, run in problem.runs.items():
                if name not in ("cudnn", "flash"):
                    run()
    assert any("fp8" in name for name in names) is chip.fp8
    assert any("w4a4" in name for name in names) is chip.fp4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main([]) == 1
    assert "--static needs no GPU" in capsys.readouterr().err
