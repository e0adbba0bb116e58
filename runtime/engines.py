"""Engines in a bundle: their keys, and which of them may run here.

Neither torch nor an engine library is imported: what fits is decided from the manifest alone. The
manifest's ``engines`` has one entry a library and target, a *set*: an engine of each component.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .contract import GRAPHS, Axis
from .errors import BackendUnavailableError, EngineMismatchError

LIBRARIES: Mapping[str, str] = {
    "tensorrt": "tensorrt_bindings",
    "tensorrt-rtx": "tensorrt_rtx_bindings",
}
"""Engine library -> its Python module; the extra that installs it has the library's name."""
_OPTIONS: Mapping[Axis, str] = {
    "batch": "--batch",
    "context_tokens": "--contexts",
    **dict.fromkeys(("width", "height", "grid_width", "grid_height"), "--size"),
    **dict.fromkeys(("target_tokens", "image_tokens"), "--size"),
}
"""Axis of an input -> what widens it when engines are built; others nothing does."""
_COUNTED: Mapping[Axis, str] = {
    "batch": "edits of one size at once",
    "text_tokens": "tokens a prompt",
}
"""Axis of an input -> what a call passes so many of."""
RTX_TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
"""What TensorRT-RTX 1.7 compiles for without a GPU: the members of its ``ComputeCapability``."""


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name, compute capability as ``sm_89``, multiprocessors, and memory in bytes."""

    name: str
    sm: str
    sm_count: int
    memory: int


@dataclass(frozen=True)
class Recipe:
    """All that makes an engine what it is, besides its graph, weights and profile.

    library, version: of the compiler. target: ``sm_120``. gpu: the one that it was timed on, or
    None when it was compiled without. precision: of the graph. flags: the builder's, in order.
    """

    library: str
    version: str
    target: str
    gpu: Gpu | None
    precision: str
    flags: tuple[str, ...]

    @property
    def set_name(self) -> str:
        """The name of the set in the manifest, and of its folder."""
        place = self.gpu.name if self.gpu else self.target
        return f"{self.library}-{''.join(c if c.isalnum() else '_' for c in place).lower()}"


def engine_key(
    recipe: Recipe,
    graph: str,
    weights: Mapping[str, str],
    profile: Mapping[str, Any],
    code: str = "",
) -> str:
    """SHA-256 in hexadecimal of everything that an engine depends on.

    graph: digest of its bytes. weights: file -> digest. profile: as Workload.profile gives it.
    code: of kernels that are compiled in.
    """
    facts = {"graph": graph, "weights": dict(weights), "profile": profile, **asdict(recipe)}
    facts["code"] = code
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def choose_set(
    manifest: Mapping[str, Any], gpu: Gpu, versions: Mapping[str, str], *, qualified: bool
) -> tuple[str, Mapping[str, Any]]:
    """Name and entry of the set of engines that runs on ``gpu``.

    versions: installed engine library -> its version. qualified: only those that doctor has passed
    on this very GPU. Raises EngineMismatchError with what each set expects and what was found.
    """
    sets: Mapping[str, Mapping[str, Any]] = manifest.get("engines", {})
    reasons = []
    for name, entry in sets.items():
        reason = misfit(entry, gpu, versions)
        if reason is None and qualified and not is_qualified(entry, gpu):
            reason = f"found engines that did not pass on this {gpu.name} yet: run doctor on it"
        if reason is None:
            return name, entry
        reasons.append(f"{name}: {reason}")
    raise EngineMismatchError(
        f"expected engines for {gpu.name} ({gpu.sm}), "
        + ("found " + "; ".join(reasons) if reasons else "found none in the bundle")
        + "; build them with: fluxkontext build"
    )


def misfit(entry: Mapping[str, Any], gpu: Gpu, versions: Mapping[str, str]) -> str | None:
    """Why a set cannot run here, or None. An engine runs with the version that compiled it alone,
    and one that was timed on a GPU on that model of GPU alone."""
    library, version = entry["library"], entry["version"]
    if library not in versions:
        return f"expected {library} {version}, found it not installed"
    if versions[library] != version:
        return f"expected {library} {version}, found {versions[library]}"
    if entry["target"] != gpu.sm:
        return f"expected a GPU of {entry['target']}, found {gpu.name} of {gpu.sm}"
    if entry["gpu"] and entry["gpu"]["name"] != gpu.name:
        return f"expected {entry['gpu']['name']}, found {gpu.name}"
    return None


def is_qualified(entry: Mapping[str, Any], gpu: Gpu) -> bool:
    """Whether the golden edit has passed with these engines on this model of GPU."""
    return gpu.name in entry["qualified"]


def check_shapes(
    name: str, profile: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise EngineMismatchError unless each input of component ``name`` is within its profile."""
    for key, shape in shapes.items():
        least, _, most = profile[key]
        axes = GRAPHS[name][0][key].shape
        if len(shape) != len(axes):
            raise EngineMismatchError(
                f"{name}: expected {key} of {len(axes)} axes, found {_x(shape)}"
            )
        for axis, low, side, high in zip(axes, least, shape, most, strict=True):
            if not low <= side <= high:
                raise EngineMismatchError(
                    f"{name}: expected {key} of {_x(least)} to {_x(most)}, found {_x(shape)}; "
                    f"{_remedy(axis, low, side, high)}"
                )


def _remedy(axis: Axis, low: int, side: int, high: int) -> str:
    """What to do about ``side``, which is not from ``low`` to ``high``."""
    bound = high if low == high else f"at most {high}" if side > high else f"at least {low}"
    counted, option = _COUNTED.get(axis), _OPTIONS.get(axis)
    remedy = f"pass {bound} {counted}" if counted else "use what the engines were built for"
    build = f", or build engines for this with: fluxkontext build {option}" if option else ""
    return remedy + build


def _x(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"


def gpu_at(device: str) -> tuple[int, Gpu]:
    """The number of a device, and the GPU; ``auto`` and ``cuda`` are the first.

    Raises BackendUnavailableError for anything else than ``cuda:N``, or where there is none.
    """
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cuda") or not (number.isdecimal() or device in ("auto", "cuda")):
        raise BackendUnavailableError(
            f"device: expected auto, cuda or cuda:N for engines, found {device}"
        )
    from .cuda import gpus

    found, index = gpus(), int(number or 0)
    if index >= len(found):
        raise BackendUnavailableError(
            f"device: expected one of cuda:0 to cuda:{len(found) - 1}, found {device}"
        )
    return index, found[index]


def why_not_here(manifest: Mapping[str, Any], device: str, precision: str) -> str | None:
    """Why no qualified engine of a bundle runs on ``device`` of this machine in ``precision``
    (``auto`` is its own); None if one does."""
    if not manifest.get("engines"):
        return "the bundle has no engines"
    try:
        _, gpu = gpu_at(device)
        versions = {library: it.version for library, it in installed().items()}
        _, entry = choose_set(manifest, gpu, versions, qualified=True)
    except ImportError:
        return "cuda-bindings is not installed"
    except (BackendUnavailableError, EngineMismatchError) as error:
        return str(error)
    if precision not in ("auto", entry["precision"]):
        return f"its engines are of precision {entry['precision']}, asked for is {precision}"
    return None


@dataclass(frozen=True)
class Installed:
    """An engine library that is installed: its version, and the CUDA that it is made for."""

    version: str
    cuda: int


def installed() -> dict[str, Installed]:
    """Engine library -> what of it is installed, from the metadata of its wheels."""
    found = {}
    for library, module in LIBRARIES.items():
        for cuda in (13, 12):
            try:
                name = module.replace("_bindings", f"_cu{cuda}_bindings")
                found[library] = Installed(version(name), cuda)
                break
            except PackageNotFoundError:
                continue
    return found
