"""What this machine can run, and why not the rest."""

import platform
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .about import VERSION
from .bundle import Bundle, open_bundle, update_manifest
from .engines import installed
from .errors import (
    BackendUnavailableError,
    CorruptedError,
    EngineMismatchError,
    KontextError,
    OutOfMemoryError,
)
from .golden import Outcome, load_golden, replay
from .loader import load, open_backend

CORE = ("numpy", "pillow", "safetensors", "tokenizers", "tqdm")
OPTIONAL = ("onnxruntime", "onnxruntime-gpu", "torch", "triton", "cuda-bindings")


def diagnose(bundle: Path | None = None, device: str = "auto") -> dict[str, Any]:
    """Facts about this machine, as JSON: software, devices, and each backend with its reason.

    bundle: verified whole, large files too, and its golden edit replayed on ``device`` by the
    backend that this machine would choose. Engines that fit this GPU and reproduce it are qualified
    for its model from then on. Raises CorruptedError or CheckpointError for a bad bundle, and
    KontextError for one that cannot be written where engines have passed.
    """
    facts = {
        "fluxkontext": VERSION,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in (*CORE, *OPTIONAL)},
        "backends": {"onnx": _onnx(), "native": _native(), "tensorrt": _tensorrt()},
    }
    if bundle is not None:
        facts["bundle"] = _bundle(bundle, device)
    return facts


def _bundle(root: Path, device: str) -> dict[str, Any]:
    """Verify and replay a bundle."""
    bundle = open_bundle(root, "always")
    facts: dict[str, Any] = {"path": str(root), "files verified": len(bundle.manifest["files"])}
    golden = load_golden(root)
    if golden is None:
        return {**facts, "golden edit": "none in the bundle"}
    if bundle.manifest.get("engines"):
        try:
            facts["engines"] = qualify(root, device)
        except (BackendUnavailableError, EngineMismatchError, OutOfMemoryError) as error:
            facts["engines"] = f"none that runs here: {error}"
            if bundle.packed:
                return facts
        else:
            return facts
    try:
        loaded = load(root, {}, "auto", "auto", device, "never")
        try:
            outcome = replay(loaded.backend, golden)
        finally:
            loaded.backend.close()
    except (BackendUnavailableError, OutOfMemoryError) as error:
        return {**facts, "golden edit": f"not replayed: {error}"}
    where = f"{root} on the {loaded.backend.name} backend"
    outcome.check(loaded.backend.precision, where)
    about = {"backend": loaded.backend.name, "precision": loaded.backend.precision}
    return {**facts, "golden edit": {**about, **outcome.facts()}}


def qualify(root: Path, device: str) -> dict[str, Any]:
    """Replay the golden edit with the engines that fit the GPU, and write down, unless it is there,
    that they passed on its model; returns what was measured.

    Raises CorruptedError for engines that are wrong, which are then not qualified on it, and
    BackendUnavailableError, EngineMismatchError or OutOfMemoryError if none runs here.
    """
    bundle = open_bundle(root)
    trial = try_engines(bundle, device)
    try:
        passed = trial.check()
    except CorruptedError:
        with suppress(KontextError):  # that it cannot be written: what is wrong says more
            update_manifest(root, lambda it: trial.qualified(it).pop(trial.gpu, None))
        raise
    if trial.gpu not in trial.qualified(bundle.manifest):
        update_manifest(root, lambda it: trial.qualified(it).update(passed))
    return {trial.engines: passed}


@dataclass(frozen=True)
class Trial:
    """The golden edit as a set of engines made it on a GPU."""

    root: Path
    engines: str
    gpu: str
    precision: str
    outcome: Outcome

    def check(self) -> dict[str, Any]:
        """What the manifest says of engines that passed, by GPU. Raises CorruptedError for
        others."""
        self.outcome.check(self.precision, f"{self.root}: {self.engines} on {self.gpu}")
        return {self.gpu: self.outcome.facts()}

    def qualified(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Where the manifest says so."""
        found: dict[str, Any] = manifest["engines"][self.engines]["qualified"]
        return found


def try_engines(bundle: Bundle, device: str = "auto") -> Trial:
    """Replay the golden edit with the first engines of ``bundle`` that fit the GPU.

    Raises BackendUnavailableError, EngineMismatchError or OutOfMemoryError if none runs here.
    """
    golden = load_golden(bundle.root)
    if golden is None:
        raise BackendUnavailableError(
            f"{bundle.root}: expected a golden edit to qualify engines with, found none; "
            "make one with: fluxkontext build --golden always"
        )
    backend = open_backend("tensorrt", bundle, device, "auto", qualified=False)
    try:
        replay(backend, golden)  # the first run compiles and records
        outcome = replay(backend, golden)
    finally:
        backend.close()
    about = backend.details
    return Trial(bundle.root, about["engines"], about["gpu"], backend.precision, outcome)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _tensorrt() -> dict[str, Any]:
    """The engine libraries that are installed, and the GPU that they would run on."""
    found = {library: it.version for library, it in installed().items()}
    if not found:
        return {
            "available": False,
            "reason": "no engine library is installed: pip install 'fluxkontext[tensorrt]' or "
            "'fluxkontext[tensorrt-rtx]'",
        }
    try:
        from .cuda import gpus

        devices = [asdict(gpu) for gpu in gpus()]
    except ImportError:
        reason = "cuda-bindings is not installed: pip install cuda-bindings"
    except BackendUnavailableError as error:
        reason = str(error)
    else:
        reason = "runs engines that were built for this GPU"
        return {"available": True, "reason": reason, "libraries": found, "devices": devices}
    return {"available": False, "reason": reason, "libraries": found}


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
    devices: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "precisions": ["fp32", "bf16", "fp16"],
            "kernels (fp32)": _kernels(torch, "cpu", torch.float32),
        }
    ]
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
        f"kernels ({'bf16' if bf16 else 'fp16'})": _kernels(
            torch, f"cuda:{index}", torch.bfloat16 if bf16 else torch.float16
        ),
    }


def _kernels(torch: Any, device: str, dtype: Any) -> Any:
    """How each implementation of the fused ops fares at FLUX's sizes: ``passes``, or why not."""
    try:
        from ..kernels.proof import trials
    except ImportError as error:
        return f"kernels do not import: {error}"
    try:
        return trials(torch.device(device), dtype, 128, 3072)
    except RuntimeError as error:  # the GPU is taken, or has too little memory left
        return f"not tried: {str(error).splitlines()[0]}"
