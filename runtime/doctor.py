"""What this machine can run, and why not the rest."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .about import VERSION
from .bundle import open_bundle

CORE = ("numpy", "pillow", "safetensors", "tokenizers", "tqdm")
OPTIONAL = ("onnxruntime", "onnxruntime-gpu", "torch", "triton")


def diagnose(bundle: Path | None = None) -> dict[str, Any]:
    """Facts about this machine, as JSON: software, devices, and each backend with its reason.

    bundle: verified whole, large files too. Raises CorruptedError or CheckpointError for a bad one.
    """
    facts = {
        "fluxkontext": VERSION,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in (*CORE, *OPTIONAL)},
        "backends": {"onnx": _onnx(), "native": _native()},
    }
    if bundle is not None:
        files = open_bundle(bundle, "always").manifest["files"]
        facts["bundle"] = {"path": str(bundle), "files verified": len(files)}
    return facts


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _onnx() -> dict[str, Any]:
    """The ONNX Runtime backend. Its two wheels hold the same module and overwrite each other."""
    cpu, gpu = _version("onnxruntime"), _version("onnxruntime-gpu")
    if cpu and gpu:
        return {
            "available": False,
            "reason": "onnxruntime and onnxruntime-gpu overwrite each other: uninstall both, then "
            "install one",
        }
    if not (cpu or gpu):
        return {
            "available": False,
            "reason": "onnxruntime is not installed: pip install 'fluxkontext[cpu]'",
        }
    try:
        import onnxruntime
    except (ImportError, OSError) as error:
        return {"available": False, "reason": f"onnxruntime does not import: {error}"}
    providers = onnxruntime.get_available_providers()
    return {"available": True, "reason": "runs bundles", "providers": providers}


def _native() -> dict[str, Any]:
    """The torch backend: does it import, and on which devices does it run."""
    if _version("torch") is None:
        return {
            "available": False,
            "reason": "torch is not installed: pip install 'fluxkontext[torch]'",
        }
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"available": False, "reason": f"torch does not import: {error}"}
    devices: list[dict[str, Any]] = [{"device": "cpu", "precisions": ["fp32", "bf16", "fp16"]}]
    for index in range(torch.cuda.device_count()):
        devices.append(_cuda(torch, index))
    reason = (
        "runs on CPU and GPU"
        if len(devices) > 1
        else f"runs on the CPU; no GPU: torch {torch.__version__} "
        + ("was built without CUDA" if torch.version.cuda is None else "finds no CUDA device")
    )
    return {"available": True, "reason": reason, "devices": devices}


def _cuda(torch: Any, index: int) -> dict[str, Any]:
    try:
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:  # there, but broken or taken
        return {"device": f"cuda:{index}", "problem": str(error).splitlines()[0]}
    bf16 = properties.major >= 8
    return {
        "device": f"cuda:{index}",
        "name": properties.name,
        "sm": f"{properties.major}.{properties.minor}",
        "memory_gib": round(total / 2**30, 1),
        "free_gib": round(free / 2**30, 1),
        "precisions": ["fp32", *(["bf16"] if bf16 else []), "fp16"],
    }
