"""Install engines in a bundle: compile what is missing, then name all of them in its manifest."""

import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...runtime.bundle import update_manifest
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


def compile_all(
    engines: list[Engine], workload: Workload, say: Callable[[str], None]
) -> dict[str, Any]:
    """Compile what is not there yet and install the set; returns its entry of the manifest."""
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
        "qualified": False,
    }
    _install(root, recipe.set_name, entry, files)
    return entry


def _install(
    root: Path, name: str, entry: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]
) -> None:
    """Name the set in the manifest, then drop what an older set of this name had."""
    old: set[str] = set()

    def change(manifest: dict[str, Any]) -> None:
        sets, known = manifest.setdefault("engines", {}), manifest["files"]
        before = sets.get(name)
        same = all(known.get(file) == facts for file, facts in files.items())
        if before and same and _plain({**before, "qualified": False}) == _plain(entry):
            return  # and what these engines have passed still holds
        if before:
            old.update(part["file"] for part in before["components"].values())
        old.difference_update(files)
        for file in old:
            known.pop(file, None)
        known.update(files)
        sets[name] = dict(entry)

    update_manifest(root, change)
    for file in old:
        for suffix in (".engine", ".json", ".log"):
            (root / file).with_suffix(suffix).unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """Tuples as the lists that JSON makes of them."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
