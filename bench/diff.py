"""Is the new run slower than the old one? ``fluxkontext bench diff OLD NEW [--threshold 3%]``.

A time is a regression when its median grew by more than the threshold *and* the rank test of its
raw samples says that noise rarely shows this: a diff of two runs that do not differ raises an alarm
in at most one of a hundred. One more row adds the warm results up, since what is a little slower
everywhere may show in no single one. Samples know the noise within a run only; what the machine did
between two runs is what the threshold is for. Peaks of torch's allocator are counted, not sampled:
the threshold alone decides.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..runtime.commands.parsing import Parser
from ..runtime.errors import InvalidInputError
from .document import read
from .rank_test import chance_of_larger, chance_of_larger_in_all, smallest_chance
from .report.content import Table
from .report.markdown import table_lines
from .report.selection import same_work
from .report.wording import device, seconds, size, suite

FALSE_ALARMS = 0.01
"""Of a whole diff, in either direction, where nothing changed."""
ALL = "all together"
REGRESSION, IMPROVEMENT, SAME, UNSURE = "REGRESSION", "improvement", "same", "too few samples"

_UNSTEADY = ("throttled", "clock_changed", "other_load", "spread")
"""Kinds of warnings of a document that make a difference less certain than its samples say."""

Json = Mapping[str, Any]
T = TypeVar("T")
Pair = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Change:
    """A row of a diff. old, new: medians in ``unit``, None for all together; ratio: new over old;
    chance: that noise alone shows as much, 0..1, None where there is no noise."""

    name: str
    unit: str
    old: float | None
    new: float | None
    ratio: float
    chance: float | None
    verdict: str


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 1 if anything is slower beyond noise."""
    parser = Parser(prog="fluxkontext bench diff", description="Is a run slower than another?")
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument(
        "--threshold", type=_percent, default=0.03, metavar="3%", help="slower by less is fine"
    )
    parser.add_argument("--force", action="store_true", help="compare what is not comparable")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    old, new = read(args.old), read(args.new)
    if (reason := incomparable(old, new)) and not args.force:
        raise InvalidInputError(f"expected two runs of the same, found {reason}; --force compares")
    changes = compare(old, new, args.threshold)
    missing = sorted(set(_warm(old)) ^ set(_warm(new)))
    if args.json:
        print(json.dumps({"changes": [asdict(change) for change in changes], "missing": missing}))
    else:
        print("\n".join(_lines(changes, missing)))
    for side, document in (("old", old), ("new", new)):
        for doubt in document["warnings"]:
            if doubt["kind"] in _UNSTEADY:
                print(f"the {side} run: {doubt['text']}", file=sys.stderr)
    found = [change.name for change in changes if change.verdict == REGRESSION]
    if found:
        print(f"worse beyond noise and {args.threshold:.1%}: {'; '.join(found)}", file=sys.stderr)
    return 1 if found else 0


def incomparable(old: Json, new: Json) -> str | None:
    """Why two documents cannot be compared, None if they can."""
    for what, of in (("suites", suite), ("devices", device)):
        if of(old) != of(new):
            return f"different {what}: {of(old)} and {of(new)}"
    for key in ("name", "digest"):
        if old["model"][key] != new["model"][key]:
            return f"different models: {old['model'][key]} and {new['model'][key]}"
    rows = {row["name"]: row for row in old["results"]}
    for row in new["results"]:
        if (before := rows.get(row["name"])) is None:
            continue
        if difference := same_work(before, row):
            return f"different work as {row['name']}: {difference}"
        for key in ("implementation", "backend", "precision", "device"):
            values = [r["parameters"][key] for r in (before, row)]
            if values[0] != values[1]:
                return f"different {key} of {row['name']}: {values[0]} and {values[1]}"
    return None


def compare(old: Json, new: Json, threshold: float) -> list[Change]:
    """Everything that both measured. threshold: 0.03 is 3%."""
    warm, cold = (_both(of(old), of(new)) for of in (_warm, _cold))
    if not warm and not cold:
        raise InvalidInputError(
            "expected a result that both runs measured, found none; run the same"
        )
    timed = {**warm, **cold}
    # Each direction of each row has an equal share of the false alarms.
    allowed = FALSE_ALARMS / 2 / (len(timed) + (len(warm) > 1))
    changes = [_change(name, pair, threshold, allowed) for name, pair in timed.items()]
    if len(warm) > 1:
        changes.append(_all(list(warm.values()), threshold, allowed))
    for name, (before, after) in _both(_peaks(old), _peaks(new)).items():
        verdict = _verdict(after / before, 0, 0, threshold, 0)
        changes.append(Change(name, "B", before, after, after / before, None, verdict))
    return changes


def _both(old: Mapping[str, T], new: Mapping[str, T]) -> dict[str, tuple[T, T]]:
    return {name: (old[name], new[name]) for name in old if name in new}


def _change(name: str, pair: Pair, threshold: float, allowed: float) -> Change:
    old, new = (float(np.median(values)) for values in pair)
    slower, faster = chance_of_larger(*pair), chance_of_larger(*reversed(pair))
    verdict = _verdict(new / old, slower, faster, threshold, allowed)
    moved = max(new / old, old / new) > 1 + threshold
    if verdict == SAME and moved and smallest_chance(*map(len, pair)) > allowed:
        verdict = UNSURE
    return Change(name, "s", old, new, new / old, min(slower, faster), verdict)


def _all(pairs: Sequence[Pair], threshold: float, allowed: float) -> Change:
    """The geometric mean of the ratios."""
    ratios = [np.median(new) / np.median(old) for old, new in pairs]
    ratio = float(np.exp(np.mean(np.log(ratios))))
    slower = chance_of_larger_in_all(pairs)
    faster = chance_of_larger_in_all([(new, old) for old, new in pairs])
    verdict = _verdict(ratio, slower, faster, threshold, allowed)
    return Change(ALL, "s", None, None, ratio, min(slower, faster), verdict)


def _verdict(ratio: float, slower: float, faster: float, threshold: float, allowed: float) -> str:
    if ratio > 1 + threshold and slower <= allowed:
        return REGRESSION
    if 1 / ratio > 1 + threshold and faster <= allowed:
        return IMPROVEMENT
    return SAME


def _warm(document: Json) -> dict[str, list[float]]:
    """Result -> raw seconds."""
    rows = document["results"]
    return {row["name"]: row["latency"]["values"] for row in rows if row["latency"] is not None}


def _cold(document: Json) -> dict[str, list[float]]:
    return {
        f"{row['name']}: process start to picture": row["cold"]["process_start_to_picture"][
            "values"
        ]
        for row in document["results"]
        if row["cold"] is not None
    }


def _peaks(document: Json) -> dict[str, float]:
    """Bytes; none on a CPU, whose resident set has a mind of its own."""
    totals = {row["name"]: row["memory"].get("total") for row in document["results"]}
    return {
        f"{name}: peak VRAM": peaks["max_allocated"]
        for name, peaks in totals.items()
        if peaks is not None and peaks["max_allocated"]
    }


def _lines(changes: Sequence[Change], missing: Sequence[str]) -> list[str]:
    """A table, worst first, and what only one of the two has."""
    rows = [
        [
            change.name,
            *(_shown(value, change.unit) for value in (change.old, change.new)),
            f"{change.ratio - 1:+.1%}",
            "–" if change.chance is None else f"{change.chance:.1g}",
            change.verdict,
        ]
        for change in sorted(changes, key=lambda change: -change.ratio)
    ]
    columns = ["Result", "Old", "New", "Change", "Chance", "Verdict"]
    lines = table_lines(Table("", columns, rows, words=frozenset({5})))
    return [*lines, *(f"only one of the two measured {name}" for name in missing)]


def _shown(value: float | None, unit: str) -> str:
    return "–" if value is None else size(value) if unit == "B" else seconds(value)


def _percent(text: str) -> float:
    """``3%`` or ``0.03``."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a share like 3% or 0.03, found {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
