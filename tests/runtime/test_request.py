"""What a call may ask for: how pictures and prompts pair, and what is refused, each in one line."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fluxkontext.runtime import InvalidInputError
from fluxkontext.runtime.backend import Embeddings
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
