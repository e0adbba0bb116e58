"""``fluxkontext bench gpu``: one command that rates a GPU, at full size, without any weights.

A fixed suite of scenarios in every precision of a ladder, the device's measured ceilings and how
near to them the steps come, and a sustained run that shows whether the device holds its clocks.
"""

import argparse
import gc
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from ..kernels.candidates import CANDIDATES
from ..runtime import KontextPipeline
from ..runtime.budget import parse_bytes
from ..runtime.commands.parsing import Parser
from ..runtime.errors import (
    BackendUnavailableError,
    InvalidInputError,
    OutOfMemoryError,
)
from ..runtime.geometry import Grid
from ..runtime.plan import gib
from .ceilings import measured as ceilings_of
from .ceilings import refuse_impossible
from .document import FAILED, Json, distribution, document, reason_of, result, warning, write
from .drawn import MODELS, Drawn
from .edit import label, measure
from .environment import environment, git_state, git_warnings, reader_of
from .measure import OtherLoad, Shared, sample_warnings, throughput
from .models import shapes_of
from .nvml import state_warnings
from .options import add_effort, common, deliver, effort_of, several, whole
from .roofline import roofline, step_cost
from .scenarios import Work, works
from .tables import latency_table
from .threads import threads

SUITE = ("gpu", 1)
"""Name and version of :data:`_WORKS` and the model's shapes; what changes a figure raises it."""
_WORKS = (
    ("edit", 28, 1),
    ("edit", 8, 1),
    ("text-to-image", 28, 1),
    ("two-contexts", 8, 1),
    ("edit", 8, 4),
)
"""Scenario, steps and batch. The first is the headline."""
_LEAST = 5
_LEAST_OF_HEADLINE = 8
"""Rounds, however long they take: fewer can hardly show a regression to ``bench diff``."""
_SUSTAINED = "sustained "
"""What the name of a sustained run begins with."""
_LADDER = {"cuda": ["bf16", "fp8", "fp8:attend=fp8", "nvfp4"], "cpu": ["fp32", "bf16"]}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = _parser().parse_args(argv)
    device = _device(args.device)
    command = ["fluxkontext", "bench", "gpu", *(sys.argv[1:] if argv is None else argv)]
    with threads(args.threads, device):
        for found in _rated(args, device, command):
            if args.out:  # whatever happens next, this much is there
                write(found, args.out)
    return deliver(found, args, latency_table(found))


def _rated(args: argparse.Namespace, device: str, command: Sequence[str]) -> Iterator[Json]:
    """The document as far as it goes: after each rung, and whole at last."""
    model = MODELS[args.spec]
    ladder = [Rung.of(text) for text in args.precision or _LADDER[device.partition(":")[0]]]
    others = OtherLoad()
    ceilings = ceilings_of(device)
    rows: list[Json] = []
    doubts = [warning("synthetic_weights", "random weights: the pictures are noise")]
    git = git_state()

    def so_far() -> Json:
        states = [row["devices"] for row in rows if row["devices"]]
        around = (states[0]["before"], states[-1]["after"]) if states else (None, None)
        best = _best(rows)
        return document(
            "gpu",
            SUITE,
            git=git,
            command=command,
            model=model.facts(),
            environment=environment(device, *around),
            warnings=[*git_warnings(git), *doubts, *others.warnings()],
            results=rows,
            ceilings=ceilings,
            headline=best and headline(best),
        )

    todo = _works(model)[: 1 if args.headline else None]
    spare = Shared(effort_of(args).seconds, len(ladder) * len(todo))
    rung_of: dict[str, Rung] = {}
    for i, rung in enumerate(ladder):
        spare.works = (len(ladder) - i) * len(todo)  # also where one before failed half-way
        for row, found in _climbed(model, rung, device, args, ceilings, todo, spare):
            rows.append(row)
            rung_of[row["name"]] = rung
            doubts += found
        yield so_far()
    best = _best(rows)
    if best and args.sustain:
        row, found = _held(model, rung_of[best["name"]], device, args)
        rows.append(row)
        doubts += found
        yield so_far()


@dataclass(frozen=True)
class Rung:
    """A precision, and the implementations of some ops by name."""

    precision: str
    kernels: Mapping[str, str]

    @classmethod
    def of(cls, text: str) -> "Rung":
        """Of ``PRECISION[:OP=NAME ...]``."""
        precision, *pairs = text.split(":")
        if odd := [pair for pair in pairs if "=" not in pair]:
            raise InvalidInputError(
                f"--precision: expected PRECISION[:OP=NAME ...], such as fp8:attend=fp8, "
                f"found {odd[0]} in {text}"
            )
        kernels = dict(pair.split("=", 1) for pair in pairs)
        if unknown := kernels.keys() - CANDIDATES.keys():
            raise InvalidInputError(
                f"--precision: expected ops out of {', '.join(CANDIDATES)}, "
                f"found {min(unknown)} in {text}"
            )
        return cls(precision, kernels)

    def label(self, budget: int | None) -> str:
        """What the name of a result ends with, as :func:`.edit.label` has it."""
        named = " ".join(map("=".join, self.kernels.items()))
        parts = (f"native {self.precision}", named, "" if budget is None else gib(budget))
        return ", ".join(part for part in parts if part)


def headline(row: Json) -> Json:
    """The figures to quote of a result, as the schema's ``headline``."""
    memory, energy = row["memory"].get("total", {}), row["energy"]
    seconds = row["latency"]["p50"] / row["parameters"]["batch"]
    return {
        "result": row["name"],
        "s_per_edit": seconds,
        "edits_per_min": 60 / seconds,
        "j_per_edit": energy["total"] / row["parameters"]["batch"] if energy else None,
        "peak_vram": memory.get("max_process_vram") or memory.get("max_reserved"),
    }


def _device(asked: str) -> str:
    if asked == "auto":
        if not torch.cuda.is_available():
            raise BackendUnavailableError(
                "bench gpu: expected an NVIDIA GPU and a torch built for CUDA, found none; "
                "--spec mini --device cpu tries the same code on a small model"
            )
        return f"cuda:{torch.cuda.current_device()}"
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise BackendUnavailableError(f"device: expected one that is there, found {asked}")
    return asked


def _grid(model: Drawn) -> Grid:
    vae = model.spec.vae
    return Grid(2 * vae.downscale, vae.sample_size)


def _works(model: Drawn) -> list[Work]:
    return [works([name], _grid(model), [steps], [batch])[0] for name, steps, batch in _WORKS]


def _climbed(
    model: Drawn,
    rung: Rung,
    device: str,
    args: argparse.Namespace,
    ceilings: Json,
    todo: Sequence[Work],
    spare: Shared,
) -> Iterator[tuple[Json, list[Json]]]:
    """The works on one rung; what does not fit, cannot run here or fails is a row that says so.
    Time that one leaves is the next ones'.

    An error that is none of ours ends the rung, since a GPU's state is unknown after it, but not
    the others.
    """
    disabled = True if args.quiet else None
    headline = _works(model)[0]
    left = list(todo)
    try:
        with _loaded(model, rung, device, args) as pipe:
            for work in todo:
                least = _LEAST_OF_HEADLINE if work == headline else _LEAST
                bar = tqdm(disable=disabled, desc=label(work, pipe), leave=False)
                with bar, spare.share() as seconds:
                    limits = replace(effort_of(args), seconds=seconds, least=least)
                    try:
                        row, doubts = measure(pipe, work, limits, bar, shapes_of(model.spec))
                    except OutOfMemoryError as error:
                        row, doubts = _skipped(model, work, rung, device, args, error)
                    row = _with_roofline(model, row, ceilings, device)
                left.remove(work)
                yield row, doubts
    except Exception as error:
        for work in left:
            yield _skipped(model, work, rung, device, args, error)


def _skipped(
    model: Drawn,
    work: Work,
    rung: Rung,
    device: str,
    args: argparse.Namespace,
    error: Exception,
    how: str = "",
) -> tuple[Json, list[Json]]:
    """A row that says why there is nothing, and a doubt about it unless that is to be expected."""
    parameters = {
        **work.shape(_grid(model), model.spec.text_length),
        "precision": rung.precision,
        "backend": "native",
        "device": device,
        "implementation": "fluxkontext",
    }
    name = f"{how}{work.name}, {rung.label(args.vram_budget)}"
    row = result(name, work.scenario, parameters, reason=reason_of(error))
    expected = isinstance(error, BackendUnavailableError | OutOfMemoryError)
    return row, [] if expected else [warning(FAILED, row["reason"], name)]


@contextmanager
def _loaded(
    model: Drawn, rung: Rung, device: str, args: argparse.Namespace
) -> Iterator[KontextPipeline]:
    """For this block, once the memory of another, which may have failed, is given back: both would
    not fit."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    with model.pipeline(rung.precision, device, args.vram_budget, rung.kernels) as pipe:
        yield pipe


def _with_roofline(model: Drawn, row: Json, ceilings: Json, device: str) -> Json:
    """The row with the floor of its steps. Raises KontextError if it is faster than can be."""
    if row["latency"] is None:
        return row
    parameters = row["parameters"]
    precision = parameters["precision"]
    cost = step_cost(model.spec.transformer, parameters["tokens"], parameters["batch"], precision)
    step = row["step"]["p50"]
    refuse_impossible(row["name"], cost.flop, step, ceilings, device)
    attention_fp8 = "attend=fp8" in row["details"].get("kernels", "").split()
    return {**row, "roofline": roofline(cost, precision, ceilings, step, attention_fp8)}


def _best(rows: Sequence[Json]) -> Json | None:
    """The fastest row of the headline's work; None if none was measured."""
    scenario, steps, batch = _WORKS[0]
    those = [
        row
        for row in rows
        if row["latency"]
        and (row["scenario"], row["parameters"]["steps"], row["parameters"]["batch"])
        == (scenario, steps, batch)
    ]
    return min(those, key=lambda row: float(row["latency"]["p50"]), default=None)


def _held(
    model: Drawn, rung: Rung, device: str, args: argparse.Namespace
) -> tuple[Json, list[Json]]:
    """:func:`_sustained`, or why there is none: a later rung's fault may have left no GPU to it."""
    try:
        return _sustained(model, rung, device, args)
    except Exception as error:
        work = _works(model)[0]
        return _skipped(model, work, rung, device, args, error, _SUSTAINED)


def _sustained(
    model: Drawn, rung: Rung, device: str, args: argparse.Namespace
) -> tuple[Json, list[Json]]:
    """The headline's work again and again for ``--sustain`` seconds, with the GPU's state after
    every call."""
    reader = reader_of(device)
    series: list[Json] = []
    with _loaded(model, rung, device, args) as pipe:
        work = _works(model)[0]
        name, arguments = f"{_SUSTAINED}{label(work, pipe)}", work.arguments()
        pipe(**arguments)
        since = time.perf_counter()
        with tqdm(disable=True if args.quiet else None, desc=name, leave=False) as bar:
            while (start := time.perf_counter()) - since < args.sustain or not series:
                pipe(**arguments)
                now = time.perf_counter()
                state = reader.state() if reader else None
                series.append({"t": now - since, "latency": now - start, "state": state})
                bar.update()
        parameters = work.parameters(pipe)
    taken = [entry["latency"] for entry in series]
    states = [entry["state"] for entry in series]
    row = result(
        name,
        work.scenario,
        parameters,
        warmup=1,
        latency=distribution(taken),
        throughput=throughput(work.batch * len(taken), sum(taken)),
        devices={"before": states[0], "after": states[-1]} if reader else None,
        series=series,
    )
    return row, [*sample_warnings(taken, name), *state_warnings(states, name)]


def _parser() -> Parser:
    parser = Parser(
        prog="fluxkontext bench gpu",
        description="Rates a GPU with the full-size model's shapes and random weights.",
        parents=[common(model=False)],
    )
    parser.add_argument("--spec", choices=list(MODELS), default="full", help="default: full")
    parser.add_argument(
        "--precision",
        type=several,
        metavar="PRECISION[:OP=NAME ...],...",
        help="with ops by name; default: bf16,fp8,fp8:attend=fp8,nvfp4",
    )
    parser.add_argument(
        "--vram-budget",
        type=parse_bytes,
        metavar="N",
        help="what the device may spend, such as 14GiB; what does not fit is streamed",
    )
    parser.add_argument(
        "--sustain", type=whole, default=60, metavar="SECONDS", help="default: %(default)s"
    )
    parser.add_argument(
        "--headline", action="store_true", help="one edit of 28 steps alone, not the whole suite"
    )
    add_effort(parser, rounds=10, minutes=10, warmup=1)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
