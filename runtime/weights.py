"""What safetensors files hold, by name, without reading a weight; no torch needed.

Quantised files carry scales and marks beside the weights; these are told apart here, so that the
rest of the code sees one tensor a name and what belongs to it.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from operator import add
from pathlib import Path
from typing import Any

from .comfy_marks import first_form, marked_layers
from .errors import CheckpointError
from .layouts import Locate, Piece
from .stored import StoredTensor as StoredTensor
from .stored import WeightIndex as WeightIndex
from .stored import absent_scales, wrong_scales

FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
"""Stored types that load: anything that converts to the compute type by a cast (and a scale)."""

_NUMBER = re.compile(r"([0-9]{1,18})")
_MARK = re.compile(r"(?:.*\.)?(?:scaled_fp8|comfy_quant|spiece_model)$")
_KINDS = {
    "weight_scale": "scales",
    "scale_weight": "scales",
    "weight_scale_2": "global_scales",
    "input_scale": "input_scales",
    "scale_input": "input_scales",
}


def read_headers(files: Iterable[Path]) -> WeightIndex:
    """Index the tensors of safetensors files from their headers, and from the marks in them."""
    found: dict[str, dict[str, StoredTensor]] = {kind: {} for kind in ("tensors", *_KINDS.values())}
    metadata: dict[str, str] = {}
    comfy: dict[str, bool] = {}
    for file in files:
        with open_safetensors(file, "numpy") as opened:
            own = opened.metadata() or {}
            marks: dict[str, bytes] = {}
            scaled: tuple[int, ...] | None = None
            for key in opened.keys():  # noqa: SIM118 - not a mapping
                view = opened.get_slice(key)
                stored = StoredTensor(file, key, view.get_dtype(), tuple(view.get_shape()))
                if _MARK.match(key):
                    if key.endswith("comfy_quant"):
                        marks[key] = opened.get_tensor(key).tobytes()
                    elif key.endswith("scaled_fp8"):
                        scaled = stored.shape
                    continue
                module, kind = _split(key)
                name = f"{module}.weight" if module else key
                if name in found[kind]:
                    raise CheckpointError(
                        f"{file}: expected {key} once, found it in {found[kind][name].file} too"
                    )
                found[kind][name] = stored
            if scaled is not None:
                comfy |= first_form(
                    scaled, (n for n, s in found["scales"].items() if s.file == file)
                )
            comfy |= marked_layers(file, own, marks)
            metadata |= own
    return WeightIndex(metadata=metadata, comfy=comfy, **found)


def _split(key: str) -> tuple[str, str]:
    """(module, kind of scale) of a key, or ("", "tensors")."""
    module, _, last = key.rpartition(".")
    return (module, _KINDS[last]) if module and last in _KINDS else ("", "tensors")


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
    """The safetensors files of a component's folder: the shards of its index, or one file.

    The usual names come first: beside them may lie a variant, such as ``model.fp16.safetensors``.
    """
    for name in ("diffusion_pytorch_model.safetensors", "model.safetensors"):
        if (index := folder / f"{name}.index.json").exists():
            return _shards(index)
        if (folder / name).exists():
            return [folder / name]
    indices = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(folder.glob("*.safetensors"))
    if len(indices) == 1:
        return _shards(indices[0])
    if indices or len(files) != 1:
        found = ", ".join(file.name for file in indices or files) or "none"
        raise CheckpointError(f"{folder}: expected one safetensors file or an index, found {found}")
    return files


def _shards(index: Path) -> list[Path]:
    """The files that an index names."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise CheckpointError(f"{index}: expected a weight_map of file names, found none")
    files = sorted({index.parent / shard for shard in shards.values()})
    if outside := [file.name for file in files if file.parent != index.parent]:
        raise CheckpointError(f"{index}: expected shards beside it, found {outside[0]}")
    if missing := [file.name for file in files if not file.exists()]:
        raise CheckpointError(
            f"{index}: expected {len(files)} shards, found no {', '.join(missing)}; "
            "download them into the same folder"
        )
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
        shapes = [index.shape(piece.key) for piece in pieces]
        rows = sum(
            s[0] / (1 if p.half is None else 2) for p, s in zip(pieces, shapes, strict=True) if s
        )
        if any((rows, *_inner(s)) != (shape[0], *_inner(shape)) for s in shapes):
            sizes = " + ".join(str(list(s)) for s in shapes)
            misshaped.append((pieces[0].key, f"{sizes} for {list(shape)}"))
        for piece, t in zip(pieces, stored, strict=True):
            missing += absent_scales(component, index, piece.key)
            misshaped += wrong_scales(index, piece.key)
            if t.dtype not in FLOAT_DTYPES and index.form(piece.key) == "float":
                wrong_dtype.append((t.key, t.dtype))
        found[name] = pieces
    unexpected = [key for key in index.tensors if key not in used]
    beside = [*index.scales.items(), *index.global_scales.items()]
    unexpected += [scale.key for key, scale in beside if key not in used]
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
