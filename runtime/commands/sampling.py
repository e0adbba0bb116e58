"""What `edit` and `generate` share: the options of an edit, and running it."""

import argparse
import json
import sys
import time
from pathlib import Path

from ..checkpoint import MINI
from ..errors import InvalidInputError
from .parsing import Parser, add_parts, count, given_parts, kernel, size


def options() -> Parser:
    """The options, as a parent of both parsers."""
    options = Parser(add_help=False)
    options.add_argument("-p", "--prompt", required=True, help="instruction or description")
    options.add_argument("-o", "--output", type=Path, required=True, help="picture to write")
    options.add_argument(
        "--model",
        default=MINI,
        help="bundle, diffusers folder, safetensors file, or hub id in the cache "
        "(default: %(default)s, which comes with the package)",
    )
    add_parts(options)
    options.add_argument("--backend", default="auto", help="auto, onnx, native or tensorrt")
    options.add_argument(
        "--verify",
        default="once",
        metavar="WHEN",
        help="large files of a bundle: once, always, never",
    )
    options.add_argument("--precision", default="auto", help="auto, fp32, bf16, fp16, fp8, nvfp4")
    options.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    options.add_argument(
        "--vram-budget",
        metavar="N",
        help="what the device may spend, such as 12GiB; what does not fit is streamed (native)",
    )
    options.add_argument(
        "--kernel",
        action="append",
        default=[],
        type=kernel,
        metavar="OP=NAME",
        help="implementation of an op, such as attend=fp8; `doctor` lists them (native)",
    )
    options.add_argument("--steps", type=count, default=28, help="default: %(default)s")
    options.add_argument("--guidance", type=float, default=2.5, help="default: %(default)s")
    options.add_argument("--negative-prompt", help="what to avoid; needs --true-cfg above 1")
    options.add_argument(
        "--true-cfg",
        type=float,
        default=1.0,
        metavar="SCALE",
        help="above 1: away from --negative-prompt",
    )
    options.add_argument("--seed", type=int, help="default: a new one, reported")
    options.add_argument(
        "--size",
        type=_size_or_auto,
        metavar="WxH|auto",
        help="of the result (default: the picture's)",
    )
    options.add_argument(
        "-n", "--num-images", type=count, default=1, help="results: OUT-1, OUT-2 ..."
    )
    options.add_argument("--deadline", type=float, metavar="SECONDS")
    options.add_argument(
        "--no-metadata", action="store_true", help="keep the settings out of the PNG"
    )
    options.add_argument("--quiet", action="store_true", help="no progress bar")
    return options


def _size_or_auto(text: str) -> tuple[int, int] | None:
    return None if text == "auto" else size(text, ", or auto")


def _check_guidance(negative_prompt: str | None, scale: float) -> None:
    """Either alone changes nothing, which is not what was asked for."""
    if negative_prompt is None and scale != 1:
        raise InvalidInputError(
            "--true-cfg: expected --negative-prompt beside it, found none; "
            "say what to avoid, or leave --true-cfg out"
        )
    if negative_prompt is not None and not scale > 1:
        raise InvalidInputError(
            f"--negative-prompt: expected --true-cfg above 1 beside it, found {scale:g}; "
            "add such as --true-cfg 4, or leave --negative-prompt out"
        )


def run(args: argparse.Namespace) -> None:
    """Load the model, make the pictures, write and name them."""
    from ..images import check_output, read_picture
    from ..pipeline import KontextPipeline
    from ..result import numbered

    for output in numbered(args.output, args.num_images):
        check_output(output)  # before any work is done
    _check_guidance(args.negative_prompt, args.true_cfg)
    images = [read_picture(path) for path in args.images]
    width, height = args.size or (None, None)

    started = time.perf_counter()
    with KontextPipeline.from_pretrained(
        args.model,
        backend=args.backend,
        precision=args.precision,
        device=args.device,
        vram_budget=args.vram_budget,
        kernels=dict(args.kernel),
        verify=args.verify,
        **given_parts(args),
    ) as pipe:
        loaded = time.perf_counter() - started
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
            "timings": {"load": loaded, **result.timings},
        }
        print(json.dumps(report))
    else:
        for output, settings in zip(outputs, result.settings, strict=True):
            print(f"{output} ({settings['size']}, seed {settings['seed']})")
