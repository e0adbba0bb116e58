"""What every step trains on, drawn from the seed and the step alone: any step can be redone.

Scenes travel as integers and are rendered on the device; texts as token ids, from the tokenizer
files that ship.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ....runtime.tokenizer import PromptTokenizer, load_tokenizer
from ..instructions import PAIR_KINDS, Sample, draw_sample
from ..scenes import Scene, Split, draw_scene, encode


@dataclass(frozen=True)
class Group:
    """Samples with equally many context pictures, which share one sequence length.

    share: of every step's samples. kinds: how often each comes, in any unit. blank: the share whose
    text is empty: their target is the context itself, or any scene; guidance is distilled from
    the difference that a text makes.
    """

    contexts: int
    share: float
    kinds: Mapping[str, float]
    blank: float


_CAPTIONS = {"caption": 1.0}
# What a first trial found hardest comes more often.
_EDITS = {
    "recolour": 1.0,
    "remove": 0.8,
    "add": 1.4,
    "replace": 1.2,
    "reshape": 1.2,
    "resize": 1.0,
    "move": 1.6,
    "swap": 1.8,
    "background": 1.0,
    "nothing": 1.2,
}
_PAIRS = dict.fromkeys(PAIR_KINDS, 1.0)

TEXT_TO_IMAGE = (Group(0, 1.0, _CAPTIONS, 0.08),)
JOINT = (
    Group(0, 0.2, _CAPTIONS, 0.08),
    Group(1, 0.65, _EDITS, 0.04),
    Group(2, 0.15, _PAIRS, 0.04),
)


class Batch(NamedTuple):
    """Samples of one group. Pictures are counted with the target first, then the contexts.

    things ``[B, pictures, 9, 3]`` and backgrounds ``[B, pictures]`` uint8, as ``scenes.encode``
    writes them; clip and t5 ``[B, tokens]`` int64.
    """

    things: Tensor
    backgrounds: Tensor
    clip: Tensor
    t5: Tensor

    @property
    def codes(self) -> tuple[Tensor, Tensor]:
        """Things and backgrounds of all pictures in one row."""
        return self.things.flatten(0, 1), self.backgrounds.flatten()

    def repeated(self, times: int) -> "Batch":
        """Every sample so many times in a row."""
        return Batch(*(part.repeat_interleave(times, 0) for part in self))

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        return Batch(*(part.to(device, non_blocking=True) for part in self))


@cache
def tokenizers(folder: Path) -> tuple[PromptTokenizer, PromptTokenizer]:
    """The two tokenizers of a model's folder."""
    return load_tokenizer(folder / "tokenizer", 77), load_tokenizer(folder / "tokenizer_2", 512)


def token_ids(folder: Path, texts: list[str]) -> tuple[Tensor, Tensor]:
    """The ids of texts for CLIP and for T5, each ``[B, tokens]``."""
    clip, t5 = (np.stack([tokenizer(t) for t in texts]) for tokenizer in tokenizers(folder))
    return torch.from_numpy(clip), torch.from_numpy(t5)


def assemble(folder: Path, samples: list[Sample]) -> Batch:
    """Samples of one group as integers."""
    pictures = [scene for sample in samples for scene in (sample.target, *sample.contexts)]
    codes = encode(pictures)
    count = len(pictures) // len(samples)
    return Batch(
        torch.from_numpy(codes.things).unflatten(0, (-1, count)),
        torch.from_numpy(codes.backgrounds).unflatten(0, (-1, count)),
        *token_ids(folder, [sample.text for sample in samples]),
    )


def draw_group(rng: np.random.Generator, group: Group, count: int, split: Split) -> list[Sample]:
    """Random samples of a group."""
    kinds = list(group.kinds)
    weights = np.array([group.kinds[kind] for kind in kinds])
    chosen = rng.choice(len(kinds), count, p=weights / weights.sum())
    return [_draw(rng, group, kinds[i], split) for i in chosen]


def _draw(rng: np.random.Generator, group: Group, kind: str, split: Split) -> Sample:
    sample = draw_sample(rng, kind, split)
    if rng.random() >= group.blank:
        return sample
    contexts = sample.contexts
    target = contexts[0] if contexts else sample.target
    return Sample("blank", "", contexts, target)


@dataclass(frozen=True)
class EditSteps(Dataset[list[Batch]]):
    """By step: one batch a group, this process's part of it. tokenizers: a model's folder."""

    groups: tuple[Group, ...]
    batch: int
    seed: int
    tokenizers: Path
    process: int = 0

    def __getitem__(self, step: int) -> list[Batch]:
        rng = np.random.default_rng((self.seed, self.process, step))
        counts = [max(1, round(self.batch * group.share)) for group in self.groups]
        return [
            assemble(self.tokenizers, draw_group(rng, group, count, "train"))
            for group, count in zip(self.groups, counts, strict=True)
        ]


@dataclass(frozen=True)
class SceneSteps(Dataset[tuple[Tensor, Tensor]]):
    """By step: scenes for the VAE, ``[B, 9, 3]`` things and ``[B]`` backgrounds, uint8.

    Two in three are dense: in sparse ones the background is nearly all of the loss, and things come
    last. The rest are as the edits have them, since the norms see how much of a picture is plain.
    """

    batch: int
    seed: int
    process: int = 0

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((self.seed, self.process, step))
        usual = self.batch // 3
        scenes = dense_scenes(rng, self.batch - usual, "train")
        scenes += [draw_scene(rng, "train") for _ in range(usual)]
        codes = encode(scenes)
        return torch.from_numpy(codes.things), torch.from_numpy(codes.backgrounds)


def dense_scenes(rng: np.random.Generator, count: int, split: Split) -> list[Scene]:
    """Scenes of five to nine things."""
    return [draw_scene(rng, split, range(5, 10)) for _ in range(count)]


def stream(
    steps: Dataset[list[Batch]], start: int, workers: int, pin: bool
) -> Iterator[list[Batch]]:
    """The batches of step ``start`` and after, drawn ahead by other processes if there are any."""
    return iter(
        DataLoader(
            steps,
            batch_size=None,
            sampler=range(start, 2**40),
            num_workers=workers,
            prefetch_factor=8 if workers else None,
            pin_memory=pin,
        )
    )
