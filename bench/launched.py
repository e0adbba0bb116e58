"""Which kernels ran: asserted, so that no fallback hides behind the name of what was asked for."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch.profiler import ProfilerActivity, profile

from ..runtime.errors import KontextError

_OURS = {
    "modulate": r"_modulate_kernel",
    "norm_rope": r"_norm_rope_kernel|_attention\w*_kernel",  # attention may rotate by itself
}
"""Ops of every step -> the Triton kernel that runs them."""
_QUANTISED = {"linear_fp8": r"_linear\w*_kernel"}


@contextmanager
def launching(name: str, patterns: Sequence[str], device: str) -> Iterator[None]:
    """What runs in this block has an operator or a kernel for each of these regular expressions.

    Raises KontextError at its end if not: ``name`` did something else than it says.
    """
    if not patterns:
        yield
        return
    activities = [ProfilerActivity.CPU]
    if device.startswith("cuda"):
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as seen:
        yield
    names = {event.key for event in seen.key_averages()}
    for pattern in patterns:
        if not any(re.search(pattern, found) for found in names):
            raise KontextError(
                f"{name}: expected a kernel like {pattern}, found none among the {len(names)} that "
                "ran: it fell back to others; leave it out of --peers, or install what it needs"
            )


def of_our_kernels(chosen: str, precision: str) -> list[str]:
    """Patterns for a native backend that says it runs ``chosen``: ``op=implementation ...``."""
    ops = _OURS | (_QUANTISED if precision == "fp8" else {})
    triton = {
        op for op, _, name in (word.partition("=") for word in chosen.split()) if name == "triton"
    }
    return [pattern for op, pattern in ops.items() if op in triton]
