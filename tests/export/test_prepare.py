"""What a build decides before any work: precision, calibration, and whether a bundle is the one."""

import sys
from pathlib import Path

import pytest
import torch

from fluxkontext.export import bundle as exporter
from fluxkontext.export.build import Order, build
from fluxkontext.export.calibration import Calibration
from fluxkontext.export.prepare import Source, bundle_once, stages_folder, wanted_precision
from fluxkontext.export.quantize import write_quantised
from fluxkontext.kernels import reference
from fluxkontext.runtime import CheckpointError, InvalidInputError
from fluxkontext.runtime.bundle import read_manifest
from fluxkontext.runtime.checkpoint import find
from fluxkontext.runtime.cli import main
from fluxkontext.runtime.errors import BackendUnavailableError
from fluxkontext.runtime.loading import build as built
from fluxkontext.runtime.models.transformer import Flux


@pytest.fixture(scope="module")
def calibrations(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two of the smallest model, which differ."""
    folder = tmp_path_factory.mktemp("calibrations")
    flux = built(lambda: Flux(find(small_model, {}).transformer.config, reference()))
    modules = [name for name, it in flux.named_modules() if isinstance(it, torch.nn.Linear)]
    blocks = ("double_blocks.0", "single_blocks.0")
    names = [*modules, *(f"{block}.{part}" for block in blocks for part in "qkv")]
    files = (folder / "one.json", folder / "two.json")
    for amax, file in enumerate(files, 1):
        Calibration("small", 100.0, dict.fromkeys(names, float(amax)), {}).write(file)
    return files


@pytest.fixture(scope="module")
def static(
    small_model: Path, calibrations: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> str:
    """The smallest model in fp8-static."""
    out = tmp_path_factory.mktemp("static") / "model"
    write_quantised(find(small_model, {}), out, "fp8", "fp8-static", calibrations[0])
    return str(out)


@pytest.fixture
def _no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What surrounds them is looked at."""
    monkeypatch.setattr(exporter, "graphs", lambda *_: [])


def silent(_: str) -> None:
    """Nobody is told."""


def test_weights_that_no_engine_runs_are_refused(small_model: Path, tmp_path: Path) -> None:
    write_quantised(find(small_model, {}), tmp_path / "dynamic", "fp8")
    source = Source(str(tmp_path / "dynamic"))
    for precision in ("auto", "fp8"):
        with pytest.raises(CheckpointError, match=r"fp8-dynamic, .* --recipe fp8-static"):
            wanted_precision(source, precision)


def test_a_calibration_that_nothing_would_use_is_refused(
    small_model: Path, static: str, calibrations: tuple[Path, Path]
) -> None:
    file = calibrations[0]
    for source, precision in (
        (Source(str(small_model), calibration=file), "auto"),
        (Source(str(small_model), calibration=file), "fp16"),
        (Source(static, calibration=file, attention="16bit"), "auto"),
    ):
        with pytest.raises(InvalidInputError, match="--calibration: expected none"):
            wanted_precision(source, precision)
    assert wanted_precision(Source(static, calibration=file), "auto") == "fp8"
    assert wanted_precision(Source(str(small_model), calibration=file), "nvfp4") == "nvfp4"


def test_a_calibration_that_is_none_is_refused(static: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.json"):
        wanted_precision(Source(static, calibration=tmp_path / "none.json"), "auto")


def test_a_bundle_has_nothing_to_calibrate(
    small_bundle: Path, calibrations: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build", str(small_bundle), "--size", "64x64", "--engine", "tensorrt-rtx"]
    for option in (["--calibration", str(calibrations[0])], ["--attention", "16bit"]):
        assert main([*command, "--target", "sm_120", *option]) == 2
        assert "expected a checkpoint for --calibration" in capsys.readouterr().err


@pytest.mark.usefixtures("_no_graphs")
def test_attention_by_another_calibration_is_another_bundle(
    static: str, calibrations: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    one, two = (Source(static, calibration=file) for file in calibrations)
    bundle_once(one, out, "fp8", "link", silent)
    said: list[str] = []
    bundle_once(one, out, "fp8", "link", said.append)
    assert said == [f"export: {out} is there"]
    for other, wanted in ((two, "fp8"), (Source(static), "16 bits")):
        with pytest.raises(InvalidInputError, match=rf"\(attention in {wanted}\), calibrated"):
            bundle_once(other, out, "fp8", "link", silent)


@pytest.mark.usefixtures("_no_graphs")
def test_attention_may_stay_in_16_bits(
    small_model: Path, calibrations: tuple[Path, Path], tmp_path: Path
) -> None:
    """Of weights that are quantised for it; the choice tells bundles apart."""
    sources = {
        kind: Source(str(small_model), calibration=calibrations[0], attention=kind)
        for kind in ("fp8", "16bit")
    }
    for kind, source in sources.items():
        bundle_once(source, tmp_path / kind, "fp8", "link", silent)
        assert (read_manifest(tmp_path / kind)["attention"] is None) == (kind == "16bit")
        bundle_once(source, tmp_path / kind, "fp8", "link", silent)
    with pytest.raises(InvalidInputError, match=r"16 bits\).*, found one of .*attention in fp8"):
        bundle_once(sources["16bit"], tmp_path / "fp8", "fp8", "link", silent)


def test_what_the_golden_edit_needs_is_asked_for_first(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(
        "tensorrt_rtx_bindings", reason="needs the TensorRT-RTX wheels: extra tensorrt-rtx"
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    out = tmp_path / "out"
    order = Order(out, "tensorrt-rtx", "sm_120", ((64, 64),), precision="fp8")
    said: list[str] = []
    with pytest.raises(BackendUnavailableError, match=r"onnxruntime .*fluxkontext\[cpu\]"):
        build(Source(str(small_model), steps=1), order, said.append)
    assert not said
    assert not out.exists()
    assert not stages_folder(out).exists()
