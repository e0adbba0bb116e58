"""Graphs of quantised weights: the same function as the native model, over the same bytes."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from fluxkontext.export.bundle import CPU_ONLY, write_bundle
from fluxkontext.export.calibration import Calibration
from fluxkontext.export.components import Graph, graphs
from fluxkontext.export.functions import graph_ops
from fluxkontext.export.hardware_types import check_types
from fluxkontext.export.onnx_graph import attached, trace_graph
from fluxkontext.export.quantize import write_quantised
from fluxkontext.kernels import KernelSet, reference
from fluxkontext.runtime import CheckpointError, KontextPipeline
from fluxkontext.runtime.bundle import open_bundle
from fluxkontext.runtime.checkpoint import find
from fluxkontext.runtime.errors import KontextError
from fluxkontext.runtime.loading import Quantised, build, load
from fluxkontext.runtime.models.transformer import Flux
from fluxkontext.runtime.recipes import RECIPES

Arrays = dict[str, NDArray[Any]]
ENGINE_RECIPES = sorted(RECIPES.keys() - CPU_ONLY)


@pytest.fixture(scope="module")
def recipes(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Recipe -> the smallest model quantised by it."""
    folder = tmp_path_factory.mktemp("recipes")
    calibration = folder / "calibration.json"
    shapes = find(small_model, {}).transformer.config
    flux = build(lambda: Flux(shapes, reference()))
    modules = [name for name, module in flux.named_modules() if isinstance(module, nn.Linear)]
    Calibration("small", 100.0, dict.fromkeys(modules, 4.0), {}).write(calibration)
    for name, recipe in RECIPES.items():
        file = calibration if recipe.static else None
        write_quantised(find(small_model, {}), folder / name, recipe.precision, name, file)
    return {name: folder / name for name in RECIPES}


@cache
def transformer(folder: Path, flavour: str) -> Path:
    """The transformer of a folder, computing in float32; its graph lies where its weights do."""
    return export(folder, flavour, None)


def export(folder: Path, flavour: str, calibration: Calibration | None) -> Path:
    graph = graph_of(folder)
    file = next(iter(graph.component.weights.tensors.values())).file
    places = {file: PurePosixPath("transformer", file.name)}
    model = ir.Model(traced(folder.parent).graph.clone(), ir_version=10)
    path = folder / f"transformer.{flavour}{len(list(folder.glob('*.onnx')))}.onnx"
    ir.save(attached(model, graph, flavour, places, calibration), path)
    onnx.checker.check_model(str(path), full_check=True)
    return path


@cache
def traced(folder: Path) -> ir.Model:
    """The trace, which is the same for all recipes."""
    return trace_graph(graph_of(folder / "fp8-dynamic"))


def graph_of(folder: Path) -> Graph:
    found = graphs(find(folder, {}), torch.float32, graph_ops())
    return next(graph for graph in found if graph.name == "transformer")


def inputs(model: Path, seed: int = 0) -> Arrays:
    """A step of a small edit."""
    rng = np.random.default_rng(seed)
    sizes = {"batch": 1, "target_tokens": 6, "context_tokens": 4, "text_tokens": 5}
    arrays: Arrays = {}
    for value in onnx.load(model, load_external_data=False).graph.input:
        dims = value.type.tensor_type.shape.dim
        shape = [sizes.get(d.dim_param, d.dim_value) for d in dims]
        arrays[value.name] = np.asarray(rng.standard_normal(shape), np.float32)
    arrays["positions"] = np.array([[0, i, i + 1] for i in range(10)], np.int32)
    arrays["modulation"] *= 0.3
    return arrays


def native(folder: Path, arrays: Arrays, ops: KernelSet | None = None) -> NDArray[np.float32]:
    """The velocity of the torch model that runs the same file, in float32."""
    ops = ops or reference()
    component = find(folder, {}).transformer
    make, cpu = (lambda c: Flux(c, ops)), torch.device("cpu")
    flux = load(component, make, cpu, torch.float32, Quantised(ops))
    t = {name: torch.from_numpy(array) for name, array in arrays.items()}
    with torch.inference_mode():
        context, text = flux.img_in(t["context"]), flux.txt_in(t["text"])
        rope = flux.rope(t["positions"], 5)
        velocity: Tensor = flux(t["latents"], context, text, t["modulation"], rope)
    return velocity.numpy()


def error(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def least_error(graph: Path, folder: Path, ops: KernelSet | None = None) -> float:
    """Of three steps. Where the last bit of a sum decides to which of two neighbours a number is
    rounded, two correct implementations part by thousandths; not in all three."""
    if "FLOAT4E2M1" in types(graph):  # ONNX Runtime has no kernel for these
        session: Any = ReferenceEvaluator(str(graph))
    else:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    steps = [inputs(graph, seed) for seed in range(3)]
    return min(error(session.run(["velocity"], s)[0], native(folder, s, ops)) for s in steps)


def types(graph: Path) -> Counter[str]:
    """The types of the initialisers that lie in other files."""
    tensors = onnx.load(graph, load_external_data=False).graph.initializer
    outside = [t for t in tensors if t.data_location == onnx.TensorProto.EXTERNAL]
    return Counter(onnx.TensorProto.DataType.Name(t.data_type) for t in outside)


@pytest.mark.parametrize(
    ("recipe", "flavour"),
    [*((recipe, "cpu") for recipe in RECIPES), *((recipe, "gpu") for recipe in ENGINE_RECIPES)],
)
def test_graphs_equal_the_native_model(
    recipe: str, flavour: str, recipes: dict[str, Path], small_model: Path
) -> None:
    """In float32, where errors cannot hide."""
    graph = transformer(recipes[recipe], flavour)
    assert least_error(graph, recipes[recipe]) < 2e-6
    # so much is what the recipe does to the model: the comparison above sees all of it
    assert least_error(graph, small_model) > 5e-3


def test_fp8_attention_equals_its_definition(recipes: dict[str, Path]) -> None:
    folder = recipes["fp8-static"]
    amax = {"q": 5.0, "k": 6.0, "v": 2.0}
    blocks = ("double_blocks.0", "single_blocks.0")
    names = {f"{block}.{part}": a for block in blocks for part, a in amax.items()}
    graph = export(folder, "gpu", Calibration("small", 100.0, names, {}))
    operators = {node.op_type for node in onnx.load(graph, load_external_data=False).graph.node}
    assert "Attention" not in operators
    ops = replace(reference(), attention=partial(attention_fp8, amax))
    assert least_error(graph, folder, ops) < 2e-6
    assert least_error(graph, folder) > 1e-3


def attention_fp8(amax: Mapping[str, float], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of ``[B, S, H, d]`` whose four factors are E4M3."""

    def through(x: Tensor, largest: float) -> Tensor:
        scale = torch.tensor(largest / 448)
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    q, k, v = (
        through(x.transpose(1, 2), amax[name]) for x, name in zip((q, k, v), "qkv", strict=True)
    )
    p = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)
    return (through(p, 1.0) @ v).transpose(1, 2).flatten(2)


def test_calibration_of_another_model_is_refused(recipes: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"found none for double_blocks.0.q"):
        export(recipes["fp8-static"], "gpu", Calibration("other", 100.0, {}, {}))


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_are_the_files_own_bytes(recipe: str, recipes: dict[str, Path]) -> None:
    """Nothing is in the graph but numbers of its own; what is outside has the stored type."""
    flavour = "gpu" if recipe in ENGINE_RECIPES else "cpu"
    graph = transformer(recipes[recipe], flavour)
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        inside = tensor.data_location != onnx.TensorProto.EXTERNAL
        assert not inside or np.prod(tensor.dims) <= 64, tensor.name
    narrow = {
        "fp8-dynamic": "FLOAT8E4M3FN", "fp8-static": "FLOAT8E4M3FN",
        "nvfp4-w4a16": "FLOAT4E2M1", "nvfp4-w4a4": "FLOAT4E2M1",
    }  # fmt: skip
    # of a double block, 2 streams of q, k, v, proj and two layers; of a single, q, k, v, up, down
    assert types(graph)[narrow[recipe]] == 2 * 6 + 5


@pytest.mark.parametrize(
    ("recipe", "target", "found"),
    [
        ("nvfp4-w4a4", "sm_89", "FLOAT4E2M1 in node network.double_blocks.0"),
        ("fp8-static", "sm_86", "FLOAT8E4M3FN in node network.double_blocks.0"),
        ("nvfp4-w4a4", "sm_120", None),
        ("fp8-static", "sm_89", None),
    ],
)
def test_formats_that_a_chip_lacks_are_named(
    recipe: str, target: str, found: str | None, recipes: dict[str, Path]
) -> None:
    graph = transformer(recipes[recipe], "gpu")
    if found is None:
        check_types(graph, target)
    else:
        with pytest.raises(KontextError, match=found):
            check_types(graph, target)


def test_a_recipe_that_engines_cannot_run_has_no_gpu_graphs(
    recipes: dict[str, Path], tmp_path: Path
) -> None:
    """What there is works: an edit through it is the native one, up to that one's bf16."""
    write_bundle(find(recipes["fp8-dynamic"], {}), tmp_path / "bundle")
    bundle = open_bundle(tmp_path / "bundle")
    with pytest.raises(CheckpointError, match="fp8-dynamic has none for engines"):
        bundle.precision("gpu")
    pictures = []
    for folder, backend in ((bundle.root, "onnx"), (recipes["fp8-dynamic"], "native")):
        with KontextPipeline.from_pretrained(folder, backend=backend, device="cpu") as pipe:
            assert (pipe.about["precision"], pipe.about["recipe"]) == ("fp8", "fp8-dynamic")
            call = {"num_inference_steps": 2, "seed": 3, "output_type": "latent"}
            pictures.append(pipe(prompt="a star", **call).images)
    assert error(pictures[0], pictures[1]) < 1e-2
