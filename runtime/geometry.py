"""Sizes, tokens and positions: how pictures of any shape become one sequence, and back.

Tokens are 2x2 patches of latents, so one token covers ``2 * downscale`` (16) pixels a side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .arguments import whole
from .errors import InvalidInputError

PREFERRED = (
    (672, 1568),
    (688, 1504),
    (720, 1456),
    (752, 1392),
    (800, 1328),
    (832, 1248),
    (880, 1184),
    (944, 1104),
    (1024, 1024),
    (1104, 944),
    (1184, 880),
    (1248, 832),
    (1328, 800),
    (1392, 752),
    (1456, 720),
    (1504, 688),
    (1568, 672),
)
"""(width, height) that FLUX.1 Kontext was trained on (BFL ``PREFERED_KONTEXT_RESOLUTIONS``)."""
NATIVE = 1024
MAX_SIDE = 8192
"""The longest side of a picture inside the model; far above what it was trained on."""
LAYOUTS = ("index", "offset")

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True)
class Transform:
    """How a user's picture maps onto the model's, and onto the result. All sizes are (w, h).

    source: the user's picture, upright. model: the same picture as the model sees it, stretched.
    target: the result. Coordinates are continuous pixels, (0, 0) the top left corner.
    """

    source: Size
    model: Size
    target: Size

    def to_target(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the user's picture lies in the result."""
        return x * self.target[0] / self.source[0], y * self.target[1] / self.source[1]

    def to_source(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the result lies in the user's picture."""
        return x * self.source[0] / self.target[0], y * self.source[1] / self.target[1]


@dataclass(frozen=True)
class Grid:
    """The sizes that a model works in.

    multiple: pixels per token along a side. native: the side of its usual square picture; the
    preferred sizes scale with it, so that a small model has small ones.
    """

    multiple: int = 16
    native: int = NATIVE

    @property
    def preferred(self) -> list[Size]:
        """The preferred sizes at this model's scale."""
        scale = self.native / NATIVE
        sizes = {(self._nearest(w * scale), self._nearest(h * scale)) for w, h in PREFERRED}
        return sorted(sizes)

    def _nearest(self, side: float) -> int:
        return max(1, round(side / self.multiple)) * self.multiple

    def context_size(self, source: Size, auto_resize: bool) -> Size:
        """The size at which a context picture is encoded.

        auto_resize: the preferred size of nearest aspect, taken from the exact sides as BFL does
        (diffusers cuts them to multiples of 16 first, and so picks another for some); otherwise the
        picture's own, cut down to whole tokens.
        """
        width, height = source
        if auto_resize:
            aspect = width / height
            return min((abs(aspect - w / h), w, h) for w, h in self.preferred)[1:]
        size = tuple(max(side // self.multiple, 1) * self.multiple for side in source)
        return self._checked(size[0], size[1])

    def target_size(
        self, height: int | None, width: int | None, max_area: int | None, context: Size | None
    ) -> Size:
        """The size of the result.

        Without height and width: the first context's own size, so that nothing shifts or zooms, or
        the native square. With them: their aspect at ``max_area`` (native squared) pixels, cut down
        to whole tokens: diffusers' formula.
        """
        for name, side in (("height", height), ("width", width)):
            if side is not None:
                whole(name, side, 1, MAX_SIDE)
        if max_area is not None:
            whole("max_area", max_area, self.multiple**2, MAX_SIDE**2)
        if height is None and width is None and max_area is None:
            return context or (self._nearest(self.native), self._nearest(self.native))
        if height is None and width is None and context:
            width, height = context
        area = max_area or self.native**2
        aspect = (width or self.native) / (height or self.native)
        sides = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        return self._checked(*(side // self.multiple * self.multiple for side in sides))

    def _checked(self, width: int, height: int) -> Size:
        if not (self.multiple <= width <= MAX_SIDE and self.multiple <= height <= MAX_SIDE):
            raise InvalidInputError(
                f"size: expected sides of {self.multiple} to {MAX_SIDE} pixels, "
                f"found {width}x{height}; choose a less extreme shape"
            )
        return width, height

    def tokens(self, size: Size) -> Size:
        """Tokens along the width and the height of a picture."""
        return size[0] // self.multiple, size[1] // self.multiple


def position_ids(
    target: Size, contexts: Sequence[Size], layout: str = "index"
) -> NDArray[np.int32]:
    """RoPE positions ``[tokens, 3]`` as (frame, h, w); all sizes are in tokens, (w, h).

    The target lies at frame 0. ``index``: context i at frame i + 1, each from its own origin.
    ``offset``: all at frame 1, each below or beside those before it, whichever keeps the whole
    smaller (ComfyUI's default). Text tokens lie at (0, 0, 0) and are not part of this.
    """
    parts = [_block(0, 0, 0, target)]
    across = down = 0  # extent of the contexts placed so far
    for i, (width, height) in enumerate(contexts):
        if layout == "index":
            parts.append(_block(i + 1, 0, 0, (width, height)))
            continue
        beside = height + down > width + across
        top, left = (0, across) if beside else (down, 0)
        parts.append(_block(1, top, left, (width, height)))
        down, across = max(down, top + height), max(across, left + width)
    return np.concatenate(parts)


def _block(frame: int, top: int, left: int, size: Size) -> NDArray[np.int32]:
    h, w = np.mgrid[top : top + size[1], left : left + size[0]]
    return np.stack([np.full(h.size, frame), h.ravel(), w.ravel()], axis=1).astype(np.int32)


def pack(latents: NDArray[np.float32]) -> NDArray[np.float32]:
    """Latents ``[C, h, w]`` to tokens ``[(h/2)(w/2), 4C]``, features ordered (c, ph, pw)."""
    channels, height, width = latents.shape
    tokens = latents.reshape(channels, height // 2, 2, width // 2, 2).transpose(1, 3, 0, 2, 4)
    return np.ascontiguousarray(tokens.reshape(-1, channels * 4))


def unpack(tokens: NDArray[np.float32], size: Size) -> NDArray[np.float32]:
    """Tokens ``[w * h, 4C]`` of a grid of ``size`` (w, h) back to latents ``[C, 2h, 2w]``."""
    width, height = size
    latents = tokens.reshape(height, width, -1, 2, 2).transpose(2, 0, 3, 1, 4)
    return np.ascontiguousarray(latents.reshape(-1, height * 2, width * 2))
