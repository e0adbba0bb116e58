"""Figures of a document in words: three digits and a unit, or "not measured"."""

from collections.abc import Mapping, Sequence
from typing import Any

from .content import NOT_MEASURED

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_GPU_STATE = {
    "sm_clock_mhz": "SM {} MHz",
    "memory_clock_mhz": "memory {} MHz",
    "temperature_c": "{} °C",
    "power_w": "{:.0f} W",
}


def seconds(value: float | None) -> str:
    """``812 ms``."""
    if value is None:
        return NOT_MEASURED
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if abs(value) * scale >= 0.9995:
            return f"{digits(value * scale)} {unit}"
    return f"{digits(value * 1e6)} µs"


def size(value: float | None) -> str:
    """``1.25 GiB``; from bytes."""
    if value is None:
        return NOT_MEASURED
    for unit, scale in (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10)):
        if abs(value) >= scale:
            return f"{digits(value / scale)} {unit}"
    return f"{value:.0f} B"


def rate(value: float | None, unit: str) -> str:
    """``790 TFLOP/s``."""
    if value is None:
        return NOT_MEASURED
    scale, prefix = next((p for p in _PREFIXES if abs(value) >= p[0]), _PREFIXES[-1])
    return f"{digits(value / scale)} {prefix}{unit}"


def number(value: float | None, unit: str = "") -> str:
    """Three digits, and the unit as it is."""
    return NOT_MEASURED if value is None else f"{digits(value)} {unit}".rstrip()


def share(value: float | None) -> str:
    """``71%``; from 0..1."""
    return NOT_MEASURED if value is None else f"{value:.0%}"


def times(value: float) -> str:
    """``1.72 ×``."""
    return f"{value:.2f} ×"


def digits(value: float) -> str:
    """Three significant digits, never an exponent."""
    if value == 0:
        return "0"
    whole = len(str(int(abs(value) + 0.5)))
    return f"{value:,.{max(0, 3 - whole)}f}"


def text(value: object) -> str:
    """Of a setting: null is not measured, a list is its entries."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, list):
        return ", ".join(map(text, value)) or "none"
    return str(value)


def apart(names: Sequence[str]) -> list[str]:
    """Names without those of their parts, between commas, that all of them have: a plot has little
    room, and a name cut at its end would not say what differs."""
    parts = [name.split(", ") for name in names]
    if len(set(names)) < 2 or len({len(those) for those in parts}) > 1:
        return list(names)
    kept = [i for i, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
    return [", ".join(those[i] for i in kept) for those in parts]


def state(found: Mapping[str, Any] | None) -> str:
    """Of a GPU, as NVML read it."""
    if found is None:
        return NOT_MEASURED
    parts = [form.format(found[key]) for key, form in _GPU_STATE.items() if found[key] is not None]
    reasons = found["throttle_reasons"]
    if reasons is not None:
        parts.append(f"throttled by {', '.join(reasons)}" if reasons else "not throttled")
    return ", ".join(parts) or NOT_MEASURED


def device(document: Mapping[str, Any]) -> str:
    """What a document was measured on."""
    environment = document["environment"]
    gpu = environment["gpu"]
    used = {row["parameters"]["device"].partition(":")[0] for row in document["results"]}
    if gpu is not None and used != {"cpu"}:
        return str(gpu["name"])
    cpu = environment["cpu"] or environment["machine"]
    threads = environment["threads"] or environment["cores"]
    return f"{cpu}, {threads} thread{'s' if threads != 1 else ''}"


def commit(document: Mapping[str, Any]) -> str:
    """Twelve digits of it, and whether there was more than it says."""
    git = document["git"]
    if git["commit"] is None:
        return "commit unknown"
    return f"{git['commit'][:12]}" + (" with uncommitted changes" if git["dirty"] else "")


def suite(document: Mapping[str, Any]) -> str:
    """Its name and version: only the same ones are comparable."""
    return f"{document['suite']['name']} v{document['suite']['version']}"
