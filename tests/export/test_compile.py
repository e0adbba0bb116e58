"""What a failed compilation says, beyond what real compilers are asked for elsewhere."""

import shutil
from pathlib import Path

import onnx
import pytest

from fluxkontext.export.engines.compile import Engine, _check
from fluxkontext.runtime import KontextError
from fluxkontext.runtime.bundle import open_bundle
from fluxkontext.runtime.engines import Recipe

FAILED = "Error Code 10: could not find any implementation for Attention operation"
REFUSED = {"node": "a", "operator": "TRT_QuantizedAttention", "message": "no plugin"}


@pytest.mark.parametrize("event", [{"failed": FAILED}, {"refused": [REFUSED]}], ids=str)
def test_a_compiler_without_fp8_attention_is_helped(
    event: dict[str, object], small_bundle: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(small_bundle, tmp_path / "bundle"))
    graph = root / "transformer.gpu.onnx"
    model = onnx.load(graph, load_external_data=False)
    recipe = Recipe("tensorrt", "11.4.0.106", "sm_90", None, "fp8", ())
    engine = Engine(open_bundle(root), "transformer", recipe, {})
    advice = "build it without, with --attention 16bit and another -o"
    if "failed" in event:  # attention in 16 bits, which nothing can replace
        with pytest.raises(KontextError, match=r"\(Attention\)") as caught:
            _check(engine, event, 1, "")
        assert advice not in str(caught.value)
    for node in model.graph.node:
        node.op_type = "TRT_QuantizedAttention" if node.op_type == "Attention" else node.op_type
    onnx.save(model, graph)
    with pytest.raises(KontextError, match=advice):
        _check(engine, event, 1, "")
