"""The sections of one document about limits and circumstances; None where there is nothing."""

import shlex
from collections.abc import Mapping
from typing import Any

from . import plots, wording
from .content import Code, Plot, Section, Table
from .wording import seconds

Json = Mapping[str, Any]
_POINTS = 8
"""Of a roofline at most; the table holds all."""


def roofline(document: Json) -> Section | None:
    """Measured ceilings, and the share of the analytic floor that steps, or kernels, reach."""
    ceilings = document["ceilings"]
    rows = [row for row in document["results"] if row["roofline"] is not None]
    if ceilings is None:
        return None
    copy = ceilings["copy"]["p50"]
    peaks = {name: found["p50"] for name, found in ceilings["flops"].items()}
    points = [
        plots.Point(
            row["name"],
            row["roofline"]["flop"] / row["roofline"]["bytes"],
            row["roofline"]["flop"] / found["p50"],
        )
        for row in rows
        if row["roofline"]["flop"] and (found := row["step"] or row["latency"]) is not None
    ][:_POINTS]
    drawn = []
    if peaks:
        words = "; ".join(
            [f"copy {wording.rate(copy, 'B/s')}"]
            + [f"{name} {wording.rate(peak, 'FLOP/s')}" for name, peak in peaks.items()]
            + [f"{point.name} {wording.rate(point.rate, 'FLOP/s')}" for point in points]
        )
        drawn.append(Plot("Roofline", plots.roofline(copy, peaks, points), words))
    limits = [["copy, read plus written", wording.rate(copy, "B/s")]]
    limits += [[f"matrix product, {n}", wording.rate(p, "FLOP/s")] for n, p in peaks.items()]
    shares = [
        [
            row["name"],
            seconds(row["roofline"]["floor"]),
            seconds((found := row["step"] or row["latency"]) and found["p50"]),
            wording.share(row["roofline"]["share"]),
            "arithmetic" if row["roofline"]["bound"] == "flop" else "memory",
        ]
        for row in rows
    ]
    tables = [Table("Ceilings, measured on this device", ["Of", "Median"], limits)]
    if shares:
        columns = ["Result", "Floor", "Measured", "Share of the floor", "Bound by"]
        tables.append(Table("Share reached", columns, shares, words=frozenset({4})))
    return Section(
        "Roofline",
        "The floor is the least time that the arithmetic and the bytes of a denoising step, or of "
        "a kernel, leave at the ceilings measured here.",
        plots=drawn,
        tables=tables,
    )


def cold(document: Json) -> Section | None:
    """New processes."""
    rows = [row for row in document["results"] if row["cold"] is not None]
    if not rows:
        return None
    parts = ("process_start_to_picture", "load", "first_edit")
    table = []
    for row in rows:
        found = [row["cold"][part] for part in parts]
        times = [seconds(part and part["p50"]) for part in found]
        table.append([row["name"], *times, str(found[0]["count"])])
    columns = ["Result", "Process start to picture", "Load", "First edit", "Samples"]
    note = "Medians. First-use compilation is part of the first edit; file caches are warm."
    return Section("Cold start", tables=[Table("", columns, table, note)])


def load(document: Json) -> Section | None:
    """Arrivals, queueing and the tail."""
    rows = [row for row in document["results"] if row["load"] is not None]
    if not rows:
        return None
    table = []
    for row in rows:
        found, queue = row["load"], row["stages"].get("queue")
        arrival = f"{found['concurrency']} at a time"
        if found["rate"] is not None:
            arrival = f"{wording.digits(found['rate'])} a second"
        met = {True: "met", False: "missed", None: "none was asked for"}[found["slo_met"]]
        if found["slo"] is not None:
            met = f"{met}: {wording.share(found['quantile'])} within {seconds(found['slo'])}"
        table.append(
            [
                row["name"],
                arrival,
                f"{found['completed']} of {found['arrivals']}",
                str(found["rejected"]),
                wording.number(row["throughput"] and row["throughput"]["value"]),
                seconds(queue and queue["p50"]),
                seconds(queue and queue["p95"]),
                met,
            ]
        )
    columns = [
        "Result",
        "Arrivals",
        "Completed",
        "Rejected",
        "Images/s",
        "Queued, p50",
        "Queued, p95",
        "Objective",
    ]
    note = "Latency counts from the intended arrival of a request."
    return Section("Under load", tables=[Table("", columns, table, note, frozenset({1, 7}))])


def sustained(document: Json) -> Section | None:
    """A long run: does it slow down as the device warms up?"""
    rows = [row for row in document["results"] if row["series"]]
    if not rows:
        return None
    drawn, table = [], []
    for row in rows:
        series = row["series"]
        times = [(entry["t"], entry["latency"]) for entry in series]
        tenth = max(1, len(times) // 10)
        first, last = (
            sorted(v for _, v in part)[tenth // 2] for part in (times[:tenth], times[-tenth:])
        )
        drawn.append(
            Plot(
                row["name"],
                plots.over_time(times),
                f"{seconds(first)} at first, {seconds(last)} at last",
            )
        )
        ends = [series[0]["state"], series[-1]["state"]]
        table.append(
            [
                row["name"],
                seconds(times[-1][0]),
                seconds(first),
                seconds(last),
                *map(wording.state, ends),
            ]
        )
    columns = ["Result", "Lasted", "First tenth", "Last tenth", "GPU at first", "GPU at last"]
    return Section(
        "Sustained",
        plots=drawn,
        tables=[Table("", columns, table, words=frozenset({4, 5}))],
    )


def quality(document: Json) -> Section | None:
    """How often edits come out exactly right."""
    rows = [row for row in document["results"] if row.get("quality")]
    if not rows:
        return None
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["quality"]))
    table = []
    for kind in kinds:
        found = [row["quality"].get(kind) for row in rows]
        exact = [wording.number(scores and scores["exact"], "%") for scores in found]
        requests = next(int(scores["n"]) for scores in found if scores)
        table.append([kind, *exact, str(requests)])
    columns = ["Requests", *(row["name"] for row in rows), "Count"]
    note = "Pictures that are what was asked for, in every place; the rest of it untouched."
    return Section("Exactly right", tables=[Table("", columns, table, note)])


def skipped(document: Json) -> Section | None:
    """What was not measured, and why."""
    rows = [[r["name"], str(r["reason"])] for r in document["results"] if r["status"] == "skipped"]
    if not rows:
        return None
    table = Table("", ["Result", "Reason"], rows, words=frozenset({1}))
    return Section("Not measured", tables=[table])


def environment(document: Json) -> Section:
    """The machine and its software."""
    found = document["environment"]
    rows = []
    for name, value in found.items():
        if name == "gpu":
            continue
        shown = wording.size(value) if name == "ram" else wording.text(value)
        absent = value is None and name not in ("cpu", "ram", "threads")
        rows.append([_LABELS.get(name, name), "none" if absent else shown])
    gpu = found["gpu"]
    if gpu is not None:
        for name, value in gpu.items():
            if name in ("before", "after"):
                shown = wording.state(value)
            else:
                shown = wording.size(value) if name == "memory" else wording.text(value)
            rows.append([f"GPU, {_LABELS.get(name, name)}", shown])
    else:
        rows.append(["GPU", "none"])
    return Section(
        "Machine",
        tables=[Table("", ["What", "Found"], rows, words=frozenset({1}))],
        folded=True,
    )


_LABELS = {
    "machine": "instruction set",
    "os": "operating system",
    "cpu": "CPU",
    "cores": "CPU cores for this process",
    "threads": "threads of an operation",
    "ram": "RAM",
    "cuda": "CUDA",
    "cudnn": "cuDNN",
    "tensorrt": "TensorRT",
    "onnxruntime": "ONNX Runtime",
    "uuid_hash": "UUID, hashed",
    "sm": "SM version",
    "power_limit_w": "power limit, W",
    "before": "before the run",
    "after": "after the run",
}


def repeat(document: Json) -> Section:
    """What it takes to run the same again."""
    model = document["model"]
    parameters = model["parameters"]
    rows = [
        ["Suite", wording.suite(document)],
        ["Made", document["created"]],
        ["fluxkontext", document["fluxkontext"]],
        ["Commit", wording.commit(document)],
        ["Model", model["name"]],
        ["Weights", "random, made for this run" if model["synthetic"] else model["digest"]],
        ["Parameters", "unknown" if parameters is None else f"{parameters:,}"],
    ]
    if model.get("bundle"):
        rows.append(["Bundle, with its graphs and engines", model["bundle"]])
    seeds = sorted({seed for row in document["results"] for seed in row["parameters"]["seeds"]})
    rows.append(["Seeds", wording.text(seeds)])
    return Section(
        "To repeat it",
        tables=[Table("", ["What", "Value"], rows, words=frozenset({1}))],
        code=[Code("Command", shlex.join(document["command"]))],
    )


def work(document: Json) -> Section | None:
    """What each result computed: settings, tokens and counted forwards; kernels say it by name."""
    if document["benchmark"] == "kernels":
        return None
    rows = []
    for row in document["results"]:
        p = row["parameters"]
        contexts = ", ".join(f"{c['width']}×{c['height']}" for c in p["contexts"])
        tokens = p["tokens"]
        counted = row["work"]
        rows.append(
            [
                row["name"],
                f"{p['width']}×{p['height']}",
                contexts or "none",
                str(p["steps"]),
                str(p["batch"]),
                f"{tokens['target']} + {tokens['context']} + {tokens['text']}",
                str(counted["forwards"]) if counted else wording.text(None),
                wording.rate(counted and counted["flop"], "FLOP"),
                f"{p['implementation']}, {p['backend']}, {p['precision']} on {p['device']}",
            ]
        )
    if not rows:
        return None
    columns = [
        "Result",
        "Picture",
        "Contexts",
        "Steps",
        "Batch",
        "Tokens",
        "Forwards",
        "Work",
        "Run by",
    ]
    note = "Tokens: target + context + text. Forwards: counted while it ran."
    return Section("The work", tables=[Table("", columns, rows, note, frozenset({2, 8}))])
