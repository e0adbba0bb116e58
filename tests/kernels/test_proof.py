"""Kernels are tried at load: a wrong one is replaced, or refused when it was asked for by name."""

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fluxkontext.kernels import proof, proven
from fluxkontext.kernels.attend import attend_ref
from fluxkontext.kernels.candidates import CANDIDATES, Candidate, Situation
from fluxkontext.kernels.gelu import gelu_ref
from fluxkontext.kernels.group_norm import moments_shape
from fluxkontext.kernels.kernel_set import reference
from fluxkontext.kernels.proof import CASES, fault_of

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def candidates(run: Callable[..., Any]) -> dict[str, tuple[Candidate, ...]]:
    """The known ones, with another GELU before all of them."""
    return {**CANDIDATES, "gelu": (Candidate("new", run, lambda _: None), *CANDIDATES["gelu"])}


def _raises(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel image is available\nfor this device")


WRONG = {
    "largest error": lambda x: torch.nn.functional.gelu(x),
    r"\[2, 37, 768\]": lambda x: gelu_ref(x)[:, :1],
    "torch.float64": lambda x: gelu_ref(x).double(),
    "not finite": lambda x: gelu_ref(x) / (x - x.flatten()[5]),
    "RuntimeError: no kernel image is available$": _raises,
}


@pytest.mark.parametrize("found", WRONG)
def test_a_wrong_kernel_is_replaced(found: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        chosen = proven(CPU, torch.float32, 64, 192, candidates=candidates(WRONG[found]))
    assert "gelu=sigmoid" in chosen.name.split()
    (record,) = caplog.records
    message = record.getMessage().removesuffix("; using the next implementation")
    assert message.startswith("gelu: expected new's result within twice the error of torch's")
    with pytest.raises(ValueError, match=f"found .*{found}") as error:
        proven(CPU, torch.float32, 64, 192, {"gelu": "new"}, candidates(WRONG[found]))
    assert str(error.value) == message


def test_a_kernel_that_breaks_the_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is launched without an error, and faults as it runs; after that nothing runs."""

    def settle(_: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setattr(proof, "_settle", settle)
    right = candidates(lambda x: gelu_ref(x.clone()))
    with pytest.raises(ValueError, match="broke") as error:
        proven(CPU, torch.float32, 64, 192, candidates={"gelu": right["gelu"]})
    assert str(error.value) == (
        "gelu: new broke the CUDA context (RuntimeError: CUDA error: an illegal memory access was "
        "encountered); start again with kernels={'gelu': 'torch'}"
    )


_BREAKS = """
import torch
from fluxkontext.kernels import proven
from fluxkontext.kernels.candidates import CANDIDATES, Candidate

def faulty(x):
    torch.zeros(1, device=x.device)[torch.full((1,), 5, device=x.device)]
    return torch.empty_like(x)

known = {"gelu": (Candidate("new", faulty, lambda _: None), *CANDIDATES["gelu"])}
try:
    proven(torch.device("cuda", 0), torch.bfloat16, 64, 192, candidates=known)
except ValueError as error:
    print(error)
"""


@pytest.mark.gpu
def test_a_fault_on_a_gpu_is_found_in_the_trial(
    namespace_env: dict[str, str], tmp_path: Path
) -> None:
    """In a process of its own, which has no use of the GPU afterwards."""
    command = [sys.executable, "-c", _BREAKS]
    done = subprocess.run(command, env=namespace_env, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("gelu: new broke the CUDA context ("), done.stderr


def test_a_right_kernel_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    right = lambda x: gelu_ref(x.clone())  # noqa: E731
    chosen = proven(CPU, torch.float32, 64, 192, candidates=candidates(right))
    assert chosen.gelu is right
    assert "gelu=new" in chosen.name.split()
    assert not caplog.records


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "width"), [(64, 192), (128, 128), (128, 3072)])
def test_what_a_cpu_runs_passes(
    head_dim: int, width: int, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    assert "norm_rope=complex" in proven(CPU, dtype, head_dim, width).name
    assert not caplog.records


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_op_has_a_case_that_its_reference_passes(dtype: torch.dtype) -> None:
    assert CASES.keys() == CANDIDATES.keys()
    for op in CASES:
        plain = getattr(reference(), op)
        again = Candidate("again", lambda *args, run=plain: run(*args), lambda _: None)
        assert fault_of(op, again, Situation(CPU, dtype, 64), 192) is None, op


@pytest.mark.parametrize("op", CASES)
def test_every_case_sees_an_error(op: str) -> None:
    """One result in a hundred off by a tenth of its size is far outside; in FP8, whose own steps
    are an eighth, off by a half."""
    plain = getattr(reference(), op)
    factor = 1.5 if op.endswith("_rows") else 1.1

    def wrong(*args: Any) -> Any:
        results = plain(*args)
        first = results if isinstance(results, torch.Tensor) else results[0]
        values = first.float()
        values.flatten()[::100] *= factor
        first.copy_(values.to(first.dtype))
        return results

    candidate = Candidate("wrong", wrong, lambda _: None)
    assert fault_of(op, candidate, Situation(CPU, torch.bfloat16, 64), 192)


def test_attention_is_tried_on_one_stream_too() -> None:
    """Of which only the last tokens ask: a kernel that takes part there alone is seen."""

    def wrong(ops: Any, streams: Any, q_rope: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        out = attend_ref(ops, streams, q_rope, rope)
        return out if len(streams) == 2 else 1.1 * out

    candidate = Candidate("wrong", wrong, lambda _: None)
    assert fault_of("attend", candidate, Situation(CPU, torch.bfloat16, 64), 192)


@pytest.mark.parametrize("channels", [16, 128, 512])
def test_a_picture_is_tried_whose_moments_are_merged(channels: int) -> None:
    situation = Situation(CPU, torch.bfloat16, 64, (channels,))
    x, groups, *_ = CASES["group_norm_silu"].make(torch.Generator(), situation, 192)
    assert moments_shape(x, groups)[-1] > 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "width"), [(64, 192), (128, 3072)])
def test_every_kernel_passes_on_a_gpu(
    head_dim: int, width: int, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = proven(torch.device("cuda", 0), dtype, head_dim, width)
    assert not caplog.records
    assert "norm_rope=triton" in chosen.name
