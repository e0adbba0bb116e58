"""What a device can do at best: matrix products by dtype, and copying. As the schema's
``ceilings``."""

import torch

from . import gpu_timing
from .document import Json, distribution
from .measure import Effort, interleaved

_SIDE = 1024
"""Of a product on a CPU: large enough for all its threads, done in milliseconds."""
_COPIED = 2**27
"""Bytes copied on a CPU: more than its caches."""
_EFFORT = Effort(warmup=2, rounds=9)


def measured(device: str) -> Json:
    """On random numbers, which cost a chip more power than zeros do."""
    if device.startswith("cuda"):
        with torch.inference_mode(), torch.device(device):
            found = gpu_timing.ceilings()
        return {
            "flops": {k: distribution(v, "FLOP/s") for k, v in found.items() if k != "copy"},
            "copy": distribution(found["copy"], "B/s"),
        }
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, _SIDE, _SIDE, generator=generator).unbind(0)
    a16, b16 = a.bfloat16(), b.bfloat16()
    source = torch.randint(0, 255, (_COPIED,), dtype=torch.uint8, generator=generator)
    target = torch.empty_like(source)
    with torch.inference_mode():
        taken = interleaved(
            {
                "fp32": lambda: a @ b,
                "bf16": lambda: a16 @ b16,
                "copy": lambda: target.copy_(source),
            },
            _EFFORT,
        )
    flop = 2 * _SIDE**3
    return {
        "flops": {
            name: distribution([flop / s for s in taken[name]], "FLOP/s")
            for name in ("fp32", "bf16")
        },
        "copy": distribution([2 * _COPIED / s for s in taken["copy"]], "B/s"),
    }
