"""Quantised files, ours and others', run as they are stored: the right numbers, and no copies."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fluxkontext.bench.checkpoint_writer import stored_tensors
from fluxkontext.export.calibrate import SCENE, calibrate
from fluxkontext.export.quantize import write_quantised
from fluxkontext.kernels import reference
from fluxkontext.kernels.nvfp4 import pack
from fluxkontext.runtime import CheckpointError, KontextError, KontextPipeline
from fluxkontext.runtime.backends.native import NativeBackend
from fluxkontext.runtime.checkpoint import find, open_component
from fluxkontext.runtime.errors import BackendUnavailableError
from fluxkontext.runtime.layouts import diffusers_transformer
from fluxkontext.runtime.loading import Quantised, load
from fluxkontext.runtime.models.quantised import (
    Fp8Linear,
    Fp8WeightLinear,
    NvFp4Linear,
    QuantisedLinear,
    quantise,
)
from fluxkontext.runtime.models.t5 import T5Encoder
from fluxkontext.runtime.models.transformer import Flux
from fluxkontext.runtime.recipes import RECIPES, takes_part

OPS = reference()
CPU = torch.device("cpu")
State = dict[str, Tensor]
SIZE = {"height": 64, "width": 64, "max_area": 64 * 64}


@pytest.fixture(scope="module")
def model(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest model in BF16, as the real one is published."""
    folder = Path(shutil.copytree(small_model, tmp_path_factory.mktemp("bf16") / "model"))
    for file in folder.rglob("*.safetensors"):
        rounded = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
        save_file(rounded, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def recipes(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Recipe -> the smallest model quantised by it."""
    folder = tmp_path_factory.mktemp("quantised")
    with KontextPipeline.from_pretrained(model, device="cpu") as pipe:
        found = calibrate(pipe, [SCENE], ["make it red"], steps=2, size=(64, 64))
    found.write(folder / "calibration.json")
    made = {}
    for name, recipe in RECIPES.items():
        made[name] = folder / name
        file = folder / "calibration.json" if recipe.static else None
        write_quantised(find(model, {}), made[name], recipe.precision, name, file)
    return made


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


# whole edits


def velocity(path: Path, precision: str = "auto") -> Tensor:
    """Of one step from a given noise, relative to which nothing else matters."""
    noise = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0))
    with KontextPipeline.from_pretrained(path, precision=precision, device="cpu") as pipe:
        result = pipe(
            picture(),
            "make it red",
            latents=noise,
            num_inference_steps=1,
            output_type="latent",
            auto_resize=False,
            **SIZE,
        )
    return torch.as_tensor(np.asarray(result.images[0])) - noise[0]


def picture() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def noise_of(form: str) -> float:
    """Relative error, root mean square, of Gaussian numbers in a format."""
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    tensors = quantise(x, form)
    back = meaning({f"x.{name}": tensor for name, tensor in tensors.items()}, "x")
    return ((back - x).norm() / x.norm()).item()


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_edit_stays_close(recipe: str, model: Path, recipes: dict[str, Path]) -> None:
    """A product of factors with independent errors has the sum of their squares; what passes by in
    the residual stream only makes that less. So it is the bound for the velocity, for which no step
    has made anything of it yet; errors of several layers add to it, by half at most here."""
    exact = velocity(model, "fp32")
    found = velocity(recipes[recipe])
    weights, activations = noise_of(RECIPES[recipe].precision), 0.0
    if recipe != "nvfp4-w4a16":
        activations = noise_of(RECIPES[recipe].precision)
    error = ((found - exact).norm() / exact.norm()).item()
    assert 0.003 < error < 1.5 * (weights**2 + activations**2) ** 0.5


def test_what_runs_is_reported(recipes: dict[str, Path]) -> None:
    for name, folder in recipes.items():
        with KontextPipeline.from_pretrained(folder, device="cpu") as pipe:
            assert pipe.about["precision"] == RECIPES[name].precision
            assert pipe.about["recipe"] == name
        with KontextPipeline.from_pretrained(folder, precision="fp32", device="cpu") as pipe:
            assert pipe.about["precision"] == "fp32"
            assert "recipe" not in pipe.about


# our files


@pytest.mark.parametrize("recipe", ["fp8-dynamic", "nvfp4-w4a16"])
def test_quantised_while_loading_is_the_same(
    recipe: str, model: Path, recipes: dict[str, Path]
) -> None:
    """Bit for bit, T5 too."""
    stored = NativeBackend(find(recipes[recipe], {}), "cpu", "auto")
    loaded = NativeBackend(find(model, {}), "cpu", RECIPES[recipe].precision)
    for name in ("_flux", "_t5", "_clip", "_vae"):
        same_bits(getattr(loaded, name).state_dict(), getattr(stored, name).state_dict())


@pytest.mark.parametrize("recipe", RECIPES)
def test_layers_run_as_they_are_stored(recipe: str, recipes: dict[str, Path], model: Path) -> None:
    flux = flux_of(recipes[recipe] / "transformer")
    plain = canonical(model)
    kind = {"fp8": Fp8Linear, "nvfp4": NvFp4Linear}[RECIPES[recipe].precision]
    found = {n: m for n, m in flux.named_modules() if isinstance(m, QuantisedLinear)}
    assert sorted(found) == sorted(layers(plain))
    assert all(type(module) is kind for module in found.values())
    assert all((m.input_scale is not None) == RECIPES[recipe].static for m in found.values())
    file = recipes[recipe] / "transformer" / "diffusion_pytorch_model.safetensors"
    stored = load_file(file)
    state = flux.state_dict()
    assert state.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(state[name].float(), tensor.float()), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_asked_for_in_full_precision_it_is_dequantised(
    recipe: str, recipes: dict[str, Path]
) -> None:
    stored = flux_of(recipes[recipe] / "transformer").state_dict()
    full = flux_of(recipes[recipe] / "transformer", as_stored=False).state_dict()
    assert {tensor.dtype for tensor in full.values()} == {torch.float32}
    for layer in layers(full):
        assert torch.equal(full[f"{layer}.weight"], meaning(stored, layer)), layer


def meaning(state: Mapping[str, Tensor], layer: str) -> Tensor:
    """What a layer's tensors stand for, by ml_dtypes."""
    weight, scale = state[f"{layer}.weight"], state[f"{layer}.weight_scale"]
    if weight.dtype == torch.float8_e4m3fn:
        return weight.float() * scale[:, None]
    codes = np.stack((weight.numpy() & 15, weight.numpy() >> 4), -1).reshape(len(weight), -1, 16)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    blocks = torch.from_numpy(values) * scale.float()[:, :, None] * state[f"{layer}.weight_scale_2"]
    return blocks.flatten(1)


class _Copies(TorchDispatchMode):
    """Which floating-point matrices operators make, by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            wide = isinstance(tensor, Tensor) and tensor.is_floating_point()
            if wide and tensor.itemsize > 1 and tensor.device.type != "meta":
                self.shapes.add(tuple(tensor.shape))
        return result


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_dequantised_weight_is_ever_made(recipe: str, recipes: dict[str, Path]) -> None:
    component = open_component("transformer", recipes[recipe] / "transformer")
    shapes = component.weights.shapes
    quantised = {f"{name}.weight" for name in layers_of(shapes)}
    matrices = {shapes[n] for n in quantised} - {shapes[n] for n in shapes.keys() - quantised}
    assert len(matrices) == 4
    with _Copies() as loading:
        load(component, lambda c: Flux(c, OPS), CPU, torch.float32, Quantised(OPS))
    assert not matrices & loading.shapes
    with _Copies() as dequantising:  # what the check would see
        load(component, lambda c: Flux(c, OPS), CPU, torch.float32)
    assert matrices <= dequantising.shapes


def layers_of(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    names = [n.removesuffix(".weight") for n in shapes if n.endswith(".weight")]
    return [n for n in names if takes_part("transformer", n, shapes[f"{n}.weight"][-1])]


def test_t5_keeps_its_widest_product_in_fp32(recipes: dict[str, Path]) -> None:
    """As it does unquantised: in fp16 alone, the outputs of ``wo`` would leave the range."""
    component = open_component("text_encoder_2", recipes["fp8-dynamic"] / "text_encoder_2")
    t5 = load(component, T5Encoder, CPU, torch.float16, Quantised(OPS))
    found = {n: m for n, m in t5.named_modules() if isinstance(m, Fp8WeightLinear)}
    assert len(found) == 14
    assert {n.rpartition(".")[2]: m.dtype for n, m in found.items()} == dict.fromkeys(
        ("q", "k", "v", "o", "wi_0", "wi_1"), torch.float16
    ) | {"wo": torch.float32}
    embedded = t5(torch.tensor([[3, 4, 5, 1]]))
    assert embedded.dtype == torch.float16
    full = load(component, T5Encoder, CPU, torch.float32)(torch.tensor([[3, 4, 5, 1]]))
    assert (embedded.float() - full).norm() / full.norm() < 0.01


# others' files


def write(
    tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None
) -> Path:
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file, metadata
    )
    return file


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


# what is wrong


def problem_of(call: Callable[[], object], error: type[KontextError] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def damaged(folder: Path, tmp_path: Path, change: Callable[[State, dict[str, str]], None]) -> Path:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = dict(opened.metadata())
    change(state, metadata)
    (tmp_path / "transformer").mkdir()
    shutil.copy(file.with_name("config.json"), tmp_path / "transformer")
    save_file(state, tmp_path / "transformer" / file.name, metadata)
    return tmp_path / "transformer"


LAYER = "double_blocks.0.img_mlp.0"


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("fp8-dynamic", "weight_scale"),
        ("fp8-static", "input_scale"),
        ("nvfp4-w4a16", "weight_scale"),
        ("nvfp4-w4a16", "weight_scale_2"),
        ("nvfp4-w4a4", "input_scale"),
    ],
)
def test_a_missing_scale_is_named(
    recipe: str, name: str, recipes: dict[str, Path], tmp_path: Path
) -> None:
    path = damaged(recipes[recipe], tmp_path, lambda state, _: state.__delitem__(f"{LAYER}.{name}"))
    for as_stored in (True, False):
        problem = problem_of(lambda: flux_of(path, as_stored=as_stored))  # noqa: B023
        assert f"missing {LAYER}.{name}" in problem


@pytest.mark.parametrize(
    ("recipe", "name", "wrong"),
    [
        ("fp8-dynamic", "weight_scale", torch.ones(7)),
        ("fp8-dynamic", "weight_scale", torch.ones(512, dtype=torch.uint8)),  # as MXFP8 has
        ("fp8-static", "input_scale", torch.ones(2)),
        ("nvfp4-w4a16", "weight_scale", torch.ones(512, 7).to(torch.float8_e4m3fn)),
        ("nvfp4-w4a16", "weight_scale", torch.ones(512, 8)),
        ("nvfp4-w4a16", "weight_scale_2", torch.ones(3)),
        ("nvfp4-w4a16", "weight", torch.ones(512, 63, dtype=torch.uint8)),
    ],
)
def test_a_wrong_scale_is_named(
    recipe: str, name: str, wrong: Tensor, recipes: dict[str, Path], tmp_path: Path
) -> None:
    path = damaged(
        recipes[recipe], tmp_path, lambda state, _: state.update({f"{LAYER}.{name}": wrong})
    )
    assert f"mis-shaped {LAYER}.{name}" in problem_of(lambda: flux_of(path)).replace(", ", " ")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("fluxkontext.recipe", "fp6-magic", "expected fluxkontext.recipe to be one of fp8-dynamic"),
        ("fluxkontext.recipe", None, "found None"),
        ("fluxkontext.format", "2", "expected fluxkontext.format '1', found '2'"),
        ("fluxkontext.format", None, "expected fluxkontext.format '1', found None"),
    ],
)
def test_an_unknown_recipe_or_version_is_named(
    key: str, value: str | None, message: str, recipes: dict[str, Path], tmp_path: Path
) -> None:
    def change(_: State, metadata: dict[str, str]) -> None:
        metadata.pop(key)
        metadata |= {} if value is None else {key: value}

    path = damaged(recipes["fp8-dynamic"], tmp_path, change)
    assert message in problem_of(lambda: open_component("transformer", path))


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ({"format": "mxfp8"}, "found 'mxfp8' (double_blocks.0.img_mlp.0)"),
        ({"format": "int8_tensorwise", "convrot": True}, "found 'int8_tensorwise'"),
        ({}, "found None"),
        ([], "expected a JSON object in double_blocks.0.img_mlp.0.comfy_quant"),
        (None, "expected a JSON object"),
    ],
)
def test_marks_that_are_not_understood(
    mark: object, message: str, model: Path, tmp_path: Path
) -> None:
    text = b"{" if mark is None else json.dumps(mark).encode()
    stored = canonical(model) | {
        f"{LAYER}.comfy_quant": torch.tensor(list(text), dtype=torch.uint8)
    }
    file = write(stored, tmp_path / "model.safetensors")
    assert message in problem_of(lambda: flux_of(file))


def test_what_is_stored_is_not_quantised_again(recipes: dict[str, Path]) -> None:
    for recipe, asked in (("fp8-dynamic", "nvfp4"), ("nvfp4-w4a4", "fp8")):
        problem = problem_of(
            lambda: KontextPipeline.from_pretrained(recipes[recipe], precision=asked, device="cpu"),  # noqa: B023
            BackendUnavailableError,
        )
        assert f"found {asked} and one in {recipe}" in problem
    component = open_component("transformer", recipes["fp8-dynamic"] / "transformer")
    quantised = Quantised(OPS, "nvfp4-w4a16")
    problem = problem_of(
        lambda: load(component, lambda c: Flux(c, OPS), CPU, torch.float32, quantised)
    )
    assert "expected plain weights to quantise as nvfp4-w4a16" in problem


def test_a_quantised_vae_or_clip_is_dequantised(model: Path, tmp_path: Path) -> None:
    """Only the two large networks run quantised weights."""
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    file = copy / "text_encoder" / "model.safetensors"
    state = load_file(file)
    name = "text_model.encoder.layers.0.mlp.fc1"
    weight = state[f"{name}.weight"].float()
    state[f"{name}.weight"] = (weight * 1000).to(torch.float8_e4m3fn)
    state[f"{name}.weight_scale"] = torch.tensor(0.001)
    wanted = state[f"{name}.weight"].float() * 0.001
    save_file(state, file)
    backend = NativeBackend(find(copy, {}), "cpu", "auto")
    assert backend.precision == "fp32"
    assert torch.equal(backend._clip.state_dict()["encoder.layers.0.mlp.fc1.weight"], wanted)
