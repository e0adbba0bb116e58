"""Export and build, killed at every stage: what was there stays usable, the next run resumes."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from fluxkontext.export import bundle as exporter
from fluxkontext.export import prepare
from fluxkontext.export.bundle import write_bundle
from fluxkontext.export.prepare import stages_folder
from fluxkontext.runtime import KontextPipeline
from fluxkontext.runtime.bundle import open_bundle, read_manifest
from fluxkontext.runtime.checkpoint import find
from fluxkontext.runtime.files import whole_folder

COMMAND = (
    "-c",
    "import sys; from fluxkontext.runtime.cli import main; sys.exit(main(sys.argv[1:]))",
)
PATIENCE = 180
"""Seconds until a stage must have begun."""


def started(arguments: list[str], env: dict[str, str], log: Path) -> "subprocess.Popen[bytes]":
    """The command line in a process of its own, what it says in a file."""
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, *COMMAND, *arguments], env=env, cwd=log.parent, stdout=out, stderr=out
        )


def killed_when(process: "subprocess.Popen[bytes]", begun: Callable[[], bool], log: Path) -> None:
    """Kill it as soon as ``begun``; it must not have ended by itself."""
    until = time.monotonic() + PATIENCE
    while not begun():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL, log.read_text()


@pytest.mark.slow
def test_a_killed_export_leaves_no_bundle(
    small_model: Path, tmp_path: Path, namespace_env: dict[str, str]
) -> None:
    """Before the first graph, and among graphs: no folder, then a whole one."""
    out, log = tmp_path / "folder" / "out", tmp_path / "log"
    building = out.with_name(".out.building")
    for sign in ("transformer/*.safetensors", "modulation.cpu.onnx"):
        process = started(["export", str(small_model), "-o", str(out)], namespace_env, log)
        killed_when(process, lambda sign=sign: any(building.glob(sign)), log)
        assert not out.exists()
    write_bundle(find(small_model, {}), out)
    open_bundle(out, "always")
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_build_killed_at_every_stage_goes_on(
    small_model: Path, tmp_path: Path, namespace_env: dict[str, str]
) -> None:
    """From a checkpoint to FP8 engines: six runs, of which five are killed, each one stage later,
    and none does again what another has finished."""
    pytest.importorskip(
        "tensorrt_rtx_bindings", reason="needs the TensorRT-RTX wheels: extra tensorrt-rtx"
    )
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = ["build", str(small_model), "-o", str(out), "--size", "64x64", "--precision", "fp8"]
    arguments += ["--engine", "tensorrt-rtx", "--target", "sm_89", "--calibration-steps", "1"]
    stages = ["calibrate:", "quantise:", "export:", "golden edit:", "compile:"]
    manifest = None
    for number, stage in enumerate(stages):
        process = started(arguments, namespace_env, log)

        def begun(stage: str = stage) -> bool:
            seen = any(line.startswith(stage) for line in log.read_text().splitlines())
            return seen and (stage != "compile:" or bool(list(out.glob("engines/*/t5-*.engine"))))

        killed_when(process, begun, log)
        said = log.read_text()
        assert not [before for before in stages[: max(number - 1, 0)][:2] if before in said]
        if out.exists():  # usable as it is
            manifest = open_bundle(out, "always").manifest
            assert manifest["recipe"] == "fp8-static"
            assert "engines" not in manifest
    assert manifest is not None
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    process = started(arguments, namespace_env, log)
    assert process.wait(PATIENCE) == 0, log.read_text()
    assert f"export: {out} is there" in log.read_text()
    same = {
        path for path, stamp in kept.items() if path.exists() and path.stat().st_mtime_ns == stamp
    }
    assert {path.suffix for path in set(kept) - same} <= {".json", ".partial", ".lock", ".log"}
    assert {"clip", "t5"} <= {
        path.name.partition("-")[0] for path in same if path.suffix == ".engine"
    }
    assert set(open_bundle(out, "always").manifest["engines"]) == {"tensorrt-rtx-sm_89"}
    assert not stages_folder(out).exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]
    with KontextPipeline.from_pretrained(out, device="cpu") as pipe:
        assert pipe.about["backend"] == "onnx"


def test_a_bundle_that_was_marked_late_is_taken(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What tells a bundle's source is there as soon as the bundle is: killed in between, the next
    run would find a stranger's. The stages go last."""
    monkeypatch.setattr(exporter, "graphs", lambda *_: [])  # what surrounds it is looked at
    out = tmp_path / "out"
    source = prepare.Source(str(small_model), steps=1)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "shutil", SimpleNamespace(rmtree=killed))
        with pytest.raises(KeyboardInterrupt):
            prepare.bundle_once(source, out, "nvfp4", "link", lambda _: None)
    assert stages_folder(out).exists()
    manifest = read_manifest(out)
    assert manifest["model"] == str(small_model)
    said: list[str] = []
    prepare.bundle_once(source, out, "nvfp4", "link", said.append)
    assert said == [f"export: {out} is there"]
    assert not stages_folder(out).exists()
    other = prepare.Source(str(small_model), steps=2)
    with pytest.raises(prepare.InvalidInputError, match="calibrated as asked"):
        prepare.bundle_once(other, out, "nvfp4", "link", said.append)


def test_what_a_dead_process_left_goes(tmp_path: Path) -> None:
    left = tmp_path / ".out.building"
    left.mkdir()
    (left / "half").touch()
    with whole_folder(tmp_path / "out") as building:
        (building / "whole").touch()
        assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]
    with pytest.raises(FileExistsError), whole_folder(tmp_path / "out"):
        pass
    with pytest.raises(OSError, match="disk"), whole_folder(tmp_path / "new"):
        raise OSError("disk")
    assert os.listdir(tmp_path) == ["out"]
    shutil.rmtree(tmp_path / "out")
