"""One launch of a Triton kernel as a value: to be run, replayed, or compiled for another GPU."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid and its arguments, compile-time ones included.

    Building one touches no device, so what a chip would be given can be compiled anywhere from
    tensors on the meta device. warps and stages are Triton's ``num_warps`` and ``num_stages``.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: Mapping[str, Any]
    warps: int = 4
    stages: int = 3

    def __call__(self) -> None:
        """Run on the stream that is current for the arguments' device."""
        with torch.cuda.device_of(self._first_tensor()):
            self.kernel[self.grid](**self.args, num_warps=self.warps, num_stages=self.stages)

    def _first_tensor(self) -> Tensor:
        for value in self.args.values():
            if isinstance(value := getattr(value, "base", value), Tensor):
                return value
        raise TypeError(f"{self.kernel.__name__} was given no tensor")
