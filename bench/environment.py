"""Where a benchmark ran: what a reader needs to judge its figures, and to repeat them."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .document import Json, warning
from .nvml import Nvml, open_reader

_CPUINFO = Path("/proc/cpuinfo")


def environment(device: str, before: Json | None, after: Json | None) -> Json:
    """The machine and its software, as the schema's ``environment``.

    device: ``cpu`` or ``cuda[:n]``; its GPU is described. before, after: its states under load.
    """
    torch = sys.modules.get("torch")  # a run of ONNX graphs alone does not load it for this
    return {
        "machine": platform.machine(),
        "os": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads() if torch else _threads(),
        "ram": _ram(),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "triton": _version("triton"),
        "onnxruntime": _version("onnxruntime") or _version("onnxruntime-gpu"),
        "numpy": _version("numpy"),
        "diffusers": _version("diffusers"),
        "tensorrt": next(filter(None, map(_version, _TENSORRT)), None),
        "cuda": torch.version.cuda if torch else None,
        "cudnn": _cudnn(torch),
        "driver": None,
        "gpu": None,
        **(_gpu(torch, device, before, after) if device.startswith("cuda") and torch else {}),
    }


_TENSORRT = (
    "tensorrt",
    "tensorrt_cu13",
    "tensorrt_rtx",
    "tensorrt_rtx_cu13_bindings",
)
"""Distributions that hold TensorRT or TensorRT-RTX, the first that is there."""


def reader_of(device: str) -> Nvml | None:
    """The sensors of ``device``; None for a CPU."""
    torch = sys.modules.get("torch")
    if torch is None or not device.startswith("cuda"):
        return None
    return open_reader(str(torch.cuda.get_device_properties(device).uuid))


def cores() -> int:
    """Logical cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def git_state() -> Json:
    """The commit of this checkout; nulls for an installed package. ``FLUXKONTEXT_COMMIT`` names
    the one that a copy without history was made of; where git knows one, it says nothing."""
    here = str(Path(__file__).parent)

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-c", "safe.directory=*", "-C", here, *words],
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError:
            return None
        return done.stdout if done.returncode == 0 else None

    ours = ask("ls-files", "--error-unmatch", "__init__.py")  # not of a repository around us
    commit = ask("rev-parse", "HEAD") if ours else None
    if commit is None:
        named = os.environ.get("FLUXKONTEXT_COMMIT") or None
        return {"commit": named, "dirty": False if named else None}
    changes = ask("status", "--porcelain")
    return {
        "commit": commit.strip(),
        "dirty": None if changes is None else bool(changes.strip()),
    }


def git_warnings(state: Json) -> list[Json]:
    """A figure of a tree that nobody else has cannot be repeated."""
    if not state["dirty"]:
        return []
    return [warning("dirty_tree", "the working tree has changes that its commit does not hold")]


def _threads() -> int | None:
    """What libraries that ask the environment use; None: they choose."""
    named = os.environ.get("OMP_NUM_THREADS", "")
    return int(named) if named.isdecimal() else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str | None:
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or None


def _ram() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None


def _cudnn(torch: Any) -> str | None:
    found = torch.backends.cudnn.version() if torch and torch.version.cuda else None
    return None if found is None else str(found)


def _gpu(torch: Any, device: str, before: Json | None, after: Json | None) -> Json:
    properties = torch.cuda.get_device_properties(device)
    reader = reader_of(device)
    facts = reader.facts() if reader else {}
    return {
        "driver": facts.get("driver"),
        "gpu": {
            "name": properties.name,
            "uuid_hash": facts.get("uuid_hash"),
            "sm": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "power_limit_w": facts.get("power_limit_w"),
            "before": before,
            "after": after,
        },
    }
