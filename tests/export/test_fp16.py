"""fp16: what leaves its range computes in fp32, in graphs for GPUs as on the native backend."""

import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from fluxkontext.export.components import T5Graph, VaeDecoderGraph, VaeEncoderGraph, graphs
from fluxkontext.export.functions import graph_ops
from fluxkontext.export.onnx_graph import export_graph
from fluxkontext.runtime.checkpoint import Checkpoint, find
from fluxkontext.runtime.loading import load
from fluxkontext.runtime.models.t5 import T5Encoder
from fluxkontext.runtime.models.vae import Vae

CPU, FP16 = torch.device("cpu"), torch.float16
GAINS = {
    # of the last matrix some weights are beyond 65504, and so are products with them; sums are not
    "text_encoder_2": {".wo.weight": 4e5, ".wi_1.weight": 4e-2},
    "vae": {"coder.conv_in.weight": 1e6},
}
"""What is multiplied in the smallest model."""


@pytest.fixture(scope="module")
def model(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp16") / "model"
    shutil.copytree(small_model, folder)
    for part, gains in GAINS.items():
        (file,) = (folder / part).glob("*.safetensors")
        tensors = load_file(file)
        for name, array in tensors.items():
            for end, gain in gains.items():
                if name.endswith(end):
                    tensors[name] = array * np.float32(gain)
        save_file(tensors, file, {"format": "pt"})
    return folder


def exported(checkpoint: Checkpoint, name: str) -> Path:
    """The graph ``name`` for GPUs in fp16, beside its weights."""
    graph = next(it for it in graphs(checkpoint, FP16, graph_ops()) if it.name == name)
    file = next(iter(graph.component.weights.tensors.values())).file
    path = file.with_name(f"{name}.gpu.onnx")
    ir.save(export_graph(graph, "gpu", {file: PurePosixPath(file.name)}), path)
    onnx.checker.check_model(str(path), full_check=True)
    return path


def run(graph: Path, native: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The first result of a graph and of the module that it was made from, with real weights."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]
    with torch.inference_mode():
        return torch.from_numpy(found), native(*inputs.values())


def kinds(graph: Path, operator: str) -> dict[str, int]:
    """Name -> ONNX type of what each node of ``operator`` computes."""
    model = onnx.load(graph, load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.value_info}
    return {n.output[0]: types[n.output[0]] for n in inferred.node if n.op_type == operator}


def test_the_last_matrix_of_t5_is_fp32(model: Path) -> None:
    checkpoint = find(model, {})
    graph = exported(checkpoint, "t5")
    native = T5Graph(load(checkpoint.text_encoder_2, T5Encoder, CPU, FP16))
    ids = torch.arange(1, 12)[None]
    found, wanted = run(graph, native, {"ids": ids})
    assert found.isfinite().all()
    assert (found - wanted).norm() < 0.01 * wanted.norm()
    types = list(kinds(graph, "MatMul").values())
    layers = checkpoint.text_encoder_2.config.num_layers
    assert types.count(onnx.TensorProto.FLOAT) == layers
    assert types.count(onnx.TensorProto.FLOAT16) == 6 * layers


@pytest.mark.parametrize("name", ["vae_encoder", "vae_decoder"])
def test_a_vae_that_overflows_is_fp32(model: Path, name: str) -> None:
    checkpoint = find(model, {})
    assert checkpoint.vae.config.force_upcast
    graph = exported(checkpoint, name)
    vae = load(checkpoint.vae, Vae, CPU, FP16)
    rng = torch.Generator().manual_seed(0)
    if name == "vae_encoder":
        pixels = torch.randint(0, 256, (1, 64, 48, 3), generator=rng, dtype=torch.uint8)
        found, wanted = run(graph, VaeEncoderGraph(vae), {"pixels": pixels})
        assert found.isfinite().all()
        assert (found - wanted).norm() < 0.01 * wanted.norm()
    else:
        latents = torch.randn(1, 4, 3, 64, generator=rng)
        found, wanted = run(graph, VaeDecoderGraph(vae), {"latents": latents})
        assert (found.int() - wanted.int()).abs().max() <= 1
        assert wanted.int().amax() - wanted.int().amin() > 20  # not one colour
    assert set(kinds(graph, "Conv").values()) == {onnx.TensorProto.FLOAT}


def test_another_vae_is_fp16(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    config = tmp_path / "model" / "vae" / "config.json"
    config.write_text(config.read_text().replace('"force_upcast": true', '"force_upcast": false'))
    graph = exported(find(tmp_path / "model", {}), "vae_decoder")
    assert set(kinds(graph, "Conv").values()) == {onnx.TensorProto.FLOAT16}
