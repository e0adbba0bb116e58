"""The document that every benchmark writes: `document.schema.json` beside this file is its schema.

One JSON object a run. Seconds, bytes, joules; null is "not measured". Names are those of
optimum-benchmark where it has them (latency: unit, count, mean ...; memory: max_ram ...).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.about import VERSION
from ..runtime.errors import InvalidInputError, KontextError
from ..runtime.files import whole_file
from ..runtime.loader import require

SCHEMA_VERSION = 1
SCHEMA = Path(__file__).with_name("document.schema.json")
FAILED = "failed"
"""Kind of the warning about what ended with an error of its own."""
STAGES = (
    "image_in",
    "queue",
    "noise",
    "text",
    "vae_encode",
    "begin",
    "denoise",
    "vae_decode",
    "image_out",
)
"""Parts of a call, in order. image_in: arguments checked and pictures resized; image_out: arrays
made into pictures."""
P99_SAMPLES = 100
"""Fewer say nothing about one call in a hundred."""

Json = dict[str, Any]


def distribution(values: Iterable[float], unit: str = "s") -> Json:
    """A summary with all its raw samples, in their order; there is at least one."""
    samples = [float(value) for value in values]
    p50, p90, p95, p99 = np.percentile(samples, [50, 90, 95, 99]).tolist()
    return {
        "unit": unit,
        "count": len(samples),
        "mean": float(np.mean(samples)),
        "stdev": float(np.std(samples, ddof=1)) if len(samples) > 1 else None,
        "p50": p50,
        "p90": p90,
        "p95": p95,
        "p99": p99 if len(samples) >= P99_SAMPLES else None,
        "values": samples,
    }


def memory(**peaks: int | None) -> Json:
    """Peaks in bytes by their name in the schema; those not given were not measured."""
    names = ("max_ram", "max_allocated", "max_reserved", "max_process_vram", "max_global_vram")
    return {**dict.fromkeys((*names, "predicted")), **peaks}


def result(name: str, scenario: str, parameters: Mapping[str, Any], **measured: Any) -> Json:
    """A row of a document. ``measured``: its other fields; those not given were not measured.

    A row with a ``reason`` was skipped.
    """
    row: Json = {
        "name": name,
        "scenario": scenario,
        "status": "skipped" if measured.get("reason") else "measured",
        "reason": None,
        "parameters": dict(parameters),
        "warmup": 0,
        "latency": None,
        "stages": {},
        "step": None,
        "step_clock": None,
        "throughput": None,
        "memory": {},
        "energy": None,
        "efficiency": None,
        "cold": None,
        "work": None,
        "roofline": None,
        "load": None,
        "quality": None,
        "devices": None,
        "series": [],
        "details": {},
    }
    if unknown := set(measured) - set(row):
        raise TypeError(f"expected fields of a result, found {', '.join(sorted(unknown))}")
    return {**row, **measured}


def reason_of(error: Exception) -> str:
    """An error as the ``reason`` of a row: one line, with its kind unless it is one of ours."""
    kind = "" if isinstance(error, KontextError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:500]


def warning(kind: str, text: str, about: str | None = None) -> Json:
    """A doubt about a result, or about all of them."""
    return {"kind": kind, "text": text, "result": about}


def document(
    benchmark: str,
    suite: tuple[str, int],
    *,
    git: Json,
    command: Sequence[str],
    model: Json,
    environment: Json,
    warnings: Sequence[Json],
    results: Sequence[Json],
    comparisons: Sequence[Json] = (),
    ceilings: Json | None = None,
    headline: Json | None = None,
) -> Json:
    """A whole document, made now. suite: name and version of what was run."""
    return {
        "schema_version": SCHEMA_VERSION,
        "benchmark": benchmark,
        "suite": {"name": suite[0], "version": suite[1]},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "fluxkontext": VERSION,
        "git": git,
        "command": list(command),
        "model": model,
        "environment": environment,
        "warnings": list(warnings),
        "results": list(results),
        "comparisons": list(comparisons),
        "ceilings": ceilings,
        "headline": headline,
    }


def write(found: Mapping[str, Any], file: Path) -> None:
    """Write a document, whole or not at all, with its folder. NaN and infinity are mistakes."""
    text = json.dumps(found, indent=1, allow_nan=False) + "\n"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as out:
            out.write(text.encode())
    except OSError as error:
        raise InvalidInputError(f"{file}: expected to write there, found: {error}") from None


def read(file: Path) -> Json:
    """A document, checked against the schema. Raises InvalidInputError for anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{file}: expected a benchmark document, found: {error}") from None
    problem = fault(found)
    if problem:
        raise InvalidInputError(f"{file}: expected a benchmark document, found {problem}")
    checked: Json = found
    return checked


def fault(found: object) -> str | None:
    """What is wrong with a document, by the schema; None if nothing is. Needs jsonschema."""
    version = found.get("schema_version") if isinstance(found, dict) else None
    if version != SCHEMA_VERSION:
        return f"schema_version {version!r} instead of {SCHEMA_VERSION}"
    require("jsonschema", "to check a benchmark document", "bench")
    from jsonschema import Draft202012Validator

    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    error = next(Draft202012Validator(schema).iter_errors(found), None)
    return None if error is None else f"{error.json_path}: {error.message[:200]}"
