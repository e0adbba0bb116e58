"""Write a bundle: graphs, the weights that they refer to, tokenizers, and a manifest of it all.

The folder is built under another name and takes its own only when it is whole.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

import onnx
import onnx_ir as ir
import torch
from tqdm import tqdm

from ..runtime.about import VERSION
from ..runtime.bundle import MANIFEST, SCHEMA_VERSION, digest, dump_manifest
from ..runtime.checkpoint import Checkpoint, Component
from ..runtime.errors import InvalidInputError, KontextError
from ..runtime.files import whole_folder
from ..runtime.schedule import sigmas_for
from .calibration import Calibration
from .components import Graph, graphs
from .functions import graph_ops
from .licence import licence_files, licence_of
from .model_folder import indices_of
from .onnx_graph import export_graph
from .quantised_graph import check_exportable
from .weights import Places

WEIGHTS = ("link", "copy")
CPU_ONLY = frozenset({"fp8-dynamic"})
"""Recipes without graphs for GPUs: TensorRT takes no FP8 scale that depends on the input. The
native backend runs it there; a calibrated one is for engines."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
_FOLDER_FILES = ("model_index.json", "scheduler/scheduler_config.json")


def write_bundle(
    checkpoint: Checkpoint,
    out: Path,
    precision: str = "bf16",
    weights: str = "link",
    progress: bool = False,
    calibration: Calibration | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Export ``checkpoint`` to the folder ``out``, which must not exist; no weight is read.

    precision: of the graphs for GPUs, ``fp32``, ``bf16`` or ``fp16`` (what leaves fp16's range, as
    T5's last matrices and a VAE with ``force_upcast`` do, in fp32); those for CPUs compute in fp32.
    Quantised weights stay as they are stored, and their products as the recipe says.
    weights: ``link`` (hard links; copies where the file system has none) or ``copy``.
    calibration: with it, attention of an ``fp8-static`` checkpoint is in FP8 on GPUs, too.
    extra: for the manifest.
    """
    if out.exists():  # before any work
        raise _there(out)
    networks = _networks(checkpoint)
    for part, network in networks.items():
        check_exportable(part, network.weights)
    recipe = checkpoint.transformer.weights.recipe
    if calibration is not None and recipe != "fp8-static":
        raise InvalidInputError(
            f"calibration: expected a checkpoint in fp8-static, whose attention it is for, found "
            f"{recipe or 'one that is not quantised'}; leave it out"
        )
    with _new_folder(out) as building:
        places = _places(networks)
        for source, place in places.items():  # the checker wants files, and refuses links
            _placeholder(source, building / place)
        precisions = {"cpu": "fp32", "gpu": precision}
        if recipe in CPU_ONLY:
            del precisions["gpu"]
        described: dict[str, dict[str, Any]] = {}
        with tqdm(total=6 * len(precisions), desc="graphs", disable=not progress) as bar:
            for flavour, kind in precisions.items():
                for graph in graphs(checkpoint, PRECISIONS[kind], graph_ops()):
                    entry = described.setdefault(graph.name, _describe(graph))
                    entry["graphs"][flavour] = _write_graph(
                        graph, flavour, building, places, calibration
                    )
                    bar.update()
        for source, place in places.items():
            put(source, building / place, weights)
        _copy_small_files(checkpoint, networks, building)
        manifest = _manifest(checkpoint, described, precisions) | dict(extra or {})
        manifest["attention"] = None if calibration is None else calibration.digest
        manifest["files"] = _files(building, progress)
        (building / MANIFEST).write_text(dump_manifest(manifest), encoding="utf-8")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """:func:`whole_folder`, for users."""
    try:
        with whole_folder(out) as building:
            yield building
    except FileExistsError:
        raise _there(out) from None


def _there(out: Path) -> InvalidInputError:
    return InvalidInputError(f"{out}: expected a folder that does not exist, found one")


def _networks(checkpoint: Checkpoint) -> dict[str, Component[Any]]:
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2")
    return {part: getattr(checkpoint, part) for part in parts}


def _places(networks: Mapping[str, Component[Any]]) -> dict[Path, PurePosixPath]:
    """Where in the bundle each weights file goes; one with several networks goes in once."""
    places: dict[Path, PurePosixPath] = {}
    for part, network in networks.items():
        for tensor in network.weights.tensors.values():
            places.setdefault(tensor.file, PurePosixPath(part, tensor.file.name))
    return places


def _placeholder(source: Path, place: Path) -> None:
    """An empty file of the same size, which takes no space."""
    place.parent.mkdir(exist_ok=True)
    with place.open("wb") as file:
        file.truncate(source.stat().st_size)


def put(source: Path, place: Path, weights: str) -> None:
    """Put a file in its place, linked or copied; of a link in a cache, what it points to."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    real = source.resolve()
    if weights == "link":
        try:
            place.hardlink_to(real)
            return
        except OSError:  # another file system: copy
            pass
    shutil.copyfile(real, place)


def _write_graph(
    graph: Graph, flavour: str, folder: Path, places: Places, calibration: Calibration | None
) -> str:
    """Export one graph, check it, and return its file name."""
    attention = calibration if (graph.name, flavour) == ("transformer", "gpu") else None
    model = export_graph(graph, flavour, places, attention)
    name = f"{graph.name}.{flavour}.onnx"
    ir.save(model, folder / name)
    try:
        onnx.checker.check_model(str(folder / name), full_check=True)
    except onnx.checker.ValidationError as error:
        raise KontextError(f"{name}: expected a valid graph, found: {error}") from None
    return name


def _describe(graph: Graph) -> dict[str, Any]:
    """Inputs, outputs and weight bytes of a component, for the manifest."""
    files = {tensor.file for tensor in graph.component.weights.tensors.values()}
    return {
        "graphs": {},
        "inputs": {name: asdict(spec) for name, spec in graph.inputs.items()},
        "outputs": {name: asdict(spec) for name, spec in graph.outputs.items()},
        "weight_bytes": sum(file.stat().st_size for file in files),
    }


def _copy_small_files(
    checkpoint: Checkpoint, networks: Mapping[str, Component[Any]], folder: Path
) -> None:
    """Tokenizers, and what makes the bundle of a diffusers folder a diffusers folder again."""
    for name in ("tokenizer", "tokenizer_2"):
        source = getattr(checkpoint, name)
        _copy((source / file for file in _TOKENIZER_FILES), folder / name)
    for part, network in networks.items():
        file = next(iter(network.weights.tensors.values())).file
        _copy([file.with_name("config.json"), *indices_of(network)], folder / part)
    _copy(licence_files(checkpoint), folder)
    root = checkpoint.tokenizer.parent
    for name in _FOLDER_FILES:
        _copy([root / name], (folder / name).parent)


def _copy(files: Iterable[Path], folder: Path) -> None:
    for file in files:
        if file.is_file():
            folder.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / file.name)


def _manifest(
    checkpoint: Checkpoint, described: Mapping[str, Any], precisions: Mapping[str, str]
) -> dict[str, Any]:
    config = checkpoint.scheduler
    vectors = [
        {
            "target_tokens": tokens,
            "steps": steps,
            "sigmas": sigmas_for(config, tokens, steps).tolist(),
        }
        for tokens, steps in ((64, 4), (4096, 28))
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "software": f"fluxkontext {VERSION}",
        "model": checkpoint.name,
        "licence": licence_of(checkpoint),
        "precision": dict(precisions),
        "recipe": checkpoint.transformer.weights.recipe,
        "components": dict(described),
        "vae": asdict(checkpoint.vae.config),
        "scheduler": asdict(config),
        "sigma_test_vectors": vectors,
        "tokenizers": {"clip": "tokenizer", "t5": "tokenizer_2"},
    }


def _files(folder: Path, progress: bool) -> dict[str, Any]:
    """Size and digest of every file."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "digest": digest(path)}
        for path in tqdm(paths, desc="hashes", disable=not progress)
    }
