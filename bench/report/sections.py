"""The sections of one document, each empty-handed (None) where the document has nothing for it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..document import STAGES
from . import plots, wording
from .content import Plot, Section, Table
from .selection import measured
from .wording import seconds

Json = Mapping[str, Any]
_PICTURES = 6
"""Results at most that get a plot of their own; tables hold all."""
_SOURCES = {
    "max_ram": "RAM of the process",
    "max_allocated": "allocated by torch",
    "max_reserved": "reserved by torch",
    "max_process_vram": "VRAM of the process (NVML)",
    "max_global_vram": "VRAM of the whole GPU (NVML)",
    "predicted": "predicted by the plan",
}
_PLOTTED = ("max_ram", "max_allocated", "max_process_vram", "predicted")


def comparisons(document: Json) -> Section | None:
    """The A/B table: interleaved in one run, so the machine's moods fall on both sides."""
    found = document["comparisons"]
    if not found:
        return None
    scenarios = {pair["scenario"] for pair in found}
    rows, table = [], []
    for pair in found:
        low, high = pair["interval"]
        base, other = wording.apart([pair["base"], pair["other"]])
        where = f"{pair['scenario']}, " if len(scenarios) > 1 else ""
        name = f"{where}{pair['what']}: {other}"
        rows.append(plots.Interval(name, pair["ratio"], low, high))
        agreement = pair["agreement"]
        equal = "not compared"
        if agreement is not None:
            decibels = agreement["psnr_db"]
            equal = f"at most {agreement['max_levels']} of 255"
            equal = equal if decibels is None else f"{equal}, {decibels:.1f} dB"
        times = [_median(document, pair[side], pair["what"]) for side in ("base", "other")]
        verdict = "faster" if low > 1 else "slower" if high < 1 else "no difference beyond noise"
        table.append(
            [
                name,
                base,
                *map(seconds, times),
                wording.times(pair["ratio"]),
                f"{low:.2f} to {high:.2f}",
                f"{base}: {verdict}",
                equal,
            ]
        )
    confidence = {f"{pair['confidence']:.0%}" for pair in found}
    label = "time over the base's: above 1, the base is faster"
    words = "; ".join(f"{r.name} {r.ratio:.2f} ({r.low:.2f} to {r.high:.2f})" for r in rows)
    return Section(
        "Side by side",
        "Both sides ran the same work in turns. The ratio is of medians, its interval "
        f"({' and '.join(sorted(confidence))}) from resampling.",
        plots=[Plot("Ratio of medians", plots.ratios(rows, label), words)],
        tables=[
            Table(
                "",
                [
                    "Against",
                    "Base",
                    "Base takes",
                    "Other takes",
                    "Ratio",
                    "Interval",
                    "Verdict",
                    "Outputs differ by",
                ],
                table,
                words=frozenset({1, 6, 7}),
            )
        ],
    )


def _median(document: Json, name: str, what: str) -> float | None:
    row = next((r for r in document["results"] if r["name"] == name), None)
    if row is None:
        return None
    found = row["cold"] and row["cold"]["process_start_to_picture"]
    found = found if what == "cold" else row["latency"]
    return None if found is None else float(found["p50"])


def latency(document: Json) -> Section | None:
    """Whole edits: every sample, and their percentiles."""
    rows = measured(document)
    if not rows:
        return None
    short = wording.apart([row["name"] for row in rows])
    samples = [
        plots.Samples(name, row["latency"]["values"]) for name, row in zip(short, rows, strict=True)
    ]
    words = "; ".join(f"{r['name']} median {seconds(r['latency']['p50'])}" for r in rows)
    table = [
        [
            row["name"],
            *(seconds(row["latency"][key]) for key in ("p50", "p90", "p95", "p99", "mean")),
            seconds(row["latency"]["stdev"]),
            str(row["latency"]["count"]),
            wording.number(row["throughput"] and row["throughput"]["value"]),
        ]
        for row in rows
    ]
    columns = ["Result", "p50", "p90", "p95", "p99", "Mean", "Stdev", "Samples", "Images/s"]
    return Section(
        "Latency",
        "Time of one launch, from cold caches."
        if document["benchmark"] == "kernels"
        else "Wall clock of one call, from the request to the pictures on the host.",
        plots=[
            Plot(
                "Every sample",
                plots.distribution(samples, "of the result's median"),
                words,
                "A dot is a call, a triangle one that took longer than there is room for; the "
                "thick bar is the median, the thin one the 95th percentile.",
            )
        ],
        tables=[Table("", columns, table, "p99 needs 100 samples.")],
    )


def stages(document: Json) -> Section | None:
    """Where the time of an edit goes."""
    rows = [row for row in measured(document) if row["stages"]]
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows for name in row["stages"]))
    names.sort(key=lambda name: STAGES.index(name) if name in STAGES else len(STAGES))
    drawn = []
    for row in _longest(rows):
        medians = {_spoken(name): value["p50"] for name, value in row["stages"].items()}
        words = "; ".join(f"{name} {seconds(value)}" for name, value in medians.items())
        drawn.append(Plot(row["name"], plots.waterfall(medians), words))
    table = [
        [row["name"], *(_p50(row["stages"].get(name)) for name in names), _p50(row["latency"])]
        for row in rows
    ]
    return Section(
        "Where the time goes",
        "The median of each stage, in the order in which they run. Medians need not add up to the "
        "median of the whole.",
        plots=drawn,
        tables=[Table("", ["Result", *map(_spoken, names), "Whole call"], table)],
    )


def steps(document: Json) -> Section | None:
    """Denoising steps, in their order and together."""
    rows = [row for row in measured(document) if row["step"] is not None]
    if not rows:
        return None
    drawn = []
    chosen = _longest(rows)
    short = wording.apart([row["name"] for row in chosen])
    for i, (name, row) in enumerate(zip(short, chosen, strict=True)):
        count, values = row["parameters"]["steps"], np.asarray(row["step"]["values"])
        if len(values) % count == 0:
            medians = np.median(values.reshape(-1, count), axis=0).tolist()
            drawn.append(plots.Samples(name, medians, i))
    table = [
        [
            row["name"],
            *(seconds(row["step"][key]) for key in ("p50", "p95", "p99")),
            seconds(row["step"]["values"][0]),
            str(row["step"]["count"]),
            _CLOCKS[row["step_clock"]],
        ]
        for row in rows
    ]
    words = "; ".join(f"{row.name}: first {seconds(row.values[0])}" for row in drawn)
    return Section(
        "Step by step",
        plots=[Plot("Median of each step", plots.steps(drawn), words)] if drawn else [],
        tables=[
            Table(
                "",
                ["Result", "p50", "p95", "p99", "Very first", "Samples", "Clock"],
                table,
                words=frozenset({6}),
            )
        ],
    )


_CLOCKS = {"cuda_events": "CUDA events", "perf_counter": "host", None: wording.text(None)}


def _longest(rows: Sequence[Json]) -> list[Json]:
    """One result of each scenario and each way to run it: the one with the most steps, the smallest
    batch among those."""
    best: dict[tuple[str, ...], Json] = {}
    for row in sorted(rows, key=lambda r: (-r["parameters"]["steps"], r["parameters"]["batch"])):
        ways = (row["parameters"][key] for key in ("implementation", "backend", "precision"))
        best.setdefault((row["scenario"], *ways), row)
    return list(best.values())[:_PICTURES]


def memory(document: Json) -> Section | None:
    """Peaks by stage, from all who measured them, beside what the plan predicted."""
    rows = [row for row in document["results"] if row["memory"]]
    if not rows:
        return None
    drawn = []
    known = [
        key
        for key in _SOURCES
        if any(p[key] is not None for r in rows for p in r["memory"].values())
    ]
    unknown = [n for key, n in _SOURCES.items() if key not in known and key != "predicted"]
    for row in _longest(rows):
        found = [stage for stage in row["memory"] if stage != "total"] or ["total"]
        sources = {
            _SOURCES[key]: [row["memory"][stage][key] for stage in found]
            for key in _PLOTTED
            if any(row["memory"][stage][key] is not None for stage in found)
        }
        if sources:
            words = "; ".join(
                f"{name} {wording.size(max(v or 0 for v in values))}"
                for name, values in sources.items()
            )
            drawn.append(
                Plot(
                    row["name"],
                    plots.memory([_spoken(stage) for stage in found], sources),
                    f"peaks: {words}",
                )
            )
    names = list(dict.fromkeys(stage for row in rows for stage in row["memory"]))
    table = [
        [
            f"{row['name']}: {_SOURCES[key]}",
            *(_peak(row["memory"].get(name), key) for name in names),
        ]
        for row in rows
        for key in known
        if any(peaks[key] is not None for peaks in row["memory"].values())
    ]
    title = "VRAM by stage" if document["environment"]["gpu"] is not None else "Memory by stage"
    columns = ["Peak", *map(_spoken, names)]
    note = f"Not measured: {', '.join(unknown)}." if unknown else ""
    return Section(title, plots=drawn, tables=[Table("", columns, table, note)])


def _spoken(stage: str) -> str:
    return stage.replace("_", " ").replace("vae", "VAE")


def _peak(peaks: Json | None, source: str) -> str:
    if peaks is None or (source == "predicted" and peaks[source] is None):
        return "–"
    return wording.size(peaks[source])


def _p50(found: Json | None) -> str:
    return "–" if found is None else seconds(found["p50"])
