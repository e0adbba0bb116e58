"""The pipeline's contract: memos, warm-up, memory, and what comes out."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fluxkontext.runtime import (
    BackendUnavailableError,
    InvalidInputError,
    KontextError,
    KontextPipeline,
    Transform,
)
from fluxkontext.runtime.geometry import pack
from fluxkontext.runtime.noise import NoiseStream

from .edits import EDIT, photo

# memos


def counts(pipe: KontextPipeline) -> tuple[int, int, int, int]:
    texts, images = pipe.encoder.texts, pipe.encoder.images
    return texts.hits, texts.misses, images.hits, images.misses


def test_prompts_and_pictures_are_remembered(pipe: KontextPipeline, usual: Any) -> None:
    pipe.clear_memos()
    start = np.array(counts(pipe))

    def since() -> list[int]:
        return list(np.array(counts(pipe)) - start)

    np.testing.assert_array_equal(pipe(**EDIT).images, usual)
    assert since() == [0, 1, 0, 1]
    np.testing.assert_array_equal(pipe(**EDIT).images, usual)
    assert since() == [1, 1, 1, 1]
    pipe(**EDIT | {"image": Image.fromarray(photo())})  # the same content in another form
    assert since() == [2, 1, 2, 1]
    changed = photo()
    changed[0, 0, 0] ^= 1
    assert not np.array_equal(pipe(**EDIT | {"image": changed}).images, usual)
    assert since() == [3, 1, 2, 2]
    pipe(**EDIT | {"image": photo().transpose(1, 0, 2)})
    assert since() == [4, 1, 2, 3]
    pipe(**EDIT | {"prompt_2": "another"})
    pipe(**EDIT | {"max_sequence_length": 32})
    assert since() == [4, 3, 4, 3]


def test_a_picture_that_changes_in_place_is_another(pipe: KontextPipeline) -> None:
    picture = photo(3)
    first = pipe(**EDIT | {"image": picture}).images
    picture[:] = 0
    second = pipe(**EDIT | {"image": picture}).images
    assert not np.array_equal(first, second)


def test_memos_are_bounded_and_may_be_off(small_model: Path, usual: Any) -> None:
    with KontextPipeline.from_pretrained(small_model, device="cpu", memo_entries=2) as pipe:
        for i in range(5):
            pipe(**EDIT | {"prompt": str(i), "image": photo(i), "num_inference_steps": 1})
        assert len(pipe.encoder.texts._values) == len(pipe.encoder.images._values) == 2
    with KontextPipeline.from_pretrained(small_model, device="cpu", memo_entries=0) as pipe:
        for _ in range(2):
            np.testing.assert_array_equal(pipe(**EDIT).images, usual)
        assert counts(pipe) == (0, 2, 0, 2)


@pytest.mark.parametrize("encode", ["encode_text", "encode_image"])
@pytest.mark.usefixtures("still_works")
def test_a_failing_encoder_leaves_no_trace(
    pipe: KontextPipeline, encode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unseen = {"encode_text": 1000, "encode_image": 1001}[encode]
    fresh = EDIT | {"prompt": f"never seen by {encode}", "image": photo(unseen)}

    def fail(_: object) -> None:
        raise RuntimeError("the encoder broke")

    monkeypatch.setattr(pipe.backend, encode, fail)
    with pytest.raises(RuntimeError, match="the encoder broke"):
        pipe(**fresh)
    monkeypatch.undo()
    first = pipe(**fresh).images
    pipe.clear_memos()
    np.testing.assert_array_equal(pipe(**fresh).images, first)


@pytest.mark.parametrize("option", ["memo_entries", "max_queue"])
@pytest.mark.parametrize("wrong", [-1, 1.5, "2", None])
def test_limits_of_a_pipeline_are_whole_numbers(tmp_path: Path, option: str, wrong: Any) -> None:
    """Which is said before a model is looked for."""
    with pytest.raises(InvalidInputError, match=f"{option}: expected a whole number"):
        KontextPipeline.from_pretrained(tmp_path / "none", **{option: wrong})


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("precision", "fp4", BackendUnavailableError),
        ("precision", "double", BackendUnavailableError),
        ("device", "cuda:99", BackendUnavailableError),
        ("device", "toaster", BackendUnavailableError),
        ("backend", "tensorrt", KontextError),
    ],
)
def test_what_is_asked_for_by_name_is_never_replaced(
    small_model: Path, option: str, value: str, error: type[KontextError]
) -> None:
    with pytest.raises(error, match="expected") as caught:
        KontextPipeline.from_pretrained(small_model, **{option: value})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


# warm-up


@pytest.mark.usefixtures("still_works")
def test_warming_up(pipe: KontextPipeline) -> None:
    pipe.warmup()
    pipe.warmup([(32, 48), (48, 32)], contexts=2, batch=2)
    pipe.warmup([(32, 32)], contexts=0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"sizes": [(0, 64)]},
        {"sizes": [(64, -1)]},
        {"sizes": [(10**6, 10**6)]},
        {"sizes": [("64", 64)]},
        {"sizes": [(8, 8)]},
        {"contexts": -1},
        {"batch": 0},
    ],
)
@pytest.mark.usefixtures("still_works")
def test_warming_up_for_what_cannot_be(pipe: KontextPipeline, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="expected"):
        pipe.warmup(**wrong)


# memory


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_out_of_memory_in_mid_run(
    small_model: Path, tmp_path: Path, namespace_env: dict[str, str]
) -> None:
    """The limit falls while the first of two pictures is made. What is cached may still do for
    that one, but not for the second, which is much larger."""
    code = """
import resource, sys
from pathlib import Path
import numpy as np
from fluxkontext.runtime import KontextPipeline, OutOfMemoryError
pipe = KontextPipeline.from_pretrained(sys.argv[1], device="cpu")
small = dict(prompt="a", num_inference_steps=2, seed=1, output_type="latent", image=None)
before = pipe(**small).images
pictures = [np.zeros((side, side, 3), np.uint8) for side in (64, 1536)]
steps = []
def lower(*_):
    steps.append(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, resource.RLIM_INFINITY))
for _ in range(2):
    try:
        pipe(pictures, ["a", "b"], num_inference_steps=2, seed=1, auto_resize=False,
             callback_on_step_end=lower)
    except OutOfMemoryError as error:
        print(len(steps), error)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    assert np.array_equal(pipe(**small).images, before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(small_model)],
        env=namespace_env | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        steps, _, problem = line.partition(" ")
        assert int(steps) >= 1
        assert problem.startswith("expected enough memory for this edit, found: ")


# results


def test_pictures_of_different_sizes_in_one_call(pipe: KontextPipeline) -> None:
    pictures = [photo(0, 64, 48), photo(1, 32, 32), photo(2, 64, 48), photo(3, 48, 64)]
    prompts = [f"edit {i}" for i in range(4)]
    shared = EDIT | {"auto_resize": False, "output_type": "np"}
    found = pipe(**shared | {"image": pictures, "prompt": prompts, "seed": [0, 1, 2, 3]})
    for i, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        alone = pipe(**shared | {"image": picture, "prompt": prompt, "seed": i})
        assert found.images[i].shape == picture.shape
        np.testing.assert_allclose(found.images[i], alone.images[0], atol=1.01 / 255)
        assert found.settings[i] == alone.settings[0]
        assert found.transforms[i] == alone.transforms[0]
        if i in (1, 3):  # alone in their group
            np.testing.assert_array_equal(found.images[i], alone.images[0])


def test_several_pictures_of_a_prompt_are_sequential_draws(pipe: KontextPipeline) -> None:
    found = pipe(**EDIT, num_images_per_prompt=3)
    stream = NoiseStream(7)
    latents = np.stack([pack(stream.normal(16, 8, 8)) for _ in range(3)])
    given = pipe(**EDIT | {"seed": None, "num_images_per_prompt": 3, "latents": latents})
    np.testing.assert_array_equal(found.images, given.images)
    assert (found.seeds, given.seeds) == ([7, 7, 7], [None, None, None])
    assert [settings["index"] for settings in found.settings] == [0, 1, 2]
    assert [settings["index"] for settings in given.settings] == [None] * 3
    assert not np.array_equal(found.images[0], found.images[1])


def test_a_seed_that_was_drawn_is_reported_and_repeats(pipe: KontextPipeline) -> None:
    first = pipe(**EDIT | {"seed": None})
    (seed,) = first.seeds
    assert seed is not None
    np.testing.assert_array_equal(pipe(**EDIT | {"seed": seed}).images, first.images)
    assert pipe(**EDIT | {"seed": None}).seeds != [seed]


def test_pictures_stay_on_a_gpu_only_where_there_is_one(pipe: KontextPipeline) -> None:
    with pytest.raises(InvalidInputError, match=r"output_type: .* on cpu has its .* found cuda"):
        pipe(**EDIT | {"output_type": "cuda"})


def test_output_types(pipe: KontextPipeline) -> None:
    pil = pipe(**EDIT | {"output_type": "pil"}).images
    array = pipe(**EDIT | {"output_type": "np"}).images
    latent = pipe(**EDIT).images
    assert [type(picture) for picture in pil] == [Image.Image]
    assert (array.dtype, array.shape) == (np.float32, (1, 64, 64, 3))
    np.testing.assert_array_equal(np.round(array[0] * 255), np.asarray(pil[0]))
    assert (latent.dtype, latent.shape) == (np.float32, (1, 16, 64))
    mixed = pipe(
        **EDIT | {"image": [photo(0), photo(0, 32, 32)], "prompt": ["a", "b"], "auto_resize": False}
    )
    assert [picture.shape for picture in mixed.images] == [(16, 64), (4, 64)]


def test_the_way_back_to_the_users_picture(pipe: KontextPipeline) -> None:
    pictures = [photo(0, 100, 70), photo(1, 31, 33)]
    found = pipe(**EDIT | {"image": pictures, "auto_resize": False, "output_type": "pil"})
    assert found.images[0].size == (96, 64)
    assert found.transforms == [
        [Transform((100, 70), (96, 64), (96, 64)), Transform((31, 33), (16, 32), (96, 64))]
    ]
    for transform in found.transforms[0]:
        assert transform.to_target(*transform.source) == transform.target
        assert transform.to_source(*transform.target) == transform.source
        x, y = transform.to_source(*transform.to_target(12.5, 7.25))
        assert (x, y) == pytest.approx((12.5, 7.25))


def test_settings_are_json_and_repeat_the_picture(pipe: KontextPipeline) -> None:
    first = pipe(
        **EDIT | {"num_inference_steps": np.int64(2), "guidance_scale": np.float32(3)},
        negative_prompt="blue",
        true_cfg_scale=2,
    )
    (settings,) = json.loads(json.dumps(first.settings))
    assert settings == first.settings[0]
    assert settings["prompt"] == "make it red"
    assert settings["negative_prompt"] == "blue"
    assert settings["size"] == "64x64"
    assert settings["contexts"] == [{"source": "64x64", "model": "64x64"}]
    names = ("prompt", "negative_prompt", "seed", "num_inference_steps", "guidance_scale",
             "true_cfg_scale", "context_layout", "auto_resize", "max_sequence_length")  # fmt: skip
    again = pipe(image=photo(), output_type="latent", **{name: settings[name] for name in names})
    np.testing.assert_array_equal(again.images, first.images)
    assert json.loads(json.dumps(first.timings)) == first.timings
    assert {"queue", "text", "image", "denoise", "decode", "total"} <= set(first.timings)
    custom = pipe(**EDIT | {"sigmas": np.array([1.0, 0.5], np.float32)}).settings[0]
    assert json.loads(json.dumps(custom))["sigmas"] == [1.0, 0.5]
    assert custom["num_inference_steps"] == 2
    assert "negative_prompt" not in custom
    assert "true_cfg_scale" not in custom


def test_tiny_and_stretched_pictures_run(pipe: KontextPipeline) -> None:
    for width, height in [(1, 1), (1, 4000), (4000, 1), (15, 17)]:
        for resize in (True, False):
            if not resize and max(width, height) > 1000:
                continue
            edit = EDIT | {"image": photo(0, width, height), "num_inference_steps": 1}
            found = pipe(**edit, auto_resize=resize)
            assert np.isfinite(found.images).all()
            assert found.transforms[0][0].source == (width, height)


@pytest.mark.parametrize("output_type", ["pil", "np", "latent"])
def test_what_is_not_a_number_is_reported(
    small_model: Path, tmp_path: Path, output_type: str
) -> None:
    model = Path(shutil.copytree(small_model, tmp_path / "model"))
    (file,) = (model / "transformer").glob("*.safetensors")
    state = load_file(file)
    state["proj_out.bias"][3] = torch.nan
    save_file(state, file)
    with KontextPipeline.from_pretrained(model, device="cpu") as pipe:
        for _ in range(2):
            with pytest.raises(KontextError, match="expected finite latents, found NaN"):
                pipe(**EDIT | {"output_type": output_type})


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_runs_and_is_near(small_model: Path, usual: Any, precision: str) -> None:
    with KontextPipeline.from_pretrained(small_model, precision=precision, device="cpu") as pipe:
        assert pipe.about["precision"] == precision
        found = pipe(**EDIT).images
        (picture,) = pipe(**EDIT | {"output_type": "pil"}).images
    assert picture.size == (64, 64)
    error = np.sqrt(np.mean((found - usual) ** 2) / np.mean(usual**2))
    assert error <= {"fp32": 0.0, "fp16": 0.01, "bf16": 0.05}[precision]
