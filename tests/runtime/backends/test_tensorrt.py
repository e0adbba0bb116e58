"""The TensorRT backend: what it refuses before it touches a GPU, and, on one, what it computes."""

import gc
import importlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fluxkontext.runtime import BackendUnavailableError, InvalidInputError, KontextPipeline
from fluxkontext.runtime import bundle as bundles
from fluxkontext.runtime.bundle import (
    SCHEMA_VERSION,
    dump_manifest,
    open_bundle,
    read_manifest,
    update_manifest,
)
from fluxkontext.runtime.cli import main
from fluxkontext.runtime.engines import Gpu, choose_set, installed
from fluxkontext.runtime.errors import CorruptedError, EngineMismatchError
from fluxkontext.runtime.golden import load_golden, replay

pytest.importorskip(
    "tensorrt_rtx_bindings", reason="needs the TensorRT-RTX wheels: extra tensorrt-rtx"
)
pytest.importorskip("cuda.bindings", reason="needs cuda-bindings: extra tensorrt-rtx")
SET = "tensorrt-rtx-sm_120"
BLACKWELL = Gpu("NVIDIA GeForce RTX 5090", "sm_120", 170, 32 * 2**30)


@pytest.fixture(scope="module")
def built(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with real engines of TensorRT-RTX; copy it before changing anything."""
    from fluxkontext.export.build import Order, build

    root = tmp_path_factory.mktemp("engines") / "bundle"
    shutil.copytree(small_bundle, root)
    order = Order(root, "tensorrt-rtx", "sm_120", ((64, 64),), batch=2)
    build(None, order, lambda _: None)
    return root


@pytest.fixture
def copy(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle of one's own, and a cache of one's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(built, tmp_path / "bundle"))


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
def test_the_library_is_asked_as_far_as_the_driver(built: Path) -> None:
    """The real library starts and gives our runtime; its stream reader opens the CUDA driver."""
    from fluxkontext.runtime.backends.tensorrt_engine import Engine

    part = read_manifest(built)["engines"][SET]["components"]["clip"]
    with pytest.raises(BackendUnavailableError, match=r"clip-.*: expected a CUDA driver .* found"):
        Engine("tensorrt-rtx", built / part["file"], "clip", part["profile"])


def test_devices_and_checkpoints_that_it_cannot_use(built: Path, small_model: Path) -> None:
    with pytest.raises(BackendUnavailableError, match="expected auto, cuda or cuda:N"):
        KontextPipeline.from_pretrained(built, backend="tensorrt", device="cpu")
    with pytest.raises(BackendUnavailableError, match="make one with: fluxkontext build"):
        KontextPipeline.from_pretrained(small_model, backend="tensorrt")


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def played(
    built: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[tuple[KontextPipeline, Any]]:
    """The whole backend on a GPU that the host plays, and that GPU."""
    from fluxkontext.runtime import cuda, engines, loader
    from fluxkontext.runtime.backends import tensorrt

    host_cuda = importlib.import_module(".host_cuda", __package__)
    host = host_cuda.HostCuda()
    monkeypatch.setattr(cuda, "cudart", host)
    monkeypatch.setattr(
        tensorrt, "Engine", lambda _library, *rest: host_cuda.HostEngine(host, *rest)
    )
    versions = {request.param: engines.Installed("11.4.0.106", 13)}
    monkeypatch.setattr(tensorrt, "installed", lambda: versions)
    manifest = read_manifest(built)
    manifest["engines"][SET].update(
        library=request.param, version="11.4.0.106", qualified={"gpu": host_cuda.GPU}
    )
    backend = tensorrt.TensorRtBackend(bundles.Bundle(built, manifest), "auto", "auto")
    monkeypatch.setattr(loader, "open_backend", lambda *_: backend)
    monkeypatch.setattr(tensorrt, "save_cache", lambda *_: None)
    pipe = KontextPipeline.from_pretrained(built, backend="tensorrt")
    yield pipe, host
    pipe.close()
    del pipe
    gc.collect()  # while the host still plays


PICTURE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
OTHER = np.random.default_rng(1).integers(0, 256, (48, 80, 3), np.uint8)
CALLS: list[dict[str, Any]] = [
    {"image": PICTURE},
    {"image": None},
    {"image": [PICTURE, OTHER]},
    {"image": PICTURE, "negative_prompt": "a square", "true_cfg_scale": 3.0},
    {"image": PICTURE, "num_images_per_prompt": 2},
    {"image": [PICTURE, PICTURE], "prompt": ["make it red", "remove it"]},
    {"image": PICTURE, "num_inference_steps": 120},  # more than modulation takes at once
]


def test_the_backend_on_a_played_gpu(played: tuple[KontextPipeline, Any], built: Path) -> None:
    """Every kind of edit, in turn and again, so that buffers and recorded runs are used anew."""
    pipe, host = played
    graphs = KontextPipeline.from_pretrained(built, backend="onnx", device="cpu")
    for call in [*CALLS, *CALLS[:4]]:
        call = {"prompt": "make it blue", "num_inference_steps": 3, "seed": 5} | call
        found, wanted = (it(**call, output_type="latent").images for it in (pipe, graphs))
        assert np.allclose(found, wanted, atol=1e-5)
        pictures = [[np.asarray(p, np.int16) for p in it(**call).images] for it in (pipe, graphs)]
        found, wanted = map(np.stack, pictures)
        assert np.abs(found - wanted).max() <= 1
    records = pipe.about["library"].startswith("tensorrt 11")
    assert (host.launches > 100) is records


class OnGpu:
    """An array as PyCUDA, CuPy and Numba have it; ``strides`` of theirs, None if it is dense."""

    def __init__(self, stream: Any, array: np.ndarray[Any, Any], **facts: Any) -> None:
        self.buffer = stream.put(array)
        self.facts = facts

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {**self.buffer.__cuda_array_interface__, **self.facts}


def test_arrays_on_the_gpu_go_in_and_come_out(played: tuple[KontextPipeline, Any]) -> None:
    from fluxkontext.runtime.cuda import to_host

    pipe, _ = played
    stream = pipe.backend._stream
    noise = np.random.default_rng(2).standard_normal((1, 16, 64)).astype(np.float32)
    call: dict[str, Any] = {"prompt": "make it blue", "num_inference_steps": 2}
    there = pipe(
        OnGpu(stream, PICTURE), latents=OnGpu(stream, noise, version=2, strides=None), **call,
        output_type="cuda",
    )  # fmt: skip
    here = pipe(PICTURE, latents=noise, **call)
    (picture,) = there.images
    assert picture.__cuda_array_interface__["typestr"] == "|u1"
    assert np.array_equal(to_host(picture), np.asarray(here.images[0]))
    several = pipe(PICTURE, num_images_per_prompt=2, seed=3, output_type="cuda", **call).images
    wanted = pipe(PICTURE, num_images_per_prompt=2, seed=3, **call).images
    for left, brought in zip(several, wanted, strict=True):
        assert np.array_equal(to_host(left), np.asarray(brought))
    with pytest.raises(InvalidInputError, match="dense and in C's order"):
        pipe(OnGpu(stream, PICTURE, strides=(3, 192, 1)), **call)
    with pytest.raises(InvalidInputError, match="arrays"):
        there.save("never.png")


def test_callbacks_read_and_replace_latents(played: tuple[KontextPipeline, Any]) -> None:
    pipe, _ = played

    def halve(_pipe: Any, i: int, _t: float, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": np.zeros_like(tensors["latents"])} if i == 2 else {}

    result = pipe(
        prompt="x",
        num_inference_steps=3,
        seed=0,
        output_type="latent",
        callback_on_step_end=halve,
    )
    assert not np.any(result.images)


def test_two_states_of_one_shape_do_not_mix(played: tuple[KontextPipeline, Any]) -> None:
    """Their buffers are shared; what each must keep is not."""
    pipe, _ = played
    backend = pipe.backend
    golden = load_golden(Path(pipe.name))
    assert golden is not None
    first, second = (backend.begin(golden.batch(backend)) for _ in range(2))
    backend.write(second, golden.latents[0] + 1)
    for i in range(len(golden.sigmas) - 1):
        backend.step(first, i)
        backend.step(second, i)
    assert np.allclose(backend.read(first), golden.latents[-1], atol=1e-4)
    assert not np.allclose(backend.read(second), golden.latents[-1], atol=1e-1)


def test_the_golden_edit_on_a_played_gpu(played: tuple[KontextPipeline, Any]) -> None:
    pipe, _ = played
    golden = load_golden(Path(pipe.name))
    assert golden is not None
    replay(pipe.backend, golden).check("fp32", "played")


def test_a_size_that_was_not_built_has_exit_code_4(played: tuple[KontextPipeline, Any]) -> None:
    pipe, _ = played
    with pytest.raises(EngineMismatchError, match=r"expected latents of .* build --size") as caught:
        pipe(prompt="x", width=256, height=256, max_area=65536, num_inference_steps=1, seed=0)
    assert caught.value.exit_code == 4
    pipe(prompt="x", num_inference_steps=1, seed=0)  # the next one works


def test_everything_is_freed(played: tuple[KontextPipeline, Any]) -> None:
    pipe, host = played
    pipe(PICTURE, "x", num_inference_steps=2, seed=0)
    assert host.blocks
    pipe.close()
    gc.collect()
    assert not host.blocks


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GPU that the host plays, for the engines that are installed."""
    from fluxkontext.runtime import cuda
    from fluxkontext.runtime.backends import tensorrt

    host_cuda = importlib.import_module(".host_cuda", __package__)
    gpu = host_cuda.HostCuda()
    monkeypatch.setattr(cuda, "cudart", gpu)
    monkeypatch.setattr(tensorrt, "Engine", lambda _, *rest: host_cuda.HostEngine(gpu, *rest))
    monkeypatch.setattr(tensorrt, "save_cache", lambda *_: None)
    return host_cuda


def test_engines_are_qualified_as_they_are_built(
    copy: Path, host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And stay so when they are built again where they cannot run."""
    from fluxkontext.export.build import Order, build

    order = Order(copy, "tensorrt-rtx", "sm_120", ((64, 64),), batch=2)
    assert build(None, order, lambda _: None)["qualified"] is True
    passed = read_manifest(copy)["engines"][SET]["qualified"]
    assert passed["gpu"] == host.GPU
    assert 0 <= passed["velocity_error"] < 1e-4
    monkeypatch.setattr(host.HostCuda, "cudaGetDeviceCount", lambda _: (*host.OK, 0))
    assert build(None, order, lambda _: None)["qualified"] is False
    assert read_manifest(copy)["engines"][SET]["qualified"] == passed


def test_engines_that_fail_are_not_installed(
    copy: Path, host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fluxkontext.export.build import Order, build

    run = host.HostEngine.run

    def wrong(self: Any, stream: int) -> None:
        run(self, stream)
        if self.name == "transformer":
            size = 4 * int(np.prod(self.shapes["latents"]))
            held = [self.cuda.view(self.addresses[key], size) for key in ("next", "velocity")]
            self.cuda.do(lambda: [np.frombuffer(it, np.float32).__iadd__(1) for it in held])

    monkeypatch.setattr(host.HostEngine, "run", wrong)
    order = Order(copy, "tensorrt-rtx", "sm_120", ((64, 64),), batch=2)
    said: list[str] = []
    with pytest.raises(CorruptedError, match=f"{SET} on {host.GPU}.*error of velocity"):
        build(None, order, said.append)
    assert "engines" not in read_manifest(copy) or SET not in read_manifest(copy)["engines"]
    assert not list(copy.rglob("*.engine"))
    assert list(copy.rglob("*.log"))
    assert not any("passed" in line for line in said)


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
