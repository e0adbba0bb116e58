"""The loop that all stages share: budget, learning rate, log, probes and checkpoints."""

import time
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

from .batches import stream
from .learner import Learner
from .records import Records
from .run import Run
from .schedule import rate

Weights = dict[str, Tensor]


class Stage(Protocol):
    """What differs between stages."""

    name: str

    @property
    def module(self) -> nn.Module:
        """What is trained; its weights start as they are."""

    def steps(self) -> Dataset[Any]:
        """What each step trains on."""

    def losses(self, item: Any, step: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Parts of the loss of one step, to be added, each with figures for the log."""

    def probe(self, weights: Weights) -> dict[str, float]:
        """How good the averaged weights are."""

    def result(self, weights: Weights) -> dict[str, Any]:
        """What is to be known about the final weights, ready for JSON."""


def train(stage: Stage, run: Run) -> bool:
    """Train until the budget is spent or it is time to pause; returns whether it is spent.

    Goes on from the folder's last state; without one, from the weights of a paused run, with the
    optimisers' memory and some bits lost. Every step follows from the seed and the step's number,
    so a killed run repeats what it lost: on one CPU bit by bit, if the budget is in steps.
    """
    records = Records(run.folder / stage.name)
    if records.done:
        records.log({"event": "done already"})
        return True
    learner = Learner(run.spread(stage.module))
    step, before = 0, 0.0  # before: seconds of earlier processes
    if state := records.load_state():
        learner.resume(state["learner"])
        step, before = state["step"], state["seconds"]
    elif weights := records.load_weights():  # of a paused run whose state has stayed elsewhere
        learner.start_from(weights)
        step, before = records.result()["steps"], records.result()["seconds"]
    started = time.monotonic()
    clock = _Clock(run, before, started)
    batches = stream(stage.steps(), step, run.workers, run.device.type == "cuda")
    if run.is_first:
        parameters = sum(p.numel() for p in learner.masters.values())
        records.log({"event": "start", "step": step, "parameters": parameters, **_about(run)})
    seconds = clock()
    meter = _Meter(run, step, seconds)
    while (share := run.budget.share(step, seconds)) < 1 and not clock.paused(seconds):
        for loss, figures in stage.losses(next(batches), step):
            loss.backward()
            meter.add(loss, figures)
        now = run.rate * rate(step, share)
        norm = learner.step(now)
        step, seconds = step + 1, clock()
        if meter.due("log", run.log_every, seconds) and run.is_first:
            records.log(meter.entry(step, seconds, now, norm))
        if meter.due("save", run.save_every, seconds):
            _save(records, learner, step, seconds, run)
        if meter.due("probe", run.probe_every, seconds):
            _probe(records, stage, learner, step, seconds, run)
    spent = run.budget.share(step, seconds) >= 1
    _save(records, learner, step, seconds, run)
    weights = learner.averages()
    if run.is_first:
        result = {"stage": stage.name, "done": spent, "steps": step, "seconds": round(seconds, 1)}
        result |= {**_about(run), **stage.result(weights)}
        records.save_weights(weights, result)
        records.log({"event": "spent" if spent else "paused", **result})
    run.wait()
    return spent


def _about(run: Run) -> dict[str, Any]:
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "cpu"
    return {
        "batch": run.batch,
        "rate": run.rate,
        "seed": run.seed,
        "device": device,
        "processes": run.processes,
        "dtype": str(run.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


class _Clock:
    """Seconds of the stage so far, the same for all processes."""

    def __init__(self, run: Run, before: float, started: float) -> None:
        self.run, self.before, self.started = run, before, started

    def __call__(self) -> float:
        seconds = self.before + time.monotonic() - self.started
        if self.run.processes == 1:
            return seconds
        shared = torch.tensor(seconds, dtype=torch.float64, device=self.run.device)
        dist.broadcast(shared, 0)
        return float(shared)

    def paused(self, seconds: float) -> bool:
        limit = self.run.pause_after
        return limit is not None and seconds - self.before >= 60 * limit


class _Meter:
    """Sums figures between two lines of the log without waiting for the device."""

    def __init__(self, run: Run, step: int, seconds: float) -> None:
        self.run = run
        self.sums: dict[str, Tensor] = {}
        self.last = dict.fromkeys(("log", "save", "probe"), seconds)
        self.step, self.seconds = step, seconds

    def add(self, loss: Tensor, figures: dict[str, Tensor]) -> None:
        for name, value in {"loss": loss, **figures}.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()

    def due(self, what: str, every: float, seconds: float) -> bool:
        """Whether it is time again."""
        if seconds - self.last[what] < every:
            return False
        self.last[what] = seconds
        return True

    def entry(self, step: int, seconds: float, now: float, norm: Tensor) -> dict[str, Any]:
        """The means since the last entry."""
        steps = max(1, step - self.step)
        means = {name: round(float(total) / steps, 5) for name, total in self.sums.items()}
        pace = self.run.batch * steps / max(1e-9, seconds - self.seconds)
        self.sums, self.step, self.seconds = {}, step, seconds
        return {
            "step": step,
            "seconds": round(seconds, 1),
            **means,
            "rate": float(f"{now:.3g}"),
            "gradient": round(float(norm), 4),
            "samples_per_s": round(pace, 1),
        }


def _save(records: Records, learner: Learner, step: int, seconds: float, run: Run) -> None:
    state = {"learner": learner.state(), "step": step, "seconds": seconds}
    if run.is_first:
        records.save_state(state)


def _probe(
    records: Records, stage: Stage, learner: Learner, step: int, seconds: float, run: Run
) -> None:
    weights = learner.averages()
    if run.is_first:
        scores = stage.probe(weights)
        records.log({"event": "probe", "step": step, "seconds": round(seconds, 1), **scores})
    run.wait()
