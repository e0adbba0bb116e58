"""What the machine code of a kernel holds that was compiled for a GPU that need not be there."""

import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from triton import knobs
from triton.runtime.cache import get_cache_manager

from ..kernels.ahead import build_for
from ..kernels.chips import Chip
from ..kernels.launch import Launch

MATRIX_INSTRUCTIONS = ("HMMA", "QMMA", "OMMA", "HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "UTCOMMA")
"""SASS of the tensor cores: warp-wide (H 16-bit, Q FP8, O FP4), warp-group-wide, 5th generation."""
TMA_INSTRUCTIONS = ("UTMALDG", "UTMASTG")

_INSPECTION = f"{sha256(Path(__file__).read_bytes()).hexdigest()[:16]}.json"
"""Name of a result in Triton's cache: another version of this file looks again."""


@dataclass(frozen=True)
class Compiled:
    """What one kernel needs on one chip.

    registers, stack: registers and bytes of local memory of a thread; spills need stack. shared:
    bytes of a block. tensor_memory: columns of the 5th generation's own memory. threads: of a
    block, those that specialised warps add included.
    instructions: how often each tensor-core and TMA instruction stands in the machine code.
    """

    registers: int
    stack: int
    shared: int
    tensor_memory: int
    threads: int
    instructions: dict[str, int]


def compile_for(launch: Launch, chip: Chip) -> Compiled:
    """Compile ``launch`` for ``chip``; a second time, Triton's own disk cache has it."""
    built = build_for(launch, chip)
    folder = get_cache_manager(built.hash)
    if path := folder.get_file(_INSPECTION):
        return Compiled(**json.loads(Path(path).read_text()))
    compiled = _inspect(built)
    folder.put(json.dumps(asdict(compiled)), _INSPECTION, binary=False)
    return compiled


def _inspect(built: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _run(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        code = _run(knobs.nvidia.nvdisasm.path, "-c", file.name)
    registers, stack = (int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK"))
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?(\w+)", code, re.MULTILINE)
    found = {name: opcodes.count(name) for name in (*MATRIX_INSTRUCTIONS, *TMA_INSTRUCTIONS)}
    return Compiled(
        registers=registers,
        stack=stack,
        shared=built.metadata.shared,
        tensor_memory=getattr(built.metadata, "tmem_size", 0) or 0,
        threads=32 * built.metadata.num_warps,
        instructions={name: count for name, count in found.items() if count},
    )


def _run(program: str | Path, *arguments: str) -> str:
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
    return done.stdout
