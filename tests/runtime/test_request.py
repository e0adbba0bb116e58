"""What a call may ask for: how pictures and prompts pair, and what is refused, each in one line."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fluxkontext.runtime import InvalidInputError, KontextPipeline
from fluxkontext.runtime.backend import Embeddings
from fluxkontext.runtime.jobs import Job, draw_noise, groups
from fluxkontext.runtime.noise import NoiseStream
from fluxkontext.runtime.request import Edit, Prompt, pair, picture_size, texts_of

CHANNELS = 16


def picture(value: int) -> Any:
    """One that is told from the others by its value."""
    return np.full((16, 16, 3), value, np.uint8)


def prompts(count: int) -> list[Any]:
    return [Prompt(f"prompt {i}", f"prompt {i}") for i in range(count)]


def shown(edits: Sequence[Edit]) -> list[tuple[str, list[int]]]:
    """Prompt and contexts of each edit."""
    found = []
    for edit in edits:
        assert isinstance(edit.text, Prompt)
        found.append((edit.text.clip, [int(context[0, 0, 0]) for context in edit.contexts]))
    return found


# pairing


def test_no_picture_is_text_to_image() -> None:
    assert shown(pair(None, prompts(2), [], CHANNELS)) == [("prompt 0", []), ("prompt 1", [])]


@given(count=st.integers(1, 6), wrap=st.sampled_from([lambda p: p, lambda p: [p], lambda p: (p,)]))
def test_one_picture_goes_with_every_prompt(count: int, wrap: Any) -> None:
    edits = pair(wrap(picture(7)), prompts(count), [], CHANNELS)
    assert shown(edits) == [(f"prompt {i}", [7]) for i in range(count)]


@given(count=st.integers(1, 6))
def test_a_list_with_one_prompt_is_the_contexts_of_one_edit(count: int) -> None:
    pictures = [picture(i) for i in range(count)]
    assert shown(pair(pictures, prompts(1), [], CHANNELS)) == [("prompt 0", list(range(count)))]


@given(pictures=st.integers(2, 6), texts=st.integers(2, 6))
def test_lists_of_one_length_pair_and_others_are_refused(pictures: int, texts: int) -> None:
    images = [picture(i) for i in range(pictures)]
    if pictures == texts:
        edits = pair(images, prompts(texts), [], CHANNELS)
        assert shown(edits) == [(f"prompt {i}", [i]) for i in range(texts)]
    else:
        with pytest.raises(InvalidInputError, match=f"1 picture or {texts}, .* found {pictures}"):
            pair(images, prompts(texts), [], CHANNELS)


@given(lengths=st.lists(st.integers(0, 3), min_size=1, max_size=5), texts=st.integers(1, 5))
def test_a_list_of_lists_is_the_contexts_of_each_edit(lengths: list[int], texts: int) -> None:
    images = [[picture(10 * i + j) for j in range(n)] for i, n in enumerate(lengths)]
    numbers = [[10 * i + j for j in range(n)] for i, n in enumerate(lengths)]
    if texts in (1, len(lengths)) or len(lengths) == 1:
        edits = pair(images, prompts(texts), [], CHANNELS)
        count = max(texts, len(lengths))
        assert shown(edits) == [
            (f"prompt {i if texts > 1 else 0}", numbers[i if len(lengths) > 1 else 0])
            for i in range(count)
        ]
    else:
        with pytest.raises(InvalidInputError, match="expected 1 picture or"):
            pair(images, prompts(texts), [], CHANNELS)


@given(texts=st.integers(1, 4), pictures=st.integers(1, 4), negatives=st.integers(0, 5))
def test_negative_prompts_are_one_or_one_an_edit(texts: int, pictures: int, negatives: int) -> None:
    images = [[picture(i)] for i in range(pictures)]
    if texts not in (1, pictures) and pictures != 1:
        return
    count = max(texts, pictures)
    if negatives in (0, 1, count):
        edits = pair(images, prompts(texts), prompts(negatives), CHANNELS)
        found = [
            edit.negative.clip if isinstance(edit.negative, Prompt) else None for edit in edits
        ]
        expected = {0: [None] * count, 1: ["prompt 0"] * count}
        assert found == expected.get(negatives, [f"prompt {i}" for i in range(count)])
    else:
        with pytest.raises(InvalidInputError, match=f"negative_prompt: expected 1 or {count}"):
            pair(images, prompts(texts), prompts(negatives), CHANNELS)


@pytest.mark.parametrize(
    "batch",
    [
        np.stack([picture(0), picture(1)]),
        torch.stack([torch.full((3, 16, 16), i, dtype=torch.uint8) for i in range(2)]),
        [Image.fromarray(picture(i)) for i in range(2)],
        (picture(0), torch.full((3, 16, 16), 1, dtype=torch.uint8)),
        [picture(0)[None], picture(1)[None]],
    ],
    ids=["array", "tensor", "PIL", "mixed", "batches of one"],
)
def test_a_batch_is_a_list_of_its_pictures(batch: Any) -> None:
    assert shown(pair(batch, prompts(1), [], CHANNELS)) == [("prompt 0", [0, 1])]
    assert shown(pair(batch, prompts(2), [], CHANNELS)) == [("prompt 0", [0]), ("prompt 1", [1])]


@pytest.mark.parametrize("height", [CHANNELS, 2 * CHANNELS])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_picture_as_high_as_latents_have_channels_is_a_picture(
    height: int, channels: int
) -> None:
    (edit,) = pair(np.full((height, 24, channels), 99, np.uint8), prompts(1), [], CHANNELS)
    assert picture_size(edit.contexts[0], 8) == (24, height)
    if channels != 4:
        unit = np.full((height, 24, channels), 0.5, np.float32)
        (edit,) = pair(unit, prompts(1), [], CHANNELS)
        assert picture_size(edit.contexts[0], 8) == (24, height)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_latents_are_known_by_their_channels(kind: Any) -> None:
    latents = np.zeros((CHANNELS, 6, 4), np.float32)
    for given_ in (kind(latents), kind(latents[None]), [kind(latents)]):
        (edit,) = pair(given_, prompts(1), [], CHANNELS)
        assert picture_size(edit.contexts[0], 8) == (32, 48)
        assert edit.contexts[0].dtype == np.float32


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        ([], "found an empty list"),
        ((), "found an empty list"),
        (np.zeros((0, 16, 16, 3), np.uint8), "found an empty list"),
        ([picture(0), [picture(1)]], "found a mix of both"),
        ([[[picture(0)]]], "found list"),
        ([np.stack([picture(0), picture(1)])], "found list"),
        ([None], "found NoneType"),
        ("photo.png", "found str"),
        (["photo.png"], "found str"),
        (np.zeros((CHANNELS, 5, 4), np.float32), "latents with even sides"),
        (np.full((CHANNELS, 4, 4), np.nan, np.float32), "finite values"),
        (torch.full((1, CHANNELS, 4, 4), torch.inf), "finite values"),
    ],
)
def test_pictures_that_are_none(image: Any, problem: str) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        pair(image, prompts(1), [], CHANNELS)


# texts


@given(st.lists(st.text(max_size=5).filter(lambda t: t.isascii()), min_size=1, max_size=4))
def test_texts_and_second_texts(texts: list[str]) -> None:
    assert texts_of(texts, None, None, None, WIDTHS) == [Prompt(text, text) for text in texts]
    assert texts_of(tuple(texts), texts[::-1], None, None, WIDTHS) == [
        Prompt(a, b) for a, b in zip(texts, texts[::-1], strict=True)
    ]
    assert texts_of(texts[0], "second", None, None, WIDTHS) == [Prompt(texts[0], "second")]


WIDTHS = (5, 4)


def embeddings(count: int = 1, tokens: int = 3) -> dict[str, Any]:
    return {
        "embeds": np.zeros((count, tokens, 4), np.float32),
        "pooled": torch.zeros(count, 5, dtype=torch.bfloat16),
    }


@given(count=st.integers(1, 3), tokens=st.integers(1, 5))
def test_embeddings_are_texts(count: int, tokens: int) -> None:
    found = texts_of(None, None, **embeddings(count, tokens), features=WIDTHS)
    assert len(found) == count
    for text in found:
        assert isinstance(text, Embeddings)
        assert text.tokens.shape == (tokens, 4)
        assert text.pooled.shape == (5,)
        assert text.pooled.dtype == np.float32


@pytest.mark.parametrize(
    ("prompt", "prompt_2", "embeds", "pooled", "problem"),
    [
        (None, None, None, None, "found neither"),
        ("a", None, *embeddings().values(), "found both"),
        ([], None, None, None, "at least one text, found an empty list"),
        (3, None, None, None, "expected text or a list of texts, found 3"),
        (b"bytes", None, None, None, "expected text or a list of texts"),
        (["a", None], None, None, None, "expected text or a list of texts"),
        ({"a": 1}, None, None, None, "expected text or a list of texts"),
        ("\udcff", None, None, None, "expected Unicode"),
        (["a", "b"], ["c"], None, None, "prompt_2: expected 2 texts like prompt, found 1"),
        (None, "b", *embeddings().values(), "prompt_2: expected none beside prompt_embeds"),
        (None, None, embeddings()["embeds"], None, "pooled_prompt_embeds: expected floats"),
        (None, None, embeddings(2)["embeds"], embeddings(1)["pooled"], "found 2 and 1"),
        (None, None, np.zeros((0, 1, 4), np.float32), np.zeros((0, 5), np.float32), "at least one"),
        (None, None, np.zeros((3, 4), np.float32), embeddings()["pooled"], "with 3 axes"),
        (None, None, np.zeros((1, 3, 4), int), embeddings()["pooled"], "expected floats"),
        (None, None, np.full((1, 3, 4), 1e300), embeddings()["pooled"], "finite values"),
        (
            None,
            None,
            np.zeros((1, 3, 9)),
            embeddings()["pooled"],
            "^prompt_embeds: expected 4 features, found 9",
        ),
        (
            None,
            None,
            embeddings()["embeds"],
            np.zeros((1, 9)),
            "^pooled_prompt_embeds: expected 5 features, found 9",
        ),
    ],
)
def test_texts_that_are_none(
    prompt: Any, prompt_2: Any, embeds: Any, pooled: Any, problem: str
) -> None:
    with pytest.raises(InvalidInputError, match=problem) as caught:
        texts_of(prompt, prompt_2, embeds, pooled, WIDTHS)
    assert "\n" not in str(caught.value)


def test_negative_embeddings_are_called_as_the_arguments_are() -> None:
    given = {**embeddings(), "features": WIDTHS, "label": "negative_prompt"}
    for name, changes in (
        ("negative_prompt_embeds", {"embeds": np.zeros((1, 3, 9))}),
        ("negative_pooled_prompt_embeds", {"pooled": np.zeros((1, 9))}),
        ("negative_pooled_prompt_embeds", {"pooled": None}),
    ):
        with pytest.raises(InvalidInputError, match=f"^{name}: expected"):
            texts_of(None, None, **given | changes)


# noise


def jobs(grid: Any, *sizes: tuple[int, int]) -> list[Job]:
    edit = Edit(Prompt("", ""), None, ())
    return [Job(edit, size, (), (), []) for size in sizes]


@given(seeds=st.lists(st.integers(-(2**63), 2**64), min_size=1, max_size=4))
def test_a_seed_per_picture(pipe: KontextPipeline, seeds: list[int]) -> None:
    found = jobs(pipe.grid, *[(32, 16)] * len(seeds))
    draw_noise(found, pipe.grid, CHANNELS, seeds, None, None)
    alone = jobs(pipe.grid, (32, 16))
    for job, seed in zip(found, seeds, strict=True):
        draw_noise(alone, pipe.grid, CHANNELS, seed, None, None)
        np.testing.assert_array_equal(job.noise, alone[0].noise)
        assert job.seed == seed


def test_one_seed_is_one_stream(pipe: KontextPipeline) -> None:
    """As sequential draws of one generator; the sizes may differ."""
    found = jobs(pipe.grid, (32, 16), (16, 16), (32, 32))
    draw_noise(found, pipe.grid, CHANNELS, 5, None, None)
    stream = NoiseStream(5)
    generator = torch.Generator().manual_seed(5)
    drawn = jobs(pipe.grid, (32, 16), (16, 16), (32, 32))
    draw_noise(drawn, pipe.grid, CHANNELS, None, generator, None)
    for job, other in zip(found, drawn, strict=True):
        values = stream.normal(CHANNELS, job.target[1] // 8, job.target[0] // 8)
        assert sorted(values.ravel()) == sorted(job.noise.ravel())
        np.testing.assert_allclose(job.noise, other.noise, atol=2e-6)
        assert (job.seed, other.seed) == (5, None)


@pytest.mark.parametrize("most", [1, 2, None])
def test_groups_are_as_large_as_the_backend_takes(most: int | None) -> None:
    """In order of first appearance, whatever a group is cut into."""
    mixed = jobs(None, (64, 64), (32, 32), (64, 64), (64, 64), (32, 32))
    number = {id(job): i for i, job in enumerate(mixed)}
    cut = [[number[id(job)] for job in group] for group in groups(mixed, most)]
    assert (
        cut
        == {
            1: [[0], [2], [3], [1], [4]],
            2: [[0, 2], [3], [1, 4]],
            None: [[0, 2, 3], [1, 4]],
        }[most]
    )


def test_edits_beyond_the_largest_batch_follow_one_another(
    pipe: KontextPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    begin = pipe.backend.begin
    monkeypatch.setattr(
        pipe.backend, "begin", lambda batch: (begun.append(len(batch.noise)), begin(batch))[1]
    )
    call: dict[str, Any] = {"prompt": "x", "num_inference_steps": 1, "seed": 3}
    together = pipe(**call, num_images_per_prompt=3, output_type="np")
    monkeypatch.setattr(pipe.backend, "max_batch", 2)
    apart = pipe(**call, num_images_per_prompt=3, output_type="np")
    assert begun == [3, 2, 1]
    np.testing.assert_allclose(apart.images, together.images, atol=1.01 / 255)
    assert apart.settings == together.settings


def test_a_generator_per_picture(pipe: KontextPipeline) -> None:
    found = jobs(pipe.grid, (32, 16), (32, 16))
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    draw_noise(found, pipe.grid, CHANNELS, None, generators, None)
    seeded = jobs(pipe.grid, (32, 16), (32, 16))
    draw_noise(seeded, pipe.grid, CHANNELS, np.array([3, 4]), None, None)
    for job, other in zip(found, seeded, strict=True):
        np.testing.assert_allclose(job.noise, other.noise, atol=2e-6)


# whole calls


@pytest.fixture(scope="module")
def pipe(small_model: Path) -> Iterator[KontextPipeline]:
    with KontextPipeline.from_pretrained(small_model) as loaded:
        yield loaded


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
    ("image", {"image": [picture(0)] * 3, **TWO}),
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
            "image": [picture(0), np.zeros((64, 64, 3), np.uint8)],
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
