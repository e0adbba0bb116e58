"""The namespace, the environment and the markers that all tests share."""

import os
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

if TYPE_CHECKING:
    from fluxkontext.bench.synthetic import Spec

# `fluxkontext` is this checkout, whatever is installed: otherwise a second clone could silently
# test the first one's code.
for name in [name for name in sys.modules if name.partition(".")[0] == "fluxkontext"]:
    del sys.modules[name]
_spec = ModuleSpec("fluxkontext", loader=None, is_package=True)
_spec.submodule_search_locations = [str(ROOT)]
sys.modules["fluxkontext"] = module_from_spec(_spec)

# Read by torch and the Hugging Face libraries when a test first imports them. The models here are
# tiny: more threads than this only wait for each other, and none may be fetched.
_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
os.environ.setdefault("OMP_NUM_THREADS", str(min(4, _cores)))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what takes minutes unless asked for, and what needs a GPU where there is none; torch is
    imported only if a test asks."""
    if "slow" not in config.getoption("markexpr"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: pytest -m slow"))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    try:
        import torch
    except ImportError:
        reason = "needs torch, which is not installed"
    else:
        if torch.cuda.is_available():
            return
        reason = "needs a CUDA device: torch.cuda.is_available() is false"
    for item in marked:
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def namespace_env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a subprocess in which `fluxkontext` is this checkout.

    Start it in another folder than the repository's root.
    """
    folder = tmp_path_factory.mktemp("namespace")
    (folder / "fluxkontext").symlink_to(ROOT, target_is_directory=True)
    return {**os.environ, "PYTHONPATH": str(folder)}


def small_spec() -> "Spec":
    """A block of each kind with one real head: an edit of 64x64 pixels takes milliseconds."""
    from dataclasses import replace

    from fluxkontext.bench.synthetic import TINY
    from fluxkontext.runtime.config import VaeConfig

    return replace(
        TINY,
        transformer=replace(
            TINY.transformer,
            hidden_size=128,
            num_heads=1,
            depth=1,
            depth_single_blocks=1,
            mlp_hidden=512,
        ),
        vae=VaeConfig(
            block_out_channels=(8, 8, 16, 16),
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=64,
        ),
    )


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of the smallest model; copy it before changing anything."""
    from fluxkontext.bench.synthetic import write_checkpoint

    folder = tmp_path_factory.mktemp("models") / "small"
    write_checkpoint(folder, small_spec())
    return folder


@pytest.fixture(scope="session")
def small_bundle(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest model as a bundle; copy it before changing anything."""
    from fluxkontext.export.bundle import write_bundle
    from fluxkontext.runtime.checkpoint import find

    folder = tmp_path_factory.mktemp("bundles") / "small"
    write_bundle(find(small_model, {}), folder, weights="copy")
    return folder
