"""What a device can do at best: matrix products by dtype, and copying. As the schema's
``ceilings``, and whether a figure can be true."""

import torch

from ..runtime.errors import KontextError
from . import gpu_timing
from .document import Json, distribution
from .measure import Effort, interleaved

_SIDE = 1024
"""Of a product on a CPU: large enough for all its threads, done in milliseconds."""
_COPIED = 2**27
"""Bytes copied on a CPU: more than its caches."""
_EFFORT = Effort(warmup=2, rounds=9)
SLACK = 1.1
"""Another product's shape may be a little faster than the one that was measured."""
_AGAIN = 3
"""How often a CPU's products are measured anew before a figure is refused."""


def measured(device: str) -> Json:
    """On random numbers, which cost a chip more power than zeros do."""
    if device.startswith("cuda"):
        with torch.inference_mode():
            found = gpu_timing.ceilings(device)
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


def refuse_impossible(name: str, flop: float, seconds: float, ceilings: Json, device: str) -> None:
    """Raise KontextError for a figure that the device cannot reach: something was not done.

    Other programs take as much of a CPU as they like, and may have done so while its ceilings were
    measured: they are measured anew before a figure is refused.
    """
    best, rate = _best(ceilings), flop / seconds
    for _ in range(_AGAIN if device == "cpu" else 0):
        if rate <= SLACK * best:
            break
        best = max(best, _best(measured(device)))
    if rate > SLACK * best:
        raise KontextError(
            f"{name}: expected at most {best:.3g} FLOP/s, which is what this device was measured "
            f"to do, found {rate:.3g}: some of the work was not done, or not waited for"
        )


def _best(ceilings: Json) -> float:
    """FLOP/s. Of all samples: others' load makes a measured ceiling lower, never higher."""
    return max(float(max(found["values"])) for found in ceilings["flops"].values())
