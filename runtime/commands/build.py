"""`fluxkontext build`: a checkpoint to a bundle with engines; resumable."""

import argparse
import sys
from importlib import import_module
from pathlib import Path

from .parsing import Commands, Parser, add_model, count, given_parts, show, size


def add(commands: "Commands[Parser]", common: Parser) -> None:
    parser = commands.add_parser(
        "build",
        parents=[common],
        help="a checkpoint or a bundle to a bundle with TensorRT engines; run it again to resume",
    )
    add_model(parser)
    parser.add_argument(
        "-o", "--output", type=Path, metavar="BUNDLE", help="folder to make (default: MODEL itself)"
    )
    parser.add_argument(
        "--engine", choices=("tensorrt", "tensorrt-rtx"), default="tensorrt", help="whose engines"
    )
    parser.add_argument(
        "--target",
        metavar="SM",
        help="sm_89, sm_120 ... (default: the GPU here; tensorrt-rtx only)",
    )
    parser.add_argument(
        "--size",
        type=_sizes,
        required=True,
        metavar="WxH[,WxH...]",
        help="of results; the first is what engines are tuned for",
    )
    parser.add_argument(
        "--contexts", type=_range, default=(0, 2), metavar="A-B", help="pictures of an edit (0-2)"
    )
    parser.add_argument("--batch", type=count, default=1, help="most edits at once (default: 1)")
    parser.add_argument("--static", action="store_true", help="for these very sizes only")
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16", "fp8", "nvfp4"),
        default="auto",
        help="of the engines (default: as stored, else bf16); fp8 and nvfp4 calibrate and quantise",
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="instead of calibrating: that of calibrate"
    )
    parser.add_argument(
        "--calibration-steps", type=count, default=28, help="of each edit (default: %(default)s)"
    )
    parser.add_argument(
        "--attention",
        choices=("fp8", "16bit"),
        default="fp8",
        help="of fp8 engines; 16bit is for GPUs whose compiler has no such kernel (default: fp8)",
    )
    parser.add_argument(
        "--weights", choices=("link", "copy"), default="link", help="hard links, or copies"
    )
    parser.add_argument(
        "--golden",
        choices=("auto", "always", "never"),
        default="auto",
        help="make the golden edit on the CPU (auto: only of models up to 2 GiB)",
    )
    parser.add_argument(
        "--plugins",
        action="store_true",
        help="QK-norm and RoPE by our Triton kernel (tensorrt only; not yet run on a GPU)",
    )
    parser.add_argument(
        "--pack",
        type=Path,
        metavar="FOLDER",
        help="put what engines alone need there, without graphs and weights, to be shipped",
    )
    parser.set_defaults(run=run)


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    return tuple(size(part) for part in text.split(","))


def _range(text: str) -> tuple[int, int]:
    """``1`` or ``0-2``."""
    ends = text.split("-")
    if len(ends) > 2 or not all(end.isdecimal() and int(end) <= 8 for end in ends):
        raise argparse.ArgumentTypeError(f"expected A-B, each 0 to 8, found {text!r}")
    if int(ends[0]) > int(ends[-1]):
        raise argparse.ArgumentTypeError(f"expected the smaller number first, found {text!r}")
    return int(ends[0]), int(ends[-1])


def run(args: argparse.Namespace) -> None:
    from ..bundle import MANIFEST
    from ..checkpoint import resolve
    from ..errors import CheckpointError, InvalidInputError
    from ..loader import require

    for package in ("torch", "onnxscript"):
        require(package, "to build", "torch,export")
    root = resolve(args.model)
    output = args.output or root
    is_bundle = (root / MANIFEST).is_file() and not given_parts(args)
    here = output.exists() and root.exists() and output.samefile(root)
    if here and not is_bundle:
        raise CheckpointError(
            f"{args.model}: expected a bundle, found a checkpoint; name the bundle to make with -o"
        )
    if here and (args.calibration is not None or args.attention != "fp8"):
        raise InvalidInputError(
            f"{args.model}: expected a checkpoint for --calibration and --attention, found a "
            "bundle, which has its graphs; leave them out, or build from the checkpoint with -o"
        )
    build = import_module("fluxkontext.export.build")
    source = build.Source(
        args.model,
        given_parts(args),
        args.calibration,
        args.calibration_steps,
        args.attention,
    )
    order = build.Order(
        out=output,
        library=args.engine,
        target=args.target,
        sizes=args.size,
        contexts=args.contexts,
        batch=args.batch,
        static=args.static,
        precision=args.precision,
        weights=args.weights,
        golden=args.golden,
        plugins=args.plugins,
        pack=args.pack,
    )
    show(build.build(None if here else source, order, _say), args.json)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
