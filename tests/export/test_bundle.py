"""Export: whole or nothing, valid graphs of the contract, weights where they lie."""

import os
import shutil
from pathlib import Path, PurePosixPath

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.numpy import load_file, save_file

from fluxkontext.export import bundle as exporter
from fluxkontext.export.bundle import write_bundle
from fluxkontext.export.components import graphs
from fluxkontext.export.functions import graph_ops
from fluxkontext.export.quantised_graph import attach_weights
from fluxkontext.runtime import CheckpointError, InvalidInputError, KontextPipeline
from fluxkontext.runtime.bundle import open_bundle
from fluxkontext.runtime.checkpoint import find
from fluxkontext.runtime.contract import GRAPHS
from fluxkontext.runtime.weights import data_offsets


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("flavour", ["cpu", "gpu"])
def test_graphs_have_the_boundary_of_the_contract(
    small_bundle: Path, name: str, flavour: str
) -> None:
    model = onnx.load(small_bundle / f"{name}.{flavour}.onnx", load_external_data=False)
    inputs, outputs = GRAPHS[name]
    for values, specs in ((model.graph.input, inputs), (model.graph.output, outputs)):
        assert [value.name for value in values] == list(specs)
        for value, spec in zip(values, specs.values(), strict=True):
            kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            assert kind == np.dtype(spec.dtype)
            dims = value.type.tensor_type.shape.dim
            assert len(dims) == len(spec.shape)
            fixed = [dim.dim_param or dim.dim_value for dim in dims]
            for found, wanted in zip(fixed, spec.shape, strict=True):
                # an axis that the model fixes is a number, any other keeps its name
                assert found == wanted or (isinstance(wanted, str) and isinstance(found, int))
            varying = {"batch", "text_tokens", "target_tokens", "context_tokens", "image_tokens"}
            assert varying & {a for a in spec.shape if isinstance(a, str)} <= set(fixed)


@pytest.mark.parametrize("name", ["vae_encoder", "vae_decoder"])
def test_pixels_are_only_cast(small_bundle: Path, name: str) -> None:
    """TensorRT has uint8 at a network's boundary alone: its parser refuses any other node."""
    graph = onnx.load(small_bundle / f"{name}.gpu.onnx", load_external_data=False).graph
    touching = {n.op_type for n in graph.node if "pixels" in (*n.input, *n.output)}
    assert touching - {"Shape"} == {"Cast"}


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("flavour", ["cpu", "gpu"])
def test_no_weight_is_inside_a_graph(small_bundle: Path, name: str, flavour: str) -> None:
    file = small_bundle / f"{name}.{flavour}.onnx"
    model = onnx.load(file, load_external_data=False)
    inside = [
        (tensor.name, list(tensor.dims))
        for tensor in model.graph.initializer
        if tensor.data_location != onnx.TensorProto.EXTERNAL and np.prod(tensor.dims) > 256
    ]
    assert not inside
    assert file.stat().st_size < 300_000


def test_graphs_name_no_path_of_this_machine(small_bundle: Path) -> None:
    for file in small_bundle.glob("*.onnx"):
        text = file.read_bytes()
        assert b"/home/" not in text
        assert os.fsencode(Path(__file__).parents[2]) not in text
        assert b".py" not in text  # the exporter's stack traces


def test_gpu_graphs_compute_in_the_precision_asked_for(small_bundle: Path) -> None:
    model = onnx.load(small_bundle / "transformer.gpu.onnx", load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    kinds = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    outputs = [node.output[0] for node in inferred.graph.node if node.op_type in ("MatMul", "Gemm")]
    assert len(outputs) > 10
    assert {kinds[name] for name in outputs} == {onnx.TensorProto.BFLOAT16}


def test_the_folder_is_still_a_checkpoint(small_bundle: Path, small_model: Path) -> None:
    """Byte for byte the same weights, so the same picture."""
    pictures = [
        KontextPipeline.from_pretrained(folder, backend="native", device="cpu")(
            prompt="a star", num_inference_steps=2, seed=3, output_type="latent"
        ).images
        for folder in (small_bundle, small_model)
    ]
    assert np.array_equal(*pictures)


@pytest.mark.parametrize("weights", ["link", "copy"])
def test_weights_are_linked_or_copied(
    small_model: Path, tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "graphs", lambda *_: [])  # placing is what is looked at
    write_bundle(find(small_model, {}), tmp_path / "out", weights=weights)
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        (placed,) = (tmp_path / "out" / part).glob("*.safetensors")
        source = small_model / part / placed.name
        assert placed.samefile(source) is (weights == "link")
        assert placed.read_bytes() == source.read_bytes()


def test_links_of_a_cache_are_resolved(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hub caches hold links to blobs; no runtime follows one out of a bundle."""
    monkeypatch.setattr(exporter, "graphs", lambda *_: [])
    cache = tmp_path / "snapshot"
    for file in small_model.rglob("*"):
        if file.is_file():
            link = cache / file.relative_to(small_model)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    write_bundle(find(cache, {}), tmp_path / "out")
    placed = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(placed) > 10
    assert not any(path.is_symlink() for path in placed)
    open_bundle(tmp_path / "out", "always")


def test_a_failed_export_leaves_nothing(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporter, "_write_graph", fail)
    with pytest.raises(KeyboardInterrupt):
        write_bundle(find(small_model, {}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_left_alone(small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="does not exist"):
        write_bundle(find(small_model, {}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_scaled_weights_are_refused(small_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    for file in small_model.rglob("*"):
        if file.is_file():
            copy = model / file.relative_to(small_model)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["encoder.conv_in.weight_scale"] = np.ones((), np.float32)
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match=r"vae: expected weights in .* found scaled weights"):
        write_bundle(find(model, {}), tmp_path / "out")


def test_sessions_map_weights_instead_of_copying(small_bundle: Path) -> None:
    """The graph's initialisers are ranges of the safetensors file: no second file of weights."""
    model = onnx.load(small_bundle / "transformer.cpu.onnx", load_external_data=False)
    external = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    entries = [{e.key: e.value for e in t.external_data} for t in external]
    (location,) = {entry["location"] for entry in entries}
    assert location == "transformer/diffusion_pytorch_model.safetensors"
    size = (small_bundle / location).stat().st_size
    assert all(int(e["offset"]) + int(e["length"]) <= size for e in entries)
    assert ort.InferenceSession(
        small_bundle / "transformer.cpu.onnx", providers=["CPUExecutionProvider"]
    ).get_inputs()


def test_weights_that_moved_within_their_file_are_found_again(
    small_model: Path, tmp_path: Path
) -> None:
    """A checkpoint that is written again, by the process that has exported it before."""
    model = shutil.copytree(small_model, tmp_path / "model")
    weights = model / "text_encoder" / "model.safetensors"
    tensors, seen = load_file(weights), set()
    for remark in ("short", "long" * 100):
        save_file(tensors, weights, {"format": "pt", "remark": remark})
        found = graphs(find(model, {}), torch.float32, graph_ops())
        graph = next(it for it in found if it.name == "clip")
        name, parameter = next(iter(graph.module.named_parameters()))
        value = ir.Value(None, name=name, shape=ir.Shape(parameter.shape))
        value.type = ir.TensorType(ir.DataType.FLOAT)
        traced = ir.Graph([], [], nodes=[], initializers=[value])
        attach_weights(traced, graph, "cpu", {weights: PurePosixPath("model.safetensors")})
        stored = traced.initializers[name].const_value
        assert isinstance(stored, ir.ExternalTensor)
        assert stored.offset in data_offsets(weights).values()
        seen.add(stored.offset)
    assert len(seen) == 2
