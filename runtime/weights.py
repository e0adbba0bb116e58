"""What safetensors files hold, by name, without reading a weight; no torch needed.

Quantised files of ComfyUI carry scales and markers beside the weights; these are told apart here,
so that the rest of the code sees one tensor a name and, for some, a scale.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import add
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .layouts import Locate, Piece

FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
"""Stored types that load: anything that converts to the compute type by a cast (and a scale)."""

_NUMBER = re.compile(r"([0-9]{1,18})")
_SCALE = re.compile(r"(?P<module>.+)\.(?:scale_weight|weight_scale)$")
_MARKER = re.compile(r"(?:.*\.)?(?:scaled_fp8|scale_input|input_scale|comfy_quant|spiece_model)$")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its safetensors dtype name, its shape, and where it is."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightIndex:
    """The tensors of one component by name, scales of quantised ones, and the files' metadata."""

    tensors: Mapping[str, StoredTensor]
    scales: Mapping[str, StoredTensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def under(self, prefix: str) -> "WeightIndex":
        """The tensors whose names start with ``prefix``, under their names without it."""

        def cut(named: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
            return {k.removeprefix(prefix): v for k, v in named.items() if k.startswith(prefix)}

        return WeightIndex(cut(self.tensors), cut(self.scales), self.metadata)


def read_headers(files: Iterable[Path]) -> WeightIndex:
    """Index the tensors of safetensors files from their headers alone."""
    tensors: dict[str, StoredTensor] = {}
    scales: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        with open_safetensors(file, "numpy") as opened:
            metadata |= opened.metadata() or {}
            for key in opened.keys():  # noqa: SIM118 - not a mapping
                view = opened.get_slice(key)
                stored = StoredTensor(file, key, view.get_dtype(), tuple(view.get_shape()))
                match = _SCALE.match(key)
                if not match and _MARKER.match(key):
                    continue
                name, kind = (match["module"] + ".weight", scales) if match else (key, tensors)
                if name in kind:
                    raise CheckpointError(
                        f"{file}: expected {key} once, found it in {kind[name].file} too"
                    )
                kind[name] = stored
    return WeightIndex(tensors, scales, metadata)


def open_safetensors(file: Path, framework: str) -> Any:
    """Open ``file``; whatever is wrong with it becomes one :class:`CheckpointError`."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework=framework)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: expected a safetensors file, found none") from None
    except OSError as error:
        raise CheckpointError(
            f"{file}: expected a readable safetensors file, found: {_one_line(error)}"
        ) from None
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{file}: expected a whole safetensors file, found a damaged one ({_one_line(error)}); "
            "download it again"
        ) from None


def find_files(folder: Path) -> list[Path]:
    """The safetensors files of a component's folder: the shards of its index, or one file."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        index = read_json(indices[0])
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
            raise CheckpointError(f"{indices[0]}: expected a weight_map of file names, found none")
        files = sorted({folder / shard for shard in shards.values()})
        if outside := [f.name for f in files if f.parent != folder]:
            raise CheckpointError(f"{indices[0]}: expected shards beside it, found {outside[0]}")
        if missing := [file.name for file in files if not file.exists()]:
            raise CheckpointError(
                f"{indices[0]}: expected {len(files)} shards, found no {', '.join(missing)}; "
                "download them into the same folder"
            )
        return files
    for name in ("diffusion_pytorch_model.safetensors", "model.safetensors"):
        if (folder / name).exists():
            return [folder / name]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise CheckpointError(f"{folder}: expected one safetensors file or an index, found {found}")
    return files


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: expected a JSON file, found none") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: expected JSON, found {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return values


def match(
    component: str, wanted: Mapping[str, tuple[int, ...]], index: WeightIndex, locate: Locate
) -> dict[str, tuple[Piece, ...]]:
    """Find the pieces of every wanted tensor, or name all that are missing, unexpected, mis-shaped.

    wanted: canonical name -> shape. Returns canonical name -> its stored pieces in row order.
    """
    missing, misshaped, wrong_dtype, used = [], [], [], set()
    found = {}
    for name, shape in wanted.items():
        pieces = locate(name)
        absent = [piece.key for piece in pieces if piece.key not in index.tensors]
        missing += absent
        used |= {piece.key for piece in pieces}
        if absent:
            continue
        stored = [index.tensors[piece.key] for piece in pieces]
        rows = sum(
            t.shape[0] / (1 if p.half is None else 2)
            for p, t in zip(pieces, stored, strict=True)
            if t.shape
        )
        if any((rows, *_inner(t.shape)) != (shape[0], *_inner(shape)) for t in stored):
            shapes = " + ".join(str(list(t.shape)) for t in stored)
            misshaped.append((pieces[0].key, f"{shapes} for {list(shape)}"))
        for scale, t in ((index.scales.get(t.key), t) for t in stored):
            if scale and math.prod(scale.shape) not in (1, t.shape[0] if t.shape else 1):
                misshaped.append((scale.key, f"{list(scale.shape)} for {list(t.shape)}"))
        wrong_dtype += [(t.key, t.dtype) for t in stored if t.dtype not in FLOAT_DTYPES]
        found[name] = pieces
    unexpected = [key for key in index.tensors if key not in used]
    unexpected += [scale.key for key, scale in index.scales.items() if key not in used]
    problems = [
        f"{label} {collapse(names)}"
        for label, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if misshaped:
        problems.append(
            f"mis-shaped {collapse(k for k, _ in misshaped)} (first: found {misshaped[0][1]})"
        )
    if wrong_dtype:
        problems.append(
            f"of unsupported type {wrong_dtype[0][1]} {collapse(k for k, _ in wrong_dtype)} "
            f"(supported: {', '.join(sorted(FLOAT_DTYPES))})"
        )
    if problems:
        file = next(iter(index.tensors.values())).file if index.tensors else "no file"
        raise CheckpointError(
            f"{component}: expected the {len(wanted)} tensors of the model, "
            f"found tensors {'; '.join(problems)} (in {file})"
        )
    return found


def collapse(names: Iterable[str]) -> str:
    """Name many tensors briefly: ``blocks.{0-18}.qkv.weight`` for nineteen of them."""
    groups: dict[tuple[str, ...], list[tuple[int, ...]]] = defaultdict(list)
    for name in names:
        text = _NUMBER.split(name)
        groups[tuple(text[::2])].append(tuple(map(int, text[1::2])))
    return ", ".join(
        text[0] + "".join(map(add, map(_span, zip(*rows, strict=True)), text[1:]))
        for text, rows in groups.items()
    )


def _span(numbers: Iterable[int]) -> str:
    """Write a set of numbers: ``3``, ``{0-18}`` when it has no gaps, else ``{0,2,5}``."""
    distinct = sorted(set(numbers))
    if len(distinct) == 1:
        return str(distinct[0])
    if distinct[-1] - distinct[0] == len(distinct) - 1:
        return f"{{{distinct[0]}-{distinct[-1]}}}"
    return f"{{{','.join(map(str, distinct))}}}"


def _inner(shape: tuple[int, ...]) -> tuple[int, ...]:
    """All axes but the first; a 1x1 convolution may be stored as a matrix."""
    return shape[1:2] if shape[2:] == (1, 1) else shape[1:]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def data_offsets(file: Path) -> dict[str, int]:
    """Where each tensor's bytes start in a safetensors file, from the start of the file.

    The library does not tell; the format is 8 bytes of header length, then the header as JSON, then
    the data, to which the header's offsets are relative.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    return {
        key: 8 + length + entry["data_offsets"][0]
        for key, entry in header.items()
        if key != "__metadata__"
    }
