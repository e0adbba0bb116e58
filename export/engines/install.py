"""Engines of a bundle: compile what is missing, then name all of them in its manifest, or none."""

import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...runtime.bundle import Bundle, update_manifest
from ...runtime.contract import Workload
from ...runtime.errors import KontextError
from .compile import Engine, compile_engine, finished
from .weights import engine_bytes

_GIB = 2**30


@dataclass(frozen=True)
class Need:
    """What compiling takes, in bytes: on disk for the engines that are not there yet, and memory
    for the largest of them. Memory is an estimate: the weights as read, and again as packed."""

    disk: int
    memory: int


def need(engines: list[Engine]) -> Need:
    """What compiling ``engines`` takes; those that are finished take nothing."""
    sizes = [
        engine_bytes(engine.bundle.graph(engine.component, "gpu"), engine.recipe.precision)
        for engine in engines
        if finished(engine) is None
    ]
    return Need(disk=sum(sizes), memory=2 * max(sizes, default=0))


@dataclass(frozen=True)
class EngineSet:
    """Compiled engines, all of a bundle. name, entry: in the manifest's ``engines``. files: their
    entries in its ``files``."""

    name: str
    entry: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]

    def alone_in(self, bundle: Bundle) -> Bundle:
        """``bundle`` as it would be with these engines and no others."""
        files = {**bundle.manifest["files"], **self.files}
        manifest = {**bundle.manifest, "engines": {self.name: self.entry}, "files": files}
        return replace(bundle, manifest=manifest)


def compile_all(engines: list[Engine], workload: Workload, say: Callable[[str], None]) -> EngineSet:
    """Compile what is not there yet; the manifest does not change."""
    root, recipe = engines[0].bundle.root, engines[0].recipe
    needed = need(engines)
    free = shutil.disk_usage(root).free
    say(
        f"compile: needs about {needed.disk / _GIB:.2f} GiB on disk and "
        f"{needed.memory / _GIB:.2f} GiB of memory"
    )
    if needed.disk > free:
        raise KontextError(
            f"{root}: expected {needed.disk / _GIB:.1f} GiB free for engines, found "
            f"{free / _GIB:.1f} GiB; make room, or build elsewhere"
        )
    files = {}
    for engine in engines:
        with tqdm(desc=engine.component, unit="step", disable=not sys.stderr.isatty()) as bar:
            files[engine.file.relative_to(root).as_posix()] = compile_engine(
                engine,
                say,
                lambda bar=bar: bar.update(),  # type: ignore[misc]
            )
    entry = {
        **{key: value for key, value in asdict(recipe).items() if key != "flags"},
        "flags": list(recipe.flags),
        "workload": asdict(workload),
        "components": {
            engine.component: {"file": name, "key": engine.key, "profile": engine.profile}
            for engine, name in zip(engines, files, strict=True)
        },
        "qualified": {},
    }
    return EngineSet(recipe.set_name, entry, files)


def install(root: Path, engines: EngineSet, qualified: Mapping[str, Any] | None) -> None:
    """Name engines in the manifest, then drop what an older set of this name had.

    qualified: what they passed, by GPU; None if they do not run here.
    """
    old: set[str] = set()

    def change(manifest: dict[str, Any]) -> None:
        sets, known = manifest.setdefault("engines", {}), manifest["files"]
        before = sets.get(engines.name)
        same = before and all(known.get(file) == it for file, it in engines.files.items())
        same = same and _plain({**before, "qualified": {}}) == _plain(engines.entry)
        # What the same engines have passed elsewhere still holds.
        passed = {**(before["qualified"] if same else {}), **(qualified or {})}
        if before:
            old.update(part["file"] for part in before["components"].values())
        old.difference_update(engines.files)
        for file in old:
            known.pop(file, None)
        known.update(engines.files)
        sets[engines.name] = {**engines.entry, "qualified": passed}

    update_manifest(root, change)
    _remove(root, old)


def discard(root: Path, engines: EngineSet) -> None:
    """Take away engines that are wrong; their logs stay, and so does what another set has of them.

    One of the same name stays installed, unless it is this one.
    """
    wrong = set(engines.files)

    def change(manifest: dict[str, Any]) -> None:
        sets = manifest.get("engines", {})
        before = sets.get(engines.name, {"components": {}})
        named = {part["file"] for part in before["components"].values()}
        if not named <= wrong:
            wrong.difference_update(named)
            return
        sets.pop(engines.name, None)
        for file in named:
            manifest["files"].pop(file, None)

    update_manifest(root, change)
    _remove(root, wrong, log=False)


def _remove(root: Path, files: Iterable[str], log: bool = True) -> None:
    for file in files:
        for suffix in (".engine", ".json", *([".log"] if log else [])):
            (root / file).with_suffix(suffix).unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """Tuples as the lists that JSON makes of them."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
