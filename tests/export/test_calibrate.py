"""Calibration: the magnitudes are those that layers and attention are given, over all steps."""

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fluxkontext.export.calibrate import SCENE, calibrate, pictures_of, prompts_of
from fluxkontext.export.calibration import Calibration, read_calibration
from fluxkontext.export.quantize import write_quantised
from fluxkontext.runtime import CheckpointError, InvalidInputError, KontextPipeline
from fluxkontext.runtime.backends.native import NativeBackend
from fluxkontext.runtime.checkpoint import find
from fluxkontext.runtime.cli import main
from fluxkontext.runtime.models.transformer import Flux
from fluxkontext.runtime.recipes import takes_part

SIZE = (64, 64)


@pytest.fixture
def pipe(small_model: Path) -> Iterator[KontextPipeline]:
    with KontextPipeline.from_pretrained(small_model, device="cpu") as pipe:
        yield pipe


def flux_of(pipe: KontextPipeline) -> Flux:
    assert isinstance(pipe.backend, NativeBackend)
    return pipe.backend.denoiser


def edit(pipe: KontextPipeline, prompt: str, seed: int, steps: int) -> None:
    pipe(
        Image.open(SCENE),
        prompt,
        num_inference_steps=steps,
        seed=seed,
        width=64,
        height=64,
        max_area=64 * 64,
        output_type="latent",
    )


def test_inputs_of_layers_over_all_steps(pipe: KontextPipeline) -> None:
    """Against matrix products that are watched from outside, whichever way they are called."""
    flux = flux_of(pipe)
    layers = {
        m.weight.untyped_storage().data_ptr(): n
        for n, m in flux.named_modules()
        if isinstance(m, nn.Linear) and takes_part("transformer", n, m.in_features)
    }
    seen: dict[str, list[Tensor]] = defaultdict(list)
    plain = torch.nn.functional.linear

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if name := layers.get(weight.untyped_storage().data_ptr()):
            seen[name].append(x.detach().abs().flatten())
        return plain(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", watched)
        for seed, prompt in enumerate(("make it red", "remove it", "make it red")):
            edit(pipe, prompt, seed, 2)
    assert len(seen) == 10
    pipe.clear_memos()
    prompts = ["make it red", "remove it"]
    pictures = [SCENE] * 3
    found = calibrate(pipe, pictures, prompts, steps=2, size=SIZE)
    assert {k: v for k, v in found.amax.items() if k in seen} == {
        name: max(call.max().item() for call in calls) for name, calls in seen.items()
    }
    most = calibrate(pipe, pictures, prompts, steps=2, size=SIZE, percentile=99)
    for name, calls in seen.items():
        wanted = max(np.quantile(c.numpy(), 0.99, method="inverted_cdf") for c in calls)
        assert most.amax[name] == pytest.approx(wanted, rel=1e-6)
        assert most.amax[name] < found.amax[name]


def test_inputs_of_attention(pipe: KontextPipeline) -> None:
    """After the norm, a vector is no longer than its scale allows, rotated or not; and what is
    recorded is what the first block computes at the first step."""
    found = calibrate(pipe, [SCENE], ["make it red"], steps=1, size=SIZE)
    flux = flux_of(pipe)
    for block in ("double_blocks.0", "single_blocks.0"):
        norms = {n: s for n, s in flux.named_parameters() if n.startswith(block)}
        for x, norm in (("q", "query_norm"), ("k", "key_norm")):
            scales = [s.abs().max() for n, s in norms.items() if f"{norm}.scale" in n]
            longest = max(scales).item() * math.sqrt(flux.config.head_dim)
            assert 0.05 * longest < found.amax[f"{block}.{x}"] <= longest * (1 + 1e-5)
        assert found.amax[f"{block}.v"] > 0
        assert found.amax[f"{block}.p"] == 1.0


def test_the_pipeline_is_left_as_it_was(pipe: KontextPipeline) -> None:
    flux = flux_of(pipe)
    before = dict(flux.named_modules())
    kernels = [getattr(module, "kernels", None) for module in before.values()]
    calibrate(pipe, [SCENE], ["make it red"], steps=1, size=SIZE)
    assert dict(flux.named_modules()) == before
    assert [getattr(module, "kernels", None) for module in before.values()] == kernels
    assert isinstance(pipe.backend, NativeBackend)
    assert pipe.backend.graphs


def test_nothing_changes_while_it_watches(pipe: KontextPipeline) -> None:
    """What is run is the model itself: the same pictures."""
    latents: list[Any] = []
    call = type(pipe).__call__

    def kept(self: KontextPipeline, *args: Any, **kwargs: Any) -> Any:
        result = call(self, *args, **kwargs)
        latents.append(result.images[0])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipe), "__call__", kept)
        calibrate(pipe, [SCENE], ["make it red"], steps=2, size=SIZE)
        edit(pipe, "make it red", 0, 2)
    assert np.array_equal(latents[0], latents[1])


def test_a_file_and_what_is_made_with_it(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "amax.json"
    (tmp_path / "prompts.txt").write_text("make it red\n\n  remove it \n", encoding="utf-8")
    (tmp_path / "pictures").mkdir()
    for name in ("b.png", "a.JPG"):
        Image.new("RGB", (64, 64), "red").save(tmp_path / "pictures" / name)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    command = ["calibrate", str(small_model), "-o", str(file), "--steps", "1", "--size", "64x64"]
    command += ["--images", str(tmp_path / "pictures"), str(SCENE)]
    command += ["--prompts", str(tmp_path / "prompts.txt"), "--percentile", "99.9", "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out) == {
        "calibration": str(file),
        "edits": 3,
        "tensors": 18,
    }
    values = json.loads(file.read_text())
    assert values["schema_version"] == 1
    assert values["model"] == str(small_model)
    assert values["percentile"] == 99.9
    assert values["prompts"] == ["make it red", "remove it"]
    assert values["images"] == ["a.JPG", "b.png", "scene.png"]
    assert read_calibration(file).amax == values["amax"]
    write_quantised(find(small_model, {}), tmp_path / "out", "fp8", "fp8-static", file)
    first = file.read_bytes()
    assert main(command) == 0  # the same numbers again
    assert file.read_bytes() == first


def test_what_cannot_be_calibrated(pipe: KontextPipeline, tmp_path: Path) -> None:
    for wrong in (0, -1, 100.5, math.nan):
        with pytest.raises(InvalidInputError, match="percentile: expected above 0"):
            calibrate(pipe, [SCENE], ["a"], percentile=wrong)
    for pictures, prompts in (([], ["a"]), ([SCENE], [])):
        with pytest.raises(InvalidInputError, match="a picture and a prompt at least"):
            calibrate(pipe, pictures, prompts)
    write_quantised(find(pipe.name, {}), tmp_path / "out", "fp8")
    with (
        KontextPipeline.from_pretrained(tmp_path / "out", device="cpu") as quantised,
        pytest.raises(CheckpointError, match="expected plain weights to calibrate, found fp8-dyn"),
    ):
        calibrate(quantised, [SCENE], ["a"])


def test_a_bundle_is_not_calibrated(small_bundle: Path) -> None:
    with (
        KontextPipeline.from_pretrained(small_bundle, backend="onnx") as pipe,
        pytest.raises(InvalidInputError, match="expected native to calibrate with, found onnx"),
    ):
        calibrate(pipe, [SCENE], ["a"])


def test_inputs_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="expected a text file of prompts"):
        prompts_of(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(InvalidInputError, match="expected a prompt a line, found none"):
        prompts_of(tmp_path / "empty.txt")
    with pytest.raises(InvalidInputError, match="expected pictures in this folder, found none"):
        pictures_of([tmp_path])
    assert main(["calibrate", "nothing", "-o", str(tmp_path)]) == 2


def test_a_calibration_survives_its_file(tmp_path: Path) -> None:
    wanted = Calibration("m", 99.5, {"a.b": 1.25, "c": 1e-12}, {"prompts": ["é"], "steps": 3})
    wanted.write(tmp_path / "c.json")
    assert read_calibration(tmp_path / "c.json") == wanted
