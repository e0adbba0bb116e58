"""Models that several files test, pipelines on them, and a command; peers are diffusers' own."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from fluxkontext.runtime import KontextPipeline
from fluxkontext.runtime.cli import main

from . import peers
from .commands import Run
from .edits import EDIT, waiting


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in the published layout."""
    folder = tmp_path_factory.mktemp("checkpoints") / "hub"
    peers.write_hub_folder(folder, peers.transformer(), peers.vae())
    return folder


@pytest.fixture(scope="session")
def single_files(hub: Path) -> dict[str, Path]:
    """The same model as BFL's and other single files; component -> file."""
    return peers.write_single_files(hub, hub.parent / "single")


@pytest.fixture(scope="session")
def hub_pipe(hub: Path) -> KontextPipeline:
    """Ours on ``hub``, fp32; nothing is remembered between calls."""
    return KontextPipeline.from_pretrained(hub, precision="fp32", device="cpu", memo_entries=0)


@pytest.fixture(scope="session")
def peer(hub: Path) -> Any:
    """diffusers' on ``hub``, fp32."""
    return load_peer(hub)


@pytest.fixture(scope="session")
def native_hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As small as can be, but with the real picture sizes, and without guidance embedding."""
    folder = tmp_path_factory.mktemp("checkpoints") / "native"
    autoencoder = peers.vae(widths=(8, 8, 8, 16), norm_num_groups=4, sample_size=1024)
    denoiser = peers.transformer(heads=1, layers=1, guidance=False)
    peers.write_hub_folder(folder, denoiser, autoencoder, clip_prefix="")
    return folder


@pytest.fixture(scope="session")
def native_pipe(native_hub: Path) -> KontextPipeline:
    """Ours on ``native_hub``, fp32; nothing is remembered between calls."""
    return KontextPipeline.from_pretrained(
        native_hub, precision="fp32", device="cpu", memo_entries=0
    )


@pytest.fixture(scope="session")
def native_peer(native_hub: Path) -> Any:
    """diffusers' on ``native_hub``, fp32."""
    return load_peer(native_hub)


@pytest.fixture(scope="module")
def pipe(small_model: Path) -> Iterator[KontextPipeline]:
    """Ours on ``small_model``, for one file, with its memos."""
    with KontextPipeline.from_pretrained(small_model, device="cpu") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def usual(pipe: KontextPipeline) -> Any:
    """What ``EDIT`` gives on ``pipe``."""
    return pipe(**EDIT).images


@pytest.fixture
def still_works(pipe: KontextPipeline, usual: Any) -> Iterator[None]:
    """After the test ``pipe`` gives what it gave before, and nobody waits in it."""
    yield
    np.testing.assert_array_equal(pipe(**EDIT).images, usual)
    assert waiting(pipe) == 0


@pytest.fixture(scope="session")
def bf16_model(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest model in BF16, as the real one is published."""
    folder = Path(shutil.copytree(small_model, tmp_path_factory.mktemp("bf16") / "model"))
    for file in folder.rglob("*.safetensors"):
        rounded = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
        save_file(rounded, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def recipes(bf16_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Recipe -> the smallest model quantised by it."""
    from fluxkontext.export.calibrate import SCENE, calibrate
    from fluxkontext.export.quantize import write_quantised
    from fluxkontext.runtime.checkpoint import find
    from fluxkontext.runtime.recipes import RECIPES

    folder = tmp_path_factory.mktemp("quantised")
    with KontextPipeline.from_pretrained(bf16_model, device="cpu") as pipe:
        found = calibrate(pipe, [SCENE], ["make it red"], steps=2, size=(64, 64))
    found.write(folder / "calibration.json")
    made = {}
    for name, recipe in RECIPES.items():
        made[name] = folder / name
        file = folder / "calibration.json" if recipe.static else None
        write_quantised(find(bf16_model, {}), made[name], recipe.precision, name, file)
    return made


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of 70x40 random colours."""
    file = tmp_path_factory.mktemp("pictures") / "scene.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


@pytest.fixture
def edit(scene: Path, small_model: Path, tmp_path: Path) -> list[object]:
    """A whole command that writes ``out.png``; options that follow win."""
    return ["edit", scene, "-p", "make it red", "-o", tmp_path / "out.png",
            "--model", small_model, "--device", "cpu", "--steps", 2, "--seed", 7]  # fmt: skip


def load_peer(folder: Path, **options: Any) -> Any:
    """diffusers' pipeline, silent."""
    from diffusers import FluxKontextPipeline

    pipeline = FluxKontextPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process."""

    def run_main(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:  # --help and --version
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run_main
