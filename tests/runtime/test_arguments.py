"""Whole calls with arguments of every kind: refused in one line, or they work."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fluxkontext.runtime import InvalidInputError, KontextPipeline

SMALL = np.zeros((16, 16, 3), np.uint8)
VALID: dict[str, Any] = {"prompt": "make it red", "num_inference_steps": 2, "seed": 1}
TWO = {"prompt": ["a", "b"]}
TOKENS, FEATURES = 16, 64  # of the native 64x64

WRONG: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"prompt": None}),
    ("prompt", {"prompt": []}),
    ("prompt", {"prompt": 5}),
    ("prompt", {"prompt": ["a", 5]}),
    ("prompt_2", {"prompt_2": ["a", "b"]}),
    ("prompt_2", {"prompt_2": 5}),
    ("image", {"image": []}),
    ("image", {"image": "photo.png"}),
    ("image", {"image": 5}),
    ("image", {"image": [SMALL] * 3, **TWO}),
    ("negative_prompt", {"negative_prompt": ["a"] * 3, "true_cfg_scale": 2.0, **TWO}),
    ("negative_prompt", {"negative_prompt": 5, "true_cfg_scale": 2.0}),
    ("negative_prompt", {"negative_prompt": [], "true_cfg_scale": 2.0}),
    ("height", {"height": 0}),
    ("height", {"height": -1}),
    ("height", {"height": 10**6}),
    ("height", {"height": "64"}),
    ("height", {"height": 64.5}),
    ("height", {"height": float("nan")}),
    ("height", {"height": True}),
    ("width", {"width": 0}),
    ("width", {"width": -64}),
    ("width", {"width": 10**6}),
    ("width", {"width": [64]}),
    ("max_area", {"max_area": 0}),
    ("max_area", {"max_area": 10**12}),
    ("max_area", {"max_area": "big"}),
    ("size", {"height": 1, "width": 8192}),
    ("num_inference_steps", {"num_inference_steps": 0}),
    ("num_inference_steps", {"num_inference_steps": -1}),
    ("num_inference_steps", {"num_inference_steps": 10**9}),
    ("num_inference_steps", {"num_inference_steps": 2.5}),
    ("num_inference_steps", {"num_inference_steps": "2"}),
    ("num_inference_steps", {"num_inference_steps": None}),
    ("sigmas", {"sigmas": []}),
    ("sigmas", {"sigmas": 0.5}),
    ("sigmas", {"sigmas": "high"}),
    ("sigmas", {"sigmas": ["a"]}),
    ("sigmas", {"sigmas": [None]}),
    ("sigmas", {"sigmas": [1.0, 0.0]}),
    ("sigmas", {"sigmas": [1.5, 0.5]}),
    ("sigmas", {"sigmas": [0.5, 1.0]}),
    ("sigmas", {"sigmas": [0.5, 0.5]}),
    ("sigmas", {"sigmas": [1.0, float("nan")]}),
    ("sigmas", {"sigmas": [[1.0, 0.5]]}),
    ("guidance_scale", {"guidance_scale": float("nan")}),
    ("guidance_scale", {"guidance_scale": float("inf")}),
    ("guidance_scale", {"guidance_scale": "2.5"}),
    ("guidance_scale", {"guidance_scale": None}),
    ("true_cfg_scale", {"true_cfg_scale": float("nan")}),
    ("true_cfg_scale", {"true_cfg_scale": [2.0]}),
    ("num_images_per_prompt", {"num_images_per_prompt": 0}),
    ("num_images_per_prompt", {"num_images_per_prompt": 1.5}),
    ("num_images_per_prompt", {"num_images_per_prompt": 10**9}),
    ("num_images_per_prompt", {"num_images_per_prompt": "2"}),
    ("generator", {"generator": 5, "seed": None}),
    ("generator", {"generator": [5], "seed": None}),
    ("generator", {"generator": np.random.default_rng(), "seed": None}),
    ("generator", {"generator": [torch.Generator()] * 3, "seed": None, **TWO}),
    ("generator", {"generator": torch.Generator()}),
    ("seed", {"seed": 1.5}),
    ("seed", {"seed": "1"}),
    ("seed", {"seed": True}),
    ("seed", {"seed": [1, 2]}),
    ("seed", {"seed": []}),
    ("seed", {"seed": ["1"]}),
    ("seed", {"seed": [None]}),
    ("seed", {"seed": [1.0]}),
    ("latents", {"latents": np.zeros((1, TOKENS, FEATURES), np.float32)}),
    ("latents", {"latents": 5, "seed": None}),
    ("latents", {"latents": np.zeros((1, TOKENS, FEATURES), int), "seed": None}),
    ("latents", {"latents": np.zeros((1, 16, 8, 8), np.float32), "seed": None}),
    ("latents", {"latents": np.zeros((1, TOKENS + 1, FEATURES), np.float32), "seed": None}),
    ("latents", {"latents": np.zeros((2, TOKENS, FEATURES), np.float32), "seed": None}),
    ("latents", {"latents": torch.full((1, TOKENS, FEATURES), torch.nan), "seed": None}),
    ("latents", {"latents": np.full((1, TOKENS, FEATURES), -np.inf), "seed": None}),
    (
        "latents",
        {
            "latents": np.zeros((2, TOKENS, FEATURES), np.float32),
            "seed": None,
            "image": [SMALL, np.zeros((64, 64, 3), np.uint8)],
            "auto_resize": False,
            **TWO,
        },
    ),
    ("output_type", {"output_type": "pt"}),
    ("output_type", {"output_type": None}),
    ("output_type", {"output_type": []}),
    ("context_layout", {"context_layout": "sideways"}),
    ("max_sequence_length", {"max_sequence_length": 0}),
    ("max_sequence_length", {"max_sequence_length": 1}),
    ("max_sequence_length", {"max_sequence_length": 65}),
    ("max_sequence_length", {"max_sequence_length": "64"}),
    ("callback_on_step_end_tensor_inputs", {"callback_on_step_end_tensor_inputs": ["noise"]}),
    ("callback_on_step_end", {"callback_on_step_end": lambda *_: 5}),
    ("latents", {"callback_on_step_end": lambda *_: {"latents": np.zeros((1, 2, 3))}}),
    ("latents", {"callback_on_step_end": lambda *_: {"latents": None}}),
    (
        "latents",
        {"callback_on_step_end": lambda p, i, t, kw: {"latents": kw["latents"] * np.nan}},
    ),
    ("deadline", {"deadline": 0}),
    ("deadline", {"deadline": -1}),
    ("deadline", {"deadline": float("nan")}),
    ("deadline", {"deadline": "soon"}),
    ("cancel", {"cancel": True}),
    ("prompt_embeds", {"prompt_embeds": np.zeros((1, 3, 9), np.float32), "prompt": None,
                       "pooled_prompt_embeds": np.zeros((1, 64), np.float32)}),
    ("pooled_prompt_embeds", {"prompt_embeds": np.zeros((1, 3, 64), np.float32), "prompt": None,
                              "pooled_prompt_embeds": np.zeros((1, 9), np.float32)}),
]  # fmt: skip


@pytest.fixture(scope="module")
def before(pipe: KontextPipeline) -> Any:
    return pipe(**VALID, output_type="latent").images


@pytest.mark.parametrize(
    ("label", "wrong"), WRONG, ids=[f"{i}-{label}" for i, (label, _) in enumerate(WRONG)]
)
def test_a_wrong_argument_is_refused_and_the_next_call_works(
    pipe: KontextPipeline, before: Any, label: str, wrong: dict[str, Any]
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        pipe(**VALID | wrong)
    problem = str(caught.value)
    assert problem.startswith(f"{label}: expected ")
    assert "found" in problem
    assert "\n" not in problem
    assert len(problem) < 300
    np.testing.assert_array_equal(pipe(**VALID, output_type="latent").images, before)


@given(
    arguments=st.dictionaries(
        st.sampled_from(
            [
                "prompt",
                "prompt_2",
                "image",
                "height",
                "width",
                "max_area",
                "num_inference_steps",
                "sigmas",
                "guidance_scale",
                "true_cfg_scale",
                "negative_prompt",
                "seed",
                "latents",
                "num_images_per_prompt",
                "max_sequence_length",
                "output_type",
                "context_layout",
            ]
        ),
        st.none()
        | st.booleans()
        | st.integers(-2, 3)
        | st.integers()
        | st.floats()
        | st.text(max_size=3)
        | st.lists(st.none() | st.integers() | st.floats() | st.text(max_size=3), max_size=3),
        min_size=1,
        max_size=3,
    )
)
def test_any_values_are_refused_or_work(pipe: KontextPipeline, arguments: dict[str, Any]) -> None:
    """Nothing but the one error comes out; sizes stay small enough to run."""
    for name in ("height", "width", "max_area", "num_inference_steps", "num_images_per_prompt"):
        if isinstance(arguments.get(name), int | float) and arguments[name] > 40:
            arguments[name] = 10**12
    try:
        result = pipe(**VALID | {"height": 32, "width": 32, "max_area": 1024} | arguments)
    except InvalidInputError:
        return
    assert len(result.images) == len(result.settings) >= 1


def test_numpy_numbers_are_numbers(pipe: KontextPipeline, before: Any) -> None:
    found = pipe(
        prompt=VALID["prompt"],
        num_inference_steps=np.int64(2),
        seed=np.uint32(1),
        height=np.int32(64),
        width=64.0,  # type: ignore[arg-type]
        max_area=np.int64(4096),
        guidance_scale=np.float32(2.5),
        true_cfg_scale=1,
        output_type="latent",
    )
    np.testing.assert_array_equal(found.images, before)
    assert found.settings[0]["num_inference_steps"] == 2
