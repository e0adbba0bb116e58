"""A safetensors file that is written tensor by tensor, in any order, and never all in memory."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class Spec:
    """The type and shape of a tensor to come."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """Write ``file``; the tensors and the metadata are known beforehand, and so are all offsets.

    The layout is the library's own: the widest types first, then by name, so that every tensor is
    aligned to its type and equal contents give equal bytes.
    """

    def __init__(self, file: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> None:
        self._specs = dict(specs)
        order = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
        header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
        self._starts: dict[str, int] = {}
        end = 0
        for name in order:
            self._starts[name], end = end, end + specs[name].size
            header[name] = {
                "dtype": _NAMES[specs[name].dtype],
                "shape": list(specs[name].shape),
                "data_offsets": [self._starts[name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self._file = file.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._data + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor in its place."""
        spec = self._specs.pop(name)
        assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), (name, spec)
        self._file.seek(self._data + self._starts[name])
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        self._file.write(flat.view(torch.uint8).numpy().data)

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        assert error is not None or not self._specs, f"not written: {list(self._specs)}"
