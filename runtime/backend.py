"""The contract between the pipeline and whatever runs the model.

It is small and the same for every backend, so that the denoising loop holds no array code and
nothing crosses to the host inside it. Handles and states are the backend's own and opaque.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .contract import Profile
from .geometry import Size
from .images import Pixels

Floats = NDArray[np.float32]
Handle = Any
State = Any


@dataclass(frozen=True)
class TokenIds:
    """One prompt: ``clip [77]`` and ``t5 [max_sequence_length]`` int64 token ids."""

    clip: NDArray[np.int64]
    t5: NDArray[np.int64]


@dataclass(frozen=True)
class Embeddings:
    """One prompt, encoded already: ``pooled [vec_in_dim]`` and ``tokens [S, context_in_dim]``."""

    pooled: Floats
    tokens: Floats


@dataclass(frozen=True)
class Batch:
    """What a backend needs to run edits of equal shape together.

    text, contexts: one entry an edit, of handles. negative: the same for true CFG, or empty.
    noise: ``[B, T, 4 C]`` float32 tokens. positions: ``[T + C, 3]`` int32 of target and contexts.
    target: its size in tokens (w, h). sigmas: ``[N + 1]`` float32.
    """

    text: Sequence[Handle]
    negative: Sequence[Handle]
    contexts: Sequence[Sequence[Handle]]
    noise: Floats
    positions: NDArray[np.int32]
    target: Size
    sigmas: Floats
    guidance_scale: float
    true_cfg_scale: float


class Backend(Protocol):
    """One loaded model on one device. Calls come from one thread at a time."""

    name: str
    device: str
    precision: str
    details: Mapping[str, str]
    """What else to know of it, for :attr:`KontextPipeline.about`: its kernels, say."""
    leaves: bool
    """Whether pictures can stay on a GPU."""
    text_features: tuple[int, int]
    """Of a prompt: how many its pooled vector has, and how many each of its tokens."""

    max_batch: int | None
    """Edits of equal shape that it runs together, at most; None: as many as memory takes."""
    profiles: Mapping[str, Profile]
    """Graph -> the ranges of its inputs that alone it runs; graphs that are not here run any."""

    def encode_text(self, prompt: TokenIds | Embeddings) -> Handle:
        """Text conditioning of one prompt."""

    def encode_image(self, image: Pixels | Floats) -> Handle:
        """Context tokens of one picture, uint8 ``[H, W, 3]``, or of latents ``[C, h, w]`` that are
        scaled already; the sides are whole tokens."""

    def begin(self, batch: Batch) -> State:
        """Compute everything that the steps share."""

    def step(self, state: State, i: int) -> None:
        """One Euler step: the latents go from sigma i to sigma i + 1."""

    def read(self, state: State) -> Floats:
        """The current latents ``[B, T, 4 C]``."""

    def write(self, state: State, latents: Floats) -> None:
        """Replace the current latents, for a callback that changed them."""

    def decode(self, state: State, stay: bool = False) -> list[Any]:
        """The pictures, uint8 ``[H, W, 3]``: numpy arrays; or, if they are to ``stay`` on the GPU
        and the backend ``leaves`` them there, arrays with ``__cuda_array_interface__``."""

    def close(self) -> None:
        """Release the device's memory."""
