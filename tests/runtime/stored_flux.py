"""A transformer as a file stores it: written, loaded, and what its quantised layers stand for."""

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from fluxkontext.kernels import reference
from fluxkontext.runtime.checkpoint import open_component
from fluxkontext.runtime.loading import Quantised, load
from fluxkontext.runtime.models.transformer import Flux
from fluxkontext.runtime.recipes import takes_part

OPS = reference()
CPU = torch.device("cpu")
State = dict[str, Tensor]


def write(
    tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None
) -> Path:
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file, metadata
    )
    return file


def flux_of(path: Path, dtype: torch.dtype = torch.float32, as_stored: bool = True) -> Flux:
    component = open_component("transformer", path)
    quantised = Quantised(OPS) if as_stored else None
    return load(component, lambda c: Flux(c, OPS), CPU, dtype, quantised)


def canonical(model: Path) -> State:
    return dict(flux_of(model / "transformer", torch.bfloat16).state_dict())


def same_bits(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].float(), tensor.float()), name


def layers(state: Mapping[str, Tensor]) -> list[str]:
    names = [name.removesuffix(".weight") for name in state if name.endswith(".weight")]
    return [n for n in names if takes_part("transformer", n, state[f"{n}.weight"].shape[-1])]


def meaning(state: Mapping[str, Tensor], layer: str) -> Tensor:
    """What a layer's tensors stand for, by ml_dtypes."""
    weight, scale = state[f"{layer}.weight"], state[f"{layer}.weight_scale"]
    if weight.dtype == torch.float8_e4m3fn:
        return weight.float() * scale[:, None]
    codes = np.stack((weight.numpy() & 15, weight.numpy() >> 4), -1).reshape(len(weight), -1, 16)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    blocks = torch.from_numpy(values) * scale.float()[:, :, None] * state[f"{layer}.weight_scale_2"]
    return blocks.flatten(1)
