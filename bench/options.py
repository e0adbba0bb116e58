"""What the command lines of several benchmarks share."""

import argparse
import json
import sys
from pathlib import Path

from ..runtime.commands.parsing import Parser, count
from .document import FAILED, Json, write
from .measure import Effort


def common(model: bool = True) -> Parser:
    """Where it runs and where the document goes, and, with ``model``, what runs: a parent of their
    parsers."""
    options = Parser(add_help=False)
    if model:
        options.add_argument("--model", help="as for edit; default: the miniature")
        options.add_argument("--backend", default="auto", help="auto, onnx, native or tensorrt")
    options.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    options.add_argument(
        "--threads", type=count, help="CPU threads of an operation; default: torch's own choice"
    )
    options.add_argument("--out", type=Path, metavar="FILE", help="document to write")
    options.add_argument("--json", action="store_true", help="print the document")
    options.add_argument("--quiet", action="store_true", help="no progress bar")
    return options


def add_effort(
    parser: argparse.ArgumentParser, rounds: int, minutes: float, warmup: int = 2
) -> None:
    """How long to measure; the defaults are for when neither is asked for."""
    parser.add_argument("--warmup", type=whole, default=warmup, help="rounds; default: %(default)s")
    parser.add_argument(
        "--rounds",
        type=count,
        help=f"samples of each; default: {rounds}, but no more than fit into {minutes:g} minutes",
    )
    parser.add_argument("--minutes", type=positive, help="measure for so long in all")
    parser.set_defaults(usual=(rounds, 60 * minutes))


def effort_of(args: argparse.Namespace) -> Effort:
    """Of everything together."""
    if args.rounds is None and args.minutes is None:
        return Effort(args.warmup, *args.usual)
    return Effort(args.warmup, args.rounds, args.minutes and 60 * args.minutes)


def deliver(document: Json, args: argparse.Namespace, table: str) -> int:
    """Write the document where that was asked for, and print it or a table; returns the exit code,
    1 where something failed."""
    if args.out:
        write(document, args.out)
        print(f"{args.out}: written", file=sys.stderr)
    print(json.dumps(document) if args.json else table)
    return 1 if any(doubt["kind"] == FAILED for doubt in document["warnings"]) else 0


def several(text: str) -> list[str]:
    """Names, separated by commas."""
    return [name for name in (part.strip() for part in text.split(",")) if name]


def counts(text: str) -> list[int]:
    """Numbers from 1, separated by commas."""
    return [count(part) for part in several(text)]


def whole(text: str) -> int:
    """0 to 10000."""
    if not (text.isdecimal() and int(text) <= 10_000):
        raise argparse.ArgumentTypeError(f"expected 0 to 10000, found {text!r}")
    return int(text)


def positive(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return value
