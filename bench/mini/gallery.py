"""Picture sheets for people: the pictures of each request side by side, its text above them."""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .backdrops import CANVAS

_GAP, _LINE, _LINES = 6, 13, 3
_GOOD, _BAD, _INK = (40, 130, 60), (190, 40, 40), (40, 40, 48)


@dataclass(frozen=True, slots=True)
class Entry:
    """One request: its text, its pictures uint8 (CANVAS, CANVAS, 3), and whether it went well.

    ``good`` is None where there is nothing to judge, and then no mark is drawn.
    """

    text: str
    pictures: Sequence[NDArray[np.uint8]]
    good: bool | None = None


def sheet(entries: Sequence[Entry], columns: int = 3, scale: int = 1) -> Image.Image:
    """All entries on one sheet, so many beside each other, enlarged by a whole factor."""
    side = CANVAS * scale
    widest = max(len(entry.pictures) for entry in entries)
    width = widest * (side + _GAP) + 2 * _GAP
    height = side + _LINES * _LINE + 2 * _GAP
    rows = -(-len(entries) // columns)
    page = Image.new("RGB", (columns * width, rows * height), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for i, entry in enumerate(entries):
        left, top = (i % columns) * width + _GAP, (i // columns) * height + _GAP
        ink = _INK if entry.good is None else _GOOD if entry.good else _BAD
        mark = "" if entry.good is None else "[ok] " if entry.good else "[wrong] "
        lines = wrap(mark + (entry.text or "(no text)"), max(8, (width - 2 * _GAP) // 6))
        for k, line in enumerate(lines[:_LINES]):
            draw.text((left, top + k * _LINE), line, fill=ink, font=font)
        for k, picture in enumerate(entry.pictures):
            tile = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
            page.paste(tile, (left + k * (side + _GAP), top + _LINES * _LINE))
    return page
