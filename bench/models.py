"""The model that a benchmark runs: the user's, the miniature that ships, or a drawn one."""

import hashlib
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.bundle import MANIFEST, digest
from ..runtime.checkpoint import MINI, find, resolve
from ..runtime.errors import KontextError
from ..runtime.golden import GOLDEN
from ..runtime.loader import require
from ..runtime.tensor_shapes import ModelShapes
from ..runtime.weights import read_headers
from .document import Json, warning

if TYPE_CHECKING:  # they need torch
    from .checkpoint_writer import Spec
    from .drawn import Drawn


@dataclass(frozen=True)
class Model:
    """A model on disk, what a document says of it, and its shapes, where its files tell them."""

    path: Path
    facts: Json
    shapes: ModelShapes | None

    @property
    def warnings(self) -> list[Json]:
        if not self.facts["synthetic"]:
            return []
        return [warning("synthetic_weights", "random weights: the pictures are noise")]


def shapes_of(spec: "Spec") -> ModelShapes:
    """The shapes of the four networks."""
    return ModelShapes(spec.transformer, spec.vae, spec.text_encoder, spec.text_encoder_2)


@contextmanager
def opened(name: str | None, drawn: "Drawn | None" = None, device: str = "cpu") -> Iterator[Model]:
    """``name`` as for ``from_pretrained``. None: what ``drawn`` makes on ``device`` for this block,
    or without that the miniature that comes with the package."""
    if name is None and drawn is not None:
        with tempfile.TemporaryDirectory(prefix="fluxkontext-") as folder:
            root = Path(folder) / "drawn"
            drawn.write(root, device)
            yield Model(root, drawn.facts(), shapes_of(drawn.spec))
        return
    name = name or MINI
    root = resolve(name)
    yield Model(root, {"name": name, "synthetic": False, **_weights(root)}, _shapes(name, root))


@contextmanager
def exported(model: Model) -> Iterator[Path]:
    """The model as a bundle: itself, or one that is made for this block, over the same weights."""
    if (model.path / MANIFEST).is_file():
        yield model.path
        return
    for package in ("onnxscript", "onnxruntime"):
        require(package, "to run the model's graphs", "export,cpu")
    from ..export.bundle import write_bundle

    with tempfile.TemporaryDirectory(prefix="fluxkontext-") as folder:
        bundle = Path(folder) / "bundle"
        write_bundle(find(model.path, {}), bundle)
        yield bundle


def _shapes(name: str, root: Path) -> ModelShapes | None:
    """None for a bundle of single files, which has no configs beside its weights."""
    try:
        return ModelShapes.of(find(name, {}))
    except KontextError:
        if (root / MANIFEST).is_file():
            return None
        raise


def _weights(root: Path) -> Json:
    """``digest`` over the names and contents of all weight files, and how many ``parameters``;
    ``bundle``: of the manifest, which has the hashes of graphs and engines."""
    found = [root] if root.is_file() else sorted(root.rglob("*.safetensors"))
    files = [file for file in found if file.name != GOLDEN]
    whole = hashlib.sha256()
    for file in files:
        name = file.name if file == root else file.relative_to(root).as_posix()
        whole.update(f"{name} {digest(file)}\n".encode())
    count = sum(
        math.prod(shape) for file in files for shape in read_headers([file]).shapes.values()
    )
    manifest = root / MANIFEST
    bundle = digest(manifest) if manifest.is_file() else None
    return {"digest": whole.hexdigest(), "parameters": count, "bundle": bundle}
