"""The kernel that a TensorRT plugin launches, for every GPU generation; no GPU, no TensorRT.

`.ci/tensorrt_plugin.py` runs the plugin itself by TensorRT's own Python code.
"""

import re
from pathlib import Path

import pytest
import torch

from fluxkontext.bench.kernel_cases import launches
from fluxkontext.export.build import Order
from fluxkontext.export.engines.compile import PLUGINS, Engine
from fluxkontext.export.engines.plugin import EPSILON
from fluxkontext.export.engines.plugin_kernel import DTYPES, integers, plugin_for, ptx_of
from fluxkontext.kernels.chips import CHIPS
from fluxkontext.kernels.norm_rope import EPS
from fluxkontext.kernels.ptx import SHARED_LIMIT, Ptx, _without, assemble, ptx_for
from fluxkontext.runtime import InvalidInputError, KontextError
from fluxkontext.runtime.bundle import open_bundle
from fluxkontext.runtime.cli import main
from fluxkontext.runtime.engines import Recipe

PRECISIONS = pytest.mark.parametrize("precision", DTYPES)
SMS = pytest.mark.parametrize("sm", CHIPS)


@PRECISIONS
@SMS
def test_the_text_is_all_that_a_launch_needs(precision: str, sm: int) -> None:
    """Read from the PTX itself, not from what Triton says of it."""
    ptx = ptx_of(24, 128, DTYPES[precision][0], sm)
    (listed,) = re.findall(rf"\.entry {ptx.name}\((.*?)\)", ptx.text, re.DOTALL)
    kinds = re.findall(r"\.param \.(\w+)", listed)
    assert kinds == ["u64"] * 3 + ["u32"] * 13 + ["u64"]
    assert len(integers(ptx)) == 13
    assert re.findall(r"\.reqntid (\d+)", ptx.text) == [str(ptx.threads)] == ["128"]
    assert ".shared" not in ptx.text
    assert ptx.shared == 0
    assert re.findall(r"\.target (\w+)", ptx.text)[0].rstrip("a") == f"sm_{sm}"
    assert ".loc" not in ptx.text
    assert "/" not in ptx.text  # of no file of this machine
    assert len(assemble(ptx, CHIPS[sm])) > 1000


@SMS
def test_wide_loads(sm: int) -> None:
    """16 bytes a thread: the addresses' alignment was taken into the code."""
    text = ptx_of(24, 128, torch.bfloat16, sm).text
    assert "ld.global.v4.b32" in text
    assert "st.global.v4.b32" in text


def test_shared_memory_is_found_in_the_text() -> None:
    """Of other kernels: it is asked for at the launch, and refused beyond what needs no asking."""
    found = dict(launches(CHIPS[89]))
    ptx = ptx_for(found["gelu bf16 rows"], CHIPS[89])
    assert ".extern .shared" in ptx.text
    assert 0 < ptx.shared <= SHARED_LIMIT
    with pytest.raises(ValueError, match=f"at most {SHARED_LIMIT} bytes of shared memory, found"):
        ptx_for(found["linear_fp8 tensor"], CHIPS[89])


def test_a_scratch_pointer_that_is_used_is_not_stripped() -> None:
    used = ".entry k(\n.param .u64 a,\n.param .u64 b\n) { ld.param.b64 %rd1, [b]; }"
    with pytest.raises(ValueError, match="does without b, found a use"):
        _without(used, ["b"])
    assert _without(used.replace("[b]", "[a]"), ["b"]).count(".param .u64") == 1


@pytest.mark.parametrize(
    "names", [["x_ptr", "scale_ptr", "rope_ptr", "out_ptr", "tokens"], ["x_ptr", "out_ptr"]]
)
def test_another_order_of_parameters_is_refused(names: list[str]) -> None:
    kinds = {name: "pointer" if name.endswith("_ptr") else "int32" for name in names}
    with pytest.raises(ValueError, match="expected inputs, integers, outputs"):
        integers(Ptx("k", "", kinds, 128, 0))


def test_a_graph_says_what_its_kernel_is_for(small_bundle: Path) -> None:
    kernel = plugin_for(small_bundle / "transformer.gpu.onnx", "bf16", "sm_120")
    assert kernel is not None
    assert (kernel["heads"], kernel["dim"], kernel["dtype"]) == (1, 128, "BF16")
    assert "heads" not in kernel["integers"]  # one: it is in the code
    assert plugin_for(small_bundle / "clip.gpu.onnx", "bf16", "sm_120") is None
    with pytest.raises(KontextError, match=r"--plugins: expected a GPU of one of sm_80, .* sm_75"):
        plugin_for(small_bundle / "transformer.gpu.onnx", "bf16", "sm_75")
    assert EPSILON == EPS


def test_an_engine_with_it_is_another(small_bundle: Path) -> None:
    bundle = open_bundle(small_bundle)
    keys = set()
    for component in ("clip", "transformer"):
        for flags in ((), (PLUGINS,)):
            recipe = Recipe("tensorrt", "11.4.0.106", "sm_90", None, "bf16", flags)
            engine = Engine(bundle, component, recipe, {})
            assert (engine.plugin is not None) is (component == "transformer" and bool(flags))
            keys.add(engine.key)
    assert len(keys) == 4


def test_tensorrt_rtx_takes_none(small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="--plugins: expected --engine tensorrt"):
        Order(tmp_path, "tensorrt-rtx", "sm_120", ((64, 64),), plugins=True)
    command = ["build", str(small_model), "-o", str(tmp_path / "out"), "--size", "64x64"]
    assert main([*command, "--engine", "tensorrt-rtx", "--plugins"]) == 2
    assert not (tmp_path / "out").exists()
