"""Nodes of our own domain: names that nobody else has, bodies that compute what torch does."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from fluxkontext.export.functions import DOMAIN, bodies
from fluxkontext.kernels.modulate import modulate_ref
from fluxkontext.kernels.norm_rope import norm_rope_ref, rope_table
from fluxkontext.kernels.nvfp4 import pack, unpack
from fluxkontext.kernels.quantize import quantize_rows_ref

OURS = sorted({body.name for body in bodies("cpu") if body.domain == DOMAIN})


@pytest.mark.parametrize("name", OURS)
def test_names_are_nobody_elses(name: str) -> None:
    """TensorRT's parser ignores the domain of a node whose name it knows."""
    schemas = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    assert name not in schemas


@pytest.mark.parametrize("name", OURS)
def test_names_are_not_tensorrts(name: str) -> None:
    trt: Any = pytest.importorskip("tensorrt_rtx_bindings", reason="needs TensorRT-RTX's parser")
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.supports_operator("Gelu")
    assert not parser.supports_operator(name)


def test_graphs_have_our_nodes(small_bundle: Path) -> None:
    """A block's norms are one node each; the bodies lie in the same file, no node without one."""
    for flavour in ("cpu", "gpu"):
        model = onnx.load(small_bundle / f"transformer.{flavour}.onnx", load_external_data=False)
        found = [node.op_type for node in model.graph.node if node.domain == DOMAIN]
        # queries and keys of two streams and of a single block; norms: 4, then 1 and the last
        assert {name: found.count(name) for name in found} == {"NormRope": 6, "NormModulate": 6}
        assert {function.name for function in model.functions} == set(found)
        operators = {node.op_type for node in model.graph.node}
        assert "Attention" in operators
        assert not {"RMSNormalization", "LayerNormalization"} & operators


def run(body: str, flavour: str, inputs: dict[str, torch.Tensor], **attributes: Any) -> Any:
    """One node of ours in a graph of its own, by ONNX Runtime where it can and ONNX's evaluator."""
    (function,) = (f for f in bodies(flavour) if f.name == body)
    kinds = {
        torch.float32: onnx.TensorProto.FLOAT,
        torch.bfloat16: onnx.TensorProto.BFLOAT16,
        torch.uint8: onnx.TensorProto.UINT8,
        torch.float8_e4m3fn: onnx.TensorProto.FLOAT8E4M3FN,
    }
    tensors = [
        onnx.helper.make_tensor(
            name,
            kinds[tensor.dtype],
            tensor.shape,
            tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
            raw=True,
        )
        for name, tensor in inputs.items()
    ]
    node = onnx.helper.make_node(body, list(inputs), ["y"], domain=DOMAIN, **attributes)
    shape = [None] * next(iter(inputs.values())).ndim
    out = onnx.helper.make_tensor_value_info("y", kinds[next(iter(inputs.values())).dtype], shape)
    if body == "Nvfp4Weight":
        out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "one", [], [out], tensors),
        functions=[ir.to_proto(function)],
        opset_imports=[onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    (by_onnx,) = ReferenceEvaluator(model).run(None, {})
    if flavour == "cpu":
        options = ort.SessionOptions()
        options.log_severity_level = 3
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        (by_runtime,) = session.run(None, {})
        np.testing.assert_allclose(by_runtime, by_onnx, rtol=1e-5, atol=2e-6)
    return torch.from_numpy(np.asarray(by_onnx, np.float32))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("flavour", ["cpu", "gpu"])
@pytest.mark.parametrize("batch", [1, 3])
def test_norm_rope(flavour: str, batch: int) -> None:
    x, scale = random(batch, 7, 3, 32), random(32, seed=1)
    rope = rope_table(torch.arange(21).view(7, 3), (8, 12, 12), 1e4)
    inputs = {"x": x, "scale": scale, "rope": rope}
    found = run("NormRope", flavour, inputs, epsilon=1e-6, heads=3)
    torch.testing.assert_close(found, norm_rope_ref(x, scale, rope), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("flavour", ["cpu", "gpu"])
@pytest.mark.parametrize("batch", [1, 3])
def test_norm_modulate(flavour: str, batch: int) -> None:
    x, shift, scale = random(batch, 7, 48), random(batch, 1, 48, seed=1), random(batch, 1, 48)
    inputs = {"x": x, "shift": shift, "scale": scale}
    found = run("NormModulate", flavour, inputs, epsilon=1e-6, width=[48])
    torch.testing.assert_close(found, modulate_ref(x, shift, scale), rtol=1e-5, atol=2e-6)


def test_fp8_rows() -> None:
    x = random(2, 5, 64) * torch.tensor([1e-3, 1.0, 1e3, 30.0, 0.0])[:, None]
    values, scale = quantize_rows_ref(x)
    torch.testing.assert_close(run("Fp8Rows", "cpu", {"x": x}), values.float() * scale)


def test_nvfp4_blocks() -> None:
    """All midpoints between two numbers among random ones, small and large blocks."""
    x = random(2, 9, 64)
    x[0, 0, :16] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 2) * 448
    x[0, 1] *= 1e-6
    scale = x.abs().amax() / (6 * 448)
    wanted = unpack(pack(x.flatten(0, 1), scale)).view_as(x)
    assert torch.equal(run("Nvfp4Blocks", "cpu", {"x": x, "scale": scale}), wanted)


def test_nvfp4_weight() -> None:
    packed = pack(random(24, 64))
    inputs = {
        "packed": packed.packed,
        "block_scale": packed.block_scale,
        "scale": packed.scale,
    }
    found = run("Nvfp4Weight", "cpu", inputs)
    torch.testing.assert_close(found, unpack(packed), rtol=2e-7, atol=0)
