"""Single arguments of a call, checked for type and range: one line for each that cannot be used."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from .errors import InvalidInputError


def whole(label: str, found: Any, low: int, high: int) -> int:
    """A whole number between bounds; numpy's count, and floats without a fraction."""
    exact = isinstance(found, Integral) or (isinstance(found, float) and found.is_integer())
    if isinstance(found, bool) or not exact or not low <= found <= high:
        raise InvalidInputError(
            f"{label}: expected a whole number from {low} to {high}, found {shown(found)}"
        )
    return int(found)


def number(label: str, found: Any) -> float:
    """A finite number."""
    if isinstance(found, bool) or not isinstance(found, Real) or not math.isfinite(found):
        raise InvalidInputError(f"{label}: expected a finite number, found {shown(found)}")
    return float(found)


def choice(label: str, found: Any, choices: Sequence[str]) -> None:
    """One of a few words."""
    if not isinstance(found, str) or found not in choices:
        raise InvalidInputError(
            f"{label}: expected one of {', '.join(choices)}, found {shown(found)}"
        )


def shown(found: Any) -> str:
    """A value in an error message: briefly, whatever it is."""
    text = repr(found)
    return text if len(text) <= 60 else text[:57] + "..."
