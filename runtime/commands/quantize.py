"""`fluxkontext quantize`: a checkpoint to one with FP8 or NVFP4 weights."""

import argparse
import sys
from importlib import import_module
from pathlib import Path

from ..recipes import DEFAULT, RECIPES
from .parsing import Commands, Parser, add_model, given_parts, show


def add(commands: "Commands[Parser]", common: Parser) -> None:
    parser = commands.add_parser(
        "quantize", parents=[common], help="a checkpoint to one with FP8 or NVFP4 weights"
    )
    add_model(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--precision", choices=tuple(DEFAULT), required=True, help="of the transformer; T5 is fp8"
    )
    parser.add_argument(
        "--recipe",
        choices=tuple(RECIPES),
        help=f"default: {', '.join(DEFAULT.values())}; the others need --calibration",
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="of: fluxkontext calibrate MODEL -o FILE"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..checkpoint import find
    from ..loader import require

    require("torch", "to quantise", "torch")
    checkpoint = find(args.model, given_parts(args))
    write_quantised = import_module("fluxkontext.export.quantize").write_quantised
    progress = not args.json and sys.stderr.isatty()
    facts = write_quantised(
        checkpoint, args.output, args.precision, args.recipe, args.calibration, progress
    )
    show(facts, args.json)
