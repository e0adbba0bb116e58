"""What a call returns: the pictures, and all that is needed to make them again."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .errors import InvalidInputError
from .geometry import Size, Transform
from .images import check_output, save
from .jobs import Job
from .request import Prompt

OUTPUT_TYPES = ("pil", "np", "latent", "cuda")


@dataclass(frozen=True)
class Sampling:
    """The settings that all pictures of a call share."""

    num_inference_steps: int
    sigmas: tuple[float, ...] | None
    guidance_scale: float
    true_cfg_scale: float
    context_layout: str
    auto_resize: bool
    max_sequence_length: int


@dataclass(frozen=True)
class EditResult:
    """The pictures of a call, in the order of its edits.

    images: PIL images; or arrays ``[H, W, 3]`` float32 in 0..1 (``np``); or packed latents
    ``[tokens, features]`` float32 (``latent``); arrays of one shape come stacked as one. ``cuda``
    leaves pictures on the GPU: a list of uint8 arrays ``[H, W, 3]`` with
    ``__cuda_array_interface__``, which torch, CuPy and PyCUDA read without a copy.
    seeds: of each picture, None where a generator or latents were given. transforms: for each
    picture, how each of its contexts maps onto it. settings: for each picture, what made it, ready
    for JSON. timings: seconds by stage.
    """

    images: Any
    seeds: list[int | None]
    transforms: list[list[Transform]]
    settings: list[dict[str, Any]]
    timings: dict[str, float]

    def save(self, path: str | os.PathLike[str], *, metadata: bool = False) -> list[Path]:
        """Write the pictures: to ``path``, or to several, numbered from ``-1``, beside it.

        Each is written whole or not at all. metadata: put the settings into PNGs, for
        ``fluxkontext inspect``. Raises InvalidInputError for a path that cannot be written.
        """
        paths = numbered(Path(path), len(self.images))
        for target in paths:
            check_output(target)
        for picture, target, settings in zip(self.images, paths, self.settings, strict=True):
            if not isinstance(picture, Image.Image):
                raise InvalidInputError("save: expected output_type 'pil', found arrays")
            save(picture, target, settings if metadata else None)
        return paths


def numbered(path: Path, count: int) -> list[Path]:
    """Where several pictures go: ``out-1.png``, ``out-2.png`` ...; a single one keeps its name."""
    if count == 1 or not path.name:
        return [path]
    return [path.with_stem(f"{path.stem}-{i + 1}") for i in range(count)]


def assemble(
    jobs: Sequence[Job],
    sampling: Sampling,
    about: dict[str, str],
    output_type: str,
    timings: dict[str, float],
) -> EditResult:
    """Make the result of finished jobs; ``about`` says what ran them."""
    outputs: Any = [job.output for job in jobs]
    if output_type == "pil":
        outputs = [Image.fromarray(pixels) for pixels in outputs]
    elif output_type != "cuda":
        if output_type == "np":
            outputs = [pixels.astype(np.float32) / 255 for pixels in outputs]
        if len({array.shape for array in outputs}) == 1:
            outputs = np.stack(outputs)
    return EditResult(
        images=outputs,
        seeds=[job.seed for job in jobs],
        transforms=[job.transforms for job in jobs],
        settings=[_settings(job, sampling, about) for job in jobs],
        timings=timings,
    )


def _settings(job: Job, sampling: Sampling, about: dict[str, str]) -> dict[str, Any]:
    """What made one picture, as JSON; what was not used is left out."""
    texts = {"": job.edit.text, "negative_": job.edit.negative}
    prompts = {}
    for kind, text in texts.items():
        if isinstance(text, Prompt):
            prompts[f"{kind}prompt"] = text.clip
            if text.t5 != text.clip:
                prompts[f"{kind}prompt_2"] = text.t5
    shared = {key: value for key, value in asdict(sampling).items() if value is not None}
    if job.edit.negative is None:
        del shared["true_cfg_scale"]
    return {
        **about,
        **prompts,
        "seed": job.seed,
        "index": job.draw,
        "size": _size(job.target),
        "contexts": [{"source": _size(t.source), "model": _size(t.model)} for t in job.transforms],
        **shared,
    }


def _size(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
