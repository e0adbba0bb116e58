"""The torch backend: any checkpoint, on CPU or GPU, without a build step."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from ...kernels import reference
from ..backend import Batch, Embeddings, Floats, TokenIds
from ..checkpoint import Checkpoint
from ..errors import (
    BackendUnavailableError,
    InvalidInputError,
    KontextError,
    OutOfMemoryError,
)
from ..geometry import Size
from ..images import Pixels
from ..loading import load
from ..models.clip import ClipText
from ..models.t5 import T5Encoder
from ..models.transformer import Flux
from ..models.vae import Vae, pack, scale, unpack, unscale

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_EXHAUSTED = re.compile(r"alloc|out of memory|could not create a (primitive|memory object)$", re.I)
"""What exhausted memory is called where torch raises a bare RuntimeError: its CPU allocator, CUDA,
cuBLAS and cuDNN (``..._ALLOC_FAILED``), and oneDNN."""

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Text:
    """Conditioning of one prompt: ``pooled [1, vec_in_dim]``, ``tokens [1, S, context_in_dim]``."""

    pooled: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Branch:
    """One conditioning of a batch: ``modulation [N, R, B, 1, D]``, ``txt [B, S, D]``, ``rope``."""

    modulation: Tensor
    txt: Tensor
    rope: Tensor


@dataclass
class State:
    """A batch in the making. ``latents [B, T, 4 C]`` float32; one branch, or two for true CFG."""

    latents: Tensor
    context: Tensor
    branches: Sequence[Branch]
    dts: Sequence[float]
    true_cfg_scale: float
    target: Size


def on_device(method: Callable[P, R]) -> Callable[P, R]:
    """Run without autograd, and report exhausted memory as our own error."""

    @wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(), _memory_errors():
            return method(*args, **kwargs)

    return run


@contextmanager
def _memory_errors() -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        text = str(error).splitlines()[0] if str(error) else "out of memory"
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not is_memory and not _EXHAUSTED.search(text):
            raise
        failure = OutOfMemoryError(
            f"expected enough memory for this edit, found: {text}; "
            "use a smaller size, fewer images at once or a lower precision"
        )
    else:
        return
    # raised here, so that the failed call's frames and tensors are let go first
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise failure


class NativeBackend:
    """Implements :class:`fluxkontext.runtime.backend.Backend`."""

    name = "native"

    @_memory_errors()
    def __init__(self, checkpoint: Checkpoint, device: str, precision: str) -> None:
        """Load every network.

        device: ``auto``, ``cpu``, ``cuda`` ... precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``;
        auto is fp32 on a CPU, and bf16 (fp16 before Ampere) on a GPU.
        """
        self._device = _choose_device(device)
        self.device = str(self._device)
        self.precision = _choose_precision(precision, self._device)
        self._dtype = dtype = DTYPES[self.precision]
        # fp16 overflows in the decoder, as the checkpoint's config warns
        upcast = dtype == torch.float16 and checkpoint.vae.config.force_upcast
        self._vae_dtype = torch.float32 if upcast else dtype
        ops = reference()
        self._clip = load(checkpoint.text_encoder, ClipText, self._device, dtype)
        self._t5 = load(checkpoint.text_encoder_2, T5Encoder, self._device, dtype)
        self._vae = load(checkpoint.vae, Vae, self._device, self._vae_dtype)
        self._flux = load(checkpoint.transformer, lambda c: Flux(c, ops), self._device, dtype)

    @on_device
    def encode_text(self, prompt: TokenIds | Embeddings) -> Text:
        if isinstance(prompt, Embeddings):
            shape = self._flux.config
            for label, found, takes in (
                ("prompt_embeds", prompt.tokens.shape[-1], shape.context_in_dim),
                ("pooled_prompt_embeds", prompt.pooled.shape[-1], shape.vec_in_dim),
            ):
                if found != takes:
                    raise InvalidInputError(f"{label}: expected {takes} features, found {found}")
            return Text(self._tensor(prompt.pooled)[None], self._tensor(prompt.tokens)[None])
        clip = torch.from_numpy(prompt.clip)[None].to(self._device)
        t5 = torch.from_numpy(prompt.t5)[None].to(self._device)
        return Text(self._clip(clip), self._t5(t5))

    @on_device
    def encode_image(self, image: Pixels | Floats) -> Tensor:
        """Context tokens ``[1, tokens, 4 C]``."""
        if image.dtype == np.uint8:
            pixels = torch.tensor(image, device=self._device)
            # contiguous: channels-last convolutions on a CPU lose a digit (measured at 1248x832)
            pixels = pixels.permute(2, 0, 1)[None].contiguous().to(torch.float32) / 255 * 2 - 1
            with self._exact_convolutions():
                latents = self._vae.encode(pixels.to(self._vae_dtype))
            latents = scale(latents, self._vae.config).to(self._dtype)
        else:
            latents = self._tensor(cast(Floats, image))[None]
        return pack(latents)

    @on_device
    def begin(self, batch: Batch) -> State:
        device, flux = self._device, self._flux
        contexts = [torch.cat(list(handles), dim=1) for handles in batch.contexts if handles]
        latents = torch.tensor(batch.noise, device=device)
        if contexts:
            context = flux.img_in(torch.cat(contexts))
        else:
            context = latents.new_empty(len(latents), 0, flux.config.hidden_size, dtype=self._dtype)
        sigmas = torch.from_numpy(batch.sigmas).to(device)
        guidance = torch.tensor([batch.guidance_scale], dtype=torch.float32, device=device)
        positions = torch.from_numpy(batch.positions).to(device)
        branches = []
        for texts in (batch.text, batch.negative) if batch.negative else (batch.text,):
            pooled = torch.cat([text.pooled for text in texts])
            txt = flux.txt_in(torch.cat([text.tokens for text in texts]))
            modulation = flux.modulation(sigmas[:-1], guidance, pooled)
            branches.append(Branch(modulation, txt, flux.rope(positions, txt.shape[1])))
        dts = np.diff(batch.sigmas).tolist()
        return State(latents, context, branches, dts, batch.true_cfg_scale, batch.target)

    @on_device
    def step(self, state: State, i: int) -> None:
        img = state.latents.to(self._dtype)
        velocities = [
            self._flux(img, state.context, branch.txt, branch.modulation[i], branch.rope).float()
            for branch in state.branches
        ]
        velocity = velocities[0]
        if len(velocities) == 2:
            velocity = torch.lerp(velocities[1], velocity, state.true_cfg_scale)
        state.latents.add_(velocity, alpha=state.dts[i])

    @on_device
    def read(self, state: State) -> Floats:
        return state.latents.cpu().numpy().copy()

    @on_device
    def write(self, state: State, latents: Floats) -> None:
        state.latents.copy_(torch.from_numpy(latents))

    @on_device
    def decode(self, state: State) -> list[Pixels]:
        if not state.latents.isfinite().all():
            raise KontextError(
                f"expected finite latents, found NaN or infinity after the last step in "
                f"{self.precision}; use precision bf16 or fp32"
            )
        width, height = state.target
        pictures = []
        for tokens in state.latents.split(1):  # one at a time: the decoder is the memory's peak
            latents = unscale(unpack(tokens, width, height), self._vae.config)
            with self._exact_convolutions():
                image = self._vae.decode(latents.to(self._vae_dtype))[0]
            levels = (image.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
            pictures.append(levels.permute(1, 2, 0).contiguous().cpu().numpy())
        return pictures

    def close(self) -> None:
        del self._clip, self._t5, self._vae, self._flux
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _tensor(self, array: Floats) -> Tensor:
        return torch.tensor(array, device=self._device).to(self._dtype)

    def _exact_convolutions(self) -> Any:
        """fp32 means fp32: torch lets cuDNN use TF32 for convolutions by default."""
        return torch.backends.cudnn.flags(enabled=True, allow_tf32=self._vae_dtype != torch.float32)


def _choose_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise BackendUnavailableError(
            f"device: expected auto, cpu, or one that torch can use here, found {device} ({reason})"
        ) from None
    return chosen


def _choose_precision(precision: str, device: torch.device) -> str:
    if precision == "auto":
        if device.type == "cpu":
            return "fp32"
        return "bf16" if device.type != "cuda" or torch.cuda.is_bf16_supported(False) else "fp16"
    if precision not in DTYPES:
        raise BackendUnavailableError(
            f"precision: expected auto or one of {', '.join(DTYPES)} for the native backend, "
            f"found {precision}"
        )
    return precision
