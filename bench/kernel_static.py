"""What the compiler makes of every kernel for every chip; no GPU is needed."""

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

from ..kernels.chips import CHIPS
from .aot import Compiled, compile_for
from .kernel_cases import launches

_REGISTERS = 65536
_TENSOR_MEMORY = 512
"""Of a block, on every chip listed (CUDA C++ Programming Guide; PTX ISA, "Tensor Memory")."""


@dataclass(frozen=True)
class Row:
    """One kernel on one chip; ``error`` in place of a result if it did not compile."""

    chip: int
    kernel: str
    warps: int
    stages: int
    compiled: Compiled | None
    error: str | None = None

    @property
    def faults(self) -> list[str]:
        """What forbids to launch it: no code, spills, or more than a block can have."""
        if self.compiled is None:
            return [f"does not compile: {self.error}"]
        faults = []
        if self.compiled.stack:
            faults.append(f"{self.compiled.stack} bytes of stack")
        if self.compiled.shared > (limit := CHIPS[self.chip].shared):
            faults.append(f"{self.compiled.shared} bytes of shared memory, of {limit}")
        if (registers := self.compiled.registers * self.compiled.threads) > _REGISTERS:
            faults.append(f"{registers} registers of a block, of {_REGISTERS}")
        if self.compiled.tensor_memory > _TENSOR_MEMORY:
            faults.append(f"{self.compiled.tensor_memory} columns of tensor memory")
        return faults


def static_rows(pattern: str = "", chips: Sequence[int] = tuple(CHIPS)) -> list[Row]:
    """Compile all whose name contains ``pattern``, in parallel."""
    jobs = [
        (sm, index)
        for sm in chips
        for index, (name, _) in enumerate(launches(CHIPS[sm]))
        if pattern in name
    ]
    workers = min(len(jobs), os.cpu_count() or 1)
    if workers <= 1:
        return [_row(job) for job in jobs]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_row, jobs, chunksize=4))


def _row(job: tuple[int, int]) -> Row:
    sm, index = job
    name, launch = list(launches(CHIPS[sm]))[index]
    try:
        compiled, error = compile_for(launch, CHIPS[sm]), None
    except Exception as failure:  # whatever the compiler raises is a row of the table
        lines = str(failure).strip().splitlines()
        compiled, error = None, f"{type(failure).__name__}: {lines[-1] if lines else ''}"
    return Row(sm, name, launch.warps, launch.stages, compiled, error)


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Plain objects, each with its faults."""
    return [asdict(row) | {"faults": row.faults} for row in rows]


def as_table(rows: Sequence[Row]) -> str:
    """One line a kernel and chip."""
    head = ("chip", "kernel", "warps", "stages", "registers", "stack", "shared", "instructions")
    lines = [head]
    for row in rows:
        if (c := row.compiled) is None:
            found = ("-", "-", "-", row.error or "")
        else:
            kinds = " ".join(f"{name}:{count}" for name, count in c.instructions.items())
            found = (str(c.registers), str(c.stack), str(c.shared), kinds)
        lines.append((f"sm_{row.chip}", row.kernel, str(row.warps), str(row.stages), *found))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
    return "\n".join(texts)
