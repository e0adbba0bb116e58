"""The benchmark of the kernels, as far as it goes without a GPU."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fluxkontext.bench import diff, kernel_cpu, kernel_timed, kernels
from fluxkontext.bench.document import distribution, read
from fluxkontext.bench.gpu_timing import milliseconds
from fluxkontext.bench.kernel_timed import Timed
from fluxkontext.kernels.candidates import CANDIDATES
from fluxkontext.kernels.chips import CHIPS, Chip
from fluxkontext.kernels.launch import Launch
from fluxkontext.runtime.errors import BackendUnavailableError, InvalidInputError


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: f"sm_{chip.sm}")
def test_every_problem_can_be_set_up(chip: Chip, monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake tensors: shapes and strides fit, and references run, cuDNN's excepted."""
    monkeypatch.setattr(Launch, "__call__", lambda self: None)
    runs: dict[str, set[str]] = {}
    with FakeTensorMode():
        for problem in kernel_timed.problems(chip):
            assert problem.kernel not in runs
            runs[problem.kernel] = set(problem.runs)
            assert problem.bytes > 0
            for name, run in problem.runs.items():
                if name not in ("cudnn", "flash"):
                    run()
    assert ("attention fp8 d128" in runs) is chip.fp8
    assert {"quantize_rows", "quantize_tensor"} <= runs.keys()
    for op, kernel, has in (
        ("linear_fp8 qkv", "triton, rows", chip.fp8),
        ("linear_w4a4 qkv", "triton", chip.fp4),
    ):
        assert "triton, upcast" in runs[op]
        assert (kernel in runs[op]) is has


def timed(folder: Path, *options: str) -> dict[str, Any]:
    file = folder / "kernels.json"
    assert kernels.main(["--device", "cpu", "--quiet", "--out", str(file), *options]) == 0
    return read(file)


def test_on_a_cpu_every_op_is_timed_beside_its_reference(tmp_path: Path) -> None:
    document = timed(tmp_path, "--samples", "4")
    ops: dict[str, list[str]] = {}
    for row in document["results"]:
        ops.setdefault(row["scenario"], []).append(row["parameters"]["implementation"])
        found = row["roofline"]
        assert row["latency"]["count"] == 4
        assert found["share"] == pytest.approx(found["floor"] / row["latency"]["p50"])
        assert found["floor"] * document["ceilings"]["copy"]["p50"] >= 0.999 * found["bytes"]
    quantised = ("linear", "quantize")
    plain = {op for op in CANDIDATES if not op.startswith(quantised) and not op.endswith("_rows")}
    assert set(ops) == plain - {"attend"}  # which puts others together
    assert all(names[-1] == "torch" for names in ops.values())
    assert ops["gelu"] == ["sigmoid", "torch"]
    attention = next(r for r in document["results"] if r["scenario"] == "attention")
    assert attention["roofline"]["flop"] == 4 * 160**2 * 192


def test_a_kernel_slowed_on_purpose_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Really timed, by the whole benchmark: one kernel does its work five times."""
    options = ["--kernel", "gelu", "--samples", "40"]
    timed(tmp_path, *options)
    old = (tmp_path / "kernels.json").rename(tmp_path / "old.json")
    sigmoid, *others = CANDIDATES["gelu"][1:]

    def slow(x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            sigmoid.run(x)
        return sigmoid.run(x)

    slowed = {**CANDIDATES, "gelu": (replace(sigmoid, run=slow), *others)}
    monkeypatch.setattr(kernel_cpu, "CANDIDATES", slowed)
    timed(tmp_path, *options)
    capsys.readouterr()
    assert (
        diff.main([str(old), str(tmp_path / "kernels.json"), "--json", "--threshold", "50%"]) == 1
    )
    verdicts = {c["name"]: c["verdict"] for c in json.loads(capsys.readouterr().out)["changes"]}
    assert verdicts["gelu: sigmoid"] == "REGRESSION"


def test_a_peer_that_cannot_run_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "milliseconds", lambda work, _, samples, __: [work()] * samples)

    def absent() -> float:
        raise RuntimeError("no\n such library")

    problem = Timed("attention", 1000, 10**9, "bf16", {"triton": lambda: 2.0, "cudnn": absent})
    best = {"flops": {"bf16": distribution([1e12], "FLOP/s")}, "copy": distribution([1e12], "B/s")}
    (ours, few), (theirs, none) = kernels.rows_of(problem, "cuda:0", 3, best)
    assert ours["latency"]["p50"] == pytest.approx(0.002)
    assert ours["roofline"]["share"] == pytest.approx(0.5)
    assert ours["roofline"]["bound"] == "flop"
    assert theirs["status"] == "skipped"
    assert theirs["reason"] == "RuntimeError: no such library"
    assert [doubt["kind"] for doubt in few] == ["few_samples"]
    assert none == []
    impossible = Timed("attention", 1000, 10**9, "bf16", {"triton": lambda: 0.5})
    ((refused, failed),) = kernels.rows_of(impossible, "cuda:0", 3, best)
    assert refused["status"] == "skipped"
    assert "expected at most 1e+12 FLOP/s" in refused["reason"]
    assert [(doubt["kind"], doubt["result"]) for doubt in failed] == [("failed", refused["name"])]


def test_a_fault_ends_the_run_and_loses_nothing_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the next problem cannot even be set up after a kernel's fault."""
    file, (first, *_) = tmp_path / "kernels.json", kernel_cpu.problems()

    def problems() -> Iterator[Timed]:
        yield first
        assert {row["scenario"] for row in read(file)["results"]} == {first.kernel}
        raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")

    monkeypatch.setattr(kernel_cpu, "problems", problems)
    options = ["--device", "cpu", "--quiet", "--samples", "2", "--out", str(file)]
    assert kernels.main(options) == 1
    found = read(file)
    assert [row["status"] for row in found["results"]] == ["measured"] * len(first.runs)
    reason = "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert [w["text"] for w in found["warnings"] if w["kind"] == "failed"] == [reason]


@pytest.mark.gpu
def test_a_second_gpu_is_timed_by_itself() -> None:
    if (count := torch.cuda.device_count()) < 2:
        pytest.skip(f"needs two GPUs: torch.cuda.device_count() is {count}")
    x, at = torch.ones(2**20, device="cuda:1"), set()

    def work() -> None:
        at.add((torch.cuda.current_device(), torch.cuda.current_stream().device.index))
        x.add_(1)

    assert min(milliseconds(work, "cuda:1", 3, 1)) > 0
    assert at == {(1, 1)}
    assert torch.cuda.current_device() == 0


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(InvalidInputError, match="--kernel: expected a part of a name, found 'x'"):
        kernels.main(["--device", "cpu", "--kernel", "x"])
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailableError, match="--static needs no GPU"):
            kernels.main(["--device", "cuda"])
