"""A calibration file: how large the inputs of each quantisable layer, and of attention, become."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.errors import CheckpointError
from ..runtime.files import whole_file
from ..runtime.recipes import CALIBRATION_VERSION
from ..runtime.weights import collapse, read_json


@dataclass(frozen=True)
class Calibration:
    """model: what was run. percentile: of magnitudes that counts as the largest; 100 is all.

    amax: canonical name -> magnitude. Of a linear layer it is that of its input; of
    ``double_blocks.0.q``, ``.k`` and ``.v`` (and the same in single blocks) that of attention's
    inputs after norm and RoPE, and of ``.p`` that of the probabilities, which is at most 1.
    about: what else was recorded, for a reader.
    """

    model: str
    percentile: float
    amax: Mapping[str, float]
    about: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of the magnitudes, by which one calibration is told from another."""
        return hashlib.sha256(json.dumps(dict(self.amax), sort_keys=True).encode()).hexdigest()

    def write(self, file: Path) -> None:
        values = {
            "schema_version": CALIBRATION_VERSION,
            "model": self.model,
            "percentile": self.percentile,
            **self.about,
            "amax": dict(self.amax),
        }
        with whole_file(file) as opened:
            opened.write((json.dumps(values, indent=2) + "\n").encode())

    def of(self, modules: Iterable[str], file: Path) -> dict[str, float]:
        """The magnitude for each of ``modules``; all of them have to be there."""
        wanted = list(modules)
        if absent := [module for module in wanted if module not in self.amax]:
            raise CheckpointError(
                f"{file}: expected the calibration of this model, found none for "
                f"{collapse(absent)}; make one with: fluxkontext calibrate"
            )
        return {module: self.amax[module] for module in wanted}


def read_calibration(file: Path) -> Calibration:
    """Read a file that ``fluxkontext calibrate`` wrote; anything else is a CheckpointError."""
    values = read_json(file)
    version, amax = values.pop("schema_version", None), values.pop("amax", None)
    if version != CALIBRATION_VERSION:
        raise CheckpointError(
            f"{file}: expected a calibration of schema_version {CALIBRATION_VERSION}, found "
            f"{version!r}; make one with: fluxkontext calibrate"
        )
    if not isinstance(amax, dict) or not all(map(_is_magnitude, amax.values())):
        raise CheckpointError(
            f"{file}: expected positive numbers in amax, found {_culprit(amax)}; "
            "make it again with: fluxkontext calibrate"
        )
    percentile = values.pop("percentile", 100.0)
    if not _is_magnitude(percentile):
        raise CheckpointError(f"{file}: expected percentile to be a number, found {percentile!r}")
    model = str(values.pop("model", ""))
    return Calibration(model, float(percentile), {k: float(v) for k, v in amax.items()}, values)


def _is_magnitude(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0  # type: ignore[operator,arg-type]


def _culprit(amax: object) -> str:
    if not isinstance(amax, dict):
        return type(amax).__name__
    return next(f"{k}: {v!r}" for k, v in amax.items() if not _is_magnitude(v))
