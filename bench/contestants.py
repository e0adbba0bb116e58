"""Those that a comparison runs: ours, ours with its memos, ours on another backend, and peers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..runtime import KontextPipeline
from ..runtime.backends.native import NativeBackend
from .cold import command_of
from .document import Json
from .launched import launching, of_our_kernels
from .models import Model
from .peers import PEERS, Loaded, Peer, Pixels, first_picture_command
from .scenarios import Work
from .stages import timed

OURS = "fluxkontext"
MEMO = "fluxkontext-memo"
NATIVE = "fluxkontext-native"
ONNX = "fluxkontext-onnx"
NAMES = (MEMO, NATIVE, ONNX, *PEERS)
"""Whom ours can be compared with."""


@dataclass(frozen=True)
class Contestant:
    """One that makes the picture of a work.

    edit: the picture, uint8 ``[H, W, 3]``. counted: the same, and the work as the schema has it.
    exact: evaluates the model at every step, on all tokens. first: the command of a new process.
    details: what it says of itself.
    """

    name: str
    precision: str
    backend: str
    device: str
    edit: Callable[[Work], Pixels]
    counted: Callable[[Work], tuple[Pixels, Json]]
    exact: bool = True
    first: Callable[[Work, Path], list[str]] | None = None
    details: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def ours(
    name: str,
    path: Path,
    backend: str,
    precision: str,
    device: str,
    named: Mapping[str, str] | None = None,
) -> Iterator[tuple[Contestant, KontextPipeline]]:
    """Us; only the one called MEMO remembers anything between calls. named: ops by
    implementation."""
    with KontextPipeline.from_pretrained(
        path,
        backend=backend,
        precision=precision,
        device=device,
        kernels=named,
        memo_entries=16 if name == MEMO else 0,
    ) as pipe:
        about = pipe.about
        kernels = of_our_kernels(pipe.backend.details.get("kernels", ""), about["precision"])

        def edit(work: Work) -> Pixels:
            return np.asarray(pipe(**work.arguments()).images[0])

        def counted(work: Work) -> tuple[Pixels, Json]:
            with ExitStack() as counting:
                counting.enter_context(launching(name, kernels, about["device"]))
                native = None
                if isinstance(pipe.backend, NativeBackend):
                    native = counting.enter_context(_evaluations(pipe.backend))
                clock = counting.enter_context(timed(pipe))
                picture = edit(work)
            steps = len(clock.take().spans["denoise"])
            return picture, {
                "forwards": native.all if native else steps,
                "tokens": clock.tokens,
                "flop": None,
            }

        def first(work: Work, folder: Path) -> list[str]:
            return command_of(
                work, path, about["backend"], about["precision"], about["device"], folder
            )

        yield (
            Contestant(
                name,
                about["precision"],
                about["backend"],
                about["device"],
                edit,
                counted,
                first=None if name == MEMO else first,
                details=pipe.backend.details,
            ),
            pipe,
        )


@dataclass
class Evaluations:
    """Of the transformer: calls, of which ``captures`` recorded a CUDA graph and computed
    nothing, and replays of graphs, which call nothing."""

    calls: int = 0
    captures: int = 0
    replays: int = 0

    @property
    def all(self) -> int:
        return self.calls - self.captures + self.replays


@contextmanager
def _evaluations(backend: NativeBackend) -> Iterator[Evaluations]:
    """Those in this block; known when it ends."""
    found = Evaluations(captures=-backend.captures, replays=-backend.replays)

    def count(*_: object) -> None:
        found.calls += 1

    hook = backend.denoiser.register_forward_pre_hook(count)
    try:
        yield found
    finally:
        hook.remove()
        found.captures += backend.captures
        found.replays += backend.replays


def peer(known: Peer, model: Model, device: str, text_tokens: int) -> Contestant:
    """Another's pipeline with the same weights on the same device."""
    loaded = Loaded(known, model.path, device)

    def edit(work: Work) -> Pixels:
        return loaded.edit(work, text_tokens)

    def counted(work: Work) -> tuple[Pixels, Json]:
        with (
            launching(known.name, known.kernels.get(device.partition(":")[0], ()), device),
            loaded.counted() as done,
        ):
            picture = edit(work)
        return picture, done

    def first(work: Work, folder: Path) -> list[str]:
        return first_picture_command(known, model.path, work, text_tokens, device, folder)

    return Contestant(
        known.name,
        known.precision,
        "torch",
        device,
        edit,
        counted,
        known.exact,
        first if known.plain else None,
    )


def same_work(base: Json, other: Json, names: Sequence[str]) -> str | None:
    """What differs between two counted works; None if nothing does."""
    for key in ("forwards", "tokens"):
        if base[key] != other[key]:
            return f"{key}: {names[0]} {base[key]}, {names[1]} {other[key]}"
    return None


def agreement(a: Pixels, b: Pixels) -> Json:
    """Of two pictures, as the schema's ``agreement``."""
    difference = a.astype(np.int16) - b.astype(np.int16)
    mse = float(np.mean(np.square(difference, dtype=np.float64)))
    return {
        "max_levels": int(np.abs(difference).max()),
        "psnr_db": 10 * float(np.log10(255**2 / mse)) if mse else None,
    }
