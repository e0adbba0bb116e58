"""Quantised files of others, run as they are stored: ComfyUI's, ModelOpt's, and split layers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from fluxkontext.bench.checkpoint_writer import stored_tensors
from fluxkontext.kernels.nvfp4 import pack
from fluxkontext.runtime.layouts import diffusers_transformer
from fluxkontext.runtime.models.quantised import (
    Fp8Linear,
    Fp8WeightLinear,
    NvFp4Linear,
    QuantisedLinear,
)

from .stored_flux import State, canonical, flux_of, layers, meaning, same_bits, write


@pytest.fixture(scope="session")
def model(bf16_model: Path) -> Path:
    return bf16_model


def comfy_fp8(state: State, by_row: bool, newer: bool, full_precision: bool = False) -> State:
    """ComfyUI's ``fp8_scaled``."""
    stored = dict(state)
    if not newer:
        shape = 2 if full_precision else 0
        stored["scaled_fp8"] = torch.zeros(shape, dtype=torch.float8_e4m3fn)
    for layer in layers(state):
        weight = state[f"{layer}.weight"].float()
        largest = weight.abs().amax(1) if by_row else weight.abs().amax()
        scale = largest / 448
        factor = scale[:, None] if by_row else scale
        stored[f"{layer}.weight"] = (weight / factor).to(torch.float8_e4m3fn)
        if newer:
            about: dict[str, object] = {"format": "float8_e4m3fn"}
            if full_precision:
                about["full_precision_matrix_mult"] = True
            stored[f"{layer}.weight_scale"] = scale
            stored[f"{layer}.comfy_quant"] = torch.tensor(
                list(json.dumps(about).encode()), dtype=torch.uint8
            )
        else:
            stored[f"{layer}.scale_weight"] = scale if by_row else scale[None]
            stored[f"{layer}.scale_input"] = torch.ones(1)
    return stored


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
def test_comfy_fp8(by_row: bool, newer: bool, prefix: str, model: Path, tmp_path: Path) -> None:
    plain = canonical(model)
    stored = comfy_fp8(plain, by_row, newer)
    file = write({prefix + k: v for k, v in stored.items()}, tmp_path / "model.safetensors")
    flux = flux_of(file)
    state = flux.state_dict()
    for layer in layers(plain):
        module = flux.get_submodule(layer)
        assert type(module) is Fp8Linear
        assert module.input_scale is None  # a scale a token is no worse than one for all
        assert torch.equal(state[f"{layer}.weight"].float(), stored[f"{layer}.weight"].float())
        scale = stored[f"{layer}.weight_scale" if newer else f"{layer}.scale_weight"]
        assert torch.equal(state[f"{layer}.weight_scale"], scale.expand(len(module.weight)))
        assert torch.equal(state[f"{layer}.bias"], plain[f"{layer}.bias"].float())


@pytest.mark.parametrize("newer", [False, True])
def test_comfy_fp8_that_wants_inputs_in_full_precision(
    newer: bool, model: Path, tmp_path: Path
) -> None:
    stored = comfy_fp8(canonical(model), by_row=False, newer=newer, full_precision=True)
    flux = flux_of(write(stored, tmp_path / "model.safetensors"))
    kinds = {type(m) for m in flux.modules() if isinstance(m, QuantisedLinear)}
    assert kinds == {Fp8WeightLinear}


def test_unscaled_fp8_is_cast(model: Path, tmp_path: Path) -> None:
    plain = canonical(model)
    cast = {
        k: v.to(torch.float8_e4m3fn) if k.removesuffix(".weight") in layers(plain) else v
        for k, v in plain.items()
    }
    flux = flux_of(write(cast, tmp_path / "model.safetensors"))
    assert not [m for m in flux.modules() if isinstance(m, QuantisedLinear)]
    same_bits(flux.state_dict(), {k: v.float() for k, v in cast.items()})


def rounded_by_comfy(weight: Tensor) -> tuple[NDArray[np.uint8], NDArray[np.uint8], np.float32]:
    """Codes ``[N, K]``, bytes of block scales ``[N, K / 16]`` and the scale of all, in the order of
    comfy-kitchen's arithmetic, by numpy and ml_dtypes."""
    x = weight.float().numpy()
    blocks = x.reshape(len(x), -1, 16)
    whole = np.float32(np.abs(x).max()) / np.float32(448 * 6)
    scales = (np.abs(blocks).max(-1) / np.float32(6) / whole).astype(ml_dtypes.float8_e4m3fn)
    total = whole * scales.astype(np.float32)
    codes = (blocks / total[..., None]).astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
    return codes.reshape(x.shape), scales.view(np.uint8), whole


def comfy_nvfp4(weight: Tensor) -> State:
    """A layer as comfy-kitchen writes it: the first number of a byte in its upper half, and scales
    in tiles of 128 x 4, put in place one by one."""
    codes, scales, whole = rounded_by_comfy(weight)
    rows, columns = scales.shape
    high, wide = -(-rows // 128), -(-columns // 4)
    tiled = np.zeros(high * wide * 512, np.uint8)
    for row in range(rows):
        for column in range(columns):
            tile = row // 128 * wide + column // 4
            place = tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4
            tiled[place] = scales[row, column]
    return {
        "weight": torch.from_numpy(codes[:, 0::2] << 4 | codes[:, 1::2]),
        "weight_scale": torch.from_numpy(tiled.reshape(high * 128, wide * 4)).view(
            torch.float8_e4m3fn
        ),
        "weight_scale_2": torch.tensor(whole),
    }


def comfy_nvfp4_file(state: State, file: Path, prefix: str, in_metadata: bool) -> Path:
    stored = dict(state)
    marked = {}
    for layer in layers(state):
        stored |= {f"{layer}.{k}": v for k, v in comfy_nvfp4(state[f"{layer}.weight"]).items()}
        stored[f"{layer}.input_scale"] = torch.tensor(0.01)
        marked[f"{prefix}{layer}"] = {"format": "nvfp4"}
        if not in_metadata:
            about = json.dumps({"format": "nvfp4"}).encode()
            stored[f"{layer}.comfy_quant"] = torch.tensor(list(about), dtype=torch.uint8)
    about = {"format_version": "1.0", "layers": marked}
    metadata = {"_quantization_metadata": json.dumps(about)} if in_metadata else None
    return write({prefix + k: v for k, v in stored.items()}, file, metadata)


@pytest.mark.parametrize("in_metadata", [False, True])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_comfy_nvfp4(
    in_metadata: bool, prefix: str, model: Path, recipes: dict[str, Path], tmp_path: Path
) -> None:
    """In our order, it is what was written; and nearly all of it is what we would write."""
    plain = canonical(model)
    file = comfy_nvfp4_file(plain, tmp_path / "model.safetensors", prefix, in_metadata)
    found, full = flux_of(file).state_dict(), flux_of(file, as_stored=False).state_dict()
    ours = flux_of(recipes["nvfp4-w4a16"] / "transformer").state_dict()
    assert found.keys() == ours.keys()
    for layer in layers(plain):
        codes, scales, whole = rounded_by_comfy(plain[f"{layer}.weight"])
        packed = torch.from_numpy(codes[:, 0::2] | codes[:, 1::2] << 4)
        assert torch.equal(found[f"{layer}.weight"], packed)
        assert np.array_equal(found[f"{layer}.weight_scale"].view(torch.uint8).numpy(), scales)
        assert found[f"{layer}.weight_scale_2"] == whole
        assert torch.equal(full[f"{layer}.weight"], meaning(found, layer))
        # they multiply the two scales before they divide, which matters at ties
        assert (ours[f"{layer}.weight"] == packed).float().mean() > 0.99


def test_nvfp4_without_marks_is_in_plain_order(
    model: Path, recipes: dict[str, Path], tmp_path: Path
) -> None:
    """As ModelOpt and BFL write it."""
    file = recipes["nvfp4-w4a16"] / "transformer" / "diffusion_pytorch_model.safetensors"
    unmarked = write(load_file(file), tmp_path / "model.safetensors")
    same_bits(flux_of(unmarked).state_dict(), flux_of(file.parent).state_dict())


def diffusers_names(state: State, scales: Callable[[str, Tensor], State]) -> State:
    """Split q, k, v; ``scales`` quantises a matrix of that name."""
    plain = {k: v.float() for k, v in state.items()}
    stored = stored_tensors(plain, diffusers_transformer, 128)
    fused = {piece.key for n in layers(state) for piece in diffusers_transformer(f"{n}.weight")}
    made: State = {}
    for name, tensor in stored.items():
        quantised = name in fused or name == "norm_out.linear.weight"
        made |= scales(name.removesuffix(".weight"), tensor) if quantised else {name: tensor}
    return made


@pytest.mark.parametrize("by_row", [False, True])
def test_split_projections_become_rows(by_row: bool, model: Path, tmp_path: Path) -> None:
    """With scales of pieces or of rows; halves that change places are dequantised."""

    def fp8(module: str, weight: Tensor) -> State:
        scale = weight.abs().amax(1) / 448 if by_row else weight.abs().amax() / 448
        values = (weight / (scale[:, None] if by_row else scale)).to(torch.float8_e4m3fn)
        return {f"{module}.weight": values, f"{module}.weight_scale": scale}

    plain = canonical(model)
    stored = diffusers_names(plain, fp8)
    (tmp_path / "transformer").mkdir()
    shutil.copy(model / "transformer" / "config.json", tmp_path / "transformer")
    write(stored, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    flux = flux_of(tmp_path / "transformer")
    assert {n for n, m in flux.named_modules() if isinstance(m, QuantisedLinear)} == set(
        layers(plain)
    )
    state = flux.state_dict()
    q, k, v = (f"transformer_blocks.0.attn.to_{x}" for x in "qkv")
    rows = torch.cat([stored[f"{n}.weight"].float() for n in (q, k, v)])
    scale = torch.cat([stored[f"{n}.weight_scale"].expand(128) for n in (q, k, v)])
    assert torch.equal(state["double_blocks.0.img_attn.qkv.weight"].float(), rows)
    assert torch.equal(state["double_blocks.0.img_attn.qkv.weight_scale"], scale)
    last = stored["norm_out.linear.weight"].float()
    factor = stored["norm_out.linear.weight_scale"]
    last = last * (factor[:, None] if by_row else factor)
    swapped = torch.cat(last.chunk(2)[::-1])
    assert torch.equal(state["final_layer.adaLN_modulation.1.weight"], swapped)
    dequantised = flux_of(tmp_path / "transformer", as_stored=False).state_dict()
    for layer in layers(plain):
        assert torch.equal(dequantised[f"{layer}.weight"], meaning(state, layer))


@pytest.mark.parametrize("equal", [True, False])
def test_split_nvfp4_is_joined_under_one_scale(equal: bool, model: Path, tmp_path: Path) -> None:
    """Pieces under different scales are no matrix of the format: they are dequantised."""

    def nvfp4(module: str, weight: Tensor) -> State:
        if module == "norm_out.linear":
            return {f"{module}.weight": weight}
        packed = pack(weight, torch.tensor(0.001)) if equal else pack(weight)
        return {
            f"{module}.weight": packed.packed,
            f"{module}.weight_scale": packed.block_scale,
            f"{module}.weight_scale_2": packed.scale,
        }

    plain = canonical(model)
    (tmp_path / "transformer").mkdir()
    shutil.copy(model / "transformer" / "config.json", tmp_path / "transformer")
    write(
        diffusers_names(plain, nvfp4),
        tmp_path / "transformer" / "diffusion_pytorch_model.safetensors",
    )
    flux = flux_of(tmp_path / "transformer")
    fused = ("qkv", "linear1")
    for layer in layers(plain):
        module = flux.get_submodule(layer)
        joined = equal or layer.rpartition(".")[2] not in fused
        assert isinstance(module, NvFp4Linear if joined else nn.Linear), layer
    full = flux_of(tmp_path / "transformer", as_stored=False).state_dict()
    state = flux.state_dict()
    for layer in layers(plain):
        weight = state[f"{layer}.weight"]
        same = weight if weight.dtype == torch.float32 else meaning(state, layer)
        assert torch.equal(full[f"{layer}.weight"], same)
