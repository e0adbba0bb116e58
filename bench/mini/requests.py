"""The miniature's tasks put to a pipeline: single requests of every kind, and edits in a row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...runtime.result import EditResult
from .instructions import KINDS, Sample, draw_chain, draw_sample
from .scenes import Split, render
from .score import EditScore, score_all, score_chain

Picture = NDArray[np.uint8]
Tick = Callable[[int], object]
"""Told how many pictures have been made since the last time."""


class Pipeline(Protocol):
    """Whatever is called as :class:`fluxkontext.runtime.KontextPipeline` is."""

    def __call__(
        self,
        image: list[list[Picture]] | None,
        prompt: list[str],
        *,
        num_inference_steps: int,
        guidance_scale: float,
        seed: list[int],
    ) -> EditResult: ...


@dataclass(frozen=True, slots=True)
class Settings:
    """How pictures are made. batch: how many at once."""

    steps: int = 28
    guidance: float = 2.5
    batch: int = 16


@dataclass(frozen=True, slots=True)
class Answer:
    """What a pipeline made of a request, and the verdict."""

    sample: Sample
    picture: Picture
    score: EditScore


def draw_requests(
    count: int, seed: int, split: Split = "held_out", kinds: Sequence[str] = KINDS
) -> dict[str, list[Sample]]:
    """So many samples of each kind; a kind's samples do not depend on the other kinds."""
    return {
        kind: [draw_sample(rng, kind, split) for _ in range(count)]
        for kind in kinds
        for rng in [np.random.default_rng((seed, KINDS.index(kind)))]
    }


def draw_chains(count: int, turns: int, seed: int, split: Split = "held_out") -> list[list[Sample]]:
    """So many chains of edits, each on the outcome of the one before."""
    rng = np.random.default_rng((seed, len(KINDS)))
    return [draw_chain(rng, turns, split) for _ in range(count)]


def answer(
    pipe: Pipeline, samples: Sequence[Sample], settings: Settings, seed: int, tick: Tick
) -> list[Answer]:
    """Put samples of one kind to a pipeline; the i-th has the i-th seed from ``seed`` on."""
    contexts = [[render(scene) for scene in sample.contexts] for sample in samples]
    pictures = _make(pipe, contexts, [s.text for s in samples], settings, seed, tick)
    befores = [sample.contexts[0] if sample.contexts else None for sample in samples]
    scores = score_all(befores, [sample.target for sample in samples], pictures)
    return [Answer(*each) for each in zip(samples, pictures, scores, strict=True)]


def follow(
    pipe: Pipeline, chains: Sequence[Sequence[Sample]], settings: Settings, seed: int, tick: Tick
) -> list[list[bool]]:
    """Feed every outcome back as the next picture: for each chain, whether all is still right
    after each turn."""
    shown = [render(chain[0].contexts[0]) for chain in chains]
    outcomes: list[list[Picture]] = [[] for _ in chains]
    for turn in range(len(chains[0])):
        texts = [chain[turn].text for chain in chains]
        turn_seed = seed + turn * len(chains)
        shown = _make(pipe, [[picture] for picture in shown], texts, settings, turn_seed, tick)
        for made, picture in zip(outcomes, shown, strict=True):
            made.append(picture)
    return [
        score_chain([sample.target for sample in chain], made)
        for chain, made in zip(chains, outcomes, strict=True)
    ]


def _make(
    pipe: Pipeline,
    contexts: Sequence[list[Picture]],
    texts: Sequence[str],
    settings: Settings,
    seed: int,
    tick: Tick,
) -> list[Picture]:
    pictures: list[Picture] = []
    for start in range(0, len(texts), settings.batch):
        part = slice(start, start + settings.batch)
        given = list(contexts[part])
        result = pipe(
            given if given[0] else None,
            list(texts[part]),
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            seed=[seed + start + i for i in range(len(given))],
        )
        pictures += [_array(image) for image in result.images]
        tick(len(given))
    return pictures


def _array(image: Image.Image) -> Picture:
    return np.asarray(image.convert("RGB"))
