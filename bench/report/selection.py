"""Which results of a document to show, to quote, to compare."""

from collections.abc import Mapping
from typing import Any

Json = Mapping[str, Any]


def measured(document: Json) -> list[Json]:
    """Its results that have samples."""
    return [row for row in document["results"] if row["latency"] is not None]


def quoted(document: Json) -> Json | None:
    """The result to quote: the one that the document names, else a typical one; None if none."""
    rows, named = measured(document), document["headline"]
    row = next((r for r in rows if named is not None and r["name"] == named["result"]), None)
    return row or max(rows, key=_typical, default=None)


def _typical(row: Json) -> tuple[bool, bool, bool, int]:
    """A single edit of the most steps, and the one that was also measured cold."""
    parameters = row["parameters"]
    single = parameters["batch"] == 1
    return row["cold"] is not None, row["scenario"] == "edit", single, parameters["steps"]


def same_work(one: Json, other: Json) -> str | None:
    """What differs in what two results of one name computed; None if nothing does.

    How it was computed (precision, backend, device, implementation) may differ: that is what is
    compared.
    """
    for key in ("width", "height", "steps", "batch", "contexts", "tokens"):
        if one["parameters"][key] != other["parameters"][key]:
            return f"{key} {one['parameters'][key]} and {other['parameters'][key]}"
    return None
