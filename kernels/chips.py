"""The GPU generations that kernels are chosen and compiled for."""

from dataclasses import dataclass, replace
from functools import cache

import torch

KIB = 1024


@dataclass(frozen=True)
class Chip:
    """What a kernel has to know of a GPU.

    sm: compute capability, 10 × major + minor. shared: bytes of shared memory that one block can
    have (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
    multiprocessors: how many blocks of a persistent kernel run at once.
    """

    sm: int
    shared: int
    multiprocessors: int

    @property
    def fp8(self) -> bool:
        """Whether tensor cores multiply FP8 E4M3, and Triton can name the type."""
        return self.sm >= 89

    @property
    def fp4(self) -> bool:
        """Whether tensor cores multiply NVFP4 blocks."""
        return self.sm >= 100

    @property
    def tma(self) -> bool:
        """Whether matrices are best fed to the tensor cores by the tensor memory accelerator.

        Of 12.x only the copies exist: its matrix instructions still read registers.
        """
        return self.sm in (90, 100)


CHIPS = {
    80: Chip(80, 163 * KIB, 108),  # A100
    86: Chip(86, 99 * KIB, 84),  # RTX 3090 Ti
    89: Chip(89, 99 * KIB, 128),  # RTX 4090
    90: Chip(90, 227 * KIB, 132),  # H100, H200
    100: Chip(100, 227 * KIB, 148),  # B200
    120: Chip(120, 99 * KIB, 170),  # RTX 5090
}
"""The generations that every kernel is compiled for, each with its usual GPU."""

_SAME_CODE = {87: 86, 103: 100, 121: 120}
"""Capabilities whose GPUs get the choices of another; Orin (87) has more memory than 86 needs."""


def unsupported(device: torch.device) -> str | None:
    """Why no kernel runs on ``device``; None if they do."""
    if device.type != "cuda":
        return f"Triton kernels need a CUDA device, found {device.type}"
    if torch.version.hip is not None:
        return "Triton kernels are built for NVIDIA GPUs, found an AMD one"
    sm = _capability(device)
    if _SAME_CODE.get(sm, sm) not in CHIPS:
        return f"no kernel is built for compute capability {sm / 10}"
    return None


@cache
def chip_of(device: torch.device) -> Chip:
    """The chip behind ``device``; a CPU, where only the interpreter runs kernels, counts as 9.0."""
    if device.type == "cpu":
        return CHIPS[90]
    sm = _capability(device)
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return replace(CHIPS[_SAME_CODE.get(sm, sm)], multiprocessors=count)


def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
