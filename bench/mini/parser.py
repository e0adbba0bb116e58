"""Reading a picture back into a scene by explaining every tile with the sprite that fits best.

A tile I that shows a thing of colour c is B (1 - alpha) + c tint + 255 gloss, B the background. The
squared error of every thing at every displacement follows from inner products of D = I - B with
the layers, so one matrix product compares a tile with all 2800 candidates exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .artwork import COLOURS as PALETTE
from .artwork import SPRITE, layers
from .backdrops import BACKGROUNDS, CANVAS, backdrop
from .scenes import CELLS, COLOURS, JITTER, MARGIN, SHAPES, SIZES, TILE, Scene, corner

Floats = NDArray[np.float32]

GARBLED = "garbled"
EMPTY: tuple[str, ...] = ()
_FORMS = tuple((shape, size) for shape in SHAPES for size in SIZES)
_SHIFTS = tuple((down, right) for down in range(2 * JITTER + 1) for right in range(2 * JITTER + 1))

# A tile is garbled if its best explanation is further off than RMS_LIMIT over the whole tile, or
# by more than BIAS_LIMIT on average over some PATCH x PATCH pixels (both in grey levels), or if it
# lies more than HALFWAY_LIMIT of the way to the next best one: a thing half faded is neither
# there nor gone. The limits let pass what a VAE of 33 dB does to edges.
RMS_LIMIT = 18.0
HALFWAY_LIMIT = 0.35
PATCH, BIAS_LIMIT = 5, 42.0
MARGIN_LIMIT = 20.0  # RMS over the margin: more is no known background


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a picture shows: a background or "garbled", and nine cells.

    A cell is () if empty, (shape, colour, size), or ("garbled",).
    """

    background: str
    cells: tuple[tuple[str, ...], ...]

    @property
    def garbled(self) -> bool:
        """Whether any part of the picture is nothing that a scene can hold."""
        return self.background == GARBLED or (GARBLED,) in self.cells


def truth(scene: Scene) -> Parsed:
    """What a faultless picture of this scene parses to."""
    cells = [EMPTY] * CELLS
    for thing in scene.things:
        cells[thing.cell] = (thing.shape, thing.colour, thing.size)
    return Parsed(scene.background, tuple(cells))


def tiles(pictures: Floats) -> Floats:
    """The tiles of pictures (n, CANVAS, CANVAS, 3) as (n, 9, TILE * TILE, 3)."""
    inner = pictures[:, MARGIN : CANVAS - MARGIN, MARGIN : CANVAS - MARGIN]
    split = inner.reshape(len(pictures), 3, TILE, 3, TILE, 3).transpose(0, 1, 3, 2, 4, 5)
    return split.reshape(len(pictures), CELLS, TILE * TILE, 3)


def tile_slices(cell: int) -> tuple[slice, slice]:
    """Where a cell's tile lies in a picture: rows and columns."""
    top, left = corner(cell)
    return slice(top, top + TILE), slice(left, left + TILE)


@cache
def margin_mask() -> NDArray[np.bool_]:
    """True (CANVAS, CANVAS) around the grid, where nothing but background is ever drawn."""
    mask = np.ones((CANVAS, CANVAS), bool)
    mask[MARGIN : CANVAS - MARGIN, MARGIN : CANVAS - MARGIN] = False
    return mask


class _Model(NamedTuple):
    """Templates t = form * shifts + shift, pixels p of a tile; all float32."""

    alpha: Floats  # (t, p)
    tint: Floats  # (t, p)
    gloss: Floats  # (t, p)
    palette: Floats  # (colours, 3)
    grounds: Floats  # (backgrounds, 9, p, 3)
    margins: Floats  # (backgrounds, margin pixels, 3)
    energy: Floats  # (backgrounds, 9, t, colours): |B alpha - 255 gloss - c tint|^2


@cache
def _model() -> _Model:
    stack = np.zeros((3, len(_FORMS), len(_SHIFTS), TILE, TILE), np.float32)
    for f, (shape, size) in enumerate(_FORMS):
        for s, (down, right) in enumerate(_SHIFTS):
            stack[:, f, s, down : down + SPRITE, right : right + SPRITE] = layers(shape, size)
    alpha, tint, gloss = stack.reshape(3, len(_FORMS) * len(_SHIFTS), TILE * TILE)
    palette = np.array([PALETTE[name] for name in COLOURS], np.float32)
    pictures = np.stack([backdrop(name) for name in BACKGROUNDS]).astype(np.float32)
    grounds = tiles(pictures)

    square = (grounds**2).sum(-1) @ (alpha**2).T - 510 * grounds.sum(-1) @ (alpha * gloss).T
    square += 3 * 255**2 * (gloss**2).sum(-1)
    mixed = np.einsum("bkpc,tp->bktc", grounds, alpha * tint, optimize=True)
    linear = mixed - 255 * (gloss * tint).sum(-1)[:, None]
    energy = square[..., None] - 2 * linear @ palette.T
    energy += np.outer((tint**2).sum(-1), (palette**2).sum(-1))
    margins = pictures[:, margin_mask()]
    return _Model(alpha, tint, gloss, palette, grounds, margins, energy.astype(np.float32))


def _backgrounds(pictures: Floats) -> tuple[NDArray[np.intp], Floats]:
    """The background that fits the margin best, and its RMS error there; both (n,)."""
    seen = pictures[:, margin_mask()][:, None]
    errors = ((seen - _model().margins) ** 2).mean((2, 3))
    best = errors.argmin(1)
    return best, np.sqrt(errors.min(1))


def _errors(pictures: Floats, ground: NDArray[np.intp]) -> tuple[Floats, Floats]:
    """Squared errors of all candidates (n, 9, forms, shifts, colours) and of nothing (n, 9)."""
    model = _model()
    base = model.grounds[ground]
    difference = tiles(pictures) - base
    nothing = (difference**2).sum((2, 3))
    through = (difference * base).sum(-1) @ model.alpha.T
    shine = difference.sum(-1) @ model.gloss.T
    colour = np.einsum("nkpc,tp->nktc", difference, model.tint, optimize=True) @ model.palette.T
    errors = model.energy[ground] - 2 * colour + (2 * through - 510 * shine)[..., None]
    errors += nothing[..., None, None]
    shape = (*nothing.shape, len(_FORMS), len(_SHIFTS), len(COLOURS))
    return errors.reshape(shape), nothing


def _template(cell: int, ground: int, label: int, shift: int) -> Floats:
    """The tile that a label stands for (p, 3); the last label is the bare background."""
    model = _model()
    base = model.grounds[ground, cell]
    form, colour = divmod(label, len(COLOURS))
    if form == len(_FORMS):
        return np.asarray(base)
    t = form * len(_SHIFTS) + shift
    tinted = model.tint[t, :, None] * model.palette[colour]
    lit = base * (1 - model.alpha[t, :, None]) + tinted + 255 * model.gloss[t, :, None]
    return np.asarray(lit)


def _names(label: int) -> tuple[str, ...]:
    form, colour = divmod(label, len(COLOURS))
    if form == len(_FORMS):
        return EMPTY
    shape, size = _FORMS[form]
    return shape, COLOURS[colour], size


def _local_bias(residual: Floats) -> float:
    """The largest mean error of any square of PATCH pixels and any channel; residual (p, 3).

    Blur errs to both sides of an edge and cancels; a missing tip or a leftover speck does not.
    """
    sums = np.zeros((TILE + 1, TILE + 1, 3), np.float32)
    sums[1:, 1:] = residual.reshape(TILE, TILE, 3).cumsum(0).cumsum(1)
    rows = sums[PATCH:] - sums[:-PATCH]
    return float(np.abs(rows[:, PATCH:] - rows[:, :-PATCH]).max()) / PATCH**2


def _read_tile(
    tile: Floats, cell: int, ground: int, errors: Floats, shifts: NDArray[np.intp]
) -> tuple[str, ...]:
    """The cell's contents, from the squared error and the best displacement of every label."""
    first, second = (int(label) for label in np.argsort(errors)[:2])
    best = _template(cell, ground, first, int(shifts[first]))
    rival = _template(cell, ground, second, int(shifts[second]))
    residual = tile - best
    gap = float(errors[second] - errors[first])
    halfway = 0.5 - gap / (2 * float(((best - rival) ** 2).sum()))
    rms = float(np.sqrt((residual**2).mean()))
    if rms > RMS_LIMIT or halfway > HALFWAY_LIMIT or _local_bias(residual) > BIAS_LIMIT:
        return (GARBLED,)
    return _names(first)


def parse_batch(pictures: NDArray[np.uint8]) -> list[Parsed]:
    """Read pictures, uint8 (n, CANVAS, CANVAS, 3); memory grows by about 2 MB per picture."""
    values = pictures.astype(np.float32)
    grounds, margin_errors = _backgrounds(values)
    errors, nothing = _errors(values, grounds)
    labels = (*nothing.shape, -1)
    by_label = np.append(errors.min(3).reshape(labels), nothing[..., None], -1)
    shifts = errors.argmin(3).reshape(labels)
    shifts = np.append(shifts, np.zeros_like(shifts[..., :1]), -1)
    shown = tiles(values)
    results = []
    for i, ground in enumerate(grounds.tolist()):
        name = GARBLED if margin_errors[i] > MARGIN_LIMIT else BACKGROUNDS[ground]
        cells = (
            _read_tile(shown[i, k], k, ground, by_label[i, k], shifts[i, k]) for k in range(CELLS)
        )
        results.append(Parsed(name, tuple(cells)))
    return results


def parse(picture: NDArray[np.uint8]) -> Parsed:
    """Read one picture, uint8 (CANVAS, CANVAS, 3)."""
    return parse_batch(picture[None])[0]


def parse_all(pictures: Sequence[NDArray[np.uint8]], batch: int = 32) -> list[Parsed]:
    """Read any number of pictures, some at a time."""
    starts = range(0, len(pictures), batch)
    return [p for i in starts for p in parse_batch(np.stack(pictures[i : i + batch]))]
