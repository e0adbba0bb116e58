"""Checkpoints that diffusers and transformers made, and both pipelines on them."""

from pathlib import Path
from typing import Any

import pytest

from fluxkontext.runtime import KontextPipeline

from . import peers


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
def pipe(hub: Path) -> KontextPipeline:
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


def load_peer(folder: Path, **options: Any) -> Any:
    """diffusers' pipeline, silent."""
    from diffusers import FluxKontextPipeline

    pipeline = FluxKontextPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
