"""The GPU graphs of the miniature that ships, in bf16, run by ONNX's own evaluator.

No runtime for CPUs has these types; what they compute is compared with the graphs for CPUs.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from fluxkontext.runtime.bundle import read_manifest
from fluxkontext.runtime.checkpoint import MINI_FOLDER

SIZES = {
    "batch": 1, "steps": 2, "clip_tokens": 9, "text_tokens": 7,
    "target_tokens": 16, "context_tokens": 16, "image_tokens": 32,
}  # fmt: skip
PIXELS = (1, 32, 48, 3)
LATENTS = (1, 2, 3, 64)
ERRORS = {"clip": 0.02, "t5": 0.03, "vae_encoder": 0.02, "modulation": 0.01, "transformer": 0.05}
"""The most relative error of bf16, some twice what it is."""
LEVELS = 4
"""The same of the decoder's pixels."""


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of their own: the evaluator refuses hard links, which a checkout may have."""
    return Path(shutil.copytree(MINI_FOLDER, tmp_path_factory.mktemp("evaluated") / "mini"))


def inputs(graph: Path, name: str) -> dict[str, NDArray[Any]]:
    """Noise, tokens and a grid of 4 by 4 tokens beside another."""
    rng = np.random.default_rng(0)
    if name == "vae_encoder":
        return {"pixels": rng.integers(0, 256, PIXELS, np.uint8)}
    if name == "vae_decoder":
        return {"latents": rng.standard_normal(LATENTS).astype(np.float32)}
    arrays: dict[str, NDArray[Any]] = {}
    for value in onnx.load(graph, load_external_data=False).graph.input:
        dims = value.type.tensor_type.shape.dim
        shape = [SIZES.get(dim.dim_param, dim.dim_value) for dim in dims]
        if value.name == "ids":
            arrays["ids"] = rng.integers(1, 100, shape)
        else:
            arrays[value.name] = np.asarray(rng.standard_normal(shape), np.float32)
    if name == "modulation":
        arrays |= {"sigmas": np.float32([1, 0.5]), "guidance": np.float32([2.5])}
    if name == "transformer":
        grid = [[i // 16, i % 16 // 4, i % 4] for i in range(SIZES["image_tokens"])]
        arrays |= {"positions": np.array(grid, np.int32), "modulation": 0.3 * arrays["modulation"]}
    return arrays


@pytest.mark.parametrize("name", [*ERRORS, "vae_decoder"])
def test_gpu_graphs_compute_what_cpu_graphs_do(name: str, mini: Path) -> None:
    assert read_manifest(mini)["precision"]["gpu"] == "bf16"
    graph = mini / f"{name}.gpu.onnx"
    output = {"transformer": "velocity"}.get(name)
    arrays = inputs(graph, name)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    cpu = ort.InferenceSession(
        mini / f"{name}.cpu.onnx", options, providers=["CPUExecutionProvider"]
    )
    names = [output] if output else None
    (found,) = ReferenceEvaluator(str(graph)).run(names, arrays)
    (wanted,) = cpu.run(names, arrays)
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    found, wanted = found.astype(np.float32), wanted.astype(np.float32)
    if name == "vae_decoder":
        error = np.abs(found - wanted).max()
        print(f"{name}: at most {error:.0f} levels of 255")
        assert error <= LEVELS
        assert np.ptp(wanted) > 20  # not one colour
    else:
        error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        print(f"{name}: {error:.2%}")
        assert 1e-4 < error < ERRORS[name]
