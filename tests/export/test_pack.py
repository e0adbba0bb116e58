"""`build --pack`: engines, tokenizers and the golden edit, and nothing that engines do not need."""

import shutil
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from fluxkontext.export.build import Order, build
from fluxkontext.runtime import BackendUnavailableError, CheckpointError, KontextPipeline
from fluxkontext.runtime.bundle import open_bundle, read_manifest, update_manifest
from fluxkontext.runtime.cli import main
from fluxkontext.runtime.engines import Gpu, choose_set, installed
from fluxkontext.runtime.errors import EngineMismatchError
from fluxkontext.runtime.golden import load_golden

from .test_embed import schema

pytest.importorskip(
    "tensorrt_rtx_bindings", reason="needs the TensorRT-RTX wheels: extra tensorrt-rtx"
)
SET = "tensorrt-rtx-sm_120"


@pytest.fixture(scope="module")
def whole(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with engines, packed beside itself by the same command."""
    root = tmp_path_factory.mktemp("pack") / "whole"
    shutil.copytree(small_bundle, root)
    order = Order(root, "tensorrt-rtx", "sm_120", ((64, 64),), pack=root.with_name("packed"))
    assert build(None, order, lambda _: None)["packed"] == str(root.with_name("packed"))
    return root


@pytest.fixture
def packed(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole.with_name("packed"), tmp_path / "packed"))


def test_it_holds_what_engines_need(whole: Path, packed: Path) -> None:
    manifest = open_bundle(packed, "always").manifest
    Draft202012Validator(schema()).validate(manifest)
    files = {path.relative_to(packed).as_posix() for path in packed.rglob("*") if path.is_file()}
    assert files == {"manifest.json", *manifest["files"]}
    engines = {part["file"] for part in manifest["engines"][SET]["components"].values()}
    rest = files - engines
    assert len(engines) == 6
    assert {name.partition("/")[0] for name in rest} == {
        *("manifest.json", "golden.safetensors", "tokenizer", "tokenizer_2"),
    }
    assert not [name for name in files if name.endswith(".onnx")]
    before = read_manifest(whole)
    same = {"engines", "vae", "scheduler", "tokenizers", "sigma_test_vectors", "precision"}
    assert all(manifest[key] == before[key] for key in same)
    assert load_golden(packed) is not None
    versions = {"tensorrt-rtx": installed()["tensorrt-rtx"].version}
    blackwell = Gpu("NVIDIA GeForce RTX 5090", "sm_120", 170, 2**35)
    assert choose_set(manifest, blackwell, versions, qualified=False)[0] == SET


def test_packing_again_finds_it_there(whole: Path, packed: Path) -> None:
    """What its engines have passed since does not make it another."""
    said: list[str] = []
    passed = {"NVIDIA GeForce RTX 5090": {"velocity_error": 0.01}}
    update_manifest(packed, lambda it: it["engines"][SET].update(qualified=passed))
    build(None, Order(whole, "tensorrt-rtx", "sm_120", ((64, 64),), pack=packed), said.append)
    assert said[-1] == f"pack: {packed} is there"
    assert read_manifest(packed)["engines"][SET]["qualified"] == passed


def test_another_folder_is_not_overwritten(
    whole: Path, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    update_manifest(packed, lambda it: it.update(model="another"))
    text = (packed / "manifest.json").read_text()
    command = ["build", str(whole), "--size", "64x64", "--engine", "tensorrt-rtx"]
    assert main([*command, "--target", "sm_120", "--pack", str(packed)]) == 2
    assert "found another bundle; name another folder" in capsys.readouterr().err
    assert (packed / "manifest.json").read_text() == text


def test_what_needs_graphs_says_so(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for backend in ("onnx", "native"):
        with pytest.raises(BackendUnavailableError, match="packed with engines alone; use backend"):
            KontextPipeline.from_pretrained(packed, backend=backend)
    with pytest.raises(CheckpointError, match="use the one that it was packed from"):
        open_bundle(packed).graph("clip", "gpu")
    command = ["build", str(packed), "--size", "64x64", "--engine", "tensorrt-rtx"]
    assert main([*command, "--target", "sm_89"]) == 3
    assert "use the one that it was packed from" in capsys.readouterr().err
    assert main(["doctor", str(packed)]) == 0
    assert main(["inspect", str(packed)]) == 0


def test_by_choice_it_runs_engines_or_nothing(packed: Path) -> None:
    """Here there is no GPU, or one that they have not passed on: either is said."""
    wanted = (BackendUnavailableError, EngineMismatchError)
    with pytest.raises(wanted, match=r"expected (an NVIDIA GPU|engines)"):
        KontextPipeline.from_pretrained(packed)


def test_tampering_is_found(packed: Path) -> None:
    for name in ("golden.safetensors", "tokenizer/vocab.json"):
        data = bytearray((packed / name).read_bytes())
        data[-1] ^= 1
        (packed / name).unlink()
        (packed / name).write_bytes(data)
        output = packed.parent / "o.png"
        assert main(["generate", "-p", "x", "--model", str(packed), "-o", str(output)]) == 6


def test_a_bundle_without_engines_is_not_packed(small_bundle: Path, tmp_path: Path) -> None:
    from fluxkontext.export.pack import pack

    with pytest.raises(CheckpointError, match="expected engines to pack, found none"):
        pack(small_bundle, tmp_path / "out", lambda _: None)
    assert not (tmp_path / "out").exists()
