"""``fluxkontext bench compare``: the same edit, by us and by others, interleaved in one run.

The weights, the noise, the threads, the steps and the tokens are the same, which is counted, and
the pictures are compared. Nothing is remembered between calls but in the row that says so.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm import tqdm

from ..runtime import KontextPipeline
from ..runtime.commands.parsing import Parser, count, kernel
from ..runtime.errors import BackendUnavailableError, InvalidInputError, KontextError
from .ceilings import measured as ceilings_of
from .ceilings import refuse_impossible
from .cold import cold_rounds
from .contestants import (
    MEMO,
    NAMES,
    NATIVE,
    ONNX,
    OURS,
    Contestant,
    agreement,
    ours,
    peer,
    same_work,
)
from .document import FAILED, Json, distribution, document, reason_of, result, warning
from .drawn import MODELS
from .environment import environment, git_state, git_warnings, reader_of
from .measure import OtherLoad, interleaved, sample_warnings, throughput
from .models import Model, exported, opened
from .nvml import state_warnings
from .options import add_effort, common, deliver, effort_of, several, whole
from .peers import PEERS
from .ratio import CONFIDENCE, ratio_of_medians
from .roofline import edit_flop
from .scenarios import SUITE, Work, works
from .tables import latency_table
from .threads import on_cpu, threads

Absence = tuple[str, str]
"""Why one is not compared: the kind of the warning, and the reason."""
LEVELS = 1
"""Between pictures in fp32: another order of summation rounds a value differently, no more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = _parser().parse_args(argv)
    load = OtherLoad()
    on_gpu = torch.cuda.is_available() and args.device != "cpu"
    if args.peers is not None:
        _possible(args.peers, "cuda" if on_gpu else "cpu")
    with ExitStack() as stack:
        stack.enter_context(threads(args.threads, args.device))
        drawn = None
        if args.spec == "full" and args.model is None:
            if not on_gpu:
                raise BackendUnavailableError(
                    "bench compare --spec full: expected an NVIDIA GPU and a torch built for "
                    "CUDA, found none; leave --spec out for the miniature"
                )
            drawn = MODELS["full"]
        model = stack.enter_context(opened(args.model, drawn, "cuda" if on_gpu else "cpu"))
        graphs = _graphs(args, model, stack)
        base, pipe = stack.enter_context(
            ours(
                OURS,
                graphs or model.path,
                args.backend,
                args.precision,
                args.device,
                dict(args.kernel),
            )
        )
        (work,) = works([args.scenario], pipe.grid, [args.steps], [1])
        if len(work.contexts) != 1:
            raise InvalidInputError(
                f"scenario: expected one with one picture, found {work.scenario}"
            )
        present, absent = _others(args, model, graphs, base, pipe, stack)
        everyone = [base, *present]
        ceilings = ceilings_of(base.device)
        counts, agreements, failed = _counted(work, everyone)
        absent, everyone = {**absent, **failed}, [one for one in everyone if one.name in counts]
        taken, readings = _warm(work, everyone, args)
        starts = _cold(work, everyone, args) if args.cold else {}
        parameters = work.parameters(pipe)
        doubts = [*model.warnings, *state_warnings(readings, None)]
        rows = []
        for one in everyone:
            name, done, samples = _label(work, one), counts[one.name], taken[one.name]
            if model.shapes is not None and one.exact:
                done["flop"] = edit_flop(
                    model.shapes.transformer, _as(parameters, one), done["forwards"]
                )
                refuse_impossible(name, done["flop"], min(samples), ceilings, base.device)
            rows.append(
                result(
                    name,
                    work.scenario,
                    _as(parameters, one),
                    warmup=args.warmup,
                    latency=distribution(samples),
                    throughput=throughput(len(samples), sum(samples)),
                    work=done,
                    cold=starts.get(one.name),
                    details=dict(one.details),
                )
            )
            doubts += sample_warnings(samples, name)
        for name, (kind, reason) in absent.items():
            missing = {**parameters, "implementation": name, "backend": "torch"}
            rows.append(result(f"{work.name}, {name}", work.scenario, missing, reason=reason))
            doubts.append(warning(kind, f"{name}: {reason}"))
    comparisons = [
        _comparison(work, (base, one), "warm", (taken[base.name], taken[one.name]), agreed)
        for one, agreed in zip(everyone[1:], agreements.values(), strict=True)
    ]
    for one in everyone[1:]:
        if one.name in starts:
            pair = (_first_pictures(starts, base), _first_pictures(starts, one))
            comparisons.append(_comparison(work, (base, one), "cold", pair, None))
    git = git_state()
    found = document(
        "compare",
        SUITE,
        git=git,
        command=["fluxkontext", "bench", "compare", *(sys.argv[1:] if argv is None else argv)],
        model=model.facts,
        environment=environment(base.device, *(readings or (None, None))),
        warnings=[*git_warnings(git), *doubts, *load.warnings()],
        results=rows,
        comparisons=comparisons,
        ceilings=ceilings,
    )
    return deliver(found, args, latency_table(found))


def _possible(asked: Sequence[str], device: str) -> None:
    """Raises InvalidInputError for an unknown name, and BackendUnavailableError where none of these
    can run: before minutes go into a model that nothing could be compared with."""
    if unknown := [name for name in asked if name not in NAMES]:
        raise InvalidInputError(f"peers: expected some of {', '.join(NAMES)}, found {unknown[0]}")
    reasons = [PEERS[name].missing(device) if name in PEERS else None for name in asked]
    if all(reasons):
        found = "; ".join(f"{name}: {why}" for name, why in zip(asked, reasons, strict=True))
        raise BackendUnavailableError(f"peers: expected one that can run here, found {found}")


def _graphs(args: argparse.Namespace, model: Model, stack: ExitStack) -> Path | None:
    """The model as a bundle where ours runs from one: asked for, or the usual way on a CPU."""
    if args.backend in ("native", "tensorrt") and ONNX not in (args.peers or ()):
        return None
    if args.bundle is not None:
        return Path(args.bundle)
    wanted = args.backend == "onnx" or ONNX in (args.peers or ())
    missing = [name for name in ("onnxscript", "onnxruntime") if find_spec(name) is None]
    if not wanted and (missing or not on_cpu(args.device)):
        return None
    return stack.enter_context(exported(model))


def _others(
    args: argparse.Namespace,
    model: Model,
    graphs: Path | None,
    base: Contestant,
    pipe: KontextPipeline,
    stack: ExitStack,
) -> tuple[list[Contestant], dict[str, Absence]]:
    """Those that are asked for and can run, and why the rest cannot."""
    another = [] if base.backend == "native" else [NATIVE]
    asked = [MEMO, *another, *PEERS] if args.peers is None else args.peers
    where = {
        MEMO: (graphs or model.path, base.backend, base.precision),
        NATIVE: (model.path, "native", base.precision),
        ONNX: (graphs or model.path, "onnx", "auto"),
    }
    present: list[Contestant] = []
    absent: dict[str, Absence] = {}
    for name in asked:
        if name in where:
            again = ours(name, *where[name], base.device)
            present.append(stack.enter_context(again)[0])
        elif reason := PEERS[name].missing(base.device):
            absent[name] = "not_installed", reason
        else:
            length = pipe.tokenizer_2.model_max_length
            try:
                present.append(peer(PEERS[name], model, base.device, length))
            except Exception as error:  # of its own: it is a row, not the end
                absent[name] = FAILED, reason_of(error)
    return present, absent


def _counted(
    work: Work, contestants: Sequence[Contestant]
) -> tuple[dict[str, Json], dict[str, Json], dict[str, Absence]]:
    """By name: the work of each, how the picture of each but the first agrees with the first one's,
    and why others failed. Raises KontextError for one that does something else."""
    base, *others = contestants
    picture, done = base.counted(work)
    counts: dict[str, Json] = {base.name: done}
    agreements: dict[str, Json] = {}
    failed: dict[str, Absence] = {}
    for one in others:
        try:
            theirs, counts[one.name] = one.counted(work)
        except KontextError:
            raise
        except Exception as error:  # a peer that this machine cannot compile is a row, not the end
            failed[one.name] = FAILED, reason_of(error)
            continue
        agreements[one.name] = agreement(picture, theirs)
        levels = agreements[one.name]["max_levels"]
        problem = same_work(done, counts[one.name], (base.name, one.name)) if one.exact else None
        if one.exact and one.precision == base.precision == "fp32" and levels > LEVELS:
            problem = f"pictures that differ by {levels} levels"
        if problem:
            raise KontextError(f"{one.name}: expected the same work as ours, found {problem}")
    return counts, agreements, failed


def _warm(
    work: Work, contestants: Sequence[Contestant], args: argparse.Namespace
) -> tuple[dict[str, list[float]], list[Json | None]]:
    """Samples of each in rounds A B, B A ..., and the GPU's states around them."""
    effort, reader = effort_of(args), reader_of(contestants[0].device)
    readings: list[Json | None] = []
    total = effort.rounds and effort.rounds * len(contestants)
    with tqdm(total=total, disable=True if args.quiet else None, unit="edit", leave=False) as bar:

        def read() -> None:
            if reader:
                readings.append(reader.state())

        taken = interleaved(
            {one.name: lambda one=one: one.edit(work) for one in contestants},  # type: ignore[misc]
            effort,
            warmed=read,
            after=lambda *_: bar.update(),
        )
        read()
    return taken, readings


def _cold(
    work: Work, contestants: Sequence[Contestant], args: argparse.Namespace
) -> dict[str, Json]:
    """New processes of each that can be one, interleaved."""
    with tempfile.TemporaryDirectory(prefix="fluxkontext-") as folder:
        commands = {
            one.name: one.first(work, Path(folder)) for one in contestants if one.first is not None
        }
        return cold_rounds(commands, args.cold, args.quiet)


def _first_pictures(starts: Mapping[str, Json], one: Contestant) -> list[float]:
    values: list[float] = starts[one.name]["process_start_to_picture"]["values"]
    return values


def _comparison(
    work: Work,
    pair: tuple[Contestant, Contestant],
    what: str,
    taken: tuple[Sequence[float], Sequence[float]],
    agreed: Json | None,
) -> Json:
    ratio, interval = ratio_of_medians(*taken)
    return {
        "scenario": work.scenario,
        "base": _label(work, pair[0]),
        "other": _label(work, pair[1]),
        "what": what,
        "ratio": ratio,
        "interval": interval,
        "confidence": CONFIDENCE,
        "agreement": agreed,
    }


def _label(work: Work, one: Contestant) -> str:
    return f"{work.name}, {one.name} {one.precision}"


def _as(parameters: Json, one: Contestant) -> Json:
    """The parameters of the work when another does it."""
    return {
        **parameters,
        "implementation": one.name,
        "precision": one.precision,
        "backend": one.backend,
        "device": one.device,
    }


def _parser() -> Parser:
    parser = Parser(
        prog="fluxkontext bench compare",
        description="The same edit by us and by others.",
        parents=[common()],
    )
    parser.add_argument(
        "--spec",
        choices=["mini", "full"],
        default="mini",
        help="without --model: the miniature, or full-size shapes with random weights, which takes "
        "a GPU and 34 GB in the temporary folder (default: %(default)s)",
    )
    parser.add_argument("--scenario", default="edit", help="edit or wide-edit")
    parser.add_argument("--steps", type=count, default=28, help="default: %(default)s")
    parser.add_argument("--precision", default="auto", help="ours; auto is fp32 on a CPU")
    parser.add_argument(
        "--kernel",
        action="append",
        default=[],
        type=kernel,
        metavar="OP=NAME",
        help="ours: implementation of an op, such as attend=fp8 (native)",
    )
    parser.add_argument(
        "--peers",
        type=several,
        help=f"with commas, of {', '.join(NAMES)}; default: all that differ from ours",
    )
    parser.add_argument(
        "--bundle", type=Path, help="the model exported, from which ours runs; default: made anew"
    )
    parser.add_argument(
        "--cold", type=whole, default=3, metavar="N", help="new processes; default: %(default)s"
    )
    add_effort(parser, rounds=15, minutes=3)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
