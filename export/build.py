"""From a checkpoint to a bundle with engines, in one command that can be stopped and run again.

Stages: calibrate, quantise, export, golden edit, compile, qualify, install. One that was finished
is not done again: the bundle and each engine appear whole or not at all, and the manifest names
engines only when all of them are there and none has failed the golden edit.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.bundle import Bundle, open_bundle
from ..runtime.contract import CLIP_TOKENS, GRAPHS, Workload
from ..runtime.engines import RTX_TARGETS, Gpu, Recipe, check_shapes, installed
from ..runtime.errors import (
    BackendUnavailableError,
    CorruptedError,
    EngineMismatchError,
    InvalidInputError,
    KontextError,
)
from ..runtime.geometry import Size
from ..runtime.golden import Golden, golden_size, load_golden, record
from ..runtime.loader import require
from ..runtime.schedule import SchedulerConfig
from ..runtime.tokenizer import load_tokenizer
from .engines.compile import LEVEL, PLUGINS, Engine
from .engines.install import compile_all, discard, install
from .pack import pack
from .prepare import Source, bundle_once, wanted_precision, weight_files

Say = Callable[[str], None]
GOLDEN = ("auto", "always", "never")
_GIB = 2**30
_SMALL = 2 * _GIB
"""Weights up to which the golden edit is made unasked: larger ones need minutes, and as much memory
as fp32 weights take."""


@dataclass(frozen=True)
class Order:
    """What to build. out: the bundle, which may be there already. library: of the engines. target:
    ``sm_120``, or None for the GPU in this machine. contexts: fewest and most. golden, weights: see
    :data:`GOLDEN` and ``WEIGHTS`` of the exporter. plugins: our Triton kernels in
    TensorRT's engines. pack: where to put what engines alone need."""

    out: Path
    library: str
    target: str | None
    sizes: tuple[Size, ...]
    contexts: tuple[int, int] = (0, 2)
    batch: int = 1
    static: bool = False
    precision: str = "auto"
    weights: str = "link"
    golden: str = "auto"
    plugins: bool = False
    pack: Path | None = None

    def __post_init__(self) -> None:
        """Raise InvalidInputError for a static engine of several shapes, or plugins for a library
        that takes none."""
        if self.plugins and self.library != "tensorrt":
            raise InvalidInputError(
                f"--plugins: expected --engine tensorrt, found {self.library}, which takes none; "
                "leave --plugins out"
            )
        least, most = self.contexts
        if self.static and (len(set(self.sizes)) != 1 or least != most):
            raise InvalidInputError(
                f"--static: expected one size and one number of contexts, found "
                f"{len(set(self.sizes))} sizes and {least} to {most} contexts; leave --static out"
            )


def build(source: Source | None, order: Order, say: Say) -> dict[str, Any]:
    """Do what ``order`` says and is not done yet; returns the facts of the engines.

    source: None if ``order.out`` is the bundle to compile for. What is missing on this machine is
    said before any work.
    """
    if source is not None:
        precision = wanted_precision(source, order.precision)
    else:
        precision = open_bundle(order.out, engines=False).named_precision("gpu")
        if order.precision not in ("auto", precision):
            raise InvalidInputError(
                f"--precision: expected {precision}, that of {order.out}, found {order.precision}; "
                "build from the checkpoint for another"
            )
    if order.plugins:
        require("triton", "to compile plugins", "torch")
    recipe = recipe_for(order.library, order.target, precision, order.plugins)
    if source is not None:
        size = sum(file.stat().st_size for file in weight_files(source.find()))
        if not order.out.exists() and _wants_golden(order.golden, size):
            _require_for_golden()
        bundle_once(source, order.out, precision, order.weights, say)
    bundle = open_bundle(order.out, engines=False)
    workload = workload_for(bundle, order.sizes, order.contexts, order.batch, order.static)
    golden_once(bundle, workload, order.golden, say)
    engines = compile_all(engines_of(bundle, recipe, workload), workload, say)
    try:
        qualified = qualify_here(engines.alone_in(bundle), say)
    except CorruptedError:
        discard(order.out, engines)
        raise
    install(order.out, engines, qualified)
    if order.pack is not None:
        pack(order.out, order.pack, say)
    return {
        "bundle": str(order.out),
        "engines": engines.name,
        **{key: engines.entry[key] for key in ("library", "version", "target", "precision")},
        "qualified": qualified is not None,
        **({"packed": str(order.pack)} if order.pack is not None else {}),
    }


def qualify_here(bundle: Bundle, say: Say) -> Mapping[str, Any] | None:
    """Run the golden edit with the bundle's engines on this machine's GPU; returns what they
    passed, or None if they do not run here. Raises CorruptedError for engines that are wrong."""
    from ..runtime.doctor import try_engines

    try:
        passed = try_engines(bundle).check()
    except (BackendUnavailableError, EngineMismatchError) as error:
        say(f"qualify: not here ({error}); where it will run: fluxkontext doctor {bundle.root}")
        return None
    say(f"qualify: passed, {json.dumps(passed)}")
    return passed


def recipe_for(library: str, target: str | None, precision: str, plugins: bool = False) -> Recipe:
    """How engines are compiled here. target: ``sm_120``, or None for the GPU in this machine, which
    ``tensorrt`` always builds for. Raises BackendUnavailableError with what is missing."""
    found = installed().get(library)
    if found is None:
        raise BackendUnavailableError(
            f"expected {library} to build engines with, found none; "
            f"install it with: pip install 'fluxkontext[{library}]'"
        )
    gpu = None
    if library == "tensorrt" or target is None:
        gpu = _this_gpu(library)
        if target not in (None, gpu.sm):
            raise BackendUnavailableError(
                f"--target: expected {gpu.sm}, that of the {gpu.name} in this machine, found "
                f"{target}; tensorrt builds for the GPU that it runs on: use one of {target}"
            )
        target = gpu.sm
    if library == "tensorrt-rtx" and target not in RTX_TARGETS:
        raise InvalidInputError(
            f"--target: expected one of {', '.join(RTX_TARGETS)}, found {target}; "
            "tensorrt-rtx compiles for no other"
        )
    return Recipe(
        library,
        found.version,
        target,
        gpu if library == "tensorrt" else None,  # tensorrt-rtx times nothing
        precision,
        (
            *("strongly-typed", f"optimization-level={LEVEL}", f"cuda={found.cuda}"),
            *([PLUGINS] if plugins else []),
        ),
    )


def _this_gpu(library: str) -> Gpu:
    hint = "" if library == "tensorrt" else "; or name one that is not here with --target"
    try:
        from ..runtime.cuda import gpus
    except ImportError:
        raise BackendUnavailableError(
            f"expected cuda-bindings to ask for this machine's GPU, found none; "
            f"install it with: pip install 'fluxkontext[{library}]'{hint}"
        ) from None
    try:
        return gpus()[0]
    except KontextError as error:
        raise BackendUnavailableError(
            f"{error}, which {library} builds engines for{hint}"
        ) from None


def workload_for(
    bundle: Bundle, sizes: Sequence[Size], contexts: tuple[int, int], batch: int, static: bool
) -> Workload:
    """The edits that engines are for. sizes: (w, h), cut down to whole tokens as the pipeline does;
    the golden edit's is among them, except in a static engine, which has one size."""
    grid = bundle.grid()
    whole = [
        (w // grid.multiple * grid.multiple, h // grid.multiple * grid.multiple) for w, h in sizes
    ]
    if not all(w and h for w, h in whole):
        raise InvalidInputError(
            f"--size: expected sides of {grid.multiple} pixels or more, found less"
        )
    clip = load_tokenizer(bundle.root / "tokenizer", CLIP_TOKENS).model_max_length
    length = load_tokenizer(bundle.root / "tokenizer_2", 512).model_max_length
    probe = () if static else (golden_size(grid),)
    return Workload((*whole, *probe), contexts, batch, length, static, clip)


def golden_of(root: Path) -> None:
    """Have a golden edit in the bundle ``root``, of one context and the usual size."""
    bundle = open_bundle(root)
    golden_once(bundle, workload_for(bundle, (), (1, 1), 1, False), "always", lambda _: None)


def golden_once(bundle: Bundle, workload: Workload, when: str, say: Say) -> None:
    """Have a golden edit that ``workload`` covers, made by ONNX Runtime on the CPU.

    when: ``always``; ``never``; or ``auto``: only for a model whose weights take up to 2 GiB.
    """
    golden, grid = load_golden(bundle.root), bundle.grid()
    if golden is not None and _covers(bundle, workload, golden):
        return
    weights = sum(entry["size"] for entry in bundle.manifest["files"].values())
    if not _wants_golden(when, weights):
        say("golden edit: none, so no engine can be qualified; make one with --golden always")
        return
    _require_for_golden()
    from ..runtime.backends.onnx import OnnxBackend

    say("golden edit: running it in fp32 on the CPU")
    size = workload.sizes[0] if workload.static else golden_size(grid)
    least, most = workload.contexts
    backend = OnnxBackend(bundle, "cpu", "auto")
    try:
        scheduler = SchedulerConfig(**bundle.manifest["scheduler"])
        batch = workload.batch if workload.static else 1
        record(bundle, backend, scheduler, size, min(max(least, 1), most), batch)
    finally:
        backend.close()


def _wants_golden(when: str, size: int) -> bool:
    """Whether a model of so many bytes is to have a golden edit."""
    return when == "always" or (when == "auto" and size <= _SMALL)


def _require_for_golden() -> None:
    require("onnxruntime", "to make the golden edit", "cpu")


def _covers(bundle: Bundle, workload: Workload, golden: Golden) -> bool:
    try:
        for name, shapes in golden.shapes().items():
            profile = workload.profile(name, bundle.inputs(name), bundle.grid())
            check_shapes(name, profile, shapes)
    except EngineMismatchError:
        return False
    return True


def engines_of(bundle: Bundle, recipe: Recipe, workload: Workload) -> list[Engine]:
    """One engine a component."""
    grid = bundle.grid()
    return [
        Engine(bundle, name, recipe, workload.profile(name, bundle.inputs(name), grid))
        for name in GRAPHS
    ]
