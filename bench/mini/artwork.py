"""What things look like: outlines, colours, and the sprite layers made of them.

A sprite is linear in its colour. With ``alpha`` (opacity), ``tint`` (how much of the
thing's colour) and ``gloss`` (how much white), all in 0..1, a pixel of the picture is

    background * (1 - alpha) + colour * tint + 255 * gloss

and the parser (`parser.py`) inverts exactly this formula.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (219, 44, 50),
    "orange": (249, 138, 24),
    "yellow": (253, 220, 50),
    "green": (34, 150, 66),
    "blue": (44, 98, 228),
    "purple": (154, 70, 204),
    "pink": (250, 130, 190),
    "white": (252, 252, 254),
}
RADII: dict[str, float] = {"small": 10.5, "big": 15.0}  # of the circle, in pixels
SPRITE = 36  # side of a sprite: the largest thing, its shadow included
_SUPERSAMPLING = 4


def _arc(cx: float, cy: float, radius: float, start: float, stop: float, points: int) -> Floats:
    """Points (n, 2) on an arc, angles in degrees, y pointing down."""
    angle = np.radians(np.linspace(start, stop, points))
    return np.stack([cx + radius * np.cos(angle), cy + radius * np.sin(angle)], 1, dtype=np.float32)


def _ring(radii: tuple[float, ...], corners: int) -> Floats:
    """A polygon whose corners, from the topmost on, lie on the given radii in turn."""
    angle = np.radians(-90 + 360 / corners * np.arange(corners))
    radius = np.resize(radii, corners)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1, dtype=np.float32)


def _heart() -> Floats:
    """Two half discs over a wedge, in units of the radius."""
    lobe = 0.56
    left = _arc(-0.51, -0.38, lobe, 135, 335, 28)
    right = _arc(0.51, -0.38, lobe, 205, 405, 28)
    return np.concatenate([left, right, np.array([[0.0, 0.98]], np.float32)])


def _cross() -> Floats:
    """A plus sign with thick arms."""
    arm, half = 0.94, 0.35
    corner = np.array([[half, -arm], [half, -half], [arm, -half]], np.float32)
    turn = np.array([[0, 1], [-1, 0]], np.float32)
    corners = [corner]
    for _ in range(3):
        corners.append(corners[-1] @ turn)
    return np.concatenate(corners)


class Outline(NamedTuple):
    """A closed polygon in units of the radius and how much its corners are rounded."""

    polygon: Floats
    rounding: float = 0.0


OUTLINES: dict[str, Outline] = {
    "circle": Outline(_ring((1.0,), 64)),
    "square": Outline(np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], np.float32) * 0.78, 0.1),
    "triangle": Outline(np.array([[0, -0.94], [0.98, 0.76], [-0.98, 0.76]], np.float32), 0.1),
    "diamond": Outline(np.array([[0, -0.96], [0.78, 0], [0, 0.96], [-0.78, 0]], np.float32), 0.06),
    "star": Outline(_ring((1.06, 0.53), 10) + np.array([0, 0.05], np.float32), 0.06),
    "heart": Outline(_heart(), 0.0),
    "cross": Outline(_cross(), 0.06),
}


def signed_distance(polygon: Floats, x: Floats, y: Floats) -> Floats:
    """Distance of the points (x, y) to a closed polygon, negative inside; same shape as x."""
    best = np.full(x.shape, np.inf, np.float32)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(polygon, np.roll(polygon, -1, 0), strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        best = np.minimum(best, np.hypot(x - ax - along * ex, y - ay - along * ey))
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < ex * (y - ay) / ey + ax)
    return np.where(inside, -best, best)


class Layers(NamedTuple):
    """One shape at one size: three float32 arrays (SPRITE, SPRITE) in 0..1."""

    alpha: Floats
    tint: Floats
    gloss: Floats


@cache
def layers(shape: str, size: str) -> Layers:
    """Draw a shape: rounded body, darker rim, light from the upper left, soft shadow below."""
    outline, radius = OUTLINES[shape], RADII[size]
    axis = ((np.arange(SPRITE * _SUPERSAMPLING) + 0.5) / _SUPERSAMPLING - SPRITE / 2).astype(
        np.float32
    )
    x, y = np.meshgrid(axis, axis)
    polygon = outline.polygon * radius
    distance = signed_distance(polygon, x, y) - outline.rounding * radius
    cast = signed_distance(polygon, x - 0.7, y - 1.5) - outline.rounding * radius

    body = np.clip(0.5 - distance * _SUPERSAMPLING, 0, 1)
    shadow = 0.3 * np.clip(0.5 - cast / 3.0, 0, 1) * (1 - body)
    depth = np.clip(-distance, 0, None)  # pixels from the rim
    rim = np.clip(1.9 - depth, 0, 1)
    shade = 1.0 - 0.14 * np.clip(0.5 + (x + 2 * y) / (4 * radius), 0, 1)
    light = np.hypot(x + 0.34 * radius, y + 0.36 * radius) / (0.62 * radius)
    gloss = 0.34 * np.clip(1 - light, 0, 1) * (1 - rim)
    tint = shade * (1 - 0.36 * rim)

    def shrink(layer: Floats) -> Floats:
        blocks = layer.reshape(SPRITE, _SUPERSAMPLING, SPRITE, _SUPERSAMPLING)
        return np.asarray(blocks.mean((1, 3)), np.float32)

    return Layers(
        alpha=shrink(body + shadow),
        tint=shrink(body * tint * (1 - gloss)),
        gloss=shrink(body * gloss),
    )
