"""A kernel's error is at most twice the reference's own low-precision error against float64."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fluxkontext.kernels.proof import broken_rule

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def double(value: Any) -> Any:
    """Floating-point tensors in float64; anything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def check(results: Any, reference: Callable[..., Any], *args: Any) -> None:
    """Hold ``results`` to ``reference(*args)``; both may be one tensor or several."""
    expected, exact = reference(*args), reference(*map(double, args))
    if isinstance(results, Tensor):
        results, expected, exact = (results,), (expected,), (exact,)
    for result, low, high in zip(results, expected, exact, strict=True):
        compare(result, low, high)


def compare(result: Tensor, reference: Tensor, exact: Tensor) -> None:
    """Bound the largest and the root mean square error."""
    assert exact.shape == reference.shape
    fault = broken_rule(result, reference, exact)
    assert fault is None, fault
