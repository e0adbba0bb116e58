"""The graphs of a bundle against the native path they were exported from."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fluxkontext.runtime import (
    BackendUnavailableError,
    CheckpointError,
    InvalidInputError,
    KontextPipeline,
)
from fluxkontext.runtime.bundle import Bundle, read_manifest

PICTURE = np.random.default_rng(0).integers(0, 256, (96, 64, 3), np.uint8)
OTHER = np.random.default_rng(1).integers(0, 256, (48, 80, 3), np.uint8)


@pytest.fixture(scope="module")
def onnx(small_bundle: Path) -> KontextPipeline:
    return KontextPipeline.from_pretrained(small_bundle, backend="onnx", device="cpu")


@pytest.fixture(scope="module")
def native(small_model: Path) -> KontextPipeline:
    return KontextPipeline.from_pretrained(small_model, backend="native", device="cpu")


@pytest.mark.parametrize(
    "call",
    [
        {"image": PICTURE},
        {"image": PICTURE, "auto_resize": False},
        {"image": None},
        {"image": [PICTURE, OTHER]},
        {"image": [PICTURE, OTHER], "context_layout": "offset"},
        {"image": PICTURE, "height": 48, "width": 80, "max_area": 3840},
        {"image": PICTURE, "negative_prompt": "a square", "true_cfg_scale": 3.0},
        {"image": PICTURE, "num_images_per_prompt": 2},
        {"image": [PICTURE, PICTURE], "prompt": ["make it red", "remove it"]},
        {"image": PICTURE, "sigmas": [1.0, 0.6, 0.1], "guidance_scale": 4.0},
    ],
    ids=lambda call: "-".join(call),
)
def test_equals_native(
    onnx: KontextPipeline, native: KontextPipeline, call: dict[str, Any]
) -> None:
    call = {"prompt": "make it blue", "num_inference_steps": 3, "seed": 5} | call
    found, wanted = (pipe(**call, output_type="latent").images for pipe in (onnx, native))
    assert found.shape == wanted.shape
    # 1000 sigma in a cosine of float32 leaves the two libraries 1e-5 apart; see semantics of `exp`
    assert np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)) < 1e-4
    pixels = [
        np.stack([np.asarray(p, np.int16) for p in pipe(**call).images]) for pipe in (onnx, native)
    ]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1


def test_a_callback_reads_and_replaces_latents(onnx: KontextPipeline) -> None:
    seen = []

    def zero_at_the_end(_pipe: Any, i: int, _t: float, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"].copy())
        return {"latents": np.zeros_like(tensors["latents"])} if i == 2 else {}

    result = onnx(
        prompt="x",
        num_inference_steps=3,
        seed=0,
        output_type="latent",
        callback_on_step_end=zero_at_the_end,
    )
    assert np.array_equal(result.images, np.zeros_like(result.images))
    assert len(seen) == 3
    assert not np.allclose(seen[0], seen[1])


def test_a_bundle_prefers_onnx_without_a_gpu(small_bundle: Path) -> None:
    about = KontextPipeline.from_pretrained(small_bundle, device="cpu").about
    assert (about["backend"], about["precision"]) == ("onnx", "fp32")


def test_another_precision_than_the_graphs_runs_natively(small_bundle: Path) -> None:
    for precision, backend in (("fp32", "onnx"), ("bf16", "native")):
        with KontextPipeline.from_pretrained(
            small_bundle, precision=precision, device="cpu"
        ) as pipe:
            assert (pipe.about["backend"], pipe.about["precision"]) == (backend, precision)


@pytest.mark.parametrize(
    ("name", "shape"), [("prompt_embeds", (1, 3, 9)), ("pooled_prompt_embeds", (1, 9))]
)
def test_embeddings_of_another_model_are_refused(
    onnx: KontextPipeline, name: str, shape: tuple[int, ...]
) -> None:
    pooled, tokens = onnx.backend.text_features
    given = {
        "prompt_embeds": np.zeros((1, 3, tokens), np.float32),
        "pooled_prompt_embeds": np.zeros((1, pooled), np.float32),
    }
    onnx(**given, num_inference_steps=1)
    with pytest.raises(InvalidInputError, match=f"^{name}: expected .* features, found 9"):
        onnx(**given | {name: np.zeros(shape, np.float32)})


def test_what_is_asked_for_never_falls_back(small_bundle: Path, small_model: Path) -> None:
    with pytest.raises(BackendUnavailableError, match="expected a bundle"):
        KontextPipeline.from_pretrained(small_model, backend="onnx")
    with pytest.raises(BackendUnavailableError, match=r"precision: expected fp32.*backend native"):
        KontextPipeline.from_pretrained(
            small_bundle, backend="onnx", precision="bf16", device="cpu"
        )
    with pytest.raises(BackendUnavailableError, match=r"own parts.*found vae from elsewhere"):
        KontextPipeline.from_pretrained(small_bundle, backend="onnx", vae=small_model)
    with pytest.raises(BackendUnavailableError, match="device: expected cpu"):
        KontextPipeline.from_pretrained(small_bundle, backend="onnx", device="cuda")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux's CPU affinity")
def test_as_many_threads_as_the_process_may_use(small_bundle: Path) -> None:
    """The library would start one on every core, to spin in each other's way."""
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        with KontextPipeline.from_pretrained(small_bundle, backend="onnx", device="cpu") as pipe:
            options = pipe.backend._clip._session.get_session_options()  # type: ignore[attr-defined]
    finally:
        os.sched_setaffinity(0, allowed)
    assert options.intra_op_num_threads == (1 if (os.cpu_count() or 1) > 1 else 0)


def test_a_session_on_another_device_is_an_error(
    small_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where CUDA's libraries are missing, ONNX Runtime warns and runs on the CPU."""
    from fluxkontext.runtime.backends import onnx

    opened = onnx.ort.InferenceSession

    def falls_back(path: str, options: Any, providers: Any, **also: Any) -> Any:
        return opened(path, options, providers=["CPUExecutionProvider"], **also)

    monkeypatch.setattr(onnx.ort, "InferenceSession", falls_back)
    file = small_bundle / "clip.cpu.onnx"
    with pytest.raises(
        BackendUnavailableError, match=r"expected CUDA\w+ to run clip.cpu.onnx, found CPU"
    ):
        onnx.Session(file, "cuda:0", fold=True)


def test_a_build_for_cuda_where_cuda_does_not_work(
    small_bundle: Path,
    onnx: KontextPipeline,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As with onnxruntime-gpu on a machine without a GPU: unasked the CPU, having said why; by name
    an error. What fails is the installed library's own attempt."""
    from fluxkontext.runtime.backends.onnx import _why_no_cuda, ort

    if _why_no_cuda(0) is None:
        pytest.skip("about a machine on which CUDA does not work; here it does")
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: providers)
    with KontextPipeline.from_pretrained(small_bundle, backend="onnx") as pipe:
        assert (pipe.about["device"], pipe.about["precision"]) == ("cpu", "fp32")
        found, wanted = (it(prompt="x", num_inference_steps=1, seed=0) for it in (pipe, onnx))
        assert found.images[0] == wanted.images[0]
    (said,) = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert said.startswith("device auto: the CPU, as CUDA does not work here: ")
    with pytest.raises(BackendUnavailableError, match=r"expected cuda:0 to work, found: \w+"):
        KontextPipeline.from_pretrained(small_bundle, backend="onnx", device="cuda:0")


@pytest.fixture
def cuda_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with onnxruntime-gpu and its CUDA; nothing may be opened there."""
    from fluxkontext.runtime.backends import onnx

    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnx.ort, "get_available_providers", lambda: providers)
    monkeypatch.setattr(onnx, "_why_no_cuda", lambda _: None)


@pytest.mark.usefixtures("cuda_works")
def test_a_precision_that_only_the_graphs_for_cpus_have(
    small_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Unasked they run, having said why; on a device by name nothing falls back."""
    load = partial(KontextPipeline.from_pretrained, small_bundle, backend="onnx", precision="fp32")
    with load(device="auto") as pipe:
        assert (pipe.about["device"], pipe.about["precision"]) == ("cpu", "fp32")
    assert "the CPU, as the bundle's graphs for GPUs are of bf16, asked for is fp32" in caplog.text
    with pytest.raises(BackendUnavailableError, match=r"expected bf16.* found fp32; .*device cpu"):
        load(device="cuda")


@pytest.mark.usefixtures("cuda_works")
def test_a_recipe_that_only_the_graphs_for_cpus_have(
    small_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from fluxkontext.runtime.backends.onnx import OnnxBackend

    manifest = read_manifest(small_bundle) | {"recipe": "fp8-dynamic", "precision": {"cpu": "fp32"}}
    bundle = Bundle(small_bundle, manifest)
    backend = OnnxBackend(bundle, "auto", "auto")
    assert backend.device == "cpu"
    backend.close()
    assert "the CPU, as a bundle of fp8-dynamic has no graphs for GPUs" in caplog.text
    with pytest.raises(CheckpointError, match="--device cpu"):
        OnnxBackend(bundle, "cuda", "auto")


def test_a_gpu_that_torch_cannot_use_is_left_to_others(
    small_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A driver, and a torch that was built without CUDA."""
    import torch

    from fluxkontext.runtime import loader

    monkeypatch.setattr(loader, "_has_nvidia_driver", lambda: True)
    for has_gpu, backend in ((False, "onnx"), (True, "native")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda it=has_gpu: it)
        with caplog.at_level("INFO"):
            assert loader._choose(small_bundle, True, "auto", "auto")[0] == backend
    assert caplog.text.count("not the native backend on a GPU: torch finds none") == 1


@pytest.mark.parametrize("device", ["cuda:x", "cuda:", "cuda:-1", "cudas", "gpu", "cpu:0", ""])
def test_devices_that_are_none(
    small_bundle: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fluxkontext.runtime.backends import onnx

    for providers in (["CPUExecutionProvider"], ["CUDAExecutionProvider", "CPUExecutionProvider"]):
        monkeypatch.setattr(onnx.ort, "get_available_providers", lambda it=providers: it)
        with pytest.raises(BackendUnavailableError, match=f"cuda or cuda:N .* found {device} with"):
            KontextPipeline.from_pretrained(small_bundle, backend="onnx", device=device)


def test_an_edit_imports_no_torch(
    small_bundle: Path, namespace_env: dict[str, str], tmp_path: Path
) -> None:
    code = (
        "import sys\n"
        "from fluxkontext.runtime.cli import main\n"
        f"rc = main(['generate', '-p', 'a star', '--model', {str(small_bundle)!r}, '-o', 'o.png',"
        " '--steps', '2', '--device', 'cpu'])\n"
        "print(rc, sorted({'torch', 'transformers', 'diffusers', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=namespace_env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "0 []"
    assert (tmp_path / "o.png").exists()
