"""The embedding example, and the manifest's published form."""

import json
import runpy
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from fluxkontext.runtime import KontextPipeline
from fluxkontext.runtime.bundle import MANIFEST, open_bundle
from fluxkontext.runtime.checkpoint import find
from fluxkontext.runtime.golden import load_golden, record

EXAMPLE = Path(__file__).parents[2] / "examples" / "embed" / "replay.py"


@pytest.fixture(scope="module")
def bundle(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a golden edit that the native backend made."""
    folder = tmp_path_factory.mktemp("embed") / "bundle"
    shutil.copytree(small_bundle, folder)
    scheduler = find(folder, {}).scheduler
    with KontextPipeline.from_pretrained(
        folder, backend="native", precision="fp32", device="cpu"
    ) as pipe:
        record(open_bundle(folder), pipe.backend, scheduler, (64, 48), contexts=2, batch=2)
    return folder


def replayed(bundle: Path) -> "subprocess.CompletedProcess[str]":
    """The example in a process that can import neither of us nor torch."""
    code = (
        "import runpy, sys; sys.modules.update(fluxkontext=None, torch=None, safetensors=None); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-I", "-c", code, str(EXAMPLE), str(bundle)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_example_makes_the_golden_edit(bundle: Path) -> None:
    done = replayed(bundle)
    assert done.returncode == 0, done.stderr
    levels = int(done.stdout.split("at most ")[1].split()[0])
    golden = load_golden(bundle)
    assert golden is not None
    assert levels <= 1
    assert np.ptp(golden.pixels) > 20  # not one colour, which any code could draw


def test_without_a_golden_edit_the_example_says_what_to_do(small_bundle: Path) -> None:
    done = replayed(small_bundle)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.endswith("with: fluxkontext export CHECKPOINT --golden -o BUNDLE")


def test_the_example_takes_the_engines_of_its_gpu() -> None:
    choose = runpy.run_path(str(EXAMPLE))["chosen_set"]
    pairs = [("tensorrt-rtx", "sm_89"), ("tensorrt-rtx", "sm_120"), ("tensorrt", "sm_90")]
    sets = {str(i): {"library": name, "target": sm} for i, (name, sm) in enumerate(pairs)}
    for entry in sets.values():
        assert choose({"engines": sets}, entry["library"], entry["target"]) == entry
    with pytest.raises(SystemExit, match="for the sm_90 in this machine, found sm_89, sm_120"):
        choose({"engines": sets}, "tensorrt-rtx", "sm_90")
    with pytest.raises(SystemExit, match="found none; make them with: fluxkontext build"):
        choose({}, "tensorrt", "sm_90")


def schema() -> dict[str, Any]:
    text = files("fluxkontext.export").joinpath("manifest.schema.json").read_text("utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def test_manifests_have_the_published_form(bundle: Path) -> None:
    Draft202012Validator.check_schema(schema())
    manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    Draft202012Validator(schema()).validate(manifest)


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"recipe": "fp3"},
        {"files": {"../weights": {"size": 1, "digest": "0" * 64}}},
        {"files": {"weights": {"size": 1, "digest": "0"}}},
        {"components": {}},
        {"surprise": 1},
    ],
    ids=str,
)
def test_other_manifests_have_not(bundle: Path, change: dict[str, Any]) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    assert not Draft202012Validator(schema()).is_valid({**manifest, **change})
