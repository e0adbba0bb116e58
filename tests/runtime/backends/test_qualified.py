"""What `doctor` writes down of engines, for each model of GPU by itself; the GPUs are played."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fluxkontext.runtime import CorruptedError, golden
from fluxkontext.runtime.bundle import read_manifest
from fluxkontext.runtime.cli import main

pytest.importorskip(
    "tensorrt_rtx_bindings", reason="needs the TensorRT-RTX wheels: extra tensorrt-rtx"
)
pytest.importorskip("cuda.bindings", reason="needs cuda-bindings: extra tensorrt-rtx")
SET = "tensorrt-rtx-sm_120"


@pytest.fixture(autouse=True)
def two_gpus(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one capability, and of two models."""
    from .host_cuda import OK

    def properties(index: int) -> tuple[Any, ...]:
        facts = {"name": f"GPU {index}".encode(), "major": 12, "minor": 0, "multiProcessorCount": 1}
        return (*OK, SimpleNamespace(**facts, totalGlobalMem=2**30))

    monkeypatch.setattr(library.cuda, "cudaGetDeviceCount", lambda: (*OK, 2))
    monkeypatch.setattr(library.cuda, "cudaGetDeviceProperties", properties)


def qualified(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_manifest(root)["engines"][SET]["qualified"]
    return found


def test_one_model_does_not_undo_another(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert qualified(copy) == {}
    assert main(["doctor", str(copy)]) == 0
    assert list(qualified(copy)) == ["GPU 0"]
    assert main(["doctor", str(copy), "--device", "cuda:1"]) == 0
    assert sorted(qualified(copy)) == ["GPU 0", "GPU 1"]
    assert all(facts["velocity_error"] < 1e-4 for facts in qualified(copy).values())

    def fail(*_: object) -> None:
        raise CorruptedError("expected less")

    monkeypatch.setattr(golden.Outcome, "check", fail)
    assert main(["doctor", str(copy), "--device", "cuda:1"]) == 6
    assert list(qualified(copy)) == ["GPU 0"]


def test_a_bundle_that_cannot_be_written(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(copy)]) == 0
    (copy / ".manifest.lock").mkdir()  # permissions would not hold a root user
    assert main(["doctor", str(copy)]) == 0  # there is nothing to write
    capsys.readouterr()
    assert main(["doctor", str(copy), "--device", "cuda:1"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "copy it to a folder of your own" in err

    def fail(*_: object) -> None:
        raise CorruptedError("expected less")

    monkeypatch.setattr(golden.Outcome, "check", fail)
    assert main(["doctor", str(copy)]) == 6


def test_engines_beyond_the_memory(
    copy: Path, library: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Doctor says so, and replays the golden edit on the backend that runs instead."""
    from cuda.bindings import runtime

    from .host_cuda import OK

    full = runtime.cudaError_t.cudaErrorMemoryAllocation
    monkeypatch.setattr(library.cuda, "cudaMalloc", lambda _: (full, 0))
    told = (*OK, b"out of memory")
    monkeypatch.setattr(library.cuda, "cudaGetErrorString", lambda _: told, raising=False)
    assert main(["doctor", str(copy), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["bundle"]
    assert "none that runs here: expected enough memory on the GPU" in facts["engines"]
    assert facts["golden edit"]["backend"] in ("onnx", "native")


def test_edits_beyond_the_largest_batch(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """These engines take two edits at once."""
    assert main(["doctor", str(copy)]) == 0
    command = ["generate", "-p", "x", "--model", str(copy), "-o", str(copy.parent / "o.png")]
    more = ["--backend", "tensorrt", "--steps", "1", "--size", "64x64", "-n", "3"]
    assert main([*command, *more]) == 0, capsys.readouterr().err
    assert sorted(path.name for path in copy.parent.glob("*.png")) == [
        "o-1.png",
        "o-2.png",
        "o-3.png",
    ]
