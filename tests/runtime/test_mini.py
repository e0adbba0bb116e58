"""The miniature that comes with the package: what is missing without it is the folder alone."""

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import setuptools

from fluxkontext.runtime import CheckpointError, KontextPipeline, checkpoint
from fluxkontext.runtime.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def shipped(small_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another bundle in its place."""
    monkeypatch.setattr(checkpoint, "MINI_FOLDER", small_bundle)
    return small_bundle


def test_it_is_the_default(shipped: Path, tmp_path: Path) -> None:
    """Of the pipeline and of the commands, and of both by name."""
    for arguments in ((), ("mini",)):
        with KontextPipeline.from_pretrained(*arguments, device="cpu") as pipe:
            assert (pipe.name, pipe.about["backend"]) == ("mini", "onnx")
    picture = tmp_path / "a.png"
    assert main(["generate", "-p", "x", "-o", str(picture), "--steps", "1", "--quiet"]) == 0
    edited = tmp_path / "b.png"
    assert main(["edit", str(picture), "-p", "x", "-o", str(edited), "--steps", "1"]) == 0
    assert edited.exists()


def test_it_is_inspected_and_verified_by_name(
    shipped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "mini", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "bundle"
    assert main(["doctor", "mini", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bundle"]["path"] == str(shipped)


def test_a_folder_of_that_name_is_not_it(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mini").mkdir()
    assert checkpoint.resolve("mini") == shipped
    assert checkpoint.resolve("./mini") == Path("mini")


def test_without_it_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoint, "MINI_FOLDER", tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"trained miniature in .*nowhere, found none"):
        KontextPipeline.from_pretrained()
    assert main(["generate", "-p", "x", "-o", str(tmp_path / "o.png")]) == 3
    assert "name another model: a folder" in capsys.readouterr().err


def test_the_package_brings_what_files_it_has(
    small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runtime").mkdir()
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copy(ROOT / "runtime" / "about.py", tmp_path / "runtime")
    told: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **facts: told.update(facts))
    runpy.run_path(str(tmp_path / "setup.py"))
    assert told["package_data"]["fluxkontext.runtime"] == ["py.typed"]
    shutil.copytree(small_bundle, tmp_path / "runtime" / "mini")
    runpy.run_path(str(tmp_path / "setup.py"))
    files = json.loads((small_bundle / "manifest.json").read_text())["files"]
    assert set(told["package_data"]["fluxkontext.runtime"]) == {
        *("py.typed", "mini/manifest.json"),
        *(f"mini/{name}" for name in files),
    }
