"""The command ``fluxkontext``. Results go to stdout, logs and progress to stderr."""

import argparse
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from .about import VERSION
from .errors import InvalidInputError, KontextError, OutOfMemoryError

INTERRUPTED = 130
_BENCHES = ("kernels", "quality")
_PARTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0 done; 1 run-time failure; 2 usage; 3 weights missing or malformed; 5 does not fit in memory;
    6 a file of a bundle was changed; 7 deadline; 130 interrupted.
    """
    debug = False
    try:
        args = _parser().parse_args(argv)
        debug = args.debug
        logging.basicConfig(
            level=logging.DEBUG if debug else logging.WARNING,
            format="%(name)s: %(message)s",
            stream=sys.stderr,
        )
        if not debug:
            warnings.filterwarnings("ignore", module="PIL")  # of damaged metadata, say
        code: int | None = args.run(args)  # None, unless a benchmark has a verdict of its own
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("fluxkontext: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone: not an error of ours
        _drop_output()
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        known = isinstance(error, KontextError)
        text = " ".join(str(error).split()) or type(error).__name__
        hint = "" if known else f" ({type(error).__name__}; --debug shows where)"
        print(f"fluxkontext: {text}{hint}", file=sys.stderr)
        if isinstance(error, KontextError):
            return error.exit_code
        if isinstance(error, OSError):  # perhaps of stdout, whose rest would fail again at exit
            _drop_output()
        return OutOfMemoryError.exit_code if isinstance(error, MemoryError) else 1
    return code or 0


def _drop_output() -> None:
    """Let what stdout still holds go nowhere, if it cannot be written."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, as any other error."""

    def error(self, message: str) -> NoReturn:
        raise InvalidInputError(f"{message}; see {self.prog} --help")


def _parser() -> _Parser:
    parser = _Parser(prog="fluxkontext", description="Edit pictures with FLUX.1 Kontext.")
    parser.add_argument("--version", action="version", version=f"fluxkontext {VERSION}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object")
    common.add_argument("--debug", action="store_true", help="show tracebacks and all logs")

    sampling = _sampling_options()
    edit = commands.add_parser(
        "edit", parents=[sampling, common], help="edit a picture by instruction"
    )
    edit.add_argument(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="picture; several are one edit's contexts",
    )
    edit.add_argument(
        "--context-layout", choices=("index", "offset"), default="index", help="of several pictures"
    )
    edit.add_argument(
        "--no-auto-resize",
        dest="auto_resize",
        action="store_false",
        help="keep the picture's own size, cut to multiples of 16",
    )
    edit.set_defaults(run=_make)

    generate = commands.add_parser(
        "generate", parents=[sampling, common], help="make a picture from text alone"
    )
    generate.set_defaults(run=_make, images=[], context_layout="index", auto_resize=True)

    export = commands.add_parser(
        "export", parents=[common], help="a checkpoint to a bundle of ONNX graphs and weights"
    )
    export.add_argument("model", help="diffusers folder, safetensors file, or hub id in the cache")
    export.add_argument("-o", "--output", type=Path, required=True, help="folder to make")
    export.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        default="bf16",
        help="of the graphs for GPUs (default: %(default)s); those for CPUs compute in fp32",
    )
    export.add_argument(
        "--weights", choices=("link", "copy"), default="link", help="hard links, or copies"
    )
    _add_parts(export)
    export.set_defaults(run=_export)

    inspect = commands.add_parser(
        "inspect", parents=[common], help="what a checkpoint or an output picture holds"
    )
    inspect.add_argument("path", type=Path)
    inspect.set_defaults(run=_inspect)

    bench = commands.add_parser("bench", parents=[common], help="measure; see each --help")
    bench.add_argument("what", choices=_BENCHES, help="what to measure")
    bench.add_argument("options", nargs=argparse.REMAINDER, help="its own options")
    bench.set_defaults(run=_bench)

    doctor = commands.add_parser(
        "doctor", parents=[common], help="what this machine can run, and why not the rest"
    )
    doctor.add_argument("bundle", type=Path, nargs="?", help="verify every file of a bundle too")
    doctor.set_defaults(run=_doctor)
    return parser


def _sampling_options() -> _Parser:
    """What `edit` and `generate` share."""
    options = _Parser(add_help=False)
    options.add_argument("-p", "--prompt", required=True, help="instruction or description")
    options.add_argument("-o", "--output", type=Path, required=True, help="picture to write")
    options.add_argument(
        "--model", required=True, help="diffusers folder, safetensors file, or hub id in the cache"
    )
    _add_parts(options)
    options.add_argument("--backend", default="auto", help="auto, onnx or native")
    options.add_argument(
        "--verify",
        default="once",
        metavar="WHEN",
        help="large files of a bundle: once, always, never",
    )
    options.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16")
    options.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    options.add_argument("--steps", type=_count, default=28, help="default: %(default)s")
    options.add_argument("--guidance", type=float, default=2.5, help="default: %(default)s")
    options.add_argument("--negative-prompt", help="what to avoid; needs --true-cfg above 1")
    options.add_argument("--true-cfg", type=float, default=1.0, metavar="SCALE")
    options.add_argument("--seed", type=int, help="default: a new one, reported")
    options.add_argument(
        "--size", type=_size, metavar="WxH|auto", help="of the result (default: the picture's)"
    )
    options.add_argument(
        "-n", "--num-images", type=_count, default=1, help="results: OUT-1, OUT-2 ..."
    )
    options.add_argument("--deadline", type=float, metavar="SECONDS")
    options.add_argument(
        "--no-metadata", action="store_true", help="keep the settings out of the PNG"
    )
    options.add_argument("--quiet", action="store_true", help="no progress bar")
    return options


def _add_parts(parser: argparse.ArgumentParser) -> None:
    for part in _PARTS:
        flag = "--" + part.replace("_", "-")
        parser.add_argument(flag, metavar="PATH", help=f"folder or file of the {part}")


def _given_parts(args: argparse.Namespace) -> dict[str, Any]:
    return {part: value for part in _PARTS if (value := getattr(args, part)) is not None}


def _size(text: str) -> tuple[int, int] | None:
    if text == "auto":
        return None
    from .geometry import MAX_SIDE

    sides = text.lower().split("x")
    if len(sides) != 2 or not all(s.isdecimal() and 1 <= int(s) <= MAX_SIDE for s in sides):
        raise argparse.ArgumentTypeError(
            f"expected WxH, each 1 to {MAX_SIDE}, or auto, found {text!r}"
        )
    return int(sides[0]), int(sides[1])


def _count(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 10_000):
        raise argparse.ArgumentTypeError(f"expected 1 to 10000, found {text!r}")
    return int(text)


def _make(args: argparse.Namespace) -> None:
    """`edit` and `generate`."""
    from .images import check_output, read_picture
    from .pipeline import KontextPipeline
    from .result import numbered

    for output in numbered(args.output, args.num_images):
        check_output(output)  # before any work is done
    images = [read_picture(path) for path in args.images]
    width, height = args.size or (None, None)

    with KontextPipeline.from_pretrained(
        args.model,
        backend=args.backend,
        precision=args.precision,
        device=args.device,
        verify=args.verify,
        **_given_parts(args),
    ) as pipe:
        result = pipe(
            images or None,
            args.prompt,
            negative_prompt=args.negative_prompt,
            true_cfg_scale=args.true_cfg,
            width=width,
            height=height,
            max_area=None if width is None or height is None else width * height,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            num_images_per_prompt=args.num_images,
            seed=args.seed,
            auto_resize=args.auto_resize,
            context_layout=args.context_layout,
            deadline=args.deadline,
            progress=not args.quiet and not args.json and sys.stderr.isatty(),
        )
    outputs = result.save(args.output, metadata=not args.no_metadata)
    if args.json:
        report = {
            "outputs": [str(output) for output in outputs],
            "settings": result.settings,
            "timings": result.timings,
        }
        print(json.dumps(report))
    else:
        for output, settings in zip(outputs, result.settings, strict=True):
            print(f"{output} ({settings['size']}, seed {settings['seed']})")


def _export(args: argparse.Namespace) -> None:
    from .checkpoint import find
    from .loader import require

    for package in ("torch", "onnxscript"):
        require(package, "to export", "torch,export")
    checkpoint = find(args.model, _given_parts(args))
    write_bundle = import_module("fluxkontext.export.bundle").write_bundle
    progress = not args.json and sys.stderr.isatty()
    write_bundle(checkpoint, args.output, args.precision, args.weights, progress)
    _show({"bundle": str(args.output)}, args.json)


def _inspect(args: argparse.Namespace) -> None:
    from .inspection import inspect

    _show(inspect(args.path), args.json)


def _bench(args: argparse.Namespace) -> int:
    code: int = import_module(f"fluxkontext.bench.{args.what}").main(args.options)
    return code


def _doctor(args: argparse.Namespace) -> None:
    from .doctor import diagnose

    _show(diagnose(args.bundle), args.json)


def _show(facts: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts))
    else:
        print("\n".join(_lines(facts, 0)))


def _lines(facts: Mapping[str, Any], depth: int) -> list[str]:
    """Indented ``name: value`` lines."""
    lines = []
    pad = "  " * depth
    for name, value in facts.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{pad}{name}:", *_lines(value, depth + 1)]
        elif isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
            lines.append(f"{pad}{name}:")
            for entry in value:
                lines += [f"{pad}  -", *_lines(entry, depth + 2)]
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            lines.append(f"{pad}{name}: {'none' if text in (None, '', {}) else text}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
