"""``fluxkontext calibrate``: run edits, and see how large what is to be quantised becomes.

Everything is kept on the device until the end, so that steps run without waiting for the host.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..kernels.quantize import TINY
from ..runtime.about import VERSION
from ..runtime.backends.native import NativeBackend
from ..runtime.errors import CheckpointError, InvalidInputError, KontextError
from ..runtime.geometry import Size
from ..runtime.images import read_picture
from ..runtime.models.transformer import DoubleStreamBlock, Flux, SingleStreamBlock
from ..runtime.pipeline import KontextPipeline
from ..runtime.recipes import takes_part
from .calibration import Calibration

PROMPTS = (
    "make the sky a deep orange sunset",
    "turn this into a watercolour painting",
    "remove everything in the background",
    "add a red hat",
    "replace the text with 'OPEN'",
    "the same scene at night, lit by street lamps",
    "make it a black and white photograph",
    "zoom out and show what is around",
)
"""Kinds of edits that differ: colour, style, removal, addition, text, light, tone, framing."""
SCENE = Path(__file__).with_name("scene.png")
"""A picture of soft light, edges and flat colours, for those who give none."""
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def calibrate(
    pipe: KontextPipeline,
    pictures: Sequence[Path],
    prompts: Sequence[str] = PROMPTS,
    *,
    steps: int = 28,
    percentile: float = 100.0,
    size: Size | None = None,
    progress: bool = False,
) -> Calibration:
    """Edit ``pictures`` by ``prompts``, in turn until all of both were used, and measure.

    pipe: of an unquantised checkpoint, on the native backend. percentile: of the magnitudes of one
    call that counts as its largest; the largest of all calls is kept. size: of the results, (w, h).
    Raises InvalidInputError for what cannot be used, KontextError for activations that are not
    finite.
    """
    backend = pipe.backend
    if not isinstance(backend, NativeBackend):
        raise InvalidInputError(
            f"backend: expected native to calibrate with, found {backend.name}; name a checkpoint"
        )
    if "recipe" in backend.details:
        raise CheckpointError(
            f"{pipe.name}: expected plain weights to calibrate, found {backend.details['recipe']}; "
            "calibrate the checkpoint that they were made from"
        )
    if not 0 < percentile <= 100:
        raise InvalidInputError(f"percentile: expected above 0, at most 100, found {percentile}")
    if not pictures or not prompts:
        raise InvalidInputError("expected a picture and a prompt at least, found none")
    width, height = size or (None, None)
    edits = max(len(pictures), len(prompts))
    with _observed(backend, percentile) as found:
        for i in tqdm(range(edits), desc="edits", disable=not progress):
            pipe(
                read_picture(pictures[i % len(pictures)]),
                prompts[i % len(prompts)],
                num_inference_steps=steps,
                width=width,
                height=height,
                max_area=None if width is None or height is None else width * height,
                seed=i,
                output_type="latent",
            )
    amax = {name: found[name].item() for name in sorted(found)}
    if broken := [name for name, value in amax.items() if not value < float("inf")]:
        raise KontextError(
            f"expected finite activations, found infinity or NaN in {broken[0]}; "
            "calibrate in precision bf16 or fp32"
        )
    about = {
        "software": f"fluxkontext {VERSION}",
        "precision": backend.precision,
        "steps": steps,
        "prompts": list(prompts),
        "images": [picture.name for picture in pictures],
    }
    amax = {name: max(value, TINY) for name, value in amax.items()}
    return Calibration(pipe.name, percentile, amax, about)


def pictures_of(paths: Sequence[Path]) -> list[Path]:
    """The pictures that are named, and those in folders that are named."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = [p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES]
            if not inside:
                raise InvalidInputError(f"{path}: expected pictures in this folder, found none")
            found += sorted(inside)
        else:
            found.append(path)
    return found


def prompts_of(file: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{file}: expected a text file of prompts, found {error}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InvalidInputError(f"{file}: expected a prompt a line, found none")
    return prompts


class _Observed(nn.Module):
    """Stands in for a linear layer, and shows what goes in."""

    def __init__(self, layer: nn.Module, see: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.layer = layer
        self.see = see

    def forward(self, x: Tensor) -> Any:
        self.see(x)
        return self.layer(x)

    def part(self, x: Tensor, start: int, stop: int) -> Any:
        self.see(x)
        return self.layer.part(x, start, stop)  # type: ignore[operator]


@contextmanager
def _observed(backend: NativeBackend, percentile: float) -> Iterator[dict[str, Tensor]]:
    """Watch the denoiser while the block runs: name -> largest magnitude so far, on the device."""
    flux, found = backend.denoiser, dict[str, Tensor]()

    def see(name: str, x: Tensor) -> None:
        magnitudes = x.detach().abs().flatten()
        if percentile == 100:
            largest = magnitudes.amax()
        else:
            k = max(ceil(percentile / 100 * magnitudes.numel()), 1)
            largest = magnitudes.kthvalue(k).values
        known = found.get(name)
        found[name] = largest.float() if known is None else torch.maximum(known, largest.float())

    layers = {
        name: module
        for name, module in flux.named_modules()
        if isinstance(module, nn.Linear) and takes_part("transformer", name, module.in_features)
    }
    blocks = dict(_blocks(flux))
    kernels = {name: block.kernels for name, block in blocks.items()}
    recorded, backend.graphs = backend.graphs, False  # a replay would run none of this
    try:
        for name, layer in layers.items():
            flux.set_submodule(name, _Observed(layer, partial(see, name)))
        for name, block in blocks.items():
            block.kernels = replace(kernels[name], attention=_attention(name, kernels[name], see))
        yield found
        found |= {f"{name}.p": torch.ones(()) for name in blocks}
    finally:
        backend.graphs = recorded
        for name, layer in layers.items():
            flux.set_submodule(name, layer)
        for name, block in blocks.items():
            block.kernels = kernels[name]


def _blocks(flux: Flux) -> Iterator[tuple[str, DoubleStreamBlock | SingleStreamBlock]]:
    for name, module in flux.named_modules():
        if isinstance(module, DoubleStreamBlock | SingleStreamBlock):
            yield name, module


def _attention(
    block: str, kernels: Any, see: Callable[[str, Tensor], None]
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The attention of a block, which shows its inputs."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for name, x in zip("qkv", (q, k, v), strict=True):
            see(f"{block}.{name}", x)
        out: Tensor = kernels.attention(q, k, v)
        return out

    return attention
