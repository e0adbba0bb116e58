"""``fluxkontext bench kernels``: every op beside its torch reference and the best peer.

On a GPU at the full model's sizes, on a CPU at the miniature's; each from cold caches, and judged
by the device's measured ceilings. ``--static`` compiles all for every chip and runs nothing.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from ..kernels.chips import CHIPS, chip_of, unsupported
from ..runtime.commands.parsing import Parser, count
from ..runtime.errors import BackendUnavailableError, InvalidInputError, KontextError
from . import kernel_cpu, kernel_timed
from .ceilings import measured as ceilings_of
from .ceilings import refuse_impossible
from .document import FAILED, Json, distribution, document, reason_of, result, warning, write
from .environment import environment, git_state, git_warnings, reader_of
from .gpu_timing import milliseconds
from .kernel_static import as_json, as_table, static_rows
from .kernel_timed import Timed
from .measure import Effort, OtherLoad, interleaved, sample_warnings
from .nvml import state_warnings
from .options import common, deliver
from .tables import latency_table
from .threads import on_cpu, threads

SUITE = ("kernels", 1)
"""Name and version of the problems' shapes; what changes a figure raises it."""
_WARMUP = 5
_CACHES = 2**26
"""Bytes that are written before each sample on a CPU: more than its caches."""
_MODEL: Json = {"digest": "synthetic", "synthetic": True, "parameters": None}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 1 after a fault and, with --static, if a kernel must not be launched as it
    is."""
    args = _parser().parse_args(argv)
    if args.static:
        return _static(args)
    device = _device(args.device)
    command = ["fluxkontext", "bench", "kernels", *(sys.argv[1:] if argv is None else argv)]
    with threads(args.threads, device), torch.inference_mode():
        for found in _measured(args, device, command):
            if args.out:  # whatever happens next, this much is there
                write(found, args.out)
    return deliver(found, args, latency_table(found))


def _static(args: argparse.Namespace) -> int:
    rows = static_rows(args.kernel, args.chip or tuple(CHIPS))
    print(json.dumps(as_json(rows)) if args.json else as_table(rows))
    faulty = [row for row in rows if row.faults]
    for row in faulty:
        print(f"sm_{row.chip} {row.kernel}: {'; '.join(row.faults)}", file=sys.stderr)
    return 1 if faulty else 0


def _device(asked: str) -> str:
    if on_cpu(asked):
        return "cpu"
    reason: str | None = "none"
    if torch.cuda.is_available():
        index = torch.cuda.current_device() if ":" not in asked else int(asked.split(":")[1])
        asked = f"cuda:{index}"
        reason = unsupported(torch.device(asked))
    if reason is not None:
        raise BackendUnavailableError(
            f"device: expected a GPU that runs Triton kernels, found {reason}; --device cpu times "
            "what runs there, --static needs no GPU"
        )
    return asked


def _measured(args: argparse.Namespace, device: str, command: Sequence[str]) -> Iterator[Json]:
    """The document as far as it goes, after each problem. A fault that none of an op's
    implementations may have ends it, since a GPU's state is unknown after it."""
    others, reader = OtherLoad(), reader_of(device)
    ceilings = ceilings_of(device)
    before = reader.state() if reader else None
    rows: list[Json] = []
    doubts: list[Json] = []
    git, size = git_state(), "miniature" if device == "cpu" else "full"

    def so_far() -> Json:
        after = reader.state() if reader else None
        return document(
            "kernels",
            SUITE,
            git=git,
            command=command,
            model={"name": f"{size} size, random numbers", **_MODEL},
            environment=environment(device, before, after),
            warnings=[
                *git_warnings(git),
                *doubts,
                *state_warnings([before, after], None),
                *others.warnings(),
            ],
            results=rows,
            ceilings=ceilings,
        )

    try:
        for problem in _problems(device):
            if args.kernel not in problem.kernel:
                continue
            for row, found in rows_of(problem, device, args.samples, ceilings):
                rows.append(row)
                doubts += found
            if device != "cpu":
                torch.cuda.synchronize(device)  # raises what a call has left behind
            yield so_far()
    except Exception as error:
        doubts.append(warning(FAILED, reason_of(error)))
        yield so_far()
    if not rows and not doubts:
        raise InvalidInputError(f"--kernel: expected a part of a name, found {args.kernel!r}")


def _problems(device: str) -> Iterator[Timed]:
    if device == "cpu":
        yield from kernel_cpu.problems()
        return
    torch.manual_seed(0)
    with torch.device(device):
        yield from kernel_timed.problems(chip_of(torch.device(device)))


def rows_of(
    problem: Timed, device: str, samples: int, ceilings: Json
) -> Iterator[tuple[Json, list[Json]]]:
    """A result of every implementation, and the doubts about it; one that cannot run here, or was
    faster than can be, is a row that says why."""
    taken, reasons = (
        _on_cpu(problem.runs, samples)
        if device == "cpu"
        else _on_gpu(problem.runs, device, samples)
    )
    for name in problem.runs:
        label, parameters = f"{problem.kernel}: {name}", _parameters(problem, name, device)
        if name in reasons:
            yield result(label, problem.kernel, parameters, reason=reasons[name]), []
            continue
        try:
            if problem.flops and problem.ceiling in ceilings["flops"]:
                refuse_impossible(label, problem.flops, min(taken[name]), ceilings, device)
        except KontextError as error:
            row = result(label, problem.kernel, parameters, reason=reason_of(error))
            yield row, [warning(FAILED, row["reason"], label)]
            continue
        latency = distribution(taken[name])
        row = result(
            label,
            problem.kernel,
            parameters,
            warmup=_WARMUP,
            latency=latency,
            roofline=_roofline(problem, latency["p50"], ceilings),
        )
        yield row, sample_warnings(taken[name], label)


def _on_gpu(
    runs: Mapping[str, Callable[[], object]], device: str, samples: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds by implementation, and why others cannot run."""
    taken, reasons = {}, {}
    for name, work in runs.items():
        try:
            taken[name] = [ms / 1e3 for ms in milliseconds(work, device, samples, _WARMUP)]
        except Exception as error:  # a peer that this machine lacks is a row, not the end
            reasons[name] = reason_of(error)
    return taken, reasons


def _on_cpu(
    runs: Mapping[str, Callable[[], object]], samples: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """The same, in turns."""
    caches = torch.empty(_CACHES, dtype=torch.uint8)
    flush = partial(caches.fill_, 1)
    effort = Effort(_WARMUP, samples)
    return interleaved(runs, effort, warmed=flush, after=lambda *_: flush()), {}


def _roofline(problem: Timed, seconds: float, ceilings: Json) -> Json | None:
    """As the schema's; None where the product that bounds it was not measured."""
    traffic = problem.bytes / ceilings["copy"]["p50"]
    peak = ceilings["flops"].get(problem.ceiling)
    if problem.flops and peak is None:
        return None
    compute = problem.flops / peak["p50"] if problem.flops else 0.0
    floor = max(traffic, compute)
    return {
        "flop": problem.flops,
        "bytes": problem.bytes,
        "floor": floor,
        "share": floor / seconds,
        "bound": "flop" if compute >= traffic else "bytes",
    }


def _parameters(problem: Timed, name: str, device: str) -> Json:
    """Of the edit whose step, or stage, launches it."""
    mini = device == "cpu"
    side = 128 if mini else 1024
    tokens = (side // 16) ** 2
    return {
        "width": side,
        "height": side,
        "steps": 1,
        "batch": 1,
        "contexts": [{"width": side, "height": side}],
        "precision": problem.ceiling,
        "backend": "triton" if name.startswith("triton") else "torch",
        "device": device,
        "implementation": name,
        "guidance": 1.0,
        "seeds": [0],
        "tokens": {"target": tokens, "context": tokens, "text": 32 if mini else 512},
    }


def _parser() -> Parser:
    parser = Parser(
        prog="fluxkontext bench kernels",
        description="Time the kernels, or compile them for every GPU.",
        parents=[common(model=False)],
    )
    parser.add_argument("--static", action="store_true", help="compile for all chips, run nothing")
    parser.add_argument("--kernel", default="", metavar="TEXT", help="only names that contain it")
    parser.add_argument(
        "--chip", type=int, action="append", choices=CHIPS, help="with --static; default: all"
    )
    parser.add_argument("--samples", type=count, default=30, help="default: %(default)s")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
