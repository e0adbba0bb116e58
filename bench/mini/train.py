"""Train the miniature, one stage at a time: ``python -m fluxkontext.bench.mini.train STAGE``.

Stages in order: vae, t2i, edit, distill, export. Each goes on from what the one before it left in
the run's folder, and from its own last state if it was stopped. See README.md beside this file.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..checkpoint_writer import Spec
from .training.distil_stage import DistilStage
from .training.flow_stage import FlowStage
from .training.loop import Stage, Weights, train
from .training.records import Records
from .training.run import Run, processes
from .training.schedule import Budget
from .training.shipping import total_bytes, write_folder, write_readme
from .training.spec import MINI
from .training.tokenizer_files import write_tokenizers
from .training.vae_stage import GATE, VaeStage, load_latents, with_constants
from .vocabulary import VOCABULARY

STAGES = ("vae", "t2i", "edit", "distill")
_COMMANDS = "commands.txt"
_RATES = {"vae": 6e-3, "t2i": 3e-3, "edit": 3e-3, "distill": 5e-4}
_BATCHES = {"vae": 64, "t2i": 1024, "edit": 1024, "distill": 512}
_CPU_BATCHES = {"vae": 8, "t2i": 48, "edit": 48, "distill": 32}


class NotReadyError(Exception):
    """A stage was asked for before the one that it builds on is good enough."""


def main(argv: Sequence[str] | None = None, spec: Spec = MINI) -> int:
    """Command line; returns the exit code: 0, or 1 when a stage is not ready to start."""
    args = _parser().parse_args(argv)
    words = [
        "RUN" if word == str(args.out) else word
        for word in (sys.argv[1:] if argv is None else argv)
    ]
    line = f"python -m fluxkontext.bench.mini.train {shlex.join(words)}"
    try:
        if args.stage == "export":
            export(args.out, args.to, spec, args.scores, args.ignore_gate)
        else:
            with processes(args.device) as device:
                run = _run(args, device)
                torch.backends.cudnn.benchmark = True  # few shapes, many times
                torch._dynamo.config.recompile_limit = 64  # blocks and sequence lengths
                if run.is_first:
                    _note(run.folder, line)
                train(make_stage(args.stage, spec, run, args.begin), run)
    except NotReadyError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def make_stage(name: str, spec: Spec, run: Run, start_from: Path | None = None) -> Stage:
    """A stage with the weights that it starts from: in a file, or of the stage before. Raises
    NotReadyError."""
    if name == "vae":
        return VaeStage(spec, run)
    spec, weights = finished_vae(spec, run.folder, run.ignore_gate)
    if run.is_first:
        write_tokenizers(run.folder / "tokenizers")
    run.wait()
    before = Records(run.folder / STAGES[STAGES.index(name) - 1])
    start = before.load_weights() if name != "t2i" else None
    if start_from is not None:
        if not start_from.is_file():
            raise NotReadyError(f"{start_from}: expected weights to start from, found no file")
        start = load_file(start_from)
    if name != "t2i" and not before.done and not run.ignore_gate:
        raise NotReadyError(f"{before.folder}: expected a finished stage, found none; run it first")
    latents = load_latents(spec, weights, run)
    if name != "distill":
        return FlowStage(name, spec, run, latents, start)
    if start is None:
        raise NotReadyError(f"{before.folder}: expected weights to distil from, found none")
    return DistilStage(spec, run, latents, start)


def finished_vae(spec: Spec, folder: Path, ignore_gate: bool) -> tuple[Spec, Weights]:
    """The spec with the measured constants, and the weights. Raises NotReadyError."""
    records = Records(folder / "vae")
    weights, result = records.load_weights(), records.result()
    if weights is None:
        raise NotReadyError(f"{records.folder}: expected the VAE's weights, found none; train it")
    if not result["passed"] and not ignore_gate:
        raise NotReadyError(
            f"{records.folder}: expected {GATE}% of scenes exact, found {result['exact']}%; "
            "train it longer, or pass --ignore-gate"
        )
    return with_constants(spec, result), weights


def export(folder: Path, out: Path, spec: Spec, scores: Path | None, ignore_gate: bool) -> None:
    """Write the last finished stage of a run as a diffusers folder with a README."""
    spec, vae = finished_vae(spec, folder, ignore_gate)
    trained = [name for name in STAGES if Records(folder / name).result()]
    weights = Records(folder / trained[-1]).load_weights()
    if weights is None or trained[-1] == "vae":
        raise NotReadyError(f"{folder}: expected a trained transformer, found none")
    write_folder(out, spec, {**vae, **weights})
    results = {name: Records(folder / name).result() for name in trained}
    commands = (folder / _COMMANDS).read_text(encoding="utf-8").splitlines()
    document = json.loads(scores.read_text(encoding="utf-8")) if scores else None
    write_readme(out, results, commands, document, len(VOCABULARY))
    print(f"{out}: {total_bytes(out) / 1e6:.2f} MB, from stage {trained[-1]}")


def _run(args: argparse.Namespace, device: torch.device) -> Run:
    batches = _BATCHES if device.type == "cuda" else _CPU_BATCHES
    return Run(
        folder=args.out,
        budget=Budget(args.steps, args.minutes),
        batch=args.batch or batches[args.stage],
        rate=args.rate or _RATES[args.stage],
        seed=args.seed,
        device=device,
        dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype],
        views=args.views,
        workers=args.workers,
        compile=args.compile,
        pause_after=args.pause_after,
        save_every=args.save_every,
        probe_every=args.probe_every,
        probe_samples=args.probe_samples,
        ignore_gate=args.ignore_gate,
    )


def _note(folder: Path, line: str) -> None:
    """Keep the command, once, for the README of what comes out."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / _COMMANDS
    known = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    if line not in known:
        file.write_text("\n".join([*known, line]) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name in STAGES:
        stage = stages.add_parser(name)
        budget = stage.add_mutually_exclusive_group(required=True)
        budget.add_argument("--minutes", type=float, help="budget of the stage, pauses not counted")
        budget.add_argument("--steps", type=int, help="budget of the stage")
        stage.add_argument("--out", type=Path, required=True, help="folder of the run")
        stage.add_argument(
            "--device", default="auto", help="auto, cpu, cuda (default: %(default)s)"
        )
        stage.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
        stage.add_argument("--batch", type=int, help="samples of a step, over all processes")
        stage.add_argument("--views", type=int, default=1, help="noises of a sample in a step")
        stage.add_argument("--rate", type=float, help="largest learning rate")
        stage.add_argument("--seed", type=int, default=0)
        stage.add_argument("--workers", type=int, default=0, help="processes that draw samples")
        stage.add_argument("--compile", action="store_true", help="compile the blocks")
        stage.add_argument("--pause-after", type=float, help="minutes; the same command goes on")
        stage.add_argument("--save-every", type=float, default=60.0, help="seconds")
        stage.add_argument("--probe-every", type=float, default=120.0, help="seconds")
        stage.add_argument("--probe-samples", type=int, default=128)
        stage.add_argument("--ignore-gate", action="store_true", help="start on unfinished ground")
        if name == "vae":
            stage.set_defaults(begin=None)
            continue
        stage.add_argument(
            "--begin",
            type=Path,
            metavar="FILE",
            help="weights.safetensors to start from, such as an earlier run's of the same stage; "
            "default: of the stage before",
        )
    ship = stages.add_parser("export")
    ship.add_argument("--out", type=Path, required=True, help="folder of the run")
    ship.add_argument("--to", type=Path, required=True, help="folder to write; must not exist")
    ship.add_argument("--scores", type=Path, help="of fluxkontext bench quality, for the README")
    ship.add_argument("--ignore-gate", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
