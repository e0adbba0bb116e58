"""Quantised files of ours, run as they are stored: the right numbers, and no copies."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fluxkontext.runtime import KontextPipeline
from fluxkontext.runtime.backends.native import NativeBackend
from fluxkontext.runtime.checkpoint import find, open_component
from fluxkontext.runtime.errors import BackendUnavailableError
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

from .problems import problem_of
from .stored_flux import CPU, OPS, State, canonical, flux_of, layers, meaning, same_bits, write

SIZE = {"height": 64, "width": 64, "max_area": 64 * 64}


@pytest.fixture(scope="session")
def model(bf16_model: Path) -> Path:
    return bf16_model


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


# what is wrong


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
