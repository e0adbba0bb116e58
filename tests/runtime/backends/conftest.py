"""A bundle with engines, and the GPU and the library that the host plays for them."""

import gc
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fluxkontext.runtime import KontextPipeline
from fluxkontext.runtime.bundle import Bundle, read_manifest

SET = "tensorrt-rtx-sm_120"


@pytest.fixture(scope="session")
def built(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with real engines of TensorRT-RTX; copy it before changing anything."""
    from fluxkontext.export.build import Order, build

    root = tmp_path_factory.mktemp("engines") / "bundle"
    shutil.copytree(small_bundle, root)
    order = Order(root, "tensorrt-rtx", "sm_120", ((64, 64),), batch=2)
    build(None, order, lambda _: None)
    return root


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of one's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fluxkontext"


@pytest.fixture
def copy(built: Path, tmp_path: Path, cache_folder: Path) -> Path:
    """A bundle of one's own."""
    return Path(shutil.copytree(built, tmp_path / "bundle"))


@pytest.fixture
def library(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An engine library that the host plays, on ``library.cuda``, a GPU that it plays."""
    from fluxkontext.runtime import cuda
    from fluxkontext.runtime.backends import tensorrt_engine, tensorrt_rtx

    from .host_cuda import HostCuda
    from .host_library import HostLibrary

    played = HostLibrary(HostCuda())
    monkeypatch.setattr(cuda, "cudart", played.cuda)
    for module in (tensorrt_engine, tensorrt_rtx):
        monkeypatch.setattr(module, "import_library", lambda _: played)
    monkeypatch.setattr(tensorrt_engine, "start", cache(tensorrt_engine.start.__wrapped__))
    yield played
    gc.collect()  # what is left is freed while the host still plays


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def open_played(
    built: Path, library: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Callable[[], KontextPipeline]:
    """Opens the whole backend on the played GPU, with the library of that name."""
    from fluxkontext.runtime import engines, loader
    from fluxkontext.runtime.backends import tensorrt

    from .host_cuda import GPU

    versions = {request.param: engines.Installed("11.4.0.106", 13)}
    monkeypatch.setattr(tensorrt, "installed", lambda: versions)
    manifest = read_manifest(built)
    manifest["engines"][SET].update(
        library=request.param, version="11.4.0.106", qualified={GPU: {}}
    )
    bundle = Bundle(built, manifest)

    def backend(*_: Any) -> Any:
        return tensorrt.TensorRtBackend(bundle, "auto", "auto")

    monkeypatch.setattr(loader, "open_backend", backend)
    return lambda: KontextPipeline.from_pretrained(built, backend="tensorrt")


@pytest.fixture
def played(open_played: Callable[[], KontextPipeline]) -> Iterator[KontextPipeline]:
    """One of them."""
    with open_played() as pipe:
        yield pipe
