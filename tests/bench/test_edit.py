"""Whole edits: what `bench edit` and `bench gpu` measure is what was asked for, and documented."""

import json
import math
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fluxkontext.bench import edit, gpu
from fluxkontext.bench.document import read
from fluxkontext.bench.drawn import FULL, MODELS, Drawn
from fluxkontext.bench.models import opened
from fluxkontext.bench.nvml import Nvml
from fluxkontext.bench.report import command as report
from fluxkontext.bench.scenarios import SCENARIOS, Work, works
from fluxkontext.bench.synthetic import write_tokenizers
from fluxkontext.runtime import KontextPipeline
from fluxkontext.runtime.checkpoint import MINI, MINI_FOLDER
from fluxkontext.runtime.errors import BackendUnavailableError, InvalidInputError, KontextError
from fluxkontext.runtime.geometry import Grid
from fluxkontext.runtime.weights import read_headers

from ..conftest import small_spec
from .sensors import Library


def test_scenarios_scale_with_the_model() -> None:
    full = {w.scenario: w for w in works(list(SCENARIOS), Grid(), [28], [1])}
    assert full["edit"] == Work("edit", (1024, 1024), ((1024, 1024),), 28)
    assert full["wide-edit"].target == (1392, 752)
    assert full["edit"].tokens(Grid(), 512) == {"target": 4096, "context": 4096, "text": 512}
    small = {w.scenario: w for w in works(list(SCENARIOS), Grid(16, 128), [28], [1])}
    assert small["two-contexts"].contexts == ((128, 128), (128, 128))
    assert small["wide-edit"].target == (176, 96)
    with pytest.raises(InvalidInputError, match="found sketch"):
        works(["sketch"], Grid(), [1], [1])


def test_work_is_the_same_every_time_and_differs_within_a_batch() -> None:
    work = Work("two-contexts", (64, 48), ((64, 48), (32, 32)), 4, batch=2)
    first, again = work.arguments(), work.arguments()
    assert [p.tobytes() for e in first["image"] for p in e] == [
        p.tobytes() for e in again["image"] for p in e
    ]
    assert [[p.shape for p in e] for e in first["image"]] == [[(48, 64, 3), (32, 32, 3)]] * 2
    assert len({p.tobytes() for e in first["image"] for p in e}) == 4
    assert first["prompt"][0] != first["prompt"][1]
    assert first["image"][0][0].std() > 20


def measured(options: list[str], out: Path) -> dict[str, Any]:
    assert edit.main([*options, "--out", str(out)]) == 0
    return read(out)


@pytest.fixture(scope="module")
def document(
    small_model: Path, namespace_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("edit")
    options = ["--model", str(small_model), "--steps", "1,2", "--batch", "1,2", "--rounds", "3"]
    options += ["--warmup", "1", "--cold", "1", "--precision", "fp32,bf16"]
    options += ["--scenarios", "text-to-image,edit"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", namespace_env["PYTHONPATH"])
        patch.chdir(folder)
        return measured(options, folder / "edit.json")


def test_every_combination_is_measured(document: dict[str, Any]) -> None:
    rows = document["results"]
    assert len(rows) == 2 * 2 * 2 * 2
    assert len({row["name"] for row in rows}) == len(rows)
    for row in rows:
        parameters, steps = row["parameters"], row["parameters"]["steps"]
        assert row["latency"]["count"] == 3
        assert row["step"]["count"] == 3 * steps
        assert row["step_clock"] == "perf_counter"
        assert row["work"]["forwards"] == steps
        assert row["work"]["tokens"] == sum(parameters["tokens"].values())
        assert row["throughput"]["value"] == pytest.approx(
            parameters["batch"] / row["latency"]["mean"]
        )
        assert ("vae_encode" in row["stages"]) == bool(parameters["contexts"])
    for contexts in (True, False):  # with the rows that nobody else's work made longer between
        covered = [
            sum(stage["mean"] for stage in row["stages"].values()) / row["latency"]["mean"]
            for row in rows
            if bool(row["parameters"]["contexts"]) == contexts
        ]
        assert 0.8 < max(covered) < 1.001
    batch = [r["work"]["flop"] for r in rows if r["scenario"] == "edit"][:4]
    assert batch[2] == pytest.approx(2 * batch[0])  # of the same steps, twice as many pictures


def test_memory_is_measured_by_stage(document: dict[str, Any]) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs /proc/self/clear_refs, which only Linux has")
    for row in document["results"]:
        peaks = {stage: found["max_ram"] for stage, found in row["memory"].items()}
        assert peaks["total"] == max(peaks.values()) > 2**25
        assert {"text", "begin", "denoise", "vae_decode"} < set(peaks)


def test_one_row_of_each_precision_is_measured_cold(document: dict[str, Any]) -> None:
    cold = [row for row in document["results"] if row["cold"]]
    assert [(r["scenario"], r["parameters"]["precision"]) for r in cold] == [
        ("edit", "fp32"),
        ("edit", "bf16"),
    ]
    for row in cold:
        start, load, first = (
            row["cold"][key]["p50"] for key in ("process_start_to_picture", "load", "first_edit")
        )
        assert row["parameters"]["steps"] == 2
        assert first > 0
        assert start > load + first


def test_doubts_are_in_the_document(document: dict[str, Any]) -> None:
    few = {w["result"] for w in document["warnings"] if w["kind"] == "few_samples"}
    assert few == {row["name"] for row in document["results"]}


def test_a_gpu_that_slows_down_is_told_in_the_document_and_the_report(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read before and after the samples: 1980 MHz, then 1755 under a power cap."""
    library = Library(sm=1980, bits=0)

    class Heating(Nvml):
        def state(self) -> Any:
            found = super().state()
            library.sm, library.bits = 1755, 0x4
            return found

    monkeypatch.setattr(edit, "reader_of", lambda device: Heating(library, "handle"))
    options = ["--model", str(small_model), "--scenarios", "edit", "--steps", "1", "--batch", "1"]
    file = tmp_path / "run.json"
    found = measured([*options, "--rounds", "2", "--warmup", "0", "--cold", "0"], file)
    (row,) = found["results"]
    kinds = {w["kind"]: w["result"] for w in found["warnings"]}
    for kind in ("throttled", "clock_changed", "few_samples"):
        assert kinds[kind] == row["name"]
    assert report.main([str(file), "-o", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    for said in ("held its clocks back: power cap", "from 1980 to 1755 MHz", "2 samples; 10 or"):
        assert f"{row['name']}: " in page
        assert said in page


def test_a_model_of_ones_own_is_named_by_what_it_holds(
    document: dict[str, Any], small_model: Path
) -> None:
    model = document["model"]
    assert model["name"] == str(small_model)
    assert model["synthetic"] is False
    assert len(model["digest"]) == 64
    with opened(str(small_model)) as again:
        assert again.facts == model


def test_the_usual_model_is_the_miniature_that_ships() -> None:
    with opened(None) as model:
        assert model.path == MINI_FOLDER
        assert model.facts["name"] == MINI
        assert model.facts["synthetic"] is False
        assert model.warnings == []
        networks = ["transformer", "vae", "text_encoder", "text_encoder_2"]
        headers = read_headers(
            [file for name in networks for file in (MINI_FOLDER / name).glob("*.safetensors")]
        )
        assert model.facts["parameters"] == sum(map(math.prod, headers.shapes.values()))


def test_a_bundle_is_measured_without_torch(namespace_env: dict[str, str], tmp_path: Path) -> None:
    blocked = "import sys; sys.modules['torch'] = None; from fluxkontext.bench.edit import main"
    command = [sys.executable, "-P", "-c", f"{blocked}; sys.exit(main(sys.argv[1:]))"]
    command += ["--scenarios", "edit", "--steps", "2", "--rounds", "1", "--warmup", "0"]
    file = tmp_path / "edit.json"
    subprocess.run([*command, "--cold", "0", "--out", str(file)], env=namespace_env, check=True)
    found = read(file)
    assert found["model"]["name"] == MINI
    assert found["environment"]["threads"] >= 1
    assert {row["parameters"]["backend"] for row in found["results"]} == {"onnx"}


def test_a_failed_process_says_why(namespace_env: dict[str, str], tmp_path: Path) -> None:
    from fluxkontext.bench.cold import command_of, first_picture

    work = Work("edit", (64, 64), ((64, 64),), 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", namespace_env["PYTHONPATH"])
        patch.chdir(tmp_path)
        command = command_of(work, tmp_path / "none", "auto", "fp32", "cpu", tmp_path)
        with pytest.raises(KontextError, match=r"found exit code 3: fluxkontext: .*none"):
            first_picture(command)


def test_the_command_line(namespace_env: dict[str, str], small_model: Path, tmp_path: Path) -> None:
    """Without a name it is `edit`; every benchmark is listed, and an unknown one named."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "fluxkontext.runtime.cli", "bench", *words]
        return subprocess.run(
            command, env=namespace_env, cwd=tmp_path, capture_output=True, text=True, check=False
        )

    small = ("--model", str(small_model), "--scenarios", "edit", "--steps", "1", "--batch", "1")
    done = run(*small, "--rounds", "1", "--warmup", "0", "--cold", "0", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["benchmark"] == "edit"
    assert found["command"][:3] == ["fluxkontext", "bench", "edit"]
    unknown = run("speed")
    assert unknown.returncode == 2
    assert "found speed" in unknown.stderr
    listed = run("--help")
    assert listed.returncode == 0
    for name in ("edit", "compare", "load", "gpu", "kernels", "quality", "report", "diff"):
        assert name in listed.stdout


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


def test_the_full_model_has_the_published_size() -> None:
    """Parameters of FLUX.1 [dev]: 11.90 billion in the denoiser, 4.76 in T5, 0.12 in CLIP, 0.08 in
    the VAE."""
    assert MODELS["full"].spec is FULL
    assert MODELS["full"].facts()["parameters"] == pytest.approx(16.87e9, rel=0.002)


def test_drawn_weights_in_files_are_those_that_are_drawn_at_load(tmp_path: Path) -> None:
    spec = small_spec()
    small = Drawn("small", spec, lambda where: write_tokenizers(where, spec.text_length))
    with opened(None, small) as model:
        assert model.facts["synthetic"]
        with (
            KontextPipeline.from_pretrained(model.path, backend="native", device="cpu") as read_in,
            small.pipeline(read_in.about["precision"], "cpu") as at_load,
        ):
            work = works(["edit"], at_load.grid, [2], [1])[0]
            pictures = [pipe(**work.arguments()).images[0] for pipe in (read_in, at_load)]
    np.testing.assert_array_equal(*map(np.asarray, pictures))


def test_drawn_weights_depend_on_nothing_but_their_names() -> None:
    spec = small_spec()
    small = Drawn("small", spec, lambda where: write_tokenizers(where, spec.text_length))
    pictures = []
    for _ in range(2):
        with small.pipeline("fp32", "cpu") as pipe:
            (work,) = works(["edit"], pipe.grid, [2], [1])
            pictures.append(pipe(**work.arguments()).images[0].tobytes())
    assert pictures[0] == pictures[1]
    assert len(set(pictures[0])) > 50  # noise, and not one grey
