"""As many CPU threads for all: torch's, ONNX Runtime's, and those of new processes."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..runtime.errors import InvalidInputError
from .environment import cores

_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
_VARIABLE = "OMP_NUM_THREADS"


@contextmanager
def threads(count: int | None, device: str) -> Iterator[None]:
    """In this block, and in processes begun in it, an operation uses ``count`` threads.

    None: on a CPU, as many as torch chose, or one a core without it. Every library is bound by the
    CPUs that the process may use, so these become as many. Raises InvalidInputError for more than
    there are.
    """
    if count is None and not on_cpu(device):
        yield
        return
    torch = _torch()
    wanted = count or min(torch.get_num_threads() if torch else cores(), cores())
    if wanted > cores():
        raise InvalidInputError(
            f"--threads: expected at most {cores()}, the CPUs of this process, found {wanted}"
        )
    before, variable = torch and torch.get_num_threads(), os.environ.get(_VARIABLE)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    try:
        if torch:
            torch.set_num_threads(wanted)
        os.environ[_VARIABLE] = str(wanted)
        if wanted < len(allowed):
            os.sched_setaffinity(0, _apart(sorted(allowed))[:wanted])
        yield
    finally:
        if torch:
            torch.set_num_threads(before)
        os.environ.pop(_VARIABLE)
        if variable is not None:
            os.environ[_VARIABLE] = variable
        if wanted < len(allowed):
            os.sched_setaffinity(0, allowed)


def on_cpu(device: str) -> bool:
    """Whether a model runs there; ``auto`` is a GPU where torch sees one."""
    torch = _torch()
    return device == "cpu" or (device == "auto" and not (torch and torch.cuda.is_available()))


def _torch() -> Any:
    """None where it is not installed: a bundle is measured without."""
    return import_module("torch") if find_spec("torch") else None


def _apart(cpus: Sequence[int]) -> list[int]:
    """Cores first, then the second threads of the same cores."""

    def second(cpu: int) -> bool:
        try:
            listed = Path(_SIBLINGS.format(cpu)).read_text(encoding="ascii")
        except OSError:
            return False
        return cpu != min(map(int, re.findall(r"\d+", listed)), default=cpu)

    return sorted(cpus, key=lambda cpu: (second(cpu), cpu))
