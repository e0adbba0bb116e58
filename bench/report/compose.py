"""Documents to a report: one in full; several side by side first, ranked where that is fair."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..rank_test import chance_of_larger
from . import conditions, plots, sections, wording
from .content import NOT_MEASURED, Plot, Report, Section, Table
from .headline import headline
from .selection import measured, same_work

Json = Mapping[str, Any]
_LISTED = 2
"""Results with too few samples that are listed one by one."""
RANKING_CHANCE = 0.01
"""A result is called fastest where noise alone would show such a lead at most so often."""
_PARTS: Sequence[Callable[[Json], Section | None]] = (
    headline,
    sections.comparisons,
    sections.latency,
    sections.stages,
    sections.steps,
    sections.memory,
    conditions.roofline,
    conditions.cold,
    conditions.load,
    conditions.sustained,
    conditions.quality,
    conditions.work,
    conditions.skipped,
    conditions.repeat,
    conditions.environment,
)


@dataclass(frozen=True)
class Named:
    """A document and what the report calls it."""

    name: str
    document: Json


def compose(found: Sequence[Named]) -> Report:
    """The report; there is at least one document, and names differ."""
    if len(found) == 1:
        (one,) = found
        document = one.document
        made = document["created"].replace("T", " ").removesuffix("+00:00")
        where = f"{wording.device(document)}; {made} UTC; {wording.commit(document)}"
        return Report(
            f"fluxkontext bench {document['benchmark']}: {document['model']['name']}",
            where,
            warnings(document),
            [part for make in _PARTS if (part := make(document)) is not None],
        )
    doubts = [f"{one.name}: {text}" for one in found for text in warnings(one.document)]
    parts = [_side_by_side(found), *_suites(found)]
    for one in found:
        made = [part for make in _PARTS if (part := make(one.document)) is not None]
        parts += [replace(part, title=f"{one.name}: {part.title}") for part in made]
    devices = dict.fromkeys(wording.device(one.document) for one in found)
    return Report(f"{len(found)} runs of fluxkontext bench", "; ".join(devices), doubts, parts)


def warnings(document: Json) -> list[str]:
    """What it says itself, and what a reader must know of its model and its commit."""
    kinds = {found["kind"] for found in document["warnings"]}
    few = [w for w in document["warnings"] if w["kind"] == "few_samples" and w["result"]]
    folded = few if len(few) > _LISTED else []
    said = [
        found["text"] if found["result"] is None else f"{found['result']}: {found['text']}"
        for found in document["warnings"]
        if found not in folded
    ]
    if folded:  # often most of the results: one item, or it would bury the others
        counts = {r["name"]: r["latency"]["count"] for r in measured(document)}
        short = wording.apart([found["result"] for found in few])
        listed = [
            f"{name} ({counts.get(found['result'], 'none')})"
            for name, found in zip(short, few, strict=True)
        ]
        said.append(f"Too few samples to show a spread: {'; '.join(listed)}")
    if (
        document["model"]["synthetic"]
        and "synthetic_weights" not in kinds
        and document["benchmark"] != "kernels"
    ):
        said.append(
            "The weights are random: times and memory are those of the real shapes, "
            "pictures are noise."
        )
    if document["git"]["dirty"] and "dirty_tree" not in kinds:
        said.append("The code had uncommitted changes: the commit alone does not repeat this run.")
    return said


def _side_by_side(found: Sequence[Named]) -> Section:
    rows = [
        [
            one.name,
            wording.device(one.document),
            wording.suite(one.document),
            one.document["model"]["name"],
            one.document["created"],
            wording.commit(one.document),
        ]
        for one in found
    ]
    columns = ["Run", "Device", "Suite", "Model", "Made", "Commit"]
    return Section("The runs", tables=[Table("", columns, rows, words=frozenset(range(1, 6)))])


def _suites(found: Sequence[Named]) -> list[Section]:
    """A section for each group of runs that can be ranked, and a word on why not all are one."""
    groups: dict[tuple[str, str], list[Named]] = {}
    for one in found:
        document = one.document
        weights = "random" if document["model"]["synthetic"] else document["model"]["digest"]
        key = f"{document['model']['name']} ({weights})"
        groups.setdefault((wording.suite(document), key), []).append(one)
    parts = []
    if len(groups) > 1:
        kinds = "; ".join(f"{suite} of {model}" for suite, model in groups)
        parts.append(
            Section(
                "Not ranked against each other",
                f"These runs are of different suites or models ({kinds}). Their figures stand "
                "side by side below and say nothing about which is faster.",
            )
        )
    for (suite, _), group in groups.items():
        if len(group) > 1:
            parts.append(_ranking(suite, group))
    return parts


def _ranking(suite: str, group: Sequence[Named]) -> Section:
    """Results of one suite, run by run."""
    by_run = [{r["name"]: r for r in measured(one.document)} for one in group]
    names = list(dict.fromkeys(name for rows in by_run for name in rows))
    table, dots = [], []
    for name in names:
        rows = [run.get(name) for run in by_run]
        cells = [NOT_MEASURED if r is None else wording.seconds(r["latency"]["p50"]) for r in rows]
        table.append([name, *cells, _fastest([one.name for one in group], rows)])
        whole = next(row["latency"]["p50"] for row in rows if row is not None)
        dots += [
            plots.Samples(f"{name}: {one.name}", row["latency"]["values"], i, whole)
            for i, (one, row) in enumerate(zip(group, rows, strict=True))
            if row is not None
        ]
    drawn = []
    if dots:
        words = "; ".join(f"{row[0]}: {', '.join(row[1:-1])}" for row in table)
        drawn.append(
            Plot("Every sample", plots.distribution(dots, "of the first run's median"), words)
        )
    columns = ["Median of", *(one.name for one in group), "Fastest"]
    note = (
        "Fastest: where noise within the runs would show such a lead in fewer than one of "
        f"{1 / RANKING_CHANCE:.0f} comparisons. Runs at different times also differ by what the "
        "machine did meanwhile; fluxkontext bench compare runs them in turns."
    )
    last = frozenset({len(columns) - 1})
    tables = [Table("", columns, table, note, last)]
    return Section(f"Compared: {suite}", plots=drawn, tables=tables)


def _fastest(names: Sequence[str], rows: Sequence[Json | None]) -> str:
    """The name of the run that leads beyond noise."""
    there = [(row["latency"], name, row) for name, row in zip(names, rows, strict=True) if row]
    if len(there) < 2:
        return "only one run has it"
    if any(same_work(there[0][2], row) is not None for _, _, row in there):
        return "different work"
    first, second = sorted(there, key=lambda entry: entry[0]["p50"])[:2]
    chance = chance_of_larger(first[0]["values"], second[0]["values"])
    return first[1] if chance <= RANKING_CHANCE else "no difference beyond noise"
