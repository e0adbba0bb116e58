"""The licence of a checkpoint: the name in its model card, and the text that lies beside it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..runtime.checkpoint import Checkpoint, resolve

CARD = "README.md"
"""The model card, which begins with metadata between two lines of ``---``."""
_TEXTS = ("LICENSE", "LICENCE")


def licence_files(checkpoint: Checkpoint) -> list[Path]:
    """Texts of its licence. A single file has none: what lies beside it may be another's."""
    root = resolve(checkpoint.name)
    if not root.is_dir():
        return []
    return sorted(
        it for it in root.iterdir() if it.is_file() and it.name.upper().startswith(_TEXTS)
    )


def licence_of(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """``name`` and ``files``, for a manifest; None if nothing tells."""
    root = resolve(checkpoint.name)
    card = dict(_metadata(root / CARD))
    name = card.get("license")
    if name == "other":
        name = card.get("license_name", name)
    files = [file.name for file in licence_files(checkpoint)]
    return {"name": name, "files": files} if name or files else None


def _metadata(card: Path) -> Iterator[tuple[str, str]]:
    """The plain values of a model card's front matter."""
    if not card.is_file():
        return
    first, *lines = card.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    if first.strip() != "---":
        return
    for line in lines:
        if line.strip() == "---":
            return
        key, colon, value = line.partition(":")
        if colon and value.strip() and not key.startswith((" ", "-", "#")):
            yield key.strip(), value.strip().strip("\"'")
