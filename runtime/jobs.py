"""The pictures of a call as jobs: each placed on the model's grid, given its noise, and grouped."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .arguments import shown
from .backend import Embeddings, Floats
from .contract import Shape
from .errors import InvalidInputError
from .geometry import Grid, Size, Transform, pack
from .images import as_array, resize
from .noise import NoiseStream
from .request import Edit, Picture, Text, packed_latents, picture_size


@dataclass
class Job:
    """One picture in the making. Sizes are pixels (w, h); contexts are at the model's size.

    draw: which of the seed's stream its noise is; None, as the seed, where noise is given.
    """

    edit: Edit
    target: Size
    contexts: tuple[Picture, ...]
    context_sizes: tuple[Size, ...]
    transforms: list[Transform]
    noise: Floats = field(default_factory=lambda: np.empty(0, np.float32))
    seed: int | None = None
    draw: int | None = None
    output: Any = None

    @property
    def shape(self) -> tuple[object, ...]:
        """Jobs of equal shape can run as one batch."""
        return (
            self.target,
            self.context_sizes,
            _text_shape(self.edit.text),
            self.edit.negative and _text_shape(self.edit.negative),
        )


def _text_shape(text: Text) -> int:
    """Tokens of an encoded prompt; prompts as text all get one length."""
    return len(text.tokens) if isinstance(text, Embeddings) else -1


def place(
    edit: Edit,
    grid: Grid,
    height: int | None,
    width: int | None,
    max_area: int | None,
    auto_resize: bool,
) -> Job:
    """Choose the sizes of an edit and bring its contexts to theirs."""
    sources = [picture_size(picture, grid.multiple // 2) for picture in edit.contexts]
    sizes = tuple(
        # latents have their size already
        grid.context_size(source, auto_resize and picture.dtype == np.uint8)
        for source, picture in zip(sources, edit.contexts, strict=True)
    )
    target = grid.target_size(height, width, max_area, sizes[0] if sizes else None)
    contexts = tuple(
        resize(picture, *size) if picture.dtype == np.uint8 else picture  # type: ignore[arg-type]
        for picture, size in zip(edit.contexts, sizes, strict=True)
    )
    transforms = [Transform(s, m, target) for s, m in zip(sources, sizes, strict=True)]
    return Job(edit, target, contexts, sizes, transforms)


def draw_noise(
    jobs: Sequence[Job],
    grid: Grid,
    channels: int,
    seeds: Sequence[int] | int | None,
    generator: Any,
    latents: Any,
) -> None:
    """Give every job its starting noise: from ``latents``, a torch generator, or seeds.

    One seed or generator feeds all pictures in order; a list has one a picture.
    """
    given = [
        name
        for name, value in (("seed", seeds), ("generator", generator), ("latents", latents))
        if value is not None
    ]
    if len(given) > 1:
        raise InvalidInputError(f"{given[1]}: expected none beside {given[0]}, found both")
    if latents is not None:
        width, height = grid.tokens(jobs[0].target)
        if len({job.target for job in jobs}) > 1:
            raise InvalidInputError("latents: expected results of one size, found several sizes")
        for job, noise in zip(
            jobs, packed_latents(latents, len(jobs), width * height, 4 * channels), strict=True
        ):
            job.noise = noise
        return
    streams = _streams(jobs, seeds, generator)
    for job, stream in zip(jobs, streams, strict=True):
        width, height = grid.tokens(job.target)
        shape = (channels, 2 * height, 2 * width)
        if isinstance(stream, NoiseStream):
            job.noise = pack(stream.normal(*shape))
        else:
            job.noise = pack(_torch_normal(stream, shape))


def _streams(jobs: Sequence[Job], seeds: Sequence[int] | int | None, generator: Any) -> list[Any]:
    """A noise source for each job; the seed of each, and which draw it gets, are noted on it."""
    if generator is not None:
        sources = (
            list(generator) if isinstance(generator, list | tuple) else [generator] * len(jobs)
        )
        _check_count("generator", sources, jobs)
        return sources
    if seeds is None or isinstance(seeds, int | np.integer):
        seed = fresh_seed() if seeds is None else int(seeds)
        for i, job in enumerate(jobs):
            job.seed, job.draw = seed, i
        return [NoiseStream(seed)] * len(jobs)
    _check_count("seed", seeds, jobs)
    for job, number in zip(jobs, seeds, strict=True):
        job.seed, job.draw = int(number), 0
    return [NoiseStream(int(number)) for number in seeds]


def check_seeds(seeds: Any) -> None:
    """None, a whole number, or a list of them."""
    numbers = seeds if isinstance(seeds, list | tuple | np.ndarray) else [seeds]
    for seed in numbers:
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer | None):
            raise InvalidInputError(
                f"seed: expected a whole number, or a list of them, found {shown(seed)}"
            )
        if seed is None and numbers is seeds:
            raise InvalidInputError("seed: expected a whole number a picture, found None")


def _check_count(label: str, found: Sequence[object], jobs: Sequence[Job]) -> None:
    if len(found) != len(jobs):
        raise InvalidInputError(
            f"{label}: expected one, or {len(jobs)}, one a picture, found {len(found)}"
        )


def fresh_seed() -> int:
    """A seed from the system's randomness; 32 bits are all that torch's generator uses."""
    import secrets

    return secrets.randbits(32)


def _torch_normal(generator: Any, shape: tuple[int, ...]) -> Floats:
    import torch

    if not isinstance(generator, torch.Generator):
        raise InvalidInputError(
            f"generator: expected a torch.Generator, found {type(generator).__name__}; "
            "or pass seed="
        )
    noise = as_array(torch.randn(shape, generator=generator, device=generator.device))
    assert noise is not None
    return noise


def groups(jobs: Sequence[Job], most: int | None) -> Iterator[list[Job]]:
    """Jobs of equal shape together, up to ``most``, in order of first appearance."""
    by_shape: dict[object, list[Job]] = {}
    for job in jobs:
        by_shape.setdefault(job.shape, []).append(job)
    for alike in by_shape.values():
        count = most or len(alike)
        yield from (alike[start : start + count] for start in range(0, len(alike), count))


def graph_inputs(
    jobs: Sequence[Job], grid: Grid, features: tuple[int, int], text_tokens: int, decode: bool
) -> Iterator[tuple[str, Mapping[str, Shape]]]:
    """What jobs that run as one batch ask of each graph: its name, and shapes of its inputs.

    features: of a token of latents, and of one of a prompt. text_tokens: of a prompt that is not
    encoded yet. decode: whether pictures are wanted.
    """
    first, count = jobs[0], len(jobs)
    width, height = grid.tokens(first.target)
    target = width * height
    context = sum(w * h for w, h in map(grid.tokens, first.context_sizes))
    for picture in first.contexts:
        if picture.dtype == np.uint8:
            yield "vae_encoder", {"pixels": (1, *picture.shape)}
    for text in (first.edit.text, first.edit.negative):
        if text is None:
            continue
        tokens = len(text.tokens) if isinstance(text, Embeddings) else text_tokens
        if not isinstance(text, Embeddings):
            yield "t5", {"ids": (1, tokens)}
        yield (
            "transformer",
            {
                "latents": (count, target, features[0]),
                "context": (count, context, features[0]),
                "text": (count, tokens, features[1]),
                "positions": (target + context, 3),
            },
        )
    if decode:
        yield "vae_decoder", {"latents": (1, height, width, features[0])}
