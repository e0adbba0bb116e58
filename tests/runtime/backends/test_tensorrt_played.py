"""The TensorRT backend on a GPU that the host plays: what it computes, keeps and frees."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fluxkontext.runtime import InvalidInputError, KontextPipeline
from fluxkontext.runtime.bundle import read_manifest
from fluxkontext.runtime.errors import CorruptedError, EngineMismatchError, KontextError
from fluxkontext.runtime.golden import load_golden, replay

from .conftest import SET

pytest.importorskip(
    "tensorrt_rtx_bindings", reason="needs the TensorRT-RTX wheels: extra tensorrt-rtx"
)
pytest.importorskip("cuda.bindings", reason="needs cuda-bindings: extra tensorrt-rtx")

Opener = Callable[[], KontextPipeline]
PICTURE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
OTHER = np.random.default_rng(1).integers(0, 256, (48, 80, 3), np.uint8)


def embedded(tokens: int, negative: int) -> dict[str, Any]:
    """True CFG of two prompts that are encoded already, of so many tokens."""
    random = np.random.default_rng(2).standard_normal
    return {
        "prompt": None,
        "prompt_embeds": random((1, tokens, 64), np.float32),
        "pooled_prompt_embeds": random((1, 64), np.float32),
        "negative_prompt_embeds": random((1, negative, 64), np.float32),
        "negative_pooled_prompt_embeds": random((1, 64), np.float32),
        "true_cfg_scale": 3.0,
    }


CALLS: list[dict[str, Any]] = [
    {"image": PICTURE},
    {"image": None},
    {"image": [PICTURE, OTHER]},
    {"image": PICTURE, "negative_prompt": "a square", "true_cfg_scale": 3.0},
    {"image": PICTURE, "num_images_per_prompt": 2},
    {"image": [PICTURE, PICTURE], "prompt": ["make it red", "remove it"]},
    {"image": PICTURE, "num_inference_steps": 120},  # more than modulation takes at once
    {"image": PICTURE, **embedded(10, 4)},
    {"image": PICTURE, **embedded(4, 10)},
]


def test_every_kind_of_edit(played: KontextPipeline, library: Any, built: Path) -> None:
    """Every kind of edit, in turn and again, so that buffers and recorded runs are used anew."""
    graphs = KontextPipeline.from_pretrained(built, backend="onnx", device="cpu")
    for call in [*CALLS, *CALLS[:4]]:
        call = {"prompt": "make it blue", "num_inference_steps": 3, "seed": 5} | call
        found, wanted = (it(**call, output_type="latent").images for it in (played, graphs))
        assert np.allclose(found, wanted, atol=1e-5)
        pictures = [[np.asarray(p, np.int16) for p in it(**call).images] for it in (played, graphs)]
        found, wanted = map(np.stack, pictures)
        assert np.abs(found - wanted).max() <= 1
    records = played.about["library"].startswith("tensorrt 11")
    assert (library.cuda.launches > 100) is records


class OnGpu:
    """An array as PyCUDA, CuPy and Numba have it; ``strides`` of theirs, None if it is dense."""

    def __init__(self, stream: Any, array: np.ndarray[Any, Any], **facts: Any) -> None:
        self.buffer = stream.put(array)
        self.facts = facts

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {**self.buffer.__cuda_array_interface__, **self.facts}


def test_arrays_on_the_gpu_go_in_and_come_out(played: KontextPipeline) -> None:
    from fluxkontext.runtime.cuda import to_host

    stream = played.backend._stream
    noise = np.random.default_rng(2).standard_normal((1, 16, 64)).astype(np.float32)
    call: dict[str, Any] = {"prompt": "make it blue", "num_inference_steps": 2}
    there = played(
        OnGpu(stream, PICTURE), latents=OnGpu(stream, noise, version=2, strides=None), **call,
        output_type="cuda",
    )  # fmt: skip
    here = played(PICTURE, latents=noise, **call)
    (picture,) = there.images
    assert picture.__cuda_array_interface__["typestr"] == "|u1"
    assert np.array_equal(to_host(picture), np.asarray(here.images[0]))
    several = played(PICTURE, num_images_per_prompt=2, seed=3, output_type="cuda", **call).images
    wanted = played(PICTURE, num_images_per_prompt=2, seed=3, **call).images
    for left, brought in zip(several, wanted, strict=True):
        assert np.array_equal(to_host(left), np.asarray(brought))
    with pytest.raises(InvalidInputError, match="dense and in C's order"):
        played(OnGpu(stream, PICTURE, strides=(3, 192, 1)), **call)
    with pytest.raises(InvalidInputError, match="arrays"):
        there.save("never.png")


def test_callbacks_read_and_replace_latents(played: KontextPipeline) -> None:

    def halve(_pipe: Any, i: int, _t: float, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": np.zeros_like(tensors["latents"])} if i == 2 else {}

    result = played(
        prompt="x",
        num_inference_steps=3,
        seed=0,
        output_type="latent",
        callback_on_step_end=halve,
    )
    assert not np.any(result.images)


def test_two_states_of_one_shape_do_not_mix(played: KontextPipeline) -> None:
    """Their buffers are shared; what each must keep is not."""
    backend = played.backend
    golden = load_golden(Path(played.name))
    assert golden is not None
    first, second = (backend.begin(golden.batch(backend)) for _ in range(2))
    backend.write(second, golden.latents[0] + 1)
    for i in range(len(golden.sigmas) - 1):
        backend.step(first, i)
        backend.step(second, i)
    assert np.allclose(backend.read(first), golden.latents[-1], atol=1e-4)
    assert not np.allclose(backend.read(second), golden.latents[-1], atol=1e-1)


def test_the_golden_edit(played: KontextPipeline) -> None:
    golden = load_golden(Path(played.name))
    assert golden is not None
    replay(played.backend, golden).check("fp32", "played")


def test_a_size_that_was_not_built_has_exit_code_4(played: KontextPipeline) -> None:
    with pytest.raises(EngineMismatchError, match=r"expected latents of .* build --size") as caught:
        played(prompt="x", width=256, height=256, max_area=65536, num_inference_steps=1, seed=0)
    assert caught.value.exit_code == 4
    played(prompt="x", num_inference_steps=1, seed=0)  # the next one works


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (
            {"image": [PICTURE, np.zeros((256, 256, 3), np.uint8)], "prompt": ["x", "y"]},
            "found 1x256x256x3; .* build --size",
        ),
        ({"num_images_per_prompt": 3}, "pass 2 edits of one size at once, .* build --batch"),
        (embedded(4, 99), "pass at most 64 tokens a prompt$"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(
    played: KontextPipeline, monkeypatch: pytest.MonkeyPatch, call: dict[str, Any], problem: str
) -> None:
    """Also the second group of a call; these engines take two edits, no more and no less."""
    profile: Any = played.backend.profiles["transformer"]
    monkeypatch.setitem(profile, "latents", profile["latents"][2:] * 3)
    if "num_images_per_prompt" not in call:
        call = call | {"num_images_per_prompt": 2}
    begun: list[Any] = []
    monkeypatch.setattr(played.backend, "begin", begun.append)
    usual = {"image": PICTURE, "prompt": "x", "num_inference_steps": 1, "auto_resize": False}
    with pytest.raises(EngineMismatchError, match=problem):
        played(**usual | call)
    assert not begun


def test_an_edit_leaves_nothing_of_its_own(played: KontextPipeline, library: Any) -> None:
    """The modulation of all steps is much of what an edit takes; only buffers of one step stay."""
    steps = 7
    played(PICTURE, "x", "y", true_cfg_scale=2.0, num_inference_steps=steps, seed=0)
    (bucket,) = played.backend._buckets.values()
    gc.collect()
    sizes = [len(block) for block in library.cuda.blocks.values()]
    assert sizes.count(bucket.buffers["modulation"].size) == 1
    assert bucket.buffers["modulation"].size * steps not in sizes


def test_everything_is_freed(played: KontextPipeline, library: Any) -> None:
    played(PICTURE, "x", num_inference_steps=2, seed=0)
    assert library.cuda.blocks
    played.close()
    gc.collect()
    assert not library.cuda.blocks


@pytest.mark.parametrize("open_played", ["tensorrt-rtx"], indirect=True)
@pytest.mark.parametrize("kept", [1, 8])
def test_kernels_are_compiled_once_for_every_size(
    open_played: Opener, library: Any, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    """Also those of sizes whose buffers are gone."""
    from fluxkontext.runtime.backends import tensorrt

    monkeypatch.setattr(tensorrt, "_BUCKETS", kept)
    calls: list[dict[str, Any]] = [{"image": PICTURE}, {"image": None}, {"image": [PICTURE, OTHER]}]

    def run() -> int:
        """How many kernels a process compiles that makes these edits, each twice."""
        library.compiled.clear()
        with open_played() as pipe:
            for call in calls * 2:
                pipe(prompt="x", num_inference_steps=2, seed=0, **call)
        return sum("transformer" in it for it in library.compiled)

    assert run() == len(calls)
    assert run() == 0
    assert not library.compiled


@pytest.mark.parametrize("open_played", ["tensorrt-rtx"], indirect=True)
@pytest.mark.parametrize("failure", [None, RuntimeError("no memory")])
def test_kernels_that_cannot_be_kept_lose_nothing_else(
    open_played: Opener,
    library: Any,
    cache_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: Exception | None,
) -> None:
    """The library gives none of one engine's: the others' are kept, and everything is freed."""
    from .host_library import HostCache

    serialize = HostCache.serialize

    def fails(cache: HostCache) -> memoryview | None:
        if "clip" not in str(cache.kernels):
            return serialize(cache)
        if failure:
            raise failure
        return None

    monkeypatch.setattr(HostCache, "serialize", fails)
    with open_played() as pipe:
        pipe(prompt="x", num_inference_steps=1, seed=0)
        parts = read_manifest(Path(pipe.name))["engines"][SET]["components"]
    kept = {file.name for file in cache_folder.glob("kernels/*/*")}
    assert kept == {part["key"] for name, part in parts.items() if name != "clip"}
    del pipe
    gc.collect()
    assert not library.cuda.blocks


def test_kernels_are_compiled_where_none_can_be_read_or_kept(
    open_played: Opener, library: Any, cache_folder: Path
) -> None:
    cache_folder.parent.mkdir()
    cache_folder.touch()  # where a folder would have to be
    for _ in range(2):
        library.compiled.clear()
        with open_played() as pipe:
            pipe(prompt="x", num_inference_steps=1, seed=0)
        assert bool(library.compiled) is pipe.about["library"].startswith("tensorrt-rtx")


def test_the_librarys_reason_is_that_of_the_call(
    played: KontextPipeline, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure without a word does not quote what another engine met before."""
    from .host_library import HostContext

    said: list[str] = []

    def refuse(_: Any, name: str, address: int) -> bool:
        for line in said:
            library.logger.log(library.ILogger.ERROR, line)
        return False

    library.logger.log(library.ILogger.ERROR, "of another engine")
    with monkeypatch.context() as patch:
        patch.setattr(HostContext, "set_tensor_address", refuse)
        with pytest.raises(KontextError, match="an address for ids, found: no reason given"):
            played(prompt="a", num_inference_steps=1, seed=0)
        said += ["first\n  line", "unaligned"]
        with pytest.raises(KontextError, match="an address for ids, found: unaligned"):
            played(prompt="b", num_inference_steps=1, seed=0)
    played(prompt="b", num_inference_steps=1, seed=0)


def test_an_engine_that_the_library_refuses(
    open_played: Opener, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from .host_library import HostLibrary

    open_played().close()
    library.logger.log(library.ILogger.ERROR, "of another engine")
    monkeypatch.setattr(HostLibrary, "deserialize_cuda_engine", lambda *_: None)
    with pytest.raises(EngineMismatchError, match="found: no reason given; build it anew"):
        open_played()


def test_engines_are_qualified_as_they_are_built(
    copy: Path, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And stay so when they are built again where they cannot run."""
    from fluxkontext.export.build import Order, build

    from .host_cuda import GPU, OK

    order = Order(copy, "tensorrt-rtx", "sm_120", ((64, 64),), batch=2)
    assert build(None, order, lambda _: None)["qualified"] is True
    passed = read_manifest(copy)["engines"][SET]["qualified"]
    assert list(passed) == [GPU]
    assert 0 <= passed[GPU]["velocity_error"] < 1e-4
    monkeypatch.setattr(library.cuda, "cudaGetDeviceCount", lambda: (*OK, 0))
    assert build(None, order, lambda _: None)["qualified"] is False
    assert read_manifest(copy)["engines"][SET]["qualified"] == passed


def test_engines_that_fail_are_not_installed(
    copy: Path, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fluxkontext.export.build import Order, build

    from .host_cuda import GPU
    from .host_library import HostContext

    run = HostContext.execute_async_v3

    def wrong(self: HostContext, stream: int) -> bool:
        ran = run(self, stream)
        if self.name == "transformer":
            size = 4 * int(np.prod(self.shapes["latents"]))
            held = [library.cuda.view(self.addresses[key], size) for key in ("next", "velocity")]
            library.cuda.do(lambda: [np.frombuffer(it, np.float32).__iadd__(1) for it in held])
        return ran

    monkeypatch.setattr(HostContext, "execute_async_v3", wrong)
    order = Order(copy, "tensorrt-rtx", "sm_120", ((64, 64),), batch=2)
    said: list[str] = []
    with pytest.raises(CorruptedError, match=f"{SET} on {GPU}.*error of velocity"):
        build(None, order, said.append)
    assert "engines" not in read_manifest(copy) or SET not in read_manifest(copy)["engines"]
    assert not list(copy.rglob("*.engine"))
    assert list(copy.rglob("*.log"))
    assert not any("passed" in line for line in said)
