"""Compile one engine of a bundle, unless it is there: locked, resumable, never half-written.

A finished engine lies in ``engines/SET/COMPONENT-KEY.engine``, beside it its log, and a note of its
size and digest, by which another run or process knows that it is whole.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...runtime.bundle import ENGINES, Bundle, digest, file_entry
from ...runtime.contract import Profile
from ...runtime.engines import LIBRARIES, Recipe, engine_key
from ...runtime.errors import KontextError
from ...runtime.files import locked, whole_file
from ..hardware_types import check_types
from .blame import blamed
from .weights import weight_files

PLUGINS = "plugins"
"""The flag of a recipe whose engines have our kernels in them."""
LEVEL = 3
"""Of optimisation: the libraries' own default."""
_SHORT = 2048
"""Tokens up to which the transformer's attention, FP8 or not, may be taken apart where no fused
kernel covers it (TensorRT-RTX 1.7 has none for one edit with one head at 1024 tokens, and has one
at 8704). Beyond, it would hold a matrix of all tokens by all tokens, so the build fails instead.
The VAE's, with one head of 512, always may."""
_COMPILER = Path(__file__).with_name("compiler.py")


@dataclass(frozen=True)
class Engine:
    """One engine to compile: of a component, by a recipe, for a range of shapes."""

    bundle: Bundle
    component: str
    recipe: Recipe
    profile: Profile

    @cached_property
    def plugin(self) -> dict[str, Any] | None:
        """The kernel that takes the place of some nodes; None if none does."""
        if PLUGINS not in self.recipe.flags:
            return None
        from .plugin_kernel import plugin_for  # needs Triton, which else is not

        precision = self.bundle.precision("gpu")
        return plugin_for(self.bundle.graph(self.component, "gpu"), precision, self.recipe.target)

    @cached_property
    def key(self) -> str:
        """What the engine depends on, as one digest."""
        files = self.bundle.manifest["files"]
        path = self.bundle.graph(self.component, "gpu")
        graph = path.relative_to(self.bundle.root).as_posix()
        weights = {name: files[name]["digest"] for name in weight_files(path)}
        code = self.plugin["ptx"] if self.plugin else ""
        return engine_key(self.recipe, files[graph]["digest"], weights, self.profile, code)

    @property
    def file(self) -> Path:
        """Where it lies in the bundle."""
        name = f"{self.component}-{self.key[:16]}.engine"
        return self.bundle.root / ENGINES / self.recipe.set_name / name


def compile_engine(
    engine: Engine, say: Callable[[str], None], step: Callable[[], None]
) -> dict[str, Any]:
    """Make sure that ``engine`` is there; returns its entry of the manifest's ``files``.

    say: is told when another process is waited for. step: is called at every step of the compiler.
    Raises KontextError with the node that the compiler refuses, or what else it says.
    """
    file = engine.file
    file.parent.mkdir(parents=True, exist_ok=True)
    name = f"{engine.component} for {engine.recipe.target}"
    with locked(
        file.with_suffix(".lock"), lambda: say(f"{name}: another process builds it, waiting")
    ):
        found = finished(engine)
        if found is not None:
            return found
        # A name of its own: the compiler of a process that was killed may still be writing.
        partial = file.with_suffix(f".{os.getpid()}.partial")
        try:
            _run(engine, partial, step)
            entry = file_entry(partial)
            with whole_file(file.with_suffix(".json")) as note:
                note.write(json.dumps(entry).encode())
            partial.replace(file)
        finally:
            for left in file.parent.glob(f"{file.stem}.*.partial"):
                left.unlink()
        return entry


def finished(engine: Engine) -> dict[str, Any] | None:
    """The entry of an engine that is there and as its note says."""
    file = engine.file
    try:
        entry = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        return dict(entry) if digest(file) == entry["digest"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _run(engine: Engine, out: Path, step: Callable[[], None]) -> None:
    """Have the compiler write ``out``; it is stopped if anything goes wrong here."""
    recipe, bundle = engine.recipe, engine.bundle
    check_types(bundle.graph(engine.component, "gpu"), recipe.target)
    timed = recipe.gpu is not None
    job = {
        "graph": str(bundle.graph(engine.component, "gpu")),
        "engine": str(out),
        "log": str(engine.file.with_suffix(".log")),
        "profile": engine.profile,
        "target": None if timed else recipe.target,
        "level": LEVEL,
        "decomposable": engine.component != "transformer" or _is_short(engine.profile),
        "plugin": engine.plugin,
        "timing_cache": str(out.with_name(f"timing-{recipe.version}.cache")) if timed else None,
    }
    compiler = subprocess.Popen(
        [sys.executable, "-P", str(_COMPILER), LIBRARIES[recipe.library]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with compiler:
        try:
            assert compiler.stdin is not None
            assert compiler.stdout is not None
            with compiler.stdin:
                json.dump(job, compiler.stdin)
            event: Mapping[str, Any] = {}
            remark = ""
            for line in compiler.stdout:
                if not line.startswith('{"'):  # the library's, or a traceback
                    remark = line.strip() or remark
                    continue
                event = json.loads(line)
                if "step" in event:
                    step()
        except BaseException:
            compiler.kill()
            raise
    _check(engine, event, compiler.returncode, remark)


def _is_short(profile: Profile) -> bool:
    most = 2
    return profile["text"][most][1] + profile["positions"][most][0] <= _SHORT


def _check(engine: Engine, event: Mapping[str, Any], code: int, remark: str) -> None:
    """Raise KontextError unless the compiler ended well."""
    if "done" in event and code == 0:
        return
    graph = engine.bundle.manifest["components"][engine.component]["graphs"]["gpu"]
    where = f"{graph}: expected {engine.recipe.library} {engine.recipe.version} to compile it"
    if "refused" in event:
        found = "; ".join(
            f"node {refused['node'] or '?'} ({refused['operator']}): {refused['message']}"
            for refused in event["refused"][:3]
        )
        raise KontextError(f"{where}, found that it refuses {found}{_advice(found)}")
    found = event.get("failed") or remark or f"that it ended with status {code}"
    node = blamed(engine.bundle.root / graph, found)
    raise KontextError(
        f"{where} for {engine.recipe.target}, found{f' at {node}' if node else ''}: {found:.600}"
        f"{_advice(node or '')}; see {engine.file.with_suffix('.log')}"
    )


def _advice(found: str) -> str:
    """What helps against a compiler that lacks the kernel of FP8 attention."""
    if "(TRT_QuantizedAttention)" not in found:
        return ""
    return "; build it without, with --attention 16bit and another -o"
