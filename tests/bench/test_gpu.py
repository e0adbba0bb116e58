"""``bench gpu``: a ladder of precisions, what fails in it, the headline, the sustained run."""

import weakref
from pathlib import Path
from typing import Any

import pytest

from fluxkontext.bench import edit, gpu
from fluxkontext.bench.document import read
from fluxkontext.bench.drawn import MODELS, Drawn
from fluxkontext.bench.scenarios import Work, works
from fluxkontext.bench.synthetic import write_tokenizers
from fluxkontext.runtime import KontextPipeline
from fluxkontext.runtime.errors import BackendUnavailableError, InvalidInputError

from ..conftest import small_spec


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The suite of `bench gpu` on a small model, on the CPU."""
    folder = tmp_path_factory.mktemp("gpu")
    spec = small_spec()
    small = Drawn("small", spec, lambda where: write_tokenizers(where, spec.text_length))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "small", small)
        options = ["--spec", "small", "--device", "cpu", "--precision", "fp32,bf16,nonsense"]
        options += ["--rounds", "2", "--warmup", "1", "--sustain", "1"]
        assert gpu.main([*options, "--out", str(folder / "gpu.json")]) == 0
    return read(folder / "gpu.json")


def test_a_rung_names_its_results_as_they_are_measured() -> None:
    spec = small_spec()
    small = Drawn("small", spec, lambda where: write_tokenizers(where, spec.text_length))
    rung, budget = gpu.Rung.of("fp8:norm_rope=torch:gelu=torch"), 2**30
    assert rung == gpu.Rung("fp8", {"norm_rope": "torch", "gelu": "torch"})
    with small.pipeline(rung.precision, "cpu", budget, rung.kernels) as pipe:
        work = works(["edit"], pipe.grid, [2], [1])[0]
        assert edit.label(work, pipe) == f"{work.name}, {rung.label(budget)}"
        assert {"norm_rope=torch", "gelu=torch"} <= set(pipe.about["kernels"].split())
        assert pipe.budget is not None
        assert pipe.budget.limit == budget
    assert gpu.Rung.of("bf16").label(None) == "native bf16"
    with pytest.raises(InvalidInputError, match="found attention in fp8:attention"):
        gpu.Rung.of("fp8:attention")


def test_a_ladder_of_precisions(rated: dict[str, Any]) -> None:
    rows = rated["results"]
    assert rated["suite"] == {"name": "gpu", "version": 1}
    assert [row["status"] for row in rows] == ["measured"] * 10 + ["skipped"] * 5 + ["measured"]
    for row in rows[10:15]:
        assert "found nonsense" in row["reason"]
        assert row["parameters"]["precision"] == "nonsense"
    for row in rows[:10]:
        found = row["roofline"]
        assert found["share"] > 0  # of ceilings measured at another time, when others may compute
        assert found["floor"] == pytest.approx(found["share"] * row["step"]["p50"])


def test_what_fails_is_a_row_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kernel's fault: an error that is none of ours, in the middle of the first rung."""
    spec = small_spec()
    small = Drawn("small", spec, lambda where: write_tokenizers(where, spec.text_length))
    monkeypatch.setitem(MODELS, "small", small)
    file, begun = tmp_path / "gpu.json", []

    def measure(pipe: KontextPipeline, work: Work, *rest: Any) -> Any:
        begun.append(work)
        if len(begun) == 3:
            raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")
        if len(begun) == 4:  # of the second rung: the first is on disk
            assert [row["status"] for row in read(file)["results"]] == whole
        return edit.measure(pipe, work, *rest)

    monkeypatch.setattr(gpu, "measure", measure)
    whole = ["measured"] * 2 + ["skipped"] * 3
    options = ["--spec", "small", "--device", "cpu", "--precision", "fp32,bf16", "--quiet"]
    options += ["--rounds", "1", "--warmup", "0", "--sustain", "0", "--out", str(file)]
    assert gpu.main(options) == 1
    found = read(file)
    assert [row["status"] for row in found["results"]] == [*whole, *["measured"] * 5]
    reason = "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert {row["reason"] for row in found["results"][2:5]} == {reason}
    assert [w["text"] for w in found["warnings"] if w["kind"] == "failed"] == [reason] * 3


def small_suite(monkeypatch: pytest.MonkeyPatch, file: Path, *options: str) -> int:
    """The exit code of `bench gpu` on a small model, on the CPU."""
    spec = small_spec()
    small = Drawn("small", spec, lambda where: write_tokenizers(where, spec.text_length))
    monkeypatch.setitem(MODELS, "small", small)
    usual = ["--spec", "small", "--device", "cpu", "--quiet", "--headline", "--warmup", "0"]
    return gpu.main([*usual, "--out", str(file), *options])


def test_a_sustained_run_that_fails_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kernel's fault in the second rung, whose context is dead for the first one too."""
    file, fault = tmp_path / "gpu.json", "CUDA error: an illegal memory access was encountered"
    begun: list[Work] = []
    loaded = gpu._loaded

    def measure(pipe: KontextPipeline, work: Work, *rest: Any) -> Any:
        begun.append(work)
        if len(begun) == 2:
            raise RuntimeError(fault)
        return edit.measure(pipe, work, *rest)

    def dead_at_last(*given: Any) -> Any:
        if len(begun) == 2:
            raise RuntimeError(fault)
        return loaded(*given)

    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setattr(gpu, "_loaded", dead_at_last)
    options = ["--precision", "fp32,bf16", "--rounds", "1", "--sustain", "1"]
    assert small_suite(monkeypatch, file, *options) == 1
    found = read(file)
    assert [row["status"] for row in found["results"]] == ["measured", "skipped", "skipped"]
    last = found["results"][-1]
    assert last["name"] == f"sustained {found['results'][0]['name']}"
    failed = [w for w in found["warnings"] if w["kind"] == "failed"]
    assert [w["result"] for w in failed] == [row["name"] for row in found["results"][1:]]
    assert {w["text"] for w in failed} == {f"RuntimeError: {fault}"}


def test_a_precision_of_its_own_choice_is_sustained_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "gpu.json"
    options = ["--precision", "auto", "--rounds", "1", "--sustain", "1"]
    assert small_suite(monkeypatch, file, *options) == 0
    first, last = read(file)["results"]
    assert last["name"] == f"sustained {first['name']}"


def test_time_that_a_rung_leaves_is_the_next_ones_and_the_headline_has_its_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float | None] = []

    def measure(pipe: KontextPipeline, work: Work, effort: Any, *rest: Any) -> Any:
        given.append(effort.seconds)
        return edit.measure(pipe, work, effort, *rest)

    monkeypatch.setattr(gpu, "measure", measure)
    file = tmp_path / "gpu.json"
    options = ["--precision", "nonsense,fp32", "--minutes", "0.001", "--sustain", "0"]
    assert small_suite(monkeypatch, file, *options) == 0
    assert given == [pytest.approx(0.06)]
    assert read(file)["results"][-1]["latency"]["count"] >= 8


def test_an_op_that_is_not_there_is_told_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu, "ceilings_of", lambda device: pytest.fail("measured"))
    with pytest.raises(InvalidInputError, match="found atend in fp8:atend=fp8"):
        small_suite(monkeypatch, tmp_path / "gpu.json", "--precision", "fp8:atend=fp8")


def test_the_memory_of_a_failed_model_is_given_back_before_the_next_is_loaded() -> None:
    """Also what only the collector finds."""

    class Cycle:
        def __init__(self) -> None:
            self.own = self

    class Next(Drawn):
        def pipeline(self, *given: Any) -> KontextPipeline:
            assert failed() is None
            return super().pipeline(*given)

    spec = small_spec()
    model = Next("small", spec, lambda where: write_tokenizers(where, spec.text_length))
    args = gpu._parser().parse_args([])
    failed = weakref.ref(Cycle())
    with gpu._loaded(model, gpu.Rung.of("fp32"), "cpu", args) as pipe:
        assert pipe.about["precision"] == "fp32"


def test_the_headline_is_of_the_fastest_single_edit(rated: dict[str, Any]) -> None:
    headline = rated["headline"]
    row = next(r for r in rated["results"] if r["name"] == headline["result"])
    assert row["scenario"] == "edit"
    assert row["parameters"]["steps"] == 28
    assert row["parameters"]["batch"] == 1
    assert headline["s_per_edit"] == row["latency"]["p50"]
    assert headline["edits_per_min"] == pytest.approx(60 / row["latency"]["p50"])
    assert headline["j_per_edit"] is None  # no GPU, nothing that counts joules


def test_a_sustained_run_is_a_series(rated: dict[str, Any]) -> None:
    row = rated["results"][-1]
    assert row["name"].startswith("sustained edit")
    assert [s["latency"] for s in row["series"]] == row["latency"]["values"]
    times = [s["t"] for s in row["series"]]
    assert times == sorted(times)
    assert times[-1] >= 1


def test_without_a_gpu_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(BackendUnavailableError, match="expected an NVIDIA GPU") as caught:
        gpu.main([])
    assert caught.value.exit_code == 1
