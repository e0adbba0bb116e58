"""The torch backend as the pipeline sees it; its pictures are compared in ``test_parity.py``."""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fluxkontext.kernels import candidates
from fluxkontext.kernels.candidates import CANDIDATES, Candidate
from fluxkontext.kernels.gelu import gelu_ref
from fluxkontext.runtime import KontextError, KontextPipeline
from fluxkontext.runtime.backends.native import NativeBackend
from fluxkontext.runtime.errors import BackendUnavailableError
from fluxkontext.runtime.models.quantised import Fp8Linear

PICTURE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
EDIT: dict[str, Any] = {
    "image": PICTURE,
    "prompt": "make it blue",
    "num_inference_steps": 3,
    "seed": 1,
    "output_type": "latent",
}
SIZE = {"height": 64, "width": 64, "max_area": 4096}


@pytest.fixture(scope="module")
def pipe(small_model: Path) -> KontextPipeline:
    return KontextPipeline.from_pretrained(small_model, backend="native", device="cpu")


def test_says_which_kernels_run(pipe: KontextPipeline) -> None:
    kernels = dict(part.split("=") for part in pipe.about["kernels"].split())
    assert kernels.keys() == CANDIDATES.keys()
    assert (kernels["norm_rope"], kernels["attention"]) == ("complex", "torch")
    assert pipe(**EDIT).settings[0]["kernels"] == pipe.about["kernels"]


def test_a_named_kernel_runs_or_says_why_not(small_model: Path) -> None:
    load = partial(KontextPipeline.from_pretrained, small_model, backend="native", device="cpu")
    assert "norm_rope=torch" in load(kernels={"norm_rope": "torch"}).about["kernels"]
    for named, found in (
        ({"attend": "fp8"}, "attend: fp8 cannot be used"),
        ({"attention": "flash"}, "no implementation 'flash'; it has"),
        ({"softmax": "torch"}, "no op is called"),
    ):
        with pytest.raises(BackendUnavailableError, match=found):
            load(kernels=named)


def test_fp8_layers_are_fed_by_the_ops_before_them(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No layer of a block quantises its input in a pass of its own, but for attention's result."""
    pipe = KontextPipeline.from_pretrained(
        small_model, backend="native", device="cpu", precision="fp8"
    )
    names = {layer: name for name, layer in pipe.backend.denoiser.named_modules()}
    operands, seen = Fp8Linear.operands, []

    def seeing(layer: Fp8Linear, x: Any, rows: slice) -> Any:
        if isinstance(x, torch.Tensor):
            seen.append(names[layer])
        return operands(layer, x, rows)

    monkeypatch.setattr(Fp8Linear, "operands", seeing)
    pipe(**EDIT)
    assert seen
    assert all(name.endswith("attn.proj") for name in seen), set(seen)


def test_loads_with_torchs_op_where_a_kernel_is_wrong(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = Candidate("wrong", lambda x: 1.01 * gelu_ref(x), lambda _: None)
    monkeypatch.setitem(candidates.CANDIDATES, "gelu", (wrong, *CANDIDATES["gelu"]))  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        pipe = KontextPipeline.from_pretrained(small_model, backend="native", device="cpu")
    assert "gelu=sigmoid" in pipe.about["kernels"]
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["gelu"]


def test_a_callback_replaces_latents(pipe: KontextPipeline) -> None:
    seen = []

    def at(_pipe: Any, i: int, _t: float, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"])
        return {"latents": np.zeros_like(tensors["latents"])} if i == 1 else {}

    found = pipe(**EDIT, callback_on_step_end=at).images
    plain = pipe(**EDIT).images
    np.testing.assert_array_equal(seen[2], found)
    assert not np.allclose(found, plain)
    assert not np.allclose(seen[0], seen[1])


def test_the_same_edit_again_after_others_is_the_same(pipe: KontextPipeline) -> None:
    first = pipe(**EDIT).images
    pipe(**{**EDIT, "image": None, "height": 32, "width": 64, "max_area": 2048})
    pipe(**EDIT, negative_prompt="a square", true_cfg_scale=2.0)
    pipe(**EDIT, num_images_per_prompt=3)
    np.testing.assert_array_equal(pipe(**EDIT).images, first)


def test_two_edits_at_once_do_not_mix(
    pipe: KontextPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state whose buffers went to another edit says so in every use."""
    backend = pipe.backend
    assert isinstance(backend, NativeBackend)
    batches = []
    monkeypatch.setattr(backend, "begin", lambda b, f=backend.begin: batches.append(b) or f(b))
    pipe(**EDIT)
    other = replace(batches[0], noise=batches[0].noise[:, ::-1].copy())
    older, newer = backend.begin(batches[0]), backend.begin(other)
    latents = backend.read(newer)
    for use in (
        lambda: backend.step(older, 0),
        lambda: backend.read(older),
        lambda: backend.write(older, latents),
        lambda: backend.decode(older),
    ):
        with pytest.raises(KontextError, match="found an older one"):
            use()
    np.testing.assert_array_equal(backend.read(newer), other.noise)


def test_close_lets_go(small_model: Path) -> None:
    pipe = KontextPipeline.from_pretrained(small_model, backend="native", device="cpu")
    pipe(**EDIT)
    pipe.close()
    assert not {"_executor", "_flux"} & vars(pipe.backend).keys()


@pytest.fixture(scope="module")
def gpu_pipe(small_model: Path) -> KontextPipeline:
    return KontextPipeline.from_pretrained(small_model, backend="native", device="cuda")


@pytest.mark.gpu
def test_warmup_captures_on_a_gpu(gpu_pipe: KontextPipeline) -> None:
    backend = gpu_pipe.backend
    assert isinstance(backend, NativeBackend)
    gpu_pipe.warmup([(64, 64)])
    before, replays = backend.captures, backend.replays
    assert before == 1
    for seed in (1, 2):
        gpu_pipe(**{**EDIT, "seed": seed}, **SIZE, auto_resize=False)
    assert backend.captures == before
    assert backend.replays == replays + 2 * EDIT["num_inference_steps"]


@pytest.mark.gpu
def test_a_gpu_gets_kernels(gpu_pipe: KontextPipeline, caplog: pytest.LogCaptureFixture) -> None:
    assert "norm_rope=triton" in gpu_pipe.about["kernels"]
    assert gpu_pipe.about["precision"] in ("bf16", "fp16")


@pytest.mark.gpu
def test_a_gpu_in_fp32_draws_the_cpus_picture(pipe: KontextPipeline, small_model: Path) -> None:
    on_gpu = KontextPipeline.from_pretrained(
        small_model, backend="native", device="cuda", precision="fp32"
    )
    wanted, found = (it(**EDIT).images for it in (pipe, on_gpu))
    assert np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)) < 1e-3
    assert not torch.backends.cuda.matmul.allow_tf32
