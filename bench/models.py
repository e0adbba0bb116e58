"""The model that a benchmark runs: the user's, or the miniature's shapes with random weights."""

import hashlib
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..runtime.bundle import MANIFEST, digest
from ..runtime.checkpoint import find, resolve
from ..runtime.tensor_shapes import ModelShapes
from ..runtime.weights import read_headers
from .checkpoint_writer import Spec
from .document import Json, warning
from .mini.training.shipping import write_folder
from .mini.training.spec import MINI
from .synthetic import random_networks

SYNTHETIC = "miniature shapes, random weights"
_SEED = 0


@dataclass(frozen=True)
class Model:
    """A model on disk, what a document says of it, and its shapes (None for a bundle)."""

    path: Path
    facts: Json
    shapes: ModelShapes | None

    @property
    def warnings(self) -> list[Json]:
        if not self.facts["synthetic"]:
            return []
        return [warning("synthetic_weights", "random weights: the pictures are noise")]


def shapes_of(spec: Spec) -> ModelShapes:
    """The shapes of the four networks."""
    return ModelShapes(spec.transformer, spec.vae, spec.text_encoder, spec.text_encoder_2)


@contextmanager
def opened(name: str | None) -> Iterator[Model]:
    """``name`` as for ``from_pretrained``; None makes the synthetic miniature, for this block."""
    if name is not None:
        root = resolve(name)
        shapes = None if (root / MANIFEST).is_file() else ModelShapes.of(find(name, {}))
        yield Model(root, {"name": name, "synthetic": False, **_weights(root)}, shapes)
        return
    with tempfile.TemporaryDirectory(prefix="fluxkontext-") as folder:
        root = Path(folder) / "miniature"
        networks = random_networks(MINI, _SEED)
        flat: dict[str, torch.Tensor] = {
            f"{component}.{key}": value
            for component, tensors in networks.items()
            for key, value in tensors.items()
        }
        write_folder(root, MINI, flat)
        facts = {"name": SYNTHETIC, "synthetic": True, **_weights(root), "digest": "synthetic"}
        yield Model(root, facts, shapes_of(MINI))


def _weights(root: Path) -> Json:
    """``digest`` over the names and contents of all weight files, and how many ``parameters``."""
    files = [root] if root.is_file() else sorted(root.rglob("*.safetensors"))
    whole = hashlib.sha256()
    for file in files:
        name = file.name if file == root else file.relative_to(root).as_posix()
        whole.update(f"{name} {digest(file)}\n".encode())
    count = sum(
        math.prod(shape) for file in files for shape in read_headers([file]).shapes.values()
    )
    return {"digest": whole.hexdigest(), "parameters": count}
