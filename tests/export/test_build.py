"""``build``, with TensorRT-RTX's own compiler: real engines, resumed, shared, and refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from fluxkontext.export.build import Order, build, engines_of, recipe_for, workload_for
from fluxkontext.export.engines.compile import Engine, compile_engine, finished
from fluxkontext.export.engines.install import (
    EngineSet,
    compile_all,
    discard,
    install,
    need,
)
from fluxkontext.export.prepare import Source, bundle_once, stages_folder
from fluxkontext.runtime import InvalidInputError, KontextError
from fluxkontext.runtime.bundle import file_entry, open_bundle, read_manifest, update_manifest
from fluxkontext.runtime.cli import main
from fluxkontext.runtime.contract import GRAPHS
from fluxkontext.runtime.engines import RTX_TARGETS, installed
from fluxkontext.runtime.errors import BackendUnavailableError

trt: Any = pytest.importorskip(
    "tensorrt_rtx_bindings", reason="needs the TensorRT-RTX wheels: extra tensorrt-rtx"
)
SIZES = ((64, 64), (128, 64))
SETS = {"sm_120": "tensorrt-rtx-sm_120", "sm_89": "tensorrt-rtx-sm_89"}


def silent(_: str) -> None:
    """Nobody is told."""


def order(out: Path, target: str = "sm_120", **changes: Any) -> Order:
    return Order(out, "tensorrt-rtx", target, SIZES, golden="never", **changes)


def copied(bundle: Path, out: Path) -> Path:
    """Hard links, as each file is replaced and never written into."""
    shutil.copytree(bundle, out, copy_function=os.link)
    return out


@pytest.fixture(scope="module")
def built(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with engines for two GPUs; copy it before changing anything."""
    root = copied(small_bundle, tmp_path_factory.mktemp("built") / "bundle")
    for target in SETS:
        facts = build(None, order(root, target), silent)
        assert facts["qualified"] is False
    return root


def engine(root: Path, component: str = "clip") -> Engine:
    bundle = open_bundle(root, engines=False)
    work = workload_for(bundle, SIZES, (0, 2), 1, False)
    recipe = recipe_for("tensorrt-rtx", "sm_120", bundle.precision("gpu"))
    return next(it for it in engines_of(bundle, recipe, work) if it.component == component)


def test_every_component_has_an_engine(built: Path) -> None:
    manifest = open_bundle(built, "always").manifest
    assert sorted(manifest["engines"]) == sorted(SETS.values())
    for target, name in SETS.items():
        entry = manifest["engines"][name]
        assert entry["version"] == installed()["tensorrt-rtx"].version == trt.__version__
        assert (entry["target"], entry["precision"]) == (target, "bf16")
        assert entry["qualified"] == {}
        assert set(entry["components"]) == set(GRAPHS)
        for component, part in entry["components"].items():
            file = built / part["file"]
            assert part["file"] in manifest["files"]
            assert part["key"].startswith(file.stem.rpartition("-")[2])
            assert "Compiler backend" in file.with_suffix(".log").read_text()
            assert set(part["profile"]) == set(GRAPHS[component][0])


def test_engines_hold_their_weights_in_the_graphs_precision(built: Path) -> None:
    """The estimate of what they need is close for weights, and a few megabytes of code besides."""
    for component in ("transformer", "vae_decoder"):
        it = engine(built, component)
        weights = need([Engine(it.bundle, component, it.recipe, {**it.profile, "x": ()})]).disk
        assert weights < it.file.stat().st_size < weights + 2**23


def test_a_second_run_compiles_nothing(built: Path, tmp_path: Path) -> None:
    root = copied(built, tmp_path / "bundle")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.engine")}
    manifest = (root / "manifest.json").read_text()
    said: list[str] = []
    build(None, order(root), said.append)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.engine")} == before
    assert (root / "manifest.json").read_text() == manifest
    assert len(before) == 12
    assert any("needs about 0.00 GiB on disk" in line for line in said)


def test_other_sizes_replace_the_set(built: Path, tmp_path: Path) -> None:
    root = copied(built, tmp_path / "bundle")
    old = read_manifest(root)["engines"][SETS["sm_120"]]["components"]
    bundle = open_bundle(root)
    work = workload_for(bundle, [(96, 96)], (1, 1), 1, True)
    recipe = recipe_for("tensorrt-rtx", "sm_120", "bf16")
    install(root, compile_all(engines_of(bundle, recipe, work), work, silent), None)
    manifest = open_bundle(root, "always").manifest
    new = manifest["engines"][SETS["sm_120"]]["components"]
    assert not (root / old["transformer"]["file"]).exists()
    assert old["transformer"]["file"] not in manifest["files"]
    assert new["transformer"]["profile"]["latents"][0] == [1, 36, 64]
    assert new["clip"] == old["clip"]  # what sizes do not change is kept
    assert (built / old["transformer"]["file"]).exists()


def test_engines_that_are_wrong_leave_the_old_ones(built: Path, tmp_path: Path) -> None:
    root = copied(built, tmp_path / "bundle")
    name = SETS["sm_120"]
    before = read_manifest(root)
    parts = before["engines"][name]["components"]
    shared = parts["clip"]["file"]
    fresh = str(Path(shared).with_name("transformer-0123456789abcdef.engine"))
    for suffix in (".engine", ".json", ".log"):
        (root / fresh).with_suffix(suffix).write_text("x")
    entry = {**before["engines"][name], "components": {}}
    files = {file: file_entry(root / file) for file in (shared, fresh)}
    discard(root, EngineSet(name, entry, files))
    assert open_bundle(root, "always").manifest == before
    assert not (root / fresh).exists()
    assert not (root / fresh).with_suffix(".json").exists()  # or it would pass for finished
    assert (root / fresh).with_suffix(".log").exists()


def test_engines_that_are_wrong_are_no_longer_named(built: Path, tmp_path: Path) -> None:
    root = copied(built, tmp_path / "bundle")
    before = read_manifest(root)
    entry = before["engines"][SETS["sm_120"]]
    files = {part["file"]: {} for part in entry["components"].values()}
    discard(root, EngineSet(SETS["sm_120"], entry, files))
    after = open_bundle(root, "always").manifest
    assert set(after["engines"]) == {SETS["sm_89"]}
    assert set(before["files"]) - set(after["files"]) == set(files)
    assert not any((root / file).exists() for file in files)


@pytest.mark.parametrize("damage", ["gone", "flipped", "no note"])
def test_only_what_is_damaged_is_built_again(built: Path, tmp_path: Path, damage: str) -> None:
    root = copied(built, tmp_path / "bundle")
    it = engine(root)
    others = {p: p.stat().st_mtime_ns for p in root.rglob("*.engine") if p != it.file}
    data = bytearray(it.file.read_bytes())
    it.file.unlink()
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    if damage != "gone":
        it.file.write_bytes(data)
    if damage == "no note":
        it.file.with_suffix(".json").unlink()
    assert finished(it) is None
    build(None, order(root), silent)
    open_bundle(root, "always")
    assert all(path.stat().st_mtime_ns == time for path, time in others.items())


RUN = (
    "import sys; from pathlib import Path\n"
    "from fluxkontext.export.build import Order, build\n"
    "build(None, Order(Path(sys.argv[1]), 'tensorrt-rtx', 'sm_120', ((64, 64), (128, 64)),"
    " golden='never'), lambda text: print(text, file=sys.stderr, flush=True))\n"
    "print('built', flush=True)"
)


def started(root: Path, env: dict[str, str], cwd: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(root)],
        env=env,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_build_that_is_killed_resumes(
    small_bundle: Path, tmp_path: Path, namespace_env: dict[str, str], how: signal.Signals
) -> None:
    root = copied(small_bundle, tmp_path / "bundle")
    process = started(root, namespace_env, tmp_path)
    folder = root / "engines" / SETS["sm_120"]
    until = time.monotonic() + 120
    while not list(folder.glob("t5-*.engine")):  # one is done, more are to come
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(how)
    out, _ = process.communicate(timeout=60)
    assert "built" not in out
    manifest = open_bundle(root, "always").manifest  # as it was
    assert manifest == read_manifest(small_bundle)
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.engine")}
    build(None, order(root), silent)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert set(open_bundle(root, "always").manifest["engines"]) == {SETS["sm_120"]}
    left = {path.suffix for path in folder.iterdir()}
    assert left == {".engine", ".json", ".log"}, left


def test_two_processes_build_each_engine_once(
    small_bundle: Path, tmp_path: Path, namespace_env: dict[str, str]
) -> None:
    root = copied(small_bundle, tmp_path / "bundle")
    both = [started(root, namespace_env, tmp_path) for _ in range(2)]
    results = [process.communicate(timeout=240) for process in both]
    assert [out for out, _ in results] == ["built\n"] * 2, results
    open_bundle(root, "always")
    engines = list((root / "engines").rglob("*.engine"))
    assert len(engines) == len(GRAPHS)
    for file in engines:  # the note was written before the engine took its name, and by its builder
        assert json.loads(file.with_suffix(".json").read_text()) == file_entry(file)


def with_node(root: Path, node: onnx.NodeProto) -> None:
    """Make the clip graph of a bundle end in ``node``, which reads ``almost``."""
    file = root / "clip.gpu.onnx"
    model = onnx.load(file, load_external_data=False)
    for found in model.graph.node:
        for i, name in enumerate(found.output):
            if name == "pooled":
                found.output[i] = "almost"
    model.graph.node.append(node)
    file.unlink()
    onnx.save(model, file)
    update_manifest(root, lambda it: it["files"].update({file.name: file_entry(file)}))


@pytest.mark.parametrize(
    ("node", "found"),
    [
        (
            onnx.helper.make_node("Unheard", ["almost"], ["pooled"], "the_odd_one", domain="x"),
            r"node the_odd_one \(Unheard\)",
        ),
        (
            onnx.helper.make_node("StringNormalizer", ["almost"], ["pooled"], "the_text"),
            r"node the_text \(StringNormalizer\)",
        ),
        (
            onnx.helper.make_node("Cast", ["almost"], ["pooled"], "to_e5m2", to=19),
            r"node to_e5m2 \(Cast\)",
        ),
    ],
    ids=["unknown", "unsupported", "type"],
)
def test_a_node_that_the_compiler_refuses_is_named(
    small_bundle: Path, tmp_path: Path, node: onnx.NodeProto, found: str
) -> None:
    root = copied(small_bundle, tmp_path / "bundle")
    with_node(root, node)
    manifest = (root / "manifest.json").read_text()
    with pytest.raises(KontextError, match=found) as caught:
        build(None, order(root), silent)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    assert (root / "manifest.json").read_text() == manifest
    assert not list(root.rglob("*.engine"))
    assert not list(root.rglob("*.partial"))


def test_a_type_that_the_target_lacks_is_found_at_its_node(
    small_bundle: Path, tmp_path: Path
) -> None:
    """FP4 on Ada: the compiler would say no more than the type."""
    root = copied(small_bundle, tmp_path / "bundle")
    with_node(root, onnx.helper.make_node("MatMul", ["almost", "plain"], ["pooled"], "product"))
    file = root / "clip.gpu.onnx"
    model = onnx.load(file, load_external_data=False)
    width = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    packed, one = bytes(width * width // 2), np.ones((width, width // 16), np.float32)
    model.graph.initializer.extend(
        [
            onnx.helper.make_tensor(
                "packed", onnx.TensorProto.FLOAT4E2M1, [width, width], packed, raw=True
            ),
            onnx.numpy_helper.from_array(one, "scale"),
        ]
    )
    unpack = onnx.helper.make_node(
        "DequantizeLinear", ["packed", "scale"], ["plain"], "unpack", axis=-1, block_size=16
    )
    model.graph.node.insert(0, unpack)
    file.unlink()
    onnx.save(model, file)
    update_manifest(root, lambda it: it["files"].update({file.name: file_entry(file)}))
    with pytest.raises(KontextError, match="formats of sm_89, found FLOAT4E2M1 in node unpack"):
        build(None, order(root, "sm_89"), silent)
    compile_engine(engine(root), silent, lambda: None)  # on Blackwell it is an engine


@pytest.mark.parametrize("name", GRAPHS)
def test_the_parser_knows_every_operator(small_bundle: Path, name: str) -> None:
    """Asked one by one: TensorRT-RTX's parser is TensorRT's own. Functions are asked by body."""
    model = onnx.load(small_bundle / f"{name}.gpu.onnx", load_external_data=False)
    nodes = [*model.graph.node, *(node for f in model.functions for node in f.node)]
    own = {(function.domain, function.name) for function in model.functions}
    operators = {node.op_type for node in nodes if (node.domain, node.op_type) not in own}
    assert len(operators) > 5
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    flag = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    parser = trt.OnnxParser(trt.Builder(logger).create_network(flag), logger)
    assert not [it for it in sorted(operators) if not parser.supports_operator(it)]
    assert not parser.supports_operator("Unheard")


def test_targets_are_the_compilers_own() -> None:
    capabilities = set(trt.ComputeCapability.__members__) - {"NONE", "CURRENT"}
    assert {target.upper().replace("_", "") for target in RTX_TARGETS} == capabilities


def test_what_is_missing_is_said_before_any_work(small_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["build", str(small_model), "-o", str(out), "--size", "64x64"]
    rtx = [*arguments, "--engine", "tensorrt-rtx"]
    assert main([*rtx, "--target", "sm_90"]) == 2  # none that it compiles for
    assert main([*rtx, "--target", "sm_120", "--static"]) == 2  # of 0 to 2 contexts
    if "tensorrt" not in installed():
        assert main([*arguments, "--engine", "tensorrt"]) == 1
        with pytest.raises(BackendUnavailableError, match=r"install .*fluxkontext\[tensorrt\]"):
            recipe_for("tensorrt", None, "bf16")
    assert not out.exists()


def test_another_bundle_is_not_overwritten(built: Path, small_model: Path) -> None:
    source = Source(str(small_model))
    with pytest.raises(InvalidInputError, match=r"in fp16, found one of .* in bf16"):
        build(source, order(built, precision="fp16"), silent)
    with pytest.raises(InvalidInputError, match="--precision: expected bf16"):
        build(None, order(built, precision="fp32"), silent)


def test_a_bundle_of_the_same_checkpoint_is_taken(built: Path, small_model: Path) -> None:
    said: list[str] = []
    bundle_once(Source(str(small_model)), built, "bf16", "link", said.append)
    assert said == [f"export: {built} is there"]


@pytest.mark.slow
def test_a_checkpoint_to_fp8_engines_in_one_command(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Calibrated, quantised, exported and compiled; run again, each of it is there."""
    out = tmp_path / "fp8"
    command = ["build", str(small_model), "-o", str(out), "--size", "64x64", "--precision", "fp8"]
    command += ["--engine", "tensorrt-rtx", "--target", "sm_89", "--calibration-steps", "1"]
    assert main([*command, "--json"]) == 0
    first = capsys.readouterr()
    stages = [line.partition(":")[0] for line in first.err.splitlines() if ": " in line]
    assert stages == ["calibrate", "quantise", "export", "golden edit", "compile", "qualify"]
    assert json.loads(first.out)["precision"] == "fp8"
    assert not stages_folder(out).exists()
    manifest = open_bundle(out, "always").manifest
    components = manifest["engines"]["tensorrt-rtx-sm_89"]["components"]
    engines = [part["file"] for part in components.values()]
    times = [(out / name).stat().st_mtime_ns for name in engines]
    assert main([*command, "--json"]) == 0
    assert "calibrate" not in capsys.readouterr().err
    assert [(out / name).stat().st_mtime_ns for name in engines] == times
    assert main(["doctor", str(out)]) == 0


def test_static_engines_have_one_size(built: Path) -> None:
    bundle = open_bundle(built)
    with pytest.raises(InvalidInputError, match="found 2 sizes"):
        order(built, contexts=(1, 1), static=True)
    with pytest.raises(InvalidInputError, match="0 to 2 contexts"):
        Order(built, "tensorrt-rtx", "sm_120", SIZES[:1], static=True)
    with pytest.raises(InvalidInputError, match="sides of 16 pixels"):
        workload_for(bundle, [(8, 64)], (1, 1), 1, False)


def test_an_engine_that_is_there_is_not_compiled(built: Path) -> None:
    steps: list[int] = []
    entry = compile_engine(engine(built), silent, lambda: steps.append(1))
    assert entry == read_manifest(built)["files"][engine(built).file.relative_to(built).as_posix()]
    assert not steps
