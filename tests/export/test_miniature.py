"""The miniature that ships, a bundle: its pictures beside the native model's, and its time."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
import torch
from PIL import Image

from fluxkontext.bench.mini.instructions import EDIT_KINDS, draw_sample
from fluxkontext.bench.mini.scenes import render
from fluxkontext.export.build import Order, build
from fluxkontext.runtime import KontextPipeline
from fluxkontext.runtime.bundle import open_bundle
from fluxkontext.runtime.checkpoint import MINI_FOLDER
from fluxkontext.runtime.contract import GRAPHS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="binds itself to one core"),
]
EDITS = 10
CORES = 2
SECONDS = 4.0
"""From the start of a process to its picture, on that many cores."""
WITHOUT_TORCH = """
import sys
sys.modules.update(torch=None, triton=None, onnx=None)
from fluxkontext.runtime.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def one_core() -> Iterator[None]:
    """Both backends have one thread, whatever else runs on this machine."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {max(cores)})
    torch.set_num_threads(1)
    yield
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_core")
def test_ten_held_out_edits_are_the_native_ones() -> None:
    """Within one level of 255, and warm no slower: the fastest of each edit, in turns."""
    onnx = KontextPipeline.from_pretrained("mini", device="cpu")
    native = KontextPipeline.from_pretrained(
        "mini", backend="native", precision="fp32", device="cpu"
    )
    assert (onnx.about["backend"], onnx.about["precision"]) == ("onnx", "fp32")
    rng = np.random.default_rng(0)
    ratios, spread = [], []
    for number in range(EDITS):
        sample = draw_sample(rng, EDIT_KINDS[number % len(EDIT_KINDS)], "held_out")
        (scene,) = sample.contexts
        times: dict[KontextPipeline, list[float]] = {onnx: [], native: []}
        pictures = {}
        for round_ in range(3):
            for pipe in (onnx, native) if round_ % 2 else (native, onnx):
                start = perf_counter()
                (picture,) = pipe(render(scene), sample.text, seed=number).images
                times[pipe].append(perf_counter() - start)
                pictures[pipe] = np.asarray(picture, np.int16)
        assert np.abs(pictures[onnx] - pictures[native]).max() <= 1
        spread.append(np.ptp(pictures[native]))
        ratios.append(min(times[onnx]) / min(times[native]))
    print(f"onnx / native on one core, fastest of 3: {ratios}")
    assert min(spread) > 20  # not one colour, which any code could draw
    assert np.median(ratios) <= 1


def test_a_process_without_torch_is_quick(tmp_path: Path, namespace_env: dict[str, str]) -> None:
    """28 steps, process and all. Counted in processor time, which others' work does not change."""
    Image.fromarray(render(draw_sample(np.random.default_rng(0), "nothing").contexts[0])).save(
        tmp_path / "scene.png"
    )
    command = [sys.executable, "-P", "-c", WITHOUT_TORCH, "edit", "scene.png", "-p", "nothing"]
    command += ["-o", "out.png", "--quiet"]
    spent = []
    for _ in range(2):  # the first may find files and byte code cold
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), perf_counter()
        subprocess.run(command, env=namespace_env, cwd=tmp_path, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        spent.append(used)
        print(f"{perf_counter() - start:.2f} s, of a processor {used:.2f} s")
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (128, 128)
    assert min(spent) < SECONDS * CORES


@pytest.mark.parametrize("target", ["sm_89", "sm_120"])
def test_engines_for_gpus_that_are_not_here(target: str, tmp_path: Path) -> None:
    """TensorRT-RTX's compiler takes every graph, for every number of contexts."""
    pytest.importorskip("tensorrt_rtx_bindings", reason="needs the extra tensorrt-rtx")
    root = tmp_path / "bundle"
    shutil.copytree(MINI_FOLDER, root)
    facts = build(None, Order(root, "tensorrt-rtx", target, ((128, 128),)), lambda _: None)
    assert (facts["target"], facts["precision"]) == (target, "bf16")
    manifest = open_bundle(root, "always").manifest
    entry = manifest["engines"][facts["engines"]]
    assert set(entry["components"]) == set(GRAPHS)
    assert bool(entry["qualified"]) is facts["qualified"]
