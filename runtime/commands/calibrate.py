"""`fluxkontext calibrate`: how large activations become, for recipes with static scales."""

import argparse
import sys
from importlib import import_module
from pathlib import Path

from .parsing import Commands, Parser, add_model, count, given_parts, show, size


def add(commands: "Commands[Parser]", common: Parser) -> None:
    parser = commands.add_parser(
        "calibrate",
        parents=[common],
        help="measure activations, for recipes with static scales",
    )
    add_model(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--images",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="pictures, or folders of them (default: the example picture)",
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a prompt a line (default: a few built in)"
    )
    parser.add_argument(
        "--percentile",
        type=float,
        default=100.0,
        metavar="P",
        help="of the magnitudes that counts as the largest (default: all, 100)",
    )
    parser.add_argument("--steps", type=count, default=28, help="default: %(default)s")
    parser.add_argument(
        "--size", type=size, metavar="WxH", help="of the results (default: the picture's)"
    )
    parser.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ..errors import InvalidInputError
    from ..loader import require
    from ..pipeline import KontextPipeline

    require("torch", "to calibrate", "torch")
    if args.output.is_dir() or not args.output.absolute().parent.is_dir():
        raise InvalidInputError(f"{args.output}: expected a file in an existing folder")
    work = import_module("fluxkontext.export.calibrate")
    pictures = work.pictures_of(args.images or [work.SCENE])
    prompts = work.prompts_of(args.prompts) if args.prompts else work.PROMPTS
    with KontextPipeline.from_pretrained(
        args.model,
        backend="native",
        precision=args.precision,
        device=args.device,
        **given_parts(args),
    ) as pipe:
        calibration = work.calibrate(
            pipe,
            pictures,
            prompts,
            steps=args.steps,
            percentile=args.percentile,
            size=args.size,
            progress=not args.json and sys.stderr.isatty(),
        )
    calibration.write(args.output)
    show(
        {
            "calibration": str(args.output),
            "edits": max(len(pictures), len(prompts)),
            "tensors": len(calibration.amax),
        },
        args.json,
    )
