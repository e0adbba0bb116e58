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
from ..runtime.errors import CheckpointError, InvalidInputError
from ..runtime.pipeline import KontextPipeline
from ..runtime.recipes import RECIPES
from .bundle import CPU_ONLY, write_bundle
from .calibrate import SCENE, calibrate
from .calibration import read_calibration
from .quantize import CALIBRATION, write_quantised

RECIPE_FOR = {"fp8": "fp8-static", "nvfp4": "nvfp4-w4a4"}
"""Precision -> the recipe that engines use; both have calibrated scales."""
ATTENTION = ("fp8", "16bit")
"""What attention of FP8 engines may be in."""


@dataclass(frozen=True)
class Source:
    """What is built from: a checkpoint as ``find`` takes it. calibration: a file of ``fluxkontext
    calibrate``, or None to make one; steps: of each edit of that. attention: of FP8 engines, see
    :data:`ATTENTION`; that of a checkpoint which is quantised already is in FP8 only with a
    ``calibration``."""

    model: str
    parts: Mapping[str, Any] = field(default_factory=dict)
    calibration: Path | None = None
    steps: int = 28
    attention: str = "fp8"

    def find(self) -> Checkpoint:
        """Open it."""
        return find(self.model, self.parts)

    def quantises(self, checkpoint: Checkpoint, precision: str) -> bool:
        """Whether its checkpoint is to be quantised for engines in ``precision``."""
        return precision in RECIPE_FOR and checkpoint.transformer.weights.recipe is None

    def has_fp8_attention(self, checkpoint: Checkpoint, precision: str) -> bool:
        """Whether attention is in FP8, too."""
        calibrated = self.calibration is not None or self.quantises(checkpoint, precision)
        return (precision, self.attention) == ("fp8", "fp8") and calibrated


def stages_folder(out: Path) -> Path:
    """Where the results of these stages wait for the bundle ``out``."""
    return out.with_name(f".{out.name}.stages")


def wanted_precision(source: Source, precision: str) -> str:
    """That of the engines; ``auto`` is what is stored, else bf16.

    Raises CheckpointError for weights that no engine runs or a calibration that is none,
    InvalidInputError for one that nothing would use.
    """
    checkpoint = source.find()
    recipe = checkpoint.transformer.weights.recipe
    if recipe in CPU_ONLY:
        raise CheckpointError(
            f"{checkpoint.name}: expected weights that engines can run, found {recipe}, whose "
            "scales depend on the input; quantise with --recipe fp8-static, or use --backend native"
        )
    stored = RECIPES[recipe].precision if recipe else None
    if precision == "auto":
        precision = stored or "bf16"
    elif stored not in (None, precision):
        raise InvalidInputError(
            f"--precision: expected {stored}, as the checkpoint is stored, found {precision}; "
            "name the checkpoint that it was quantised from"
        )
    if source.calibration is not None:
        attention = source.has_fp8_attention(checkpoint, precision)
        if not attention and not source.quantises(checkpoint, precision):
            raise InvalidInputError(
                f"--calibration: expected none, as nothing in {precision} engines of "
                f"{checkpoint.name} would use it, found {source.calibration}; leave it out"
            )
        read_calibration(source.calibration)
    return precision


def bundle_once(
    source: Source, out: Path, precision: str, weights: str, say: Callable[[str], None]
) -> None:
    """Make the bundle ``out`` in ``precision``, unless it is that already. Raises InvalidInputError
    for one that is something else."""
    checkpoint = source.find()
    quantise = source.quantises(checkpoint, precision)
    fp8_attention = source.has_fp8_attention(checkpoint, precision)
    if out.exists():
        bundle = open_bundle(out, engines=False)
        there = bundle.named_precision("gpu")
        if there != precision or not _is_made_from(bundle, source, checkpoint, precision):
            raise InvalidInputError(
                f"{out}: expected a bundle of {checkpoint.name} in "
                f"{_named(precision, fp8_attention)}"
                f"{', calibrated as asked' if precision in RECIPE_FOR else ''}, found one of "
                f"{bundle.manifest['model']} in "
                f"{_named(there, bundle.manifest.get('attention') is not None)}; "
                "name another folder, or remove this one"
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
        read_calibration(calibration) if calibration and fp8_attention else None,
        {"model": checkpoint.name, "source": _mark(source, checkpoint)} if quantise else None,
    )
    shutil.rmtree(stages_folder(out), ignore_errors=True)


def _named(precision: str, fp8_attention: bool) -> str:
    """A precision, and that of attention where there is a choice."""
    attention = "fp8" if fp8_attention else "16 bits"
    return f"{precision} (attention in {attention})" if precision == "fp8" else precision


def _is_made_from(bundle: Bundle, source: Source, checkpoint: Checkpoint, precision: str) -> bool:
    """Whether the bundle, which is in ``precision``, is what would be made."""
    attention = bundle.manifest.get("attention")
    fp8_attention = source.has_fp8_attention(checkpoint, precision)
    if source.quantises(checkpoint, precision):  # the mark tells one calibration from another
        same = bundle.manifest.get("source") == _mark(source, checkpoint)
        return same and (attention is not None) == fp8_attention
    calibrated = source.calibration if fp8_attention else None
    wanted = None if calibrated is None else read_calibration(calibrated).digest
    return attention == wanted and _holds(bundle, checkpoint)


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


def weight_files(checkpoint: Checkpoint) -> set[Path]:
    """The files that hold its networks."""
    return {
        tensor.file
        for part in ("transformer", "vae", "text_encoder", "text_encoder_2")
        for tensor in getattr(checkpoint, part).weights.tensors.values()
    }


def _mark(source: Source, checkpoint: Checkpoint) -> str:
    """What a quantised checkpoint is made from, as one digest: which files, by their names, sizes
    and times, and how it is calibrated."""
    files = weight_files(checkpoint)
    facts = sorted((it.name, it.stat().st_size, it.stat().st_mtime_ns) for it in files)
    calibrated = digest(source.calibration) if source.calibration else f"{source.steps} steps"
    return hashlib.sha256(json.dumps([facts, calibrated]).encode()).hexdigest()
