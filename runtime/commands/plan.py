"""`fluxkontext plan`: what goes where on the device for an edit, and what it needs at most."""

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .parsing import Commands, Parser, add_parts, count, given_parts, size

if TYPE_CHECKING:
    from ..memory_model import Workload
    from ..plan import Plan, Planner
    from ..tensor_shapes import ModelShapes

_USUAL = (24, 16, 12, 8)
"""GiB of common cards, for a plan that was given no budget."""
_AUTO = ("bf16", "fp8", "nvfp4")
"""What --precision auto chooses from, from what is stored downwards."""


def add(commands: "Commands[Parser]", common: Parser) -> None:
    parser = commands.add_parser(
        "plan",
        parents=[common],
        help="what goes where within a budget, and the predicted peak; needs no GPU",
    )
    parser.add_argument(
        "model",
        nargs="?",
        help="as for edit; the published FLUX.1 Kontext [dev] when left out, without any file",
    )
    add_parts(parser)
    parser.add_argument("--size", type=size, metavar="WxH", help="of the result")
    parser.add_argument(
        "--contexts", type=int, default=1, help="pictures of native size (default: %(default)s)"
    )
    parser.add_argument("--batch", type=count, default=1, help="edits at once")
    parser.add_argument("--steps", type=count, default=28, help="default: %(default)s")
    parser.add_argument("--vram-budget", metavar="N", help="such as 12GiB; 24 to 8 when left out")
    parser.add_argument(
        "--precision", default="auto", help="fp32, bf16, fp16, fp8, nvfp4, or auto: compare them"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the plan; raises OutOfMemoryError where nothing fits."""
    from ..arguments import whole
    from ..budget import parse_bytes
    from ..memory_model import Workload
    from ..plan import Planner
    from ..weight_model import PRECISIONS

    shapes, stored, text_tokens = _model(args)
    budget = None if args.vram_budget is None else parse_bytes(args.vram_budget)
    native = (shapes.vae.sample_size,) * 2
    contexts = whole("contexts", args.contexts, 0, 16)
    work = Workload(args.size or native, (native,) * contexts, args.batch, args.steps, text_tokens)
    if args.precision != "auto":
        plans = [Planner(shapes, args.precision).plan(work, budget)]
        chosen = plans[0]
    else:
        planners = [Planner(shapes, precision) for precision in PRECISIONS]
        plans = [_best(planner, work, budget) for planner in planners]
        allowed = _AUTO[_AUTO.index(stored) :]
        fitting = [plan for plan in plans if plan.fits and plan.precision in allowed]
        if not fitting:
            raise planners[-1].refusal(work, budget or 0)
        chosen = next((p for p in fitting if not p.placement.streamed_blocks), fitting[0])
    others: list[list[Plan]] = []
    if budget is None:
        planners = [Planner(shapes, plan.precision) for plan in plans]
        others = [[_best(planner, work, gib << 30) for gib in _USUAL] for planner in planners]
    if args.json:
        print(
            json.dumps(_report(args.model, chosen, [*plans, *(p for row in others for p in row)]))
        )
    else:
        print("\n".join(_lines(chosen, plans, others)))


def _model(args: argparse.Namespace) -> "tuple[ModelShapes, str, int]":
    """Shapes, the stored precision (bf16 for all that is not quantised), tokens of a prompt."""
    from ..checkpoint import find
    from ..recipes import RECIPES
    from ..tensor_shapes import ModelShapes
    from ..tokenizer import load_tokenizer

    if args.model is None:
        return ModelShapes(), "bf16", 512
    checkpoint = find(args.model, given_parts(args))
    weights = checkpoint.transformer.weights
    if weights.recipe is not None:
        stored = RECIPES[weights.recipe].precision
    else:
        forms = weights.forms("transformer")
        stored = "nvfp4" if "nvfp4" in forms else "fp8" if forms else "bf16"
    tokenizer = load_tokenizer(checkpoint.tokenizer_2, 512)
    return ModelShapes.of(checkpoint), stored, tokenizer.model_max_length


def _best(planner: "Planner", work: "Workload", budget: int | None) -> "Plan":
    """The plan that fits, or the one that comes nearest."""
    for plan in planner.plans(work, budget):
        if plan.fits:
            return plan
    return planner.evaluate(planner.least(work).placement, work, budget)


def _report(model: str | None, chosen: "Plan", plans: "Sequence[Plan]") -> dict[str, Any]:
    from ..memory_model import CUDA

    work = chosen.workload
    return {
        "model": model or "FLUX.1 Kontext [dev], published shapes",
        "size": list(work.target),
        "contexts": len(work.contexts),
        "batch": work.batch,
        "steps": work.steps,
        "text_tokens": work.text_tokens,
        "chosen": _facts(chosen),
        "assumed": vars(CUDA),
        "plans": [_facts(plan) for plan in plans],
    }


def _facts(plan: "Plan") -> dict[str, Any]:
    """A plan as JSON; sizes are bytes."""
    return {
        "precision": plan.precision,
        "budget": plan.budget,
        "fits": plan.fits,
        "peak": plan.peak,
        "placement": vars(plan.placement),
        "stages": {stage.name: {**vars(stage), "total": stage.total} for stage in plan.stages},
        "host": dict(plan.host),
        "transfer": plan.transfer,
        "reasons": plan.reasons,
    }


def _lines(
    chosen: "Plan", plans: "Sequence[Plan]", others: "Sequence[Sequence[Plan]]"
) -> list[str]:
    """For a reader: every precision, then the stages of the chosen plan."""
    from ..memory_model import CUDA
    from ..plan import gib

    work = chosen.workload
    budget = "no budget" if chosen.budget is None else f"within {gib(chosen.budget)}"
    lines = [
        f"{work.target[0]}x{work.target[1]}, {len(work.contexts)} context(s), batch {work.batch}, "
        f"{work.steps} steps, {work.text_tokens} text tokens, {budget}",
        "",
    ]
    if others:
        lines.append(_row(["", "resident", *(f"{card} GiB" for card in _USUAL)], 22))
        for plan, row in zip(plans, others, strict=True):
            lines.append(_row([plan.precision, gib(plan.peak), *map(_short, row)], 22))
    else:
        lines.append(_row(["", "peak", "from host", "fits", "placement"], 12))
        for plan in plans:
            fits = "yes" if plan.fits else "no"
            cells = [plan.precision, gib(plan.peak), gib(plan.transfer), fits, _how(plan)]
            lines.append(_row(cells, 12))
    lines += ["", f"{chosen.precision}:"]
    lines.append(_row(["", "weights", "staging", "other", "fixed", "total"], 12))
    for stage in chosen.stages:
        parts = (stage.weights, stage.staging, stage.other, stage.fixed, stage.total)
        lines.append(_row([stage.name, *map(gib, parts)], 12))
    lines += [f"predicted peak {gib(chosen.peak)}; from the host an edit: {gib(chosen.transfer)}"]
    graphs = "on" if chosen.placement.graphs else "off"
    lines += [*(f"- {reason}" for reason in chosen.reasons), f"- CUDA graphs: {graphs}"]
    return [
        *lines,
        "weights and activations follow from shapes; assumed, not measured: "
        f"{gib(CUDA.fixed)} of libraries, {gib(CUDA.workspace)} of workspace and "
        f"{CUDA.fragmentation:.0%} of the rest wasted",
    ]


def _row(cells: Sequence[str], width: int) -> str:
    return "".join([cells[0].ljust(9), *(cell.ljust(width) + " " for cell in cells[1:])]).rstrip()


def _short(plan: "Plan") -> str:
    return _how(plan) if plan.fits else "does not fit"


def _how(plan: "Plan") -> str:
    """What leaves the device or is cut, in a few words."""
    place = plan.placement
    words = {
        f"{place.streamed_blocks} blocks": place.streamed_blocks,
        "text": place.text_streamed,
        "mod": place.modulation_streamed,
        "VAE": place.vae_on_host,
        "tiles": place.tile,
        "eager": not place.graphs and not place.streamed_blocks,
    }
    return " ".join(word for word, holds in words.items() if holds) or "resident"
