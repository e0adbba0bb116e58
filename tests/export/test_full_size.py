"""The published shapes: export within its memory, blocks compiled for real by TensorRT-RTX."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path, PurePosixPath
from time import perf_counter
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch

from fluxkontext.export.calibration import Calibration
from fluxkontext.export.components import graphs
from fluxkontext.export.engines import compiler
from fluxkontext.export.engines.blame import blamed
from fluxkontext.export.functions import graph_ops
from fluxkontext.export.onnx_graph import attached, trace_graph
from fluxkontext.runtime.checkpoint import find
from fluxkontext.runtime.contract import GRAPHS, Profile, Workload
from fluxkontext.runtime.geometry import Grid

from .full_size import write_blocks, write_full_model

MEMORY_LIMIT = 4 * 2**30
HEADS = 24
ATTENTION = Calibration(
    "blocks",
    100.0,
    {f"{block}.{part}": 8.0 for block in ("double_blocks.0", "single_blocks.0") for part in "qkv"},
    {},
)
WORKLOADS = {
    "one edit": Workload(((1024, 1024),), (1, 1), 1, 512, static=True),
    # what `build` compiles for unasked: the golden edit is the smallest
    "edits": Workload(((1024, 1024), (128, 128)), (0, 2), 1, 512),
    # from 17 tokens on; TensorRT-RTX 1.7 has a kernel for attention in FP8 from 32
    "tiny": Workload(((1024, 1024), (64, 64)), (0, 2), 1, 512),
}


@pytest.mark.slow
def test_a_whole_export_fits_in_memory(
    small_model: Path, tmp_path: Path, namespace_env: dict[str, str]
) -> None:
    """34 GB of weights, none of which is read but for its digest. Linux counts in KiB."""
    write_full_model(tmp_path / "full", small_model)
    code = (
        "import json, resource, sys; from pathlib import Path\n"
        "from fluxkontext.runtime.checkpoint import find\n"
        "from fluxkontext.export.bundle import write_bundle\n"
        "write_bundle(find(sys.argv[1], {}), Path(sys.argv[2]))\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(json.dumps([used.ru_maxrss * 1024, used.ru_utime + used.ru_stime]))\n"
    )
    start = perf_counter()
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path / "full"), str(tmp_path / "bundle")],
        env=namespace_env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak, processor = json.loads(done.stdout)
    elapsed = perf_counter() - start
    print(f"{peak / 2**30:.2f} GiB, {elapsed:.0f} s, of a processor {processor:.0f} s")
    assert peak < MEMORY_LIMIT


@pytest.fixture(scope="module")
def blocks(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Recipe -> the GPU graph of a double and a single block; with attention in FP8, too."""
    made: dict[str, Path] = {}
    trace: ir.Model | None = None  # the same for all
    for recipe in (None, "fp8-static", "nvfp4-w4a16", "nvfp4-w4a4"):
        folder = tmp_path_factory.mktemp("blocks") / "model"
        write_blocks(folder, small_model, recipe)
        found = graphs(find(folder, {}), torch.bfloat16, graph_ops())
        graph = next(graph for graph in found if graph.name == "transformer")
        trace = trace or trace_graph(graph)
        file = next(iter(graph.component.weights.tensors.values())).file
        places = {file: PurePosixPath("transformer", file.name)}
        kinds = {recipe or "bf16": None}
        if recipe == "fp8-static":
            kinds["fp8-static attention"] = ATTENTION
        for name, calibration in kinds.items():
            model = ir.Model(trace.graph.clone(), ir_version=10)
            made[name] = folder / f"{name}.gpu.onnx"
            ir.save(attached(model, graph, "gpu", places, calibration), made[name])
    return made


def profile_of(graph: Path, workload: str) -> Profile:
    """The shapes for which ``graph`` is compiled."""
    inputs = onnx.load(graph, load_external_data=False).graph.input
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in inputs
    }
    specs = {
        name: replace(spec, shape=tuple(shapes[name]))
        for name, spec in GRAPHS["transformer"][0].items()
    }
    return WORKLOADS[workload].profile("transformer", specs, Grid())


def compile_graph(
    graph: Path, target: str, workload: str = "one edit", decomposable: bool = False
) -> dict[str, Any]:
    """The last event of the compiler, the seconds that it took, and the bytes of activations."""
    pytest.importorskip(
        "tensorrt_rtx_bindings", reason="needs the TensorRT-RTX wheels: extra tensorrt-rtx"
    )
    log = graph.with_suffix(f".{target}.log")
    job = {
        "graph": str(graph),
        "engine": str(graph.with_suffix(f".{target}.engine")),
        "log": str(log),
        "profile": profile_of(graph, workload),
        "target": target,
        "level": 3,
        "decomposable": decomposable,
        "timing_cache": None,
        "plugin": None,
    }
    start = perf_counter()
    done = subprocess.run(
        [sys.executable, "-P", str(compiler.__file__), "tensorrt_rtx_bindings"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    events = [line for line in done.stdout.splitlines() if line.startswith("{")]
    event: dict[str, Any] = json.loads(events[-1])
    said = re.search(r"Total Activation Memory: (\d+) bytes", log.read_text(encoding="utf-8"))
    memory = int(said[1]) if said else None
    return {**event, "seconds": perf_counter() - start, "memory": memory}


def probabilities(workload: str) -> int:
    """Bytes of one matrix of all tokens by all tokens for each head, in FP8."""
    axes = WORKLOADS[workload].axes(Grid())
    tokens = axes["text_tokens"][2] + axes["image_tokens"][2]
    return HEADS * tokens**2


@pytest.mark.parametrize(
    ("recipe", "target", "workload"),
    [
        ("bf16", "sm_89", "one edit"),
        ("bf16", "sm_120", "one edit"),
        ("fp8-static", "sm_89", "one edit"),
        ("fp8-static", "sm_120", "one edit"),
        ("fp8-static attention", "sm_89", "one edit"),
        ("fp8-static attention", "sm_120", "one edit"),
        ("fp8-static attention", "sm_89", "edits"),
        ("fp8-static attention", "sm_120", "edits"),
        ("nvfp4-w4a16", "sm_120", "one edit"),
        ("nvfp4-w4a4", "sm_120", "one edit"),
    ],
)
def test_full_size_blocks_compile(
    recipe: str, target: str, workload: str, blocks: dict[str, Path]
) -> None:
    """Attention in one kernel, quantised weights as they are stored."""
    event = compile_graph(blocks[recipe], target, workload)
    print(f"{recipe} for {target}: {event}")
    assert event.get("done", 0) > 2**20, event
    assert event["memory"] < probabilities(workload)


def test_fp8_attention_without_a_kernel_is_refused(blocks: dict[str, Path]) -> None:
    """Taken apart it would hold matrices of all tokens by all tokens, and the memory shows it."""
    graph = blocks["fp8-static attention"]
    event = compile_graph(graph, "sm_89", "tiny")
    assert blamed(graph, event["failed"]) == (
        "node double_blocks.0.attention (TRT_QuantizedAttention)"
    )
    event = compile_graph(graph, "sm_89", "tiny", decomposable=True)
    assert event["memory"] > probabilities("tiny")


def test_the_compiler_refuses_fp4_on_ada(blocks: dict[str, Path]) -> None:
    """It says so, but not where: that is why the build looks first (test_quantised_graphs)."""
    event = compile_graph(blocks["nvfp4-w4a4"], "sm_89")
    assert "fp4_e2m1" in event["failed"]
