"""Typed fields of a JSON config: a damaged value is an error that names file, field and value."""

from collections.abc import Mapping
from typing import Any

from .arguments import shown
from .errors import CheckpointError

_MOST = 2**20
"""A limit far above any real size: a damaged number must not become hours or terabytes."""
_MOST_NUMBER = 1e6


class Fields:
    """Typed access to a JSON config, naming the file in every complaint."""

    def __init__(self, file: str, values: Mapping[str, Any]) -> None:
        self.file = file
        self.values = values

    def expect(self, name: str, wanted: object) -> None:
        found = self.values.get(name)
        if found is not None and found != wanted:
            raise CheckpointError(
                f"{self.file}: expected {name} {wanted}, found {shown(found)}; "
                "this is not FLUX.1 Kontext"
            )

    def integer(self, name: str, default: int, most: int = _MOST, least: int = 1) -> int:
        found = self.values.get(name, default)
        if type(found) is not int or not least <= found <= most:
            raise CheckpointError(
                f"{self.file}: expected {name} to be a whole number from {least} to {most}, "
                f"found {shown(found)}"
            )
        return found

    def boolean(self, name: str, default: bool) -> bool:
        found = self.values.get(name, default)
        if not isinstance(found, bool):
            raise CheckpointError(
                f"{self.file}: expected {name} to be true or false, found {shown(found)}"
            )
        return found

    def number(self, name: str, default: float) -> float:
        """null is the default, as in diffusers."""
        found = self.values.get(name)
        found = default if found is None else found
        if type(found) not in (int, float) or not abs(found) <= _MOST_NUMBER:
            raise CheckpointError(
                f"{self.file}: expected {name} to be a number, found {shown(found)}"
            )
        return float(found)

    def positive(self, name: str, default: float) -> float:
        found = self.number(name, default)
        if found <= 0:
            raise CheckpointError(f"{self.file}: expected {name} to be above 0, found {found}")
        return found

    def integers(self, name: str, default: list[int]) -> list[int]:
        found: Any = self.values.get(name, default)
        numbers: list[int] = found if isinstance(found, list) else []
        if not numbers or not all(type(n) is int and 0 < n <= _MOST for n in numbers):
            raise CheckpointError(
                f"{self.file}: expected {name} to be positive whole numbers, found {shown(found)}"
            )
        return numbers
