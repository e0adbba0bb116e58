"""The golden edit: made in fp32, reproduced by every backend, and told apart from a wrong one."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fluxkontext.export.build import golden_of
from fluxkontext.runtime import CorruptedError
from fluxkontext.runtime.bundle import file_entry, open_bundle, update_manifest
from fluxkontext.runtime.cli import main
from fluxkontext.runtime.geometry import Grid
from fluxkontext.runtime.golden import (
    GOLDEN,
    PIXEL_LIMITS,
    VELOCITY_LIMITS,
    golden_size,
    load_golden,
    replay,
)
from fluxkontext.runtime.loader import load


@pytest.fixture(scope="module")
def bundle(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a golden edit of one context; copy it before changing anything."""
    root = tmp_path_factory.mktemp("golden") / "bundle"
    shutil.copytree(small_bundle, root, copy_function=shutil.copy)
    golden_of(root)  # as `export --golden` does
    return root


def test_the_bundle_lists_it(bundle: Path) -> None:
    assert GOLDEN in open_bundle(bundle, "always").manifest["files"]


def test_it_is_the_published_size_divided() -> None:
    assert golden_size(Grid()) == (128, 128)
    assert golden_size(Grid(16, 128)) == (64, 64)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_native_backend_reproduces_it(bundle: Path, precision: str) -> None:
    """Another implementation in another library; 16-bit formats are off, but by their roundoff."""
    golden = load_golden(bundle)
    assert golden is not None
    backend = load(bundle, {}, "native", precision, "cpu", "never").backend
    outcome = replay(backend, golden)
    outcome.check(precision, "native")
    assert len(outcome.velocity) == 4
    if precision != "fp32":
        # so that the limits are neither idle nor tight: between 1/40 and 1/2 of them
        error = max(outcome.velocity)
        assert VELOCITY_LIMITS[precision] / 40 < error < VELOCITY_LIMITS[precision] / 2
        assert outcome.pixels < PIXEL_LIMITS[precision] / 2


def test_its_latents_are_a_plain_edit(bundle: Path) -> None:
    """Without being set back before every step, the edit still ends where it ended."""
    golden = load_golden(bundle)
    assert golden is not None
    backend = load(bundle, {}, "native", "fp32", "cpu", "never").backend
    state = backend.begin(golden.batch(backend))
    for i in range(len(golden.sigmas) - 1):
        backend.step(state, i)
    assert np.allclose(backend.read(state), golden.latents[-1], atol=1e-3)
    assert np.abs(backend.decode(state)[0].astype(int) - golden.pixels[0]).max() <= 1


@pytest.mark.parametrize("name", ["latents", "pixels"])
def test_a_wrong_one_has_exit_code_6(
    bundle: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What doctor replays here differs from what the bundle says, though every digest is right."""
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    assert main(["doctor", str(copy), "--json"]) == 0
    tensors = load_file(copy / GOLDEN)
    if name == "latents":
        tensors[name][2] += 0.05
    else:
        tensors[name] += np.uint8(9)
    with (copy / GOLDEN).open("rb") as file:
        about = file.read()
    metadata = {"contexts": "1", "target": "[4, 4]", "guidance": "2.5", "prompt": '"x"'}
    assert b'"contexts":"1"' in about
    save_file(tensors, copy / GOLDEN, metadata)
    update_manifest(copy, lambda it: it["files"].update({GOLDEN: file_entry(copy / GOLDEN)}))
    capsys.readouterr()
    assert main(["doctor", str(copy)]) == 6
    kind = "velocity" if name == "latents" else "pixels"
    assert f"an error of {kind} up to" in capsys.readouterr().err


def test_a_flipped_bit_is_found(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    data = bytearray((copy / GOLDEN).read_bytes())
    data[-1] ^= 1
    (copy / GOLDEN).write_bytes(data)
    with pytest.raises(CorruptedError, match=f"{GOLDEN}: expected digest"):
        open_bundle(copy)


def test_something_else_in_its_place(tmp_path: Path) -> None:
    assert load_golden(tmp_path) is None
    for content in (b"", b"x" * 100):
        (tmp_path / GOLDEN).write_bytes(content)
        with pytest.raises(CorruptedError, match="expected a golden edit"):
            load_golden(tmp_path)
    save_file({"clip": np.zeros(77, np.int64)}, tmp_path / GOLDEN)
    with pytest.raises(CorruptedError, match="expected a golden edit"):
        load_golden(tmp_path)
