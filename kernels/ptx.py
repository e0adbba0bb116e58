"""A kernel as PTX that others launch: what Triton adds is taken out, what they need is read.

Triton ends every list of parameters with two pointers to scratch memory, which its own launcher
passes. Another launcher does not, so they go; a kernel that uses them cannot be taken.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from triton import knobs

from .ahead import build_for
from .chips import Chip
from .launch import Launch

VERSION = 87
"""Of PTX, times 10: the first that has Blackwell's consumer GPUs; every driver of CUDA 13 reads it,
and both assemblers that Triton brings."""
SHARED_LIMIT = 48 * 1024
"""Bytes of shared memory that a kernel may have without being asked for by name."""
_SCRATCH = 2
_KINDS = {"u64": "pointer", "u32": "int32", "i32": "int32"}
"""Types of PTX and of Triton's signatures; others are no launcher's but Triton's."""
_SHARED = re.compile(r"^\s*(\.extern|)\s*\.shared\s", re.MULTILINE)
_BLACKWELL = 100
"""The first capability that Triton's second assembler is for."""


@dataclass(frozen=True)
class Ptx:
    """A kernel for one chip.

    parameters: name -> ``pointer`` or ``int32``, in order. threads: of a block. shared: bytes of a
    block, to be asked for at the launch.
    """

    name: str
    text: str
    parameters: dict[str, str]
    threads: int
    shared: int


def ptx_for(launch: Launch, chip: Chip) -> Ptx:
    """``launch`` compiled for ``chip``, without Triton's own parameters and debug information.

    Raises ValueError for a kernel that a launch with pointers and integers alone cannot run.
    """
    built = build_for(launch, chip, ptx_version=VERSION)
    wanted = {
        name: "pointer" if kind.startswith("*") else _KINDS.get(kind, kind)
        for name, kind in built.src.signature.items()
        if kind != "constexpr"
    }
    text = _bare(built.asm["ptx"])
    name, kinds, threads = _entry(text)
    shared, declared = int(built.metadata.shared), _SHARED.findall(text)
    expected = [*wanted.values(), *["pointer"] * _SCRATCH]
    for what, sought, found in (
        ("parameters", expected, list(kinds.values())),
        ("threads", 32 * built.metadata.num_warps, threads),
        ("bytes of scratch", 0, built.metadata.global_scratch_size),
        ("declarations of shared memory", [".extern"] if shared else [], declared),
    ):
        if sought != found:
            raise ValueError(f"{name} for sm_{chip.sm}: expected {what} {sought}, found {found}")
    if shared > SHARED_LIMIT:
        raise ValueError(
            f"{name} for sm_{chip.sm}: expected at most {SHARED_LIMIT} bytes of shared memory, "
            f"found {shared}"
        )
    return Ptx(name, _without(text, list(kinds)[-_SCRATCH:]), wanted, threads, shared)


def assemble(ptx: Ptx, chip: Chip) -> bytes:
    """Machine code of ``ptx``, by the assembler that Triton brings for ``chip``. Raises
    CalledProcessError with what it says."""
    tools = knobs.nvidia
    tool = tools.ptxas_blackwell if chip.sm >= _BLACKWELL else tools.ptxas
    arch = re.findall(r"^\.target (\w+)", ptx.text, re.MULTILINE)[0]
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx.text, encoding="utf-8")
        command = [tool.path, f"--gpu-name={arch}", "-o", str(out), str(source)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return out.read_bytes()


def _bare(text: str) -> str:
    """Without comments and debug information, which names files of the machine it was made on."""
    text = re.sub(r"//.*", "", text)
    text = re.sub(r"^\s*\.section\s+\.debug_\w+\s*\{[^}]*\}\n?", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\s*\.(?:loc|file)\s.*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"(?<=\.target )(\w+), debug", r"\1", text)
    return re.sub(r"\n\s*\n+", "\n", text)


def _entry(text: str) -> tuple[str, dict[str, str], int]:
    """Name, parameters (name -> kind) and threads of the one kernel in ``text``."""
    ((name, listed, threads),) = re.findall(
        r"\.entry (\w+)\((.*?)\)\s*\.reqntid (\d+)", text, re.DOTALL
    )
    parameters = re.findall(r"\.param \.(\w+)\b.*?(\w+)(?:,|$)", listed.strip(), re.MULTILINE)
    return name, {key: _KINDS.get(kind, kind) for kind, key in parameters}, int(threads)


def _without(text: str, parameters: list[str]) -> str:
    """``text`` without ``parameters``, which end its list. Raises ValueError if one is used."""
    for parameter in parameters:
        text, count = re.subn(rf",\s*\.param [^,()]*\b{parameter}\b", "", text)
        if count != 1 or re.search(rf"\b{parameter}\b", text):
            raise ValueError(
                f"expected that the kernel does without {parameter}, found a use of it"
            )
    return text
