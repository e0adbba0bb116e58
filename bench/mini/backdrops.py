"""The backgrounds: six soft pictures, always the same, so that what a thing hid can be restored."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Colour = tuple[int, int, int]

CANVAS = 128  # side of a picture


def _grid() -> tuple[Floats, Floats]:
    """Coordinates x and y in 0..1, both (CANVAS, CANVAS)."""
    axis = ((np.arange(CANVAS) + 0.5) / CANVAS).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    return x, y


def _veil(ground: Floats, colour: Colour, amount: Floats) -> Floats:
    """Lay a colour over a ground (H, W, 3) or (3,), as thick as the amount (H, W) in 0..1."""
    weight = np.clip(amount, 0, 1)[..., None]
    return np.asarray(ground + (np.asarray(colour) - ground) * weight, np.float32)


def _blend(first: Colour, second: Colour, amount: Floats) -> Floats:
    """Mix two colours: amount (H, W) in 0..1 gives (H, W, 3)."""
    return _veil(np.asarray(first, np.float32), second, amount)


def _mottle(seed: int, waves: int, slowest: float, fastest: float) -> Floats:
    """Smooth noise of unit variance: plane waves of random direction, in cycles per picture."""
    x, y = _grid()
    rng = np.random.default_rng(seed)
    total = np.zeros_like(x)
    for _ in range(waves):
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        cycles = rng.uniform(slowest, fastest)
        across = np.cos(angle) * x + np.sin(angle) * y
        total += np.cos(2 * np.pi * cycles * across + phase)
    return total * np.float32(np.sqrt(2 / waves))


def _blobs(seed: int, count: int, wide: float, high: float, bottom: float) -> Floats:
    """Soft ellipses in the upper part of the picture, (H, W) in 0..1."""
    x, y = _grid()
    rng = np.random.default_rng(seed)
    total = np.zeros_like(x)
    for _ in range(count):
        cx, cy = rng.uniform(0, 1), rng.uniform(0, bottom)
        w, h = wide * rng.uniform(0.7, 1.3), high * rng.uniform(0.7, 1.3)
        total = np.maximum(total, np.exp(-(((x - cx) / w) ** 2) - ((y - cy) / h) ** 2))
    return total


def _sky() -> Floats:
    _, y = _grid()
    air = _blend((122, 184, 236), (206, 232, 250), y)
    clouds = 0.75 * _blobs(5, 9, 0.15, 0.05, 0.95)
    return _veil(air, (255, 255, 255), clouds)


def _sand() -> Floats:
    x, y = _grid()
    drift = 0.25 * _mottle(2, 5, 0.5, 1.5)
    ripples = np.sin(2 * np.pi * (9 * y + 1.5 * x + drift * 1.6))
    return _blend((226, 193, 138), (240, 214, 166), 0.5 + 0.26 * ripples + 0.16 * drift)


def _grass() -> Floats:
    _, y = _grid()
    patches = _mottle(7, 12, 1, 4)
    blades = _mottle(8, 28, 14, 24) * 0.7
    return _blend((150, 204, 108), (112, 172, 84), 0.35 + 0.3 * y + 0.12 * patches + 0.1 * blades)


def _water() -> Floats:
    x, y = _grid()
    sway = 0.45 * np.sin(2 * np.pi * 2.5 * x + 5 * y) + 0.3 * _mottle(4, 5, 1, 2.5)
    crest = np.clip(np.sin(2 * np.pi * (7 * y) + 1.8 * sway), 0, 1) ** 3
    deep = _blend((96, 196, 206), (46, 142, 172), y)
    return _veil(deep, (255, 255, 255), 0.22 * crest)


def _night() -> Floats:
    x, y = _grid()
    air = _blend((26, 30, 66), (62, 68, 122), y)
    rng = np.random.default_rng(3)
    stars = np.zeros_like(x)
    for _ in range(26):
        cx, cy, bright = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.25, 0.75)
        far = ((x - cx) ** 2 + (y - cy) ** 2) * CANVAS**2
        stars = np.maximum(stars, bright * np.exp(-far / 2.2))
    return _veil(air, (255, 250, 225), stars)


def _paper() -> Floats:
    x, y = _grid()
    sheet = _blend((248, 242, 228), (238, 229, 211), 0.5 + 0.1 * _mottle(1, 14, 2, 7))
    # Squares of 16 pixels: faint enough for a small VAE, plain enough to read as squared paper.
    near = np.minimum(np.abs(x * 8 % 1 - 0.5), np.abs(y * 8 % 1 - 0.5)) * 16
    lines = 0.16 * np.clip(1.25 - near, 0, 1)
    return _veil(sheet, (110, 140, 190), lines)


_PAINTERS = {
    "sky": _sky,
    "sand": _sand,
    "grass": _grass,
    "water": _water,
    "night": _night,
    "paper": _paper,
}
BACKGROUNDS: tuple[str, ...] = tuple(_PAINTERS)


@cache
def backdrop(name: str) -> NDArray[np.uint8]:
    """The background of that name, uint8 (CANVAS, CANVAS, 3); read-only, shared by all callers."""
    picture: NDArray[np.uint8] = np.clip(np.rint(_PAINTERS[name]()), 0, 255).astype(np.uint8)
    picture.flags.writeable = False
    return picture
