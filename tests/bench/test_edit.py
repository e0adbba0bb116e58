"""Whole edits: what `bench edit` measures is what was asked for, and documented."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fluxkontext.bench import edit
from fluxkontext.bench.document import read
from fluxkontext.bench.models import opened
from fluxkontext.bench.nvml import Nvml
from fluxkontext.bench.report import command as report
from fluxkontext.bench.scenarios import Work
from fluxkontext.runtime.checkpoint import MINI, MINI_FOLDER
from fluxkontext.runtime.errors import KontextError
from fluxkontext.runtime.weights import read_headers

from .sensors import Library


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
