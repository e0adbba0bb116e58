"""``fluxkontext bench edit``: whole edits at named scenarios, warm and cold, stage by stage."""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from ..runtime import KontextPipeline
from ..runtime.commands.parsing import Parser
from ..runtime.geometry import Grid
from ..runtime.tensor_shapes import ModelShapes
from .cold import cold_rounds, command_of
from .document import Json, distribution, document, result
from .environment import environment, git_state, git_warnings, reader_of
from .measure import Effort, OtherLoad, Shared, energy, interleaved, sample_warnings, throughput
from .memory import Peak
from .models import Model, opened
from .nvml import state_warnings
from .options import add_effort, common, counts, deliver, effort_of, several, whole
from .predicted import predicted
from .roofline import edit_flop
from .scenarios import SCENARIOS, SUITE, Work, works
from .stages import Stages, timed
from .tables import latency_table
from .threads import threads

_TOGETHER = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = _parser().parse_args(argv)
    load = OtherLoad()
    with threads(args.threads, args.device), opened(args.model) as model:
        rows: list[Json] = []
        doubts = list(model.warnings)
        states: list[Json | None] = [None, None]
        device = args.device
        for precision in args.precision:
            with loaded(model, args.backend, precision, args.device) as pipe:
                device = pipe.about["device"]
                todo = _todo(args, pipe.grid)
                for row, warnings in measured(pipe, todo, args, model.shapes):
                    rows.append(row)
                    doubts += warnings
                    if row["devices"]:
                        states = [states[0] or row["devices"]["before"], row["devices"]["after"]]
            if args.cold:
                chosen = cold_work(todo)
                row = next(r for r in rows if r["name"] == label(chosen, pipe))
                row["cold"] = _cold(chosen, pipe, model, args)
        git = git_state()
        found = document(
            "edit",
            SUITE,
            git=git,
            command=["fluxkontext", "bench", "edit", *(sys.argv[1:] if argv is None else argv)],
            model=model.facts,
            environment=environment(device, *states),
            warnings=[*git_warnings(git), *doubts, *load.warnings()],
            results=rows,
        )
    return deliver(found, args, latency_table(found))


def measured(
    pipe: KontextPipeline,
    todo: Sequence[Work],
    args: argparse.Namespace,
    shapes: ModelShapes | None,
) -> Iterator[tuple[Json, list[Json]]]:
    """A result of each work, and the doubts about it. Time that one leaves is the next ones'."""
    effort = effort_of(args)
    spare = Shared(effort.seconds and effort.seconds / len(args.precision), len(todo))
    calls = len(todo) * (effort.warmup + effort.rounds) if effort.rounds else None
    with tqdm(total=calls, disable=True if args.quiet else None, unit="call", leave=False) as bar:
        for work in todo:
            bar.set_description(label(work, pipe))
            with spare.share() as seconds:
                found = measure(pipe, work, replace(effort, seconds=seconds), bar, shapes)
            yield found


def measure(
    pipe: KontextPipeline,
    work: Work,
    effort: Effort,
    bar: "tqdm[None]",
    shapes: ModelShapes | None,
) -> tuple[Json, list[Json]]:
    """One work in a warm process: its result, and the doubts about it."""
    name, device = label(work, pipe), pipe.about["device"]
    reader = reader_of(device)
    stages = Stages()
    arguments = work.arguments()
    timings: dict[str, float] = {}
    readings: list[Json | None] = []
    spent: list[float | None] = []

    def call() -> None:
        timings.clear()
        timings.update(pipe(**arguments).timings)
        bar.update()

    def warmed() -> None:
        clock.take()  # the warm-up's
        readings.append(reader.state() if reader else None)  # still under load
        spent.append(reader.joules() if reader else None)

    with timed(pipe) as clock:
        taken = interleaved(
            {name: call},
            effort,
            warmed=warmed,
            after=lambda _, wall: stages.add(clock, timings, wall),
        )[name]
    readings.append(reader.state() if reader else None)
    joules = reader.joules() if reader else None
    used = None if joules is None or spent[0] is None else joules - spent[0]
    with timed(pipe) as watch:
        watch.watch_memory(Peak(device, reader))
        pipe(**arguments)
    peaks = watch.peaks()
    if shapes is not None and clock.clock == "cuda_events":
        for stage, planned in predicted(shapes, pipe, work).items():
            peaks[stage]["predicted"] = planned
    forwards = len(watch.take().spans["denoise"])
    parameters = work.parameters(pipe)
    row = result(
        name,
        work.scenario,
        parameters,
        warmup=effort.warmup,
        latency=distribution(taken),
        stages={key: distribution(values) for key, values in stages.stages.items()},
        step=distribution(stages.steps),
        step_clock=clock.clock,
        throughput=throughput(work.batch * len(taken), sum(taken)),
        memory=peaks,
        work={
            "forwards": forwards,
            "tokens": sum(parameters["tokens"].values()),
            "flop": edit_flop(shapes.transformer if shapes else None, parameters, forwards),
        },
        devices={"before": readings[0], "after": readings[1]} if reader else None,
        details=dict(pipe.backend.details),
        **energy(used, len(taken), work.batch * len(taken)),
    )
    return row, [*sample_warnings(taken, name), *state_warnings(readings, name)]


@contextmanager
def loaded(model: Model, backend: str, precision: str, device: str) -> Iterator[KontextPipeline]:
    """The model with nothing remembered between calls."""
    with KontextPipeline.from_pretrained(
        model.path, backend=backend, precision=precision, device=device, memo_entries=0
    ) as pipe:
        yield pipe


def label(work: Work, pipe: KontextPipeline) -> str:
    """The name of a result: the work, and what was asked for to do it with."""
    about = pipe.about
    asked = (about[key] for key in ("named", "vram_budget") if key in about)
    return ", ".join((work.name, f"{about['backend']} {about['precision']}", *asked))


def _todo(args: argparse.Namespace, grid: Grid) -> list[Work]:
    """Without --batch: every number of steps one by one, and the fewest four at once."""
    if args.batch:
        return works(args.scenarios, grid, args.steps, args.batch)
    single = works(args.scenarios, grid, args.steps, [1])
    return [*single, *works(args.scenarios, grid, [min(args.steps)], [_TOGETHER])]


def cold_work(todo: Sequence[Work]) -> Work:
    """What a new process does: one edit of the most steps, if that is asked for at all."""
    return max(todo, key=lambda work: (work.batch == 1, work.scenario == "edit", work.steps))


def _cold(work: Work, pipe: KontextPipeline, model: Model, args: argparse.Namespace) -> Json | None:
    if work.batch != 1:
        return None
    about = pipe.about
    with tempfile.TemporaryDirectory(prefix="fluxkontext-") as folder:
        command = command_of(
            work, model.path, about["backend"], about["precision"], about["device"], Path(folder)
        )
        return cold_rounds({"": command}, args.cold, args.quiet)[""]


def _parser() -> Parser:
    parser = Parser(
        prog="fluxkontext bench edit",
        description="Whole edits, stage by stage.",
        parents=[common()],
    )
    parser.add_argument(
        "--scenarios", type=several, default=list(SCENARIOS), help="default: all, with commas"
    )
    parser.add_argument("--steps", type=counts, default=[4, 8, 28], help="default: 4,8,28")
    parser.add_argument(
        "--batch", type=counts, help=f"default: 1, and {_TOGETHER} for the fewest steps"
    )
    parser.add_argument("--precision", type=several, default=["auto"], help="such as fp32,bf16")
    parser.add_argument(
        "--cold", type=whole, default=3, metavar="N", help="new processes; default: %(default)s"
    )
    add_effort(parser, rounds=10, minutes=0.75)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
