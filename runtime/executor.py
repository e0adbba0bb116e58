"""The denoising loop: buffers whose addresses stay, and a step that reads all it needs from them.

What differs between steps (the number of the step, its modulation and its dt) is selected on the
device, so a step is the same work every time: on CUDA it is recorded once for every size as a graph
and replayed; elsewhere the same code runs as it is.
"""

import logging
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .device_memory import ran_out
from .errors import KontextError
from .graphs import Pace, Recorder
from .models.transformer import Flux

_log = logging.getLogger(__name__)

MAX_GRAPHS = 8
"""Sizes whose graphs are kept; the one that was used longest ago goes first."""

_STEPS = 32
"""Buffers of modulation hold a multiple of this many steps, so that few sizes differ by them."""


@dataclass(frozen=True)
class Branch:
    """One conditioning: ``text [B, S, D]``, ``modulation [N, R, B, 1, D]``, ``rope``."""

    text: Tensor
    modulation: Tensor
    rope: Tensor


@dataclass(frozen=True)
class Edit:
    """A batch at the start: ``latents [B, T, 4 C]`` float32, ``context [B, C, D]``, ``dts [N]``.

    One branch, or two for true CFG, whose scale is looked at only then.
    """

    latents: Tensor
    context: Tensor
    branches: Sequence[Branch]
    dts: Tensor
    true_cfg_scale: float = 1.0


@dataclass(frozen=True)
class Bucket:
    """The size of an edit; edits of equal size share a graph."""

    batch: int
    target_tokens: int
    context_tokens: int
    text_tokens: tuple[int, ...]
    steps: int

    @classmethod
    def of(cls, edit: Edit) -> "Bucket":
        """The bucket that ``edit`` falls into."""
        batch, target_tokens, _ = edit.latents.shape
        text_tokens = tuple(branch.text.shape[1] for branch in edit.branches)
        steps = -(-len(edit.dts) // _STEPS) * _STEPS
        return cls(batch, target_tokens, edit.context.shape[1], text_tokens, steps)


@dataclass(frozen=True)
class Buffers:
    """What a step reads and writes. dts, modulation: of all steps. step: ``[1]``, its number."""

    latents: Tensor
    context: Tensor
    branches: Sequence[Branch]
    dts: Tensor
    true_cfg_scale: Tensor
    step: Tensor

    def fill(self, edit: Edit) -> None:
        """Put an edit of this size at its first step."""
        self.latents.copy_(edit.latents)
        self.context.copy_(edit.context)
        for mine, given in zip(self.branches, edit.branches, strict=True):
            mine.text.copy_(given.text)
            mine.modulation[: len(given.modulation)].copy_(given.modulation)
            mine.rope.copy_(given.rope)
        self.dts[: len(edit.dts)].copy_(edit.dts)
        self.true_cfg_scale.fill_(edit.true_cfg_scale)
        self.step.zero_()


@dataclass
class Recording:
    """The buffers of a size and, once it is captured, the step that works on them."""

    buffers: Buffers
    graph: Any = None  # torch.cuda.CUDAGraph


@dataclass
class Run:
    """An edit that is in the buffers: ``at`` is the step that comes next by itself."""

    recording: Recording
    record: bool
    warm: bool = False
    at: int = 0


@dataclass
class _Storage:
    """One flat piece of memory for every use, as large as its largest user was."""

    device: torch.device
    pieces: dict[Hashable, Tensor] = field(default_factory=dict)

    def like(self, use: Hashable, example: Tensor, rows: int | None = None) -> Tensor:
        """Memory of the shape (``rows`` in place of its first number) and type of ``example``."""
        shape = example.shape if rows is None else (rows, *example.shape[1:])
        count = torch.Size(shape).numel()
        piece = self.pieces.get(use)
        if piece is None or piece.numel() < count or piece.dtype != example.dtype:
            self.pieces.pop(use, None)  # before the larger one is made, unless a graph has it
            piece = torch.empty(count, dtype=example.dtype, device=self.device)
            self.pieces[use] = piece
        return piece[:count].view(shape)


class Executor:
    """Runs the steps of one edit at a time: the one that began last.

    An older edit's buffers are the new one's: using its run again is an error, not a wrong picture.
    ``captures`` and ``replays`` count what was done with graphs.
    """

    def __init__(
        self, flux: Flux, device: torch.device, dtype: torch.dtype, max_graphs: int = MAX_GRAPHS
    ) -> None:
        """dtype: what the model computes in. max_graphs: how many are kept, 0 for none."""
        self._flux = flux
        self._dtype = dtype
        self._storage = _Storage(device)
        self._recordings: OrderedDict[Bucket, Recording] = OrderedDict()
        self._max_graphs = max_graphs
        is_cuda = device.type == "cuda" and max_graphs > 0
        self._recorder = Recorder(device) if is_cuda else None
        self._pace = Pace(device) if device.type == "cuda" else None
        self._current: Run | None = None
        self.captures = 0
        self.replays = 0

    def begin(self, edit: Edit, record: bool = True) -> Run:
        """Copy an edit into the buffers. record: capture its step, if the device can."""
        self._current = None
        record = record and self._recorder is not None
        run = Run(self._recording(Bucket.of(edit), edit, record), record)
        run.recording.buffers.fill(edit)
        self._current = run
        return run

    def step(self, run: Run, i: int) -> None:
        """One Euler step: the latents go from sigma i to sigma i + 1.

        The first step of a size runs as it is, which compiles and warms up what it needs; the next
        one is captured.
        """
        self._check(run)
        recording = run.recording
        if run.at != i:
            recording.buffers.step.fill_(i)
        if recording.graph is None and run.record and run.warm:
            self._capture(run)
        if recording.graph is not None:
            recording.graph.replay()
            self.replays += 1
        else:
            self._advance(recording.buffers)
        run.warm, run.at = True, i + 1
        if self._pace is not None:
            self._pace.keep()

    def latents(self, run: Run) -> Tensor:
        """The latents of a run, ``[B, T, 4 C]`` float32: to be read, or written between steps."""
        self._check(run)
        return run.recording.buffers.latents

    def release(self) -> None:
        """Give back graphs and buffers; runs end."""
        self._current = None
        self._forget_graphs()
        self._storage.pieces.clear()

    def _check(self, run: Run) -> None:
        if run is not self._current:
            raise KontextError(
                "expected the edit that began last, found an older one: its buffers are in use; "
                "finish one edit before the next begins"
            )

    def _recording(self, bucket: Bucket, edit: Edit, record: bool) -> Recording:
        if not record:
            return Recording(self._buffers(bucket, edit))
        recording = self._recordings.pop(bucket, None)
        if recording is None or recording.graph is None:
            recording = Recording(self._buffers(bucket, edit))
        self._recordings[bucket] = recording
        while len(self._recordings) > self._max_graphs:
            _, oldest = self._recordings.popitem(last=False)
            _reset(oldest)
        return recording

    def _buffers(self, bucket: Bucket, edit: Edit) -> Buffers:
        like, steps = self._storage.like, bucket.steps
        return Buffers(
            latents=like("latents", edit.latents),
            context=like("context", edit.context),
            branches=[
                Branch(
                    like(("text", i), branch.text),
                    like(("modulation", i), branch.modulation, steps),
                    like(("rope", i), branch.rope),
                )
                for i, branch in enumerate(edit.branches)
            ],
            dts=like("dts", edit.dts, steps),
            true_cfg_scale=like("scale", edit.dts, 1).squeeze(0),
            step=like("step", torch.empty(1, dtype=torch.int64)),
        )

    def _advance(self, buffers: Buffers) -> None:
        """The step: no allocation that outlives it, nothing from or to the host."""
        img, step = buffers.latents.to(self._dtype), buffers.step
        velocities = []
        for branch in buffers.branches:
            modulation = branch.modulation.index_select(0, step).squeeze(0)
            velocity = self._flux(img, buffers.context, branch.text, modulation, branch.rope)
            velocities.append(velocity.float())
        velocity = velocities[0]
        if len(velocities) == 2:
            velocity = torch.lerp(velocities[1], velocity, buffers.true_cfg_scale)
        buffers.latents.addcmul_(velocity, buffers.dts.index_select(0, step))
        step.add_(1)

    def _capture(self, run: Run) -> None:
        """Record the step; without the memory for that, free all graphs and go on without."""
        assert self._recorder is not None
        buffers = run.recording.buffers
        try:
            run.recording.graph = self._recorder.capture(lambda: self._advance(buffers))
        except RuntimeError as error:
            if not (ran_out(error) or ran_out(error.__context__)):
                raise
            run.record = False
        else:
            self.captures += 1
            return
        self._forget_graphs()
        _log.warning(
            "CUDA graph: expected memory to capture a step, found it exhausted; freed all graphs "
            "and launch this edit's steps kernel by kernel; use fewer sizes or smaller ones"
        )

    def _forget_graphs(self) -> None:
        while self._recordings:
            _reset(self._recordings.popitem()[1])
        if self._recorder is not None:
            torch.cuda.empty_cache()


def _reset(recording: Recording) -> None:
    if recording.graph is not None:
        recording.graph.reset()
        recording.graph = None
