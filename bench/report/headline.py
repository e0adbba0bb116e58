"""The figures to quote from one document."""

from collections.abc import Mapping
from typing import Any

from . import wording
from .content import Card, Section
from .selection import quoted
from .wording import seconds

Json = Mapping[str, Any]


def headline(document: Json) -> Section | None:
    """Cards of the comparisons and of the result to quote; kernels and scores have neither."""
    if document["benchmark"] in ("kernels", "quality"):
        return None
    row = quoted(document)
    cards = [_comparison_card(c) for c in document["comparisons"]]
    if row is not None:
        cards += _result_cards(row, document["headline"])
    about = "" if row is None else f"Of \N{LEFT DOUBLE QUOTATION MARK}{row['name']}"
    about += "\N{RIGHT DOUBLE QUOTATION MARK}, unless a card says otherwise." if about else ""
    return Section("In short", about or "No result of this run was measured.", cards=cards)


def _result_cards(row: Json, named: Json | None) -> list[Card]:
    latency, batch = row["latency"], row["parameters"]["batch"]
    energy, peak = row["energy"], named["peak_vram"] if named else None
    per_minute = row["throughput"] and row["throughput"]["value"] * 60
    cold = row["cold"] and row["cold"]["process_start_to_picture"]
    total = row["memory"].get("total")
    source = next((s for s in ("max_process_vram", "max_allocated") if total and total[s]), None)
    if peak is None and source is not None and total is not None:
        peak = total[source]
    memory = Card("Peak VRAM", wording.size(peak))
    if peak is None and total is not None and total["max_ram"] is not None:
        memory = Card("Peak RAM", wording.size(total["max_ram"]), "of the whole process")
    joules = energy["total"] / batch if energy else None
    called = "one edit" if batch == 1 else f"one call of {batch} edits"
    return [
        Card("Median", seconds(latency["p50"]), f"{called}, {_samples(latency['count'])}"),
        Card("95th percentile", seconds(latency["p95"])),
        Card("99th percentile", seconds(latency["p99"]), _p99_note(latency)),
        Card("Edits a minute", wording.number(per_minute)),
        memory,
        Card("Energy an edit", wording.number(joules, "J")),
        Card(
            "Process start to picture",
            seconds(cold and cold["p50"]),
            f"median, {_samples(cold['count'])}" if cold else "",
        ),
    ]


def _samples(count: int) -> str:
    return f"{count} sample{'s' if count != 1 else ''}"


def _p99_note(latency: Json) -> str:
    return "needs 100 samples" if latency["p99"] is None else ""


def _comparison_card(pair: Json) -> Card:
    low, high = pair["interval"]
    base, other = wording.apart([pair["base"], pair["other"]])
    return Card(
        f"{other} takes, {pair['what']}",
        wording.times(pair["ratio"]),
        f"the time of {base} in {pair['scenario']}; {low:.2f} to {high:.2f}",
    )
