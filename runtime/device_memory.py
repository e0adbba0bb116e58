"""Exhausted memory under torch, as one error of our own."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import OutOfMemoryError

_EXHAUSTED = re.compile(r"alloc|out of memory|could not create a (primitive|memory object)$", re.I)
"""What exhausted memory is called where torch raises a bare RuntimeError: its CPU allocator, CUDA,
cuBLAS and cuDNN (``..._ALLOC_FAILED``), and oneDNN."""


def ran_out(error: BaseException | None) -> bool:
    """Whether ``error`` says that memory is exhausted."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_EXHAUSTED.search(_first_line(error)))


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raise OutOfMemoryError in place of whatever says so, with the memory of the call let go."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        failure = OutOfMemoryError(
            f"expected enough memory for this edit, found: {_first_line(error)}; "
            "use a smaller size, fewer images at once or a lower precision"
        )
    else:
        return
    # raised here, so that the failed call's frames and tensors are let go first
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise failure


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["out of memory"])[0]
