"""Drawing many scenes at once on a device, from the same sprites as `scenes.render`.

Tiles never overlap, so a batch is one gather of tiles, one blend, and one reshape back into
pictures; the arithmetic is the integer arithmetic of the numpy renderer.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .artwork import SPRITE
from .backdrops import BACKGROUNDS, CANVAS, backdrop
from .scenes import CELLS, JITTER, MARGIN, TILE, sprites

_SPAN = 2 * JITTER + 1


class Tables(NamedTuple):
    """What to draw with, on one device; all uint8.

    ``through`` (sprites, shifts, TILE, TILE, 1) and ``paint`` (sprites, shifts, TILE, TILE, 3) for
    every displacement (20 MB); ``grounds`` (backgrounds, CANVAS, CANVAS, 3).
    """

    through: Tensor
    paint: Tensor
    grounds: Tensor


@cache
def tables(device: torch.device) -> Tables:
    """Build the tables on a device, once."""
    drawn = sprites()
    size = (len(drawn.paint), _SPAN * _SPAN, TILE, TILE)
    through = np.full((*size, 1), 255, np.uint8)
    paint = np.zeros((*size, 3), np.uint8)
    for right in range(_SPAN):
        for down in range(_SPAN):
            shift = right * _SPAN + down
            place = (slice(None), shift, slice(down, down + SPRITE), slice(right, right + SPRITE))
            through[place] = drawn.through[..., :1]
            paint[place] = drawn.paint
    grounds = np.stack([backdrop(name) for name in BACKGROUNDS])
    return Tables(*(torch.from_numpy(t).to(device) for t in (through, paint, grounds)))


def render_batch(things: Tensor, backgrounds: Tensor) -> Tensor:
    """Draw scenes as `scenes.encode` writes them: pictures uint8 (n, CANVAS, CANVAS, 3).

    things: integers (n, 9, 3) of sprite, jitter right, jitter down (both + JITTER);
    backgrounds: integers (n,). Drawn on the device where ``things`` lie.
    """
    table = tables(things.device)
    sprite, right, down = things.long().unbind(-1)
    shift = right * _SPAN + down
    pictures = table.grounds[backgrounds.long()]
    inner = pictures[:, MARGIN : CANVAS - MARGIN, MARGIN : CANVAS - MARGIN]
    # (n, 3, TILE, 3, TILE, 3) -> (n, 9, TILE, TILE, 3)
    grid = inner.reshape(-1, 3, TILE, 3, TILE, 3).transpose(2, 3)
    ground = grid.reshape(-1, CELLS, TILE, TILE, 3).int()
    blend = (ground * table.through[sprite, shift] + 127) // 255 + table.paint[sprite, shift]
    back = blend.to(torch.uint8).reshape(-1, 3, 3, TILE, TILE, 3).transpose(2, 3)
    inner.copy_(back.reshape(inner.shape))
    return pictures
