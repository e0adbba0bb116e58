"""What a call asks for, checked and paired: from a user's arguments to a list of single edits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .arguments import shown
from .backend import Embeddings, Floats
from .errors import InvalidInputError
from .geometry import Size
from .images import Pixels, as_array, to_pixels

Picture = Pixels | Floats
"""A context: pixels ``[H, W, 3]`` uint8, or encoded latents ``[C, h, w]`` float32."""


@dataclass(frozen=True)
class Prompt:
    """One prompt as text: for CLIP, and for T5."""

    clip: str
    t5: str


Text = Prompt | Embeddings


@dataclass(frozen=True)
class Edit:
    """One picture to make from its text and its contexts."""

    text: Text
    negative: Text | None
    contexts: tuple[Picture, ...]


def texts_of(
    prompt: Any,
    prompt_2: Any,
    embeds: Any,
    pooled: Any,
    features: tuple[int, int],
    label: str = "prompt",
) -> list[Text]:
    """The texts of a call, from strings or from embeddings; exactly one of the two is given.

    features: that the model takes, of a pooled vector and of a token.
    """
    if (prompt is None) == (embeds is None):
        raise InvalidInputError(
            f"{label}: expected either {label} or {label}_embeds, found {_which(prompt)}"
        )
    if embeds is None:
        first = _strings(prompt, label)
        second = first if prompt_2 is None else _strings(prompt_2, f"{label}_2")
        if len(first) != len(second):
            raise InvalidInputError(
                f"{label}_2: expected {len(first)} texts like {label}, found {len(second)}"
            )
        return [Prompt(a, b) for a, b in zip(first, second, strict=True)]
    if prompt_2 is not None:
        raise InvalidInputError(f"{label}_2: expected none beside {label}_embeds, found one")
    pooled_label = label.replace("prompt", "pooled_prompt_embeds")
    vectors = _floats(pooled, pooled_label, 2)
    tokens = _floats(embeds, f"{label}_embeds", 3)
    if len(tokens) != len(vectors) or not len(tokens):
        raise InvalidInputError(
            f"{label}_embeds: expected as many as {pooled_label} and at least one, "
            f"found {len(tokens)} and {len(vectors)}"
        )
    for name, array, takes in zip(
        (pooled_label, f"{label}_embeds"), (vectors, tokens), features, strict=True
    ):
        if array.shape[-1] != takes:
            raise InvalidInputError(
                f"{name}: expected {takes} features, found {array.shape[-1]}; they are of another "
                "model's text encoders"
            )
    return [Embeddings(v, t) for v, t in zip(vectors, tokens, strict=True)]


def pair(
    image: Any, texts: Sequence[Text], negatives: Sequence[Text], latent_channels: int
) -> list[Edit]:
    """Match pictures with prompts.

    One picture goes with every prompt. A list with one prompt is the contexts of one edit; with as
    many prompts it pairs; a list of lists is always the contexts of each edit, and one prompt then
    goes with all of them.
    """
    contexts = _contexts(image, len(texts), latent_channels)
    count = max(len(contexts), len(texts))
    if len(negatives) not in (0, 1, count):
        raise InvalidInputError(
            f"negative_prompt: expected 1 or {count}, one an edit, found {len(negatives)}"
        )
    if len(texts) not in (1, count) or len(contexts) not in (1, count):
        raise InvalidInputError(
            f"image: expected 1 picture or {len(texts)}, one a prompt, found {len(contexts)}"
        )
    return [
        Edit(
            texts[i % len(texts)],
            negatives[i % len(negatives)] if negatives else None,
            contexts[i % len(contexts)],
        )
        for i in range(count)
    ]


def _contexts(image: Any, prompts: int, channels: int) -> list[tuple[Picture, ...]]:
    """The contexts of each edit, or of all edits when there is one entry."""
    if image is None:
        return [()]
    pictures = _unbatch(image)
    if not isinstance(pictures, list):
        return [(_picture(pictures, channels),)]
    if not pictures:
        raise InvalidInputError(
            "image: expected at least one picture, found an empty list; "
            "leave image out for text to image"
        )
    if any(isinstance(entry, list | tuple) for entry in pictures):
        if not all(isinstance(entry, list | tuple) for entry in pictures):
            raise InvalidInputError(
                "image: expected a list of pictures or a list of lists, found a mix of both"
            )
        return [tuple(_picture(p, channels) for p in entry) for entry in pictures]
    read = [_picture(p, channels) for p in pictures]
    return [tuple(read)] if prompts == 1 else [(p,) for p in read]


def _unbatch(image: Any) -> Any:
    """A 4-axis array or tensor is the list of its pictures; one picture stays one."""
    if isinstance(image, list | tuple):
        return list(image)
    if getattr(image, "ndim", 0) != 4:
        return image
    return image[0] if len(image) == 1 else list(image)


def _picture(value: Any, latent_channels: int) -> Picture:
    """Pixels of a picture; an array or tensor ``[C, h, w]`` with the VAE's channels is latents."""
    if isinstance(value, Image.Image):
        return to_pixels(value)
    array = as_array(_unbatch(value)) if not isinstance(value, list) else None
    if array is not None and _is_latents(array, latent_channels):
        latents = _floats(array, "image", 3)
        if latents.shape[1] % 2 or latents.shape[2] % 2 or 0 in latents.shape:
            raise InvalidInputError(
                f"image: expected latents with even sides, found {list(latents.shape)}"
            )
        return latents
    return to_pixels(_unbatch(value))


def _is_latents(array: Any, channels: int) -> bool:
    """``[C, h, w]`` floats; the last axis of a picture of height C is its 1 or 3 channels."""
    return bool(
        array.ndim == 3
        and array.shape[0] == channels
        and array.dtype.kind == "f"
        and array.shape[2] not in (1, 3)
    )


def picture_size(picture: Picture, pixels_per_latent: int) -> Size:
    """Width and height in pixels."""
    if picture.dtype == np.uint8:
        return picture.shape[1], picture.shape[0]
    return picture.shape[2] * pixels_per_latent, picture.shape[1] * pixels_per_latent


def packed_latents(value: Any, count: int, tokens: int, features: int) -> list[Floats]:
    """The ``latents=`` argument: packed starting noise ``[count, tokens, features]``."""
    latents = _floats(value, "latents", 3)
    if latents.shape != (count, tokens, features):
        raise InvalidInputError(
            f"latents: expected packed {[count, tokens, features]}, found {list(latents.shape)}"
        )
    return list(latents)


def _floats(value: Any, label: str, ndim: int) -> Floats:
    array = as_array(value)
    if array is None or array.ndim != ndim or array.dtype.kind != "f":
        found = type(value).__name__ if array is None else f"{array.dtype} {list(array.shape)}"
        raise InvalidInputError(f"{label}: expected floats with {ndim} axes, found {found}")
    with np.errstate(over="ignore"):
        values = array.astype(np.float32)
    if not np.isfinite(values).all():
        raise InvalidInputError(f"{label}: expected finite values, found NaN or infinity")
    return values


def _strings(value: Any, label: str) -> list[str]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list | tuple) or not all(isinstance(s, str) for s in strings):
        raise InvalidInputError(f"{label}: expected text or a list of texts, found {shown(value)}")
    if not strings:
        raise InvalidInputError(f"{label}: expected at least one text, found an empty list")
    for text in strings:
        try:
            text.encode()
        except UnicodeEncodeError:  # lone surrogates: bytes of a command line that are not UTF-8
            raise InvalidInputError(f"{label}: expected Unicode, found {shown(text)}") from None
    return list(strings)


def _which(prompt: Any) -> str:
    return "neither" if prompt is None else "both"
