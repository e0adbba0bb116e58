"""`fluxkontext export`: a checkpoint to a bundle."""

import argparse
import sys
from importlib import import_module
from pathlib import Path

from .parsing import Commands, Parser, add_model, given_parts, show


def add(commands: "Commands[Parser]", common: Parser) -> None:
    parser = commands.add_parser(
        "export", parents=[common], help="a checkpoint to a bundle of ONNX graphs and weights"
    )
    add_model(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        default="bf16",
        help="of the graphs for GPUs (default: %(default)s); those for CPUs compute in fp32",
    )
    parser.add_argument(
        "--weights", choices=("link", "copy"), default="link", help="hard links, or copies"
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="of `fluxkontext calibrate`; attention of an fp8-static checkpoint is then FP8, too",
    )
    parser.add_argument(
        "--golden",
        action="store_true",
        help="make the golden edit on the CPU, which `doctor` then compares with what runs there",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..checkpoint import find
    from ..loader import require

    for package in ("torch", "onnxscript"):
        require(package, "to export", "torch,export")
    if args.golden:
        require("onnxruntime", "to make the golden edit", "cpu")
    checkpoint = find(args.model, given_parts(args))
    write_bundle = import_module("fluxkontext.export.bundle").write_bundle
    calibration = None
    if args.calibration is not None:
        read = import_module("fluxkontext.export.calibration").read_calibration
        calibration = read(args.calibration)
    progress = not args.json and sys.stderr.isatty()
    write_bundle(checkpoint, args.output, args.precision, args.weights, progress, calibration)
    if args.golden:
        import_module("fluxkontext.export.build").golden_of(args.output)
    show({"bundle": str(args.output)}, args.json)
