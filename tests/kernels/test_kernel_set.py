"""Implementations are chosen once, best first, and one that is named is never replaced."""

import dataclasses

import pytest
import torch

from fluxkontext.kernels import KernelSet, candidates, proven, reference
from fluxkontext.kernels.candidates import CANDIDATES, Candidate, Situation, usable
from fluxkontext.kernels.chips import CHIPS
from fluxkontext.kernels.quantize import Rows, quantize_rows_ref

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BF16 = torch.bfloat16
Named = dict[str, str]


@pytest.fixture
def _h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "unsupported", lambda device: None)
    monkeypatch.setattr(candidates, "chip_of", lambda device: CHIPS[90])


def best(
    device: torch.device, dtype: torch.dtype, head_dim: int = 128, named: Named | None = None
) -> dict[str, Candidate]:
    """What is tried first of every op."""
    situation, named = Situation(device, dtype, head_dim), named or {}
    return {op: usable(op, situation, named.get(op))[0] for op in CANDIDATES}


def ops(
    device: torch.device, dtype: torch.dtype, head_dim: int = 128, named: Named | None = None
) -> dict[str, str]:
    return {op: c.name for op, c in best(device, dtype, head_dim, named).items()}


def test_a_cpu_gets_torch() -> None:
    chosen, plain = proven(CPU, torch.float64, 128, 128), reference()
    for field in dataclasses.fields(KernelSet):
        if field.name != "name":
            assert getattr(chosen, field.name) is getattr(plain, field.name)
    assert set(ops(CPU, torch.float64).values()) == {"torch", "apart"}


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_cpu_gets_fewer_passes_where_they_pay(dtype: torch.dtype) -> None:
    chosen = ops(CPU, dtype)
    sigmoid = "sigmoid" if dtype == torch.float32 else "torch"
    assert chosen.pop("norm_rope") == "complex"
    assert {chosen.pop("gelu"), chosen.pop("gelu_beside")} == {sigmoid}
    assert chosen.pop("attend") == "apart"
    assert set(chosen.values()) == {"torch"}


@pytest.mark.usefixtures("_h100")
def test_a_gpu_gets_kernels() -> None:
    chosen = ops(GPU, BF16)
    assert chosen.pop("attention") == "cudnn"
    assert chosen.pop("attend") == "apart"
    assert chosen.pop("linear_w4a4") == "upcast"  # Hopper multiplies no FP4
    assert set(chosen.values()) == {"triton"}
    assert ops(GPU, BF16, named={"attention": "triton"})["attention"] == "triton"


@pytest.mark.usefixtures("_h100")
@pytest.mark.parametrize("dtype", [torch.float16, BF16])
@pytest.mark.parametrize("sm", [80, 86])
def test_layers_in_types_that_a_gpu_does_not_multiply_run_in_16_bits(
    sm: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(candidates, "chip_of", lambda device: CHIPS[sm])
    chosen = ops(GPU, dtype)
    assert chosen.pop("linear_fp8") == chosen.pop("linear_w4a4") == "upcast"
    assert {chosen.pop("attention"), chosen.pop("attend")} == {"torch", "apart"}
    assert set(chosen.values()) == {"triton"}  # what makes their rows, too
    assert not caplog.records


def test_layers_that_run_in_float32_though_nobody_asked_for_it_are_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(candidates, "unsupported", lambda device: "too old")
    layers = ["linear_w4a4", "linear_fp8"]
    proven(GPU, torch.float16, 128, 128, layers=layers)
    (record,) = caplog.records
    assert record.getMessage().startswith("linear_fp8, linear_w4a4: expected a kernel")
    caplog.clear()
    proven(GPU, torch.float16, 128, 128)  # a model without quantised layers
    proven(GPU, torch.float16, 128, 128, dict.fromkeys(layers, "torch"), layers=layers)
    proven(GPU, torch.float32, 128, 128, layers=layers)
    proven(CPU, BF16, 128, 128, layers=layers)
    assert not caplog.records


@pytest.mark.usefixtures("_h100")
def test_fp8_layers_with_wide_results_do_without_the_kernel() -> None:
    """Its tiles of float32 do not fit into shared memory."""
    chosen = ops(GPU, torch.float32)
    assert chosen["linear_fp8"] == "torch"
    assert chosen["quantize_rows"] == "triton"


@pytest.mark.usefixtures("_h100")
def test_flash_attention_3_comes_first_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match="pip install --no-deps fa3-fwd"):
        best(GPU, BF16, named={"attention": "fa3"})
    monkeypatch.setattr(candidates, "has_fa3", lambda: True)
    assert ops(GPU, BF16)["attention"] == "fa3"
    assert ops(GPU, BF16, head_dim=64)["attention"] == "cudnn"


@pytest.mark.usefixtures("_h100")
def test_what_does_not_fit_is_left_out() -> None:
    assert ops(GPU, BF16, head_dim=96)["norm_rope"] == "torch"
    assert set(ops(GPU, torch.float64).values()) == {"torch", "apart"}


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"gelu": "triton"}, "gelu: triton cannot be used: .* CUDA device, found cpu"),
        ({"attend": "fp8"}, "attend: fp8 cannot be used: .* CUDA device, found cpu"),
        ({"gelu": "cuda"}, "gelu has no implementation 'cuda'"),
        ({"swish": "torch"}, "no op is called"),
    ],
)
def test_what_is_named_is_not_replaced(named: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        proven(CPU, BF16, 128, 128, named)


@pytest.mark.usefixtures("_h100")
def test_a_named_kernel_without_a_configuration() -> None:
    with pytest.raises(ValueError, match="no configuration for heads of 96"):
        best(GPU, BF16, head_dim=96, named={"attention": "triton"})


@pytest.mark.usefixtures("_h100")
def test_what_computes_something_else_has_to_be_named() -> None:
    assert ops(GPU, BF16)["attend"] == "apart"
    assert ops(GPU, BF16, named={"attend": "fp8"})["attend"] == "fp8"


def test_layers_that_take_rows_get_them() -> None:
    """The next layer says what the op before it writes."""
    kernels, plain = reference(), torch.nn.Linear(64, 8)
    taker = torch.nn.Linear(64, 8)
    taker.takes_rows = True  # type: ignore[assignment]
    x, left = torch.randn(2, 3, 64), torch.randn(2, 3, 16)
    vector = torch.randn(2, 1, 64)
    for op, args in {
        "modulate": (x, vector, vector),
        "gelu": (x,),
        "gelu_beside": (left, x),
    }.items():
        wanted = getattr(kernels.before(plain), op)(*args)
        rows = getattr(kernels.before(taker), op)(*args)
        assert isinstance(rows, Rows), op
        torch.testing.assert_close(rows, quantize_rows_ref(wanted), rtol=0, atol=0)
    total, normed = kernels.before(plain).residual_modulate(x, vector, x, vector, vector)
    same, rows = kernels.before(taker).residual_modulate(x, vector, x, vector, vector)
    assert torch.equal(same, total)
    assert torch.equal(rows.values.float(), quantize_rows_ref(normed).values.float())
