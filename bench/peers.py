"""Others that edit pictures with the same weights, to compare with."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from .document import Json
from .scenarios import GUIDANCE, PROMPTS, Work

Pixels = NDArray[np.uint8]
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Peer:
    """A way to run diffusers. adapt: done to its pipeline once. exact: it evaluates the model at
    every step, as we do. needs: packages, or commands, that may not be there. on: kinds of devices
    that it runs on. kernels: what must have run there, as in :func:`.launched.launching`."""

    name: str
    precision: str = "fp32"
    adapt: Callable[[Any], None] = lambda _: None
    exact: bool = True
    needs: tuple[str, ...] = ()
    on: tuple[str, ...] = ("cpu", "cuda")
    kernels: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Whether it is diffusers as it comes, in some precision."""
        return not self.needs

    def missing(self, device: str) -> str | None:
        """Why it cannot run on a ``device`` here; None if it can."""
        if (kind := device.partition(":")[0]) not in self.on:
            return f"runs on {', '.join(self.on)}, not on {kind}"
        for need in ("diffusers", "transformers", *self.needs):
            if find_spec(need) is None and shutil.which(need) is None:
                return f"not installed: {need}"
        return None


def _compile(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer)


def _compile_float8(pipe: Any) -> None:
    """Quantised, with the attention that ours takes on sm_90 and newer, then compiled, which fuses
    the scales of inputs as ours are."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, quantize_

    quantize_(pipe.transformer, Float8DynamicActivationFloat8WeightConfig())
    if pipe.device.type == "cuda" and torch.cuda.get_device_capability(pipe.device) >= (9, 0):
        pipe.transformer.set_attention_backend("_native_cudnn")
    _compile(pipe)


def _cache(pipe: Any) -> None:
    import cache_dit

    cache_dit.enable_cache(pipe)


PEERS = {
    peer.name: peer
    for peer in (
        Peer("diffusers"),
        Peer("diffusers-bf16", "bf16"),
        Peer(
            "diffusers-compile",
            adapt=_compile,
            needs=("c++",),
            kernels={"cpu": ["CompiledFxGraph"], "cuda": ["^triton_"]},
        ),
        Peer(
            "diffusers-torchao-fp8",
            "bf16",
            _compile_float8,
            needs=("torchao", "c++"),
            on=("cuda",),
            kernels={"cuda": ["^triton_", "_scaled_mm"]},
        ),
        Peer("diffusers-cache-dit", adapt=_cache, exact=False, needs=("cache_dit",)),
    )
}


class Loaded:
    """A peer with the weights in memory."""

    def __init__(self, peer: Peer, model: Path, device: str) -> None:
        from diffusers.utils import logging as messages
        from transformers.utils import logging as other_messages

        for each in (messages, other_messages):  # before the pipeline, whose import has remarks
            each.disable_progress_bar()
            each.set_verbosity_error()
        from diffusers import FluxKontextPipeline

        self.peer = peer
        dtype = getattr(torch, DTYPES[peer.precision])
        self._pipe = FluxKontextPipeline.from_pretrained(model, dtype=dtype).to(device)
        self._pipe.set_progress_bar_config(disable=True)
        self._transformer = self._pipe.transformer
        peer.adapt(self._pipe)

    def edit(self, work: Work, text_tokens: int) -> Pixels:
        """The picture ``[H, W, 3]`` of a work of one edit with at most one context."""
        pictures = [Image.fromarray(pixels) for pixels in work.pictures()[0]]
        found = self._pipe(
            image=pictures[0] if pictures else None,
            generator=torch.Generator().manual_seed(work.seed),
            _auto_resize=False,
            **call_of(work, text_tokens),
        )
        return np.asarray(found.images[0])

    @contextmanager
    def counted(self) -> Iterator[Json]:
        """The work of the calls in this block, as the schema's ``work``."""
        found: Json = {"forwards": 0, "tokens": 0, "flop": None}

        def count(_: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            found["forwards"] += 1
            image, text = kwargs["hidden_states"], kwargs["encoder_hidden_states"]
            found["tokens"] = image.shape[1] + text.shape[1]

        hook = self._transformer.register_forward_pre_hook(count, with_kwargs=True)
        try:
            yield found
        finally:
            hook.remove()


def call_of(work: Work, text_tokens: int) -> dict[str, Any]:
    """A work as arguments of diffusers' pipeline, without pictures and noise."""
    width, height = work.target
    return {
        "prompt": PROMPTS[0],
        "width": width,
        "height": height,
        "max_area": width * height,
        "num_inference_steps": work.steps,
        "guidance_scale": GUIDANCE,
        "max_sequence_length": text_tokens,
    }


def first_picture_command(
    peer: Peer, model: Path, work: Work, text_tokens: int, device: str, folder: Path
) -> list[str]:
    """A new process that does a work with one context; ``folder`` takes the files."""
    source = folder / f"{peer.name}.png"
    Image.fromarray(work.pictures()[0][0]).save(source)
    arguments = {
        "model": str(model),
        "dtype": DTYPES[peer.precision],
        "device": device,
        "image": str(source),
        "output": str(folder / f"{peer.name}-first.png"),
        "seed": work.seed,
        "call": call_of(work, text_tokens),
    }
    module = "fluxkontext.bench.diffusers_first"
    return [sys.executable, "-P", "-m", module, json.dumps(arguments)]
