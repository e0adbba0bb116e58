"""How long each stage of an edit takes, each of its steps, and the memory of each.

A backend is wrapped, so that the pipeline runs as it always does: its calls are marked, by events
on the device where torch runs on a GPU, so that nothing waits that would not wait otherwise.
"""

import gc
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..runtime import KontextPipeline
from ..runtime.backend import Backend, Batch, Embeddings, Floats, Handle, State, TokenIds
from ..runtime.images import Pixels
from .document import Json
from .memory import Peak, larger

_CALLS = ("text", "vae_encode", "begin", "denoise", "vae_decode")
"""The stages that a backend runs."""
_NAMES = {"image": "vae_encode", "decode": "vae_decode", "prepare": "image_in"}
"""What a pipeline's timings call a stage, where that differs."""


@dataclass
class Marks:
    """Of one call. spans: (start, end) by stage, host seconds or device events."""

    spans: dict[str, list[tuple[Any, Any]]] = field(default_factory=lambda: defaultdict(list))
    host: dict[str, float] = field(default_factory=lambda: defaultdict(float))


class StageClock:
    """Implements :class:`fluxkontext.runtime.backend.Backend` by another one, and times it."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.name, self.device, self.precision = backend.name, backend.device, backend.precision
        self._events: Any = None
        if backend.name == "native" and backend.device.startswith("cuda"):
            import torch

            self._events = torch.cuda
        self.tokens = 0
        """Of one picture in the last call: target, contexts and text."""
        self._text = 0
        self._marks = Marks()
        self._peak: Peak | None = None
        self._peaks: dict[str, Json] = {}

    def __getattr__(self, name: str) -> Any:
        """What a backend has beyond the contract is its own."""
        return getattr(self._backend, name)

    @property
    def clock(self) -> str:
        """As the schema's ``step_clock``."""
        return "cuda_events" if self._events else "perf_counter"

    def encode_text(self, prompt: TokenIds | Embeddings) -> Handle:
        self._text = len(prompt.tokens if isinstance(prompt, Embeddings) else prompt.t5)
        return self._marked("text", self._backend.encode_text, prompt)

    def encode_image(self, image: Pixels | Floats) -> Handle:
        return self._marked("vae_encode", self._backend.encode_image, image)

    def begin(self, batch: Batch) -> State:
        self.tokens = len(batch.positions) + self._text
        return self._marked("begin", self._backend.begin, batch)

    def step(self, state: State, i: int) -> None:
        self._marked("denoise", self._backend.step, state, i)

    def read(self, state: State) -> Floats:
        return self._backend.read(state)

    def write(self, state: State, latents: Floats) -> None:
        self._backend.write(state, latents)

    def decode(self, state: State, stay: bool = False) -> list[Any]:
        pictures: list[Any] = self._marked("vae_decode", self._backend.decode, state, stay)
        return pictures

    def close(self) -> None:
        self._backend.close()

    def watch_memory(self, peak: Peak | None) -> None:
        """Take the peak of every stage from now on, which makes them slower; None ends it."""
        gc.collect()  # garbage of before is not the stages'
        self._peak, self._peaks = peak, {}

    def peaks(self) -> dict[str, Json]:
        """By stage since memory is watched, and ``total``."""
        found = dict(self._peaks)
        for peak in self._peaks.values():
            found["total"] = larger(found["total"], peak) if "total" in found else peak
        return found

    def take(self) -> Marks:
        """What was marked since the last time; waits for the device to reach its last mark."""
        if self._events:
            self._events.synchronize(self.device)
        marks, self._marks = self._marks, Marks()
        return marks

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks."""
        return float(start.elapsed_time(end) / 1e3 if self._events else end - start)

    def _marked(self, stage: str, call: Any, *args: Any) -> Any:
        if self._peak:
            self._peak.start()
        begun = time.perf_counter()
        start = self._mark(begun)
        result = call(*args)
        ended = time.perf_counter()
        self._marks.spans[stage].append((start, self._mark(ended)))
        self._marks.host[stage] += ended - begun
        if self._peak:
            now = self._peak.stop()
            self._peaks[stage] = larger(self._peaks[stage], now) if stage in self._peaks else now
        return result

    def _mark(self, now: float) -> Any:
        if not self._events:
            return now
        event = self._events.Event(enable_timing=True)
        event.record(self._events.current_stream(self.device))
        return event


@dataclass
class Stages:
    """Seconds of every stage and every step, call after call."""

    stages: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    steps: list[float] = field(default_factory=list)

    def add(self, clock: StageClock, timings: Mapping[str, float], wall: float) -> None:
        """One finished call: its own timings, and the seconds that its caller waited.

        What a backend does takes its place in the pipeline's timing of the same stage, which holds
        more than that (the text's tokens) and, on a GPU, not all of that.
        """
        marks = clock.take()
        for name, seconds in timings.items():
            stage = _NAMES.get(name, name)
            if stage not in _CALLS and stage not in ("total", "queue"):
                self.stages[stage].append(seconds)
        for stage in _CALLS:
            spans = marks.spans.get(stage, [])
            if not spans and stage != "text":  # text to image encodes no picture
                continue
            taken = [clock.seconds(*span) for span in spans]
            known = {_NAMES.get(name, name): value for name, value in timings.items()}
            around = max(0.0, known.get(stage, 0.0) - marks.host.get(stage, 0.0))
            if stage == "denoise":
                self.steps += taken
            self.stages[stage].append(sum(taken) + around)
        self.stages["image_out"].append(max(0.0, wall - timings["total"]))


@contextmanager
def timed(pipe: KontextPipeline) -> Iterator[StageClock]:
    """A clock between a pipeline and its backend."""
    backend = pipe.backend
    clock = StageClock(backend)
    pipe.backend = pipe.encoder.backend = clock
    try:
        yield clock
    finally:
        pipe.backend = pipe.encoder.backend = backend
