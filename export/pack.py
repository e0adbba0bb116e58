"""Pack a bundle for those who ship engines only: what they run with, and nothing else.

Graphs and weights stay behind, with the configurations of a checkpoint. The licence comes along,
and so do tokenizers and the golden edit: the packed bundle can still be asked to prove itself.
"""

from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..runtime.bundle import ENGINES, MANIFEST, dump_manifest, open_bundle, read_manifest
from ..runtime.errors import CheckpointError, InvalidInputError
from ..runtime.files import whole_folder
from ..runtime.golden import GOLDEN
from .bundle import put


def pack(root: Path, out: Path, say: Callable[[str], None]) -> None:
    """Put what the engines of the bundle ``root`` need into the folder ``out``, by hard links.

    Raises CheckpointError for a bundle without engines, InvalidInputError if ``out`` is there and
    is not this bundle, packed.
    """
    bundle = open_bundle(root)
    manifest = packed(bundle.manifest)
    if not manifest.get("engines"):
        raise CheckpointError(
            f"{root}: expected engines to pack, found none; build them with: fluxkontext build"
        )
    if out.exists():
        if _unqualified(read_manifest(out)) != _unqualified(manifest):
            raise InvalidInputError(
                f"{out}: expected {root}, packed, found another bundle; name another folder, or "
                "remove this one"
            )
        say(f"pack: {out} is there")
        return
    with whole_folder(out) as building:
        for name in manifest["files"]:
            put(root / name, building / name, "link")
        (building / MANIFEST).write_text(dump_manifest(manifest), encoding="utf-8")
    size = sum(entry["size"] for entry in manifest["files"].values())
    say(f"pack: {out}, {size / 2**30:.2f} GiB")


def packed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest without graphs, and without the files that engines do not need."""
    licence = manifest.get("licence") or {"files": []}
    kept = {ENGINES, GOLDEN, *manifest["tokenizers"].values(), *licence["files"]}
    components = {
        name: {**component, "graphs": {}} for name, component in manifest["components"].items()
    }
    files = {
        name: entry
        for name, entry in manifest["files"].items()
        if PurePosixPath(name).parts[0] in kept
    }
    return {**manifest, "components": components, "files": files}


def _unqualified(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """All but what the engines have passed since."""
    sets = {name: {**it, "qualified": {}} for name, it in manifest.get("engines", {}).items()}
    return {key: value for key, value in manifest.items() if key != "checksum"} | {"engines": sets}
