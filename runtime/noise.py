"""Initial noise: torch's CPU generator, written in numpy.

One seed gives the same picture on every backend, with torch or without, and the same as diffusers
with ``torch.Generator("cpu").manual_seed(seed)``. Source: ATen's ``CPUGeneratorImpl`` (MT19937) and
``normal_fill`` (Box-Muller in blocks of 16). Values agree with ``torch.randn`` within 2e-6: torch's
vectorised logarithm and cosine themselves differ in the last bit between processors.
"""

import numpy as np
from numpy.typing import NDArray

_BLOCK = 16


class NoiseStream:
    """Standard normal float32 values in the order in which torch's CPU generator draws them."""

    def __init__(self, seed: int) -> None:
        """Start the stream; like torch, any 64-bit seed is taken modulo 2**32."""
        self._bits = np.random.RandomState(seed & 0xFFFFFFFF)

    def _uniform(self, count: int) -> NDArray[np.float32]:
        words = self._bits.randint(0, 2**32, size=count, dtype=np.uint32)
        return (words & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)

    def normal(self, *shape: int) -> NDArray[np.float32]:
        """What ``torch.randn(*shape, generator=...)`` returns next; at least 16 values."""
        count = int(np.prod(shape))
        if count < _BLOCK:
            raise ValueError(f"expected at least {_BLOCK} values to draw, found shape {shape}")
        values = self._uniform(count)
        whole = count // _BLOCK * _BLOCK
        _box_muller(values[:whole])
        if whole < count:  # torch draws the last 16 values afresh when they do not fill a block
            values[-_BLOCK:] = self._uniform(_BLOCK)
            _box_muller(values[-_BLOCK:])
        return values.reshape(shape)


def _box_muller(values: NDArray[np.float32]) -> None:
    """Turn uniform values into normal ones in place, each block of 16 by itself."""
    blocks = values.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(-2 * np.log(1 - blocks[:, 0]))
    angle = np.float32(2 * np.pi) * blocks[:, 1]
    blocks[:, 0] = radius * np.cos(angle)
    blocks[:, 1] = radius * np.sin(angle)
