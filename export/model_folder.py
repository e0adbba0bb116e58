"""What a diffusers folder has besides the networks that are written anew."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..runtime.checkpoint import TOKENIZERS, Checkpoint, Component, resolve
from ..runtime.errors import CheckpointError
from ..runtime.weights import read_json
from .configs import model_index_json, network_json, scheduler_json
from .licence import CARD, licence_files

_SCHEDULER = "scheduler/scheduler_config.json"


def link_network(network: Component[Any], folder: Path) -> None:
    """Put a network's files as they are into the new ``folder``: links, or copies."""
    folder.mkdir()
    files = sorted({tensor.file for tensor in network.weights.tensors.values()})
    for file in files:
        real = file.resolve()  # of a link in a cache, what it points to
        try:
            (folder / file.name).hardlink_to(real)
        except OSError:  # another file system
            shutil.copyfile(real, folder / file.name)
    for index in indices_of(network):
        shutil.copyfile(index, folder / index.name)
    write_config(network, folder)


def indices_of(network: Component[Any]) -> list[Path]:
    """The index by which a network's shards are found; none of a single file. That of a variant
    beside them is another's."""
    files = {tensor.file for tensor in network.weights.tensors.values()}
    if len(files) == 1:
        return []
    names = {file.name for file in files}
    indices = next(iter(files)).parent.glob("*.safetensors.index.json")
    return [it for it in indices if set(read_json(it)["weight_map"].values()) == names]


def write_config(network: Component[Any], folder: Path) -> None:
    """``config.json``: the network's own, or one written from its shape if it has none."""
    own = next(iter(network.weights.tensors.values())).file.with_name("config.json")
    if own.is_file() and _says(own, network.config):
        shutil.copyfile(own, folder / own.name)
    else:
        write_json(folder / "config.json", network_json(network.config))


def write_small_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Tokenizers, the scheduler's config, the index of the parts, model card and licence."""
    for name in TOKENIZERS:
        (folder / name).mkdir()
        for file in getattr(checkpoint, name).iterdir():
            if file.is_file():
                shutil.copyfile(file, folder / name / file.name)
    root = resolve(checkpoint.name)
    (folder / "scheduler").mkdir()
    if root.is_dir():
        for file in ("model_index.json", _SCHEDULER):
            shutil.copyfile(root / file, folder / file)
        for path in (root / CARD, *licence_files(checkpoint)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    else:
        write_json(folder / "model_index.json", model_index_json())
        write_json(folder / _SCHEDULER, scheduler_json(checkpoint.scheduler))


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object into an existing folder."""
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _says(file: Path, config: Any) -> bool:
    """Whether a config file is that of this network; one beside a single file may be another's."""
    try:
        return bool(type(config).from_json(read_json(file)) == config)
    except CheckpointError:
        return False
