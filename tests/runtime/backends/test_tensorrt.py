"""The TensorRT backend: what it refuses before it touches a GPU, and, on one, what it computes."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fluxkontext.runtime import BackendUnavailableError, KontextPipeline
from fluxkontext.runtime.bundle import (
    SCHEMA_VERSION,
    dump_manifest,
    open_bundle,
    read_manifest,
    update_manifest,
)
from fluxkontext.runtime.cli import main
from fluxkontext.runtime.engines import Gpu, choose_set, installed
from fluxkontext.runtime.errors import EngineMismatchError

from .conftest import SET

pytest.importorskip(
    "tensorrt_rtx_bindings", reason="needs the TensorRT-RTX wheels: extra tensorrt-rtx"
)
pytest.importorskip("cuda.bindings", reason="needs cuda-bindings: extra tensorrt-rtx")
BLACKWELL = Gpu("NVIDIA GeForce RTX 5090", "sm_120", 170, 32 * 2**30)


def engine(root: Path, component: str = "transformer") -> Path:
    file: str = read_manifest(root)["engines"][SET]["components"][component]["file"]
    return root / file


def fails(root: Path, code: int, capsys: pytest.CaptureFixture[str], backend: str) -> str:
    """The one line that an edit ends with, and the exit code that it must have."""
    output = root.parent / "o.png"
    command = ["generate", "-p", "x", "--model", str(root), "-o", str(output), "--steps", "1"]
    capsys.readouterr()
    assert main([*command, "--backend", backend]) == code
    assert not output.exists()
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("backend", ["tensorrt", "onnx"])
def test_a_flipped_bit_in_an_engine(
    copy: Path, capsys: pytest.CaptureFixture[str], backend: str
) -> None:
    data = bytearray(engine(copy).read_bytes())
    data[len(data) // 2] ^= 1
    engine(copy).write_bytes(data)
    err = fails(copy, 6, capsys, backend)
    assert engine(copy).name in err
    assert "expected digest" in err


def test_a_truncated_engine(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = engine(copy).read_bytes()
    engine(copy).write_bytes(data[: len(data) // 2])
    err = fails(copy, 6, capsys, "tensorrt")
    assert f"expected {len(data)} bytes, found {len(data) // 2}" in err


def test_a_missing_engine(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine(copy).unlink()
    assert "expected this file" in fails(copy, 3, capsys, "tensorrt")


def test_a_manifest_from_the_future(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = {**read_manifest(copy), "schema_version": SCHEMA_VERSION + 1}
    (copy / "manifest.json").write_text(dump_manifest(manifest))
    assert "upgrade fluxkontext" in fails(copy, 3, capsys, "tensorrt")


def test_an_engine_path_that_leads_out(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(manifest: dict[str, Any]) -> None:
        entry = manifest["files"].pop(engine(copy).relative_to(copy).as_posix())
        manifest["files"]["../transformer.engine"] = entry

    update_manifest(copy, change)
    assert "names inside the bundle" in fails(copy, 6, capsys, "tensorrt")


@pytest.mark.parametrize(
    ("changes", "gpu", "reason"),
    [
        ({}, Gpu("NVIDIA L4", "sm_89", 58, 2**34), "expected a GPU of sm_120, found NVIDIA L4"),
        ({"version": "1.6.1.120"}, BLACKWELL, "expected tensorrt-rtx 1.6.1.120, found 1.7.1"),
        ({"library": "tensorrt"}, BLACKWELL, "expected tensorrt 1.7.1"),
        ({}, BLACKWELL, "did not pass on this NVIDIA GeForce RTX 5090 yet"),
    ],
)
def test_real_engines_elsewhere(copy: Path, changes: dict[str, str], gpu: Gpu, reason: str) -> None:
    update_manifest(copy, lambda it: it["engines"][SET].update(changes))
    manifest = open_bundle(copy).manifest
    versions = {"tensorrt-rtx": installed()["tensorrt-rtx"].version}
    with pytest.raises(EngineMismatchError, match=reason) as caught:
        choose_set(manifest, gpu, versions, qualified=True)
    assert caught.value.exit_code == 4


def test_real_engines_that_fit(built: Path) -> None:
    versions = {"tensorrt-rtx": installed()["tensorrt-rtx"].version}
    name, _ = choose_set(open_bundle(built).manifest, BLACKWELL, versions, qualified=False)
    assert name == SET


def has_gpu() -> bool:
    from fluxkontext.runtime.cuda import gpus

    try:
        return bool(gpus())
    except BackendUnavailableError:
        return False


@pytest.mark.skipif(has_gpu(), reason="about a machine without a GPU; this one has one")
def test_without_a_gpu(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By name: one line. By choice: the graphs, since engines run nowhere here."""
    assert "expected an NVIDIA GPU" in fails(built, 1, capsys, "tensorrt")
    pipe = KontextPipeline.from_pretrained(built, backend="auto", device="cpu")
    assert pipe.about["backend"] == "onnx"


@pytest.mark.skipif(has_gpu(), reason="about a machine without a GPU; this one has one")
def test_the_library_is_asked_as_far_as_the_driver(built: Path, tmp_path: Path) -> None:
    """The real library starts and gives our runtime; its stream reader opens the CUDA driver."""
    from fluxkontext.runtime.backends.tensorrt_engine import Engine

    part = read_manifest(built)["engines"][SET]["components"]["clip"]
    with pytest.raises(BackendUnavailableError, match=r"clip-.*: expected a CUDA driver .* found"):
        Engine("tensorrt-rtx", built / part["file"], "clip", part["profile"], tmp_path / "kernels")


def test_devices_and_checkpoints_that_it_cannot_use(built: Path, small_model: Path) -> None:
    with pytest.raises(BackendUnavailableError, match="expected auto, cuda or cuda:N"):
        KontextPipeline.from_pretrained(built, backend="tensorrt", device="cpu")
    with pytest.raises(BackendUnavailableError, match="make one with: fluxkontext build"):
        KontextPipeline.from_pretrained(small_model, backend="tensorrt")


@pytest.mark.gpu
def test_engines_for_this_gpu_equal_the_graphs(
    small_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Built and qualified on the GPU here, chosen unasked, and within the golden edit's limits."""
    from fluxkontext.export.build import Order, build
    from fluxkontext.runtime.cuda import gpus
    from fluxkontext.runtime.engines import RTX_TARGETS

    rtx = "tensorrt" not in installed()
    if rtx and gpus()[0].sm not in RTX_TARGETS:
        pytest.skip(f"TensorRT-RTX has no {gpus()[0].sm}, and TensorRT is not installed")
    root = Path(shutil.copytree(small_bundle, tmp_path / "bundle"))
    library = "tensorrt-rtx" if rtx else "tensorrt"
    facts = build(None, Order(root, library, None, ((64, 64),), (0, 2), 2), lambda _: None)
    assert facts["qualified"]
    pipe = KontextPipeline.from_pretrained(root, backend="auto")
    assert pipe.about["backend"] == "tensorrt"
    graphs = KontextPipeline.from_pretrained(root, backend="onnx", device="cpu")
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for call in (
        {"image": picture},
        {"image": None},
        {"image": [picture, picture]},
        {"image": picture, "num_images_per_prompt": 2},
        {"image": picture, "negative_prompt": "a square", "true_cfg_scale": 3.0},
    ):
        latents = [
            it(prompt="make it blue", num_inference_steps=4, seed=5, output_type="latent", **call)
            for it in (pipe, pipe, graphs)
        ]
        first, again, wanted = (np.stack(it.images) for it in latents)
        assert np.array_equal(first, again)  # the second run is the recorded one
        assert np.sqrt(np.mean((first - wanted) ** 2) / np.mean(wanted**2)) < 0.05
    assert main(["doctor", str(root), "--json"]) == 0
