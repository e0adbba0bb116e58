"""A bundle: a checkpoint's folder with graphs beside its weights, and a manifest of every file.

Exported from a diffusers folder, it still is one. What the manifest names is verified: small files
on every load, large ones once per change.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .arguments import shown
from .contract import TensorSpec
from .errors import CheckpointError, CorruptedError, KontextError
from .files import cache_folder, locked, whole_file
from .geometry import Grid
from .recipes import RECIPES

MANIFEST = "manifest.json"
ENGINES = "engines"
"""The folder of engines, one folder a set."""
SCHEMA_VERSION = 1
VERIFY = ("once", "always", "never")
_CHUNK = 2**26
"""Bytes hashed at once; a file's digest is that of its chunks', so that threads share the work."""
_LARGE = _CHUNK
"""Larger files are verified once per change rather than on every load."""
_CHECKSUM = "checksum"
_KEY = re.compile(r"[0-9a-f]{64}")
_SET = re.compile(r"\w[\w.-]*")
"""Of engines: a key, and a set's name."""


@dataclass(frozen=True)
class Bundle:
    """A verified bundle."""

    root: Path
    manifest: Mapping[str, Any]

    def graph(self, name: str, flavour: str) -> Path:
        """The graph of a component for ``cpu`` or ``gpu``."""
        try:
            return self.root / str(self.manifest["components"][name]["graphs"][flavour])
        except KeyError:
            if self.packed:
                raise CheckpointError(
                    f"{self.root}: expected graphs, found a bundle packed with engines alone; "
                    "use the one that it was packed from"
                ) from None
            raise CheckpointError(
                f"{self.root}: expected a {flavour} graph of {name}, found none in its manifest; "
                "export the checkpoint anew"
            ) from None

    @property
    def packed(self) -> bool:
        """Whether it has engines alone: no graph, no weights."""
        return is_packed(self.manifest)

    def precision(self, flavour: str) -> str:
        """In what the graphs of a flavour compute."""
        try:
            return str(self.manifest["precision"][flavour])
        except KeyError:
            raise CheckpointError(
                f"{self.root}: expected {flavour} graphs, found none, as {self.recipe} has none "
                "for engines and providers, which take no scale that depends on the input; "
                "quantise with --recipe fp8-static, or use --device cpu or --backend native"
            ) from None

    def named_precision(self, flavour: str) -> str:
        """What a user calls it: how the weights are stored, or what the graphs compute in."""
        computed = self.precision(flavour)
        return RECIPES[self.recipe].precision if self.recipe else computed

    @property
    def recipe(self) -> str | None:
        """How the weights are quantised (:mod:`.recipes`); None if they are not."""
        recipe = self.manifest.get("recipe")
        return None if recipe is None else str(recipe)

    def grid(self) -> Grid:
        """The sizes that the model works in."""
        vae = self.manifest["vae"]
        return Grid(2 ** len(vae["block_out_channels"]), vae["sample_size"])

    def inputs(self, name: str) -> dict[str, TensorSpec]:
        """The inputs of a component's graphs, with the axes that the model fixes as numbers."""
        inputs = self.manifest["components"][name]["inputs"]
        return {
            key: TensorSpec(spec["dtype"], tuple(spec["shape"])) for key, spec in inputs.items()
        }

    @property
    def text_features(self) -> tuple[int, int]:
        """Of a prompt: of its pooled vector, and of each of its tokens."""
        pooled = self.inputs("modulation")["pooled"].shape[-1]
        return int(pooled), int(self.inputs("transformer")["text"].shape[-1])

    def weight_bytes(self, name: str) -> int:
        """How much of the files a component's graph refers to."""
        return int(self.manifest["components"][name]["weight_bytes"])


def open_bundle(root: Path, verify: str = "once", engines: bool = True) -> Bundle:
    """Read the manifest of ``root`` and verify what it names.

    verify: ``once`` (large files once per change), ``always``, or ``never`` (sizes only). engines:
    verify these too; False is for who builds them anew. Raises CorruptedError for a file that
    differs, CheckpointError for one that is missing or a manifest that this version cannot read.
    """
    manifest = read_manifest(root)
    known = _Stamps.load()
    for name, entry in manifest["files"].items():
        path = root / name
        if not engines and PurePosixPath(name).parts[0] == ENGINES:
            continue
        try:
            state = path.stat()
        except FileNotFoundError:
            raise CheckpointError(
                f"{path}: expected this file of the bundle, found none; copy the bundle again"
            ) from None
        if state.st_size != entry["size"]:
            raise CorruptedError(
                f"{path}: expected {entry['size']} bytes, found {state.st_size}; "
                "copy or export the bundle again"
            )
        if verify == "never":
            continue
        large = state.st_size > _LARGE
        if verify == "once" and large and known.has(path, state, entry["digest"]):
            continue
        if (found := digest(path)) != entry["digest"]:
            raise CorruptedError(
                f"{path}: expected digest {entry['digest'][:16]}..., found {found[:16]}...; the "
                "file was damaged or changed: copy or export the bundle again"
            )
        if large:
            known.add(path, state, found)
    known.save()
    return Bundle(root, manifest)


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest, checked against its own checksum; all that it names is inside the bundle."""
    path = root / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
        version = manifest["schema_version"]
    except OSError as error:
        raise CheckpointError(f"{path}: expected a manifest, found: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise CorruptedError(
            f"{path}: expected a manifest, found something else; export the bundle again"
        ) from None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{path}: expected a schema up to version {SCHEMA_VERSION}, found {version}; "
            "upgrade fluxkontext"
        )
    if text != dump_manifest(manifest):
        raise CorruptedError(
            f"{path}: expected what its checksum says, found a changed file; "
            "copy or export the bundle again"
        )
    sets = manifest.get("engines", {}).values()
    if not all(isinstance(entry.get("qualified", {}), dict) for entry in sets):
        raise CheckpointError(
            f"{path}: expected the GPUs that engines have passed on, found a bundle of an older "
            "version; build it again, in another folder"
        )
    if (stray := next(_strays(manifest), None)) is not None:
        raise CorruptedError(
            f"{path}: expected names inside the bundle, of files that it lists, found "
            f"{shown(stray)}; do not use it"
        )
    return dict(manifest)


def is_packed(manifest: Mapping[str, Any]) -> bool:
    """Whether a bundle has no graphs, as ``fluxkontext build --pack`` leaves them out."""
    return not any(part["graphs"] for part in manifest["components"].values())


def dump_manifest(manifest: Mapping[str, Any]) -> str:
    """The text of a manifest, with its checksum."""
    bare = {key: value for key, value in manifest.items() if key != _CHECKSUM}
    checksum = hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()
    return json.dumps({**bare, _CHECKSUM: checksum}, indent=2, sort_keys=True) + "\n"


def update_manifest(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Apply ``change`` to the manifest of ``root``: read and written whole, under a lock.

    Raises KontextError if the folder cannot be written.
    """
    try:
        with locked(root / ".manifest.lock", lambda: None):
            manifest = read_manifest(root)
            change(manifest)
            with whole_file(root / MANIFEST) as file:
                file.write(dump_manifest(manifest).encode())
    except OSError as error:
        raise KontextError(
            f"{root}: expected a bundle whose manifest can be written, found: {error.strerror}; "
            "copy it to a folder of your own, or ask its owner to run this"
        ) from None


def file_entry(path: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"size": path.stat().st_size, "digest": digest(path)}


def digest(path: Path) -> str:
    """SHA-256 over the SHA-256 of each 64 MiB of a file, in hexadecimal."""
    size = path.stat().st_size
    with path.open("rb") as file, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:

        def part(start: int) -> bytes:
            return hashlib.sha256(os.pread(file.fileno(), _CHUNK, start)).digest()

        parts = pool.map(part, range(0, max(size, 1), _CHUNK))
        return hashlib.sha256(b"".join(parts)).hexdigest()


def _strays(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Names that lead out of the bundle, or to what it does not say how to verify."""
    files = manifest["files"]
    for name in files:
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts or "\\" in name:
            yield name
    for component in manifest["components"].values():
        yield from set(component["graphs"].values()) - set(files)
    for name, entry in manifest.get("engines", {}).items():
        parts = entry["components"].values()
        yield from {part["file"] for part in parts} - set(files)
        # The cache of compiled kernels is written below a folder and under a file of these names.
        yield from (key for key in (part["key"] for part in parts) if not _KEY.fullmatch(key))
        if not _SET.fullmatch(name):
            yield name


class _Stamps:
    """Which large files have been verified, by path, size, time and inode; kept in the cache."""

    def __init__(self, file: Path, entries: dict[str, list[Any]]) -> None:
        self.file = file
        self.entries = entries
        self.changed = False

    @classmethod
    def load(cls) -> "_Stamps":
        file = cache_folder() / "verified.json"
        try:
            entries = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            entries = {}
        return cls(file, entries if isinstance(entries, dict) else {})

    def has(self, path: Path, state: os.stat_result, expected: str) -> bool:
        return self.entries.get(str(path.resolve())) == _stamp(state, expected)

    def add(self, path: Path, state: os.stat_result, found: str) -> None:
        self.entries[str(path.resolve())] = _stamp(state, found)
        self.changed = True

    def save(self) -> None:
        if not self.changed:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.file) as file:
                file.write(json.dumps(self.entries).encode())
        except OSError:  # a home that cannot be written: verify again next time
            return


def _stamp(state: os.stat_result, digest: str) -> list[Any]:
    return [state.st_size, state.st_mtime_ns, state.st_ino, digest]
