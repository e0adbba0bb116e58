"""The stages of a build before the engines: calibrate, quantise, export, each done once.

What a stage made waits in a folder beside the bundle until the bundle is there.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..runtime.bundle import Bundle, digest, open_bundle
from ..runtime.checkpoint import Checkpoint, find
from ..runtime.errors import InvalidInputError
from ..runtime.pipeline import KontextPipeline
from ..runtime.recipes import RECIPES
from .bundle import write_bundle
from .calibrate import SCENE, calibrate
from .calibration import read_calibration
from .quantize import CALIBRATION, write_quantised

RECIPE_FOR = {"fp8": "fp8-static", "nvfp4": "nvfp4-w4a4"}
"""Precision -> the recipe that engines use; both have calibrated scales."""


@dataclass(frozen=True)
class Source:
    """What is built from: a checkpoint as ``find`` takes it. calibration: a file of ``fluxkontext
    calibrate``, or None to make one; steps: of each edit of that."""

    model: str
    parts: Mapping[str, Any] = field(default_factory=dict)
    calibration: Path | None = None
    steps: int = 28

    def find(self) -> Checkpoint:
        """Open it."""
        return find(self.model, self.parts)


def stages_folder(out: Path) -> Path:
    """Where the results of these stages wait for the bundle ``out``."""
    return out.with_name(f".{out.name}.stages")


def wanted_precision(checkpoint: Checkpoint, precision: str) -> str:
    """That of the engines; ``auto`` is what is stored, else bf16."""
    recipe = checkpoint.transformer.weights.recipe
    stored = RECIPES[recipe].precision if recipe else None
    if precision == "auto":
        return stored or "bf16"
    if stored not in (None, precision):
        raise InvalidInputError(
            f"--precision: expected {stored}, as the checkpoint is stored, found {precision}; "
            "name the checkpoint that it was quantised from"
        )
    return precision


def bundle_once(
    source: Source, out: Path, precision: str, weights: str, say: Callable[[str], None]
) -> None:
    """Make the bundle ``out`` in ``precision``, unless it is that already. Raises InvalidInputError
    for one that is something else."""
    checkpoint = source.find()
    quantise = precision in RECIPE_FOR and checkpoint.transformer.weights.recipe is None
    if out.exists():
        bundle = open_bundle(out, engines=False)
        same = (
            bundle.manifest.get("source") == _mark(source, checkpoint)
            if quantise
            else _holds(bundle, checkpoint)
        )
        if (there := bundle.named_precision("gpu")) != precision or not same:
            raise InvalidInputError(
                f"{out}: expected a bundle of {checkpoint.name} in {precision}"
                f"{', calibrated as asked' if quantise else ''}, found one of "
                f"{bundle.manifest['model']} in {there}; name another folder, or remove this one"
            )
        shutil.rmtree(stages_folder(out), ignore_errors=True)
        say(f"export: {out} is there")
        return
    calibration = source.calibration
    exported = checkpoint
    if quantise:
        exported = quantised(source, checkpoint, out, precision, say)
        if exported.transformer.weights.recipe == "fp8-static":
            calibration = exported.tokenizer.parent / CALIBRATION
    say(f"export: {checkpoint.name} to {out} in {precision}")
    write_bundle(
        exported,
        out,
        "bf16" if precision in RECIPE_FOR else precision,
        weights,
        sys.stderr.isatty(),
        read_calibration(calibration) if calibration and precision == "fp8" else None,
        {"model": checkpoint.name, "source": _mark(source, checkpoint)} if quantise else None,
    )
    shutil.rmtree(stages_folder(out), ignore_errors=True)


def _holds(bundle: Bundle, checkpoint: Checkpoint) -> bool:
    """Whether the bundle's weights are those of the checkpoint, byte for byte."""
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        tensors = getattr(checkpoint, part).weights.tensors.values()
        for source in sorted({tensor.file for tensor in tensors}):
            entries = [
                (bundle.root / name, entry)
                for name, entry in bundle.manifest["files"].items()
                if Path(name).name == source.name and entry["size"] == source.stat().st_size
            ]
            if not any(
                source.samefile(place) or digest(source) == entry["digest"]
                for place, entry in entries
            ):
                return False
    return True


def quantised(
    source: Source, checkpoint: Checkpoint, out: Path, precision: str, say: Callable[[str], None]
) -> Checkpoint:
    """``checkpoint`` in the recipe for ``precision``, made in the stages' folder unless there.

    A stage that a killed run finished is taken; what a run left of another checkpoint is not.
    """
    recipe = RECIPE_FOR[precision]
    folder = stages_folder(out) / f"{recipe}-{_mark(source, checkpoint)[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "checkpoint"
    if not done.exists():
        calibration = source.calibration
        if calibration is None and RECIPES[recipe].static:
            calibration = folder / "calibration.json"
            if not calibration.exists():
                say(f"calibrate: {source.steps} steps of each edit, on the native backend")
                _calibrate(source, calibration)
        say(f"quantise: {checkpoint.name} to {recipe}")
        write_quantised(checkpoint, done, precision, recipe, calibration)
    return find(done, {})


def _calibrate(source: Source, file: Path) -> None:
    with KontextPipeline.from_pretrained(source.model, backend="native", **source.parts) as pipe:
        calibrate(pipe, [SCENE], steps=source.steps).write(file)


def _mark(source: Source, checkpoint: Checkpoint) -> str:
    """What a quantised checkpoint is made from, as one digest: which files, by their names, sizes
    and times, and how it is calibrated."""
    files = {
        tensor.file
        for part in ("transformer", "vae", "text_encoder", "text_encoder_2")
        for tensor in getattr(checkpoint, part).weights.tensors.values()
    }
    facts = sorted((it.name, it.stat().st_size, it.stat().st_mtime_ns) for it in files)
    calibrated = digest(source.calibration) if source.calibration else f"{source.steps} steps"
    return hashlib.sha256(json.dumps([facts, calibrated]).encode()).hexdigest()
