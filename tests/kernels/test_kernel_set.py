"""Implementations are chosen once, best first, and one that is named is never replaced."""

import dataclasses

import pytest
import torch

from fluxkontext.kernels import KernelSet, kernel_set, reference, select
from fluxkontext.kernels.chips import CHIPS

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BF16 = torch.bfloat16


@pytest.fixture
def _h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_set, "unsupported", lambda device: None)
    monkeypatch.setattr(kernel_set, "chip_of", lambda device: CHIPS[90])


def ops(kernels: KernelSet) -> dict[str, str]:
    return dict(part.split("=") for part in kernels.name.split())


def test_a_cpu_gets_torch() -> None:
    chosen, plain = select(CPU, torch.float64), reference()
    for field in dataclasses.fields(KernelSet):
        if field.name != "name":
            assert getattr(chosen, field.name) is getattr(plain, field.name)
    assert set(ops(chosen).values()) == {"torch"}


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_cpu_gets_fewer_passes_where_they_pay(dtype: torch.dtype) -> None:
    chosen = ops(select(CPU, dtype))
    sigmoid = "sigmoid" if dtype == torch.float32 else "torch"
    assert chosen.pop("norm_rope") == "complex"
    assert {chosen.pop("gelu"), chosen.pop("gelu_beside")} == {sigmoid}
    assert set(chosen.values()) == {"torch"}


@pytest.mark.usefixtures("_h100")
def test_a_gpu_gets_kernels() -> None:
    chosen = ops(select(GPU, BF16))
    assert chosen.pop("attention") == "torch"
    assert chosen.pop("linear_w4a4") == "torch"  # Hopper multiplies no FP4
    assert set(chosen.values()) == {"triton"}
    assert ops(select(GPU, BF16, named={"attention": "triton"}))["attention"] == "triton"


@pytest.mark.usefixtures("_h100")
def test_what_does_not_fit_is_left_out() -> None:
    assert ops(select(GPU, BF16, head_dim=96))["norm_rope"] == "torch"
    assert set(ops(select(GPU, torch.float64)).values()) == {"torch"}


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"gelu": "triton"}, "gelu: triton cannot be used: .* CUDA device, found cpu"),
        ({"gelu": "cuda"}, "gelu has no implementation 'cuda'"),
        ({"swish": "torch"}, "no op is called"),
    ],
)
def test_what_is_named_is_not_replaced(named: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(CPU, BF16, named=named)


@pytest.mark.usefixtures("_h100")
def test_a_named_kernel_without_a_configuration() -> None:
    with pytest.raises(ValueError, match="no configuration for heads of 96"):
        select(GPU, BF16, head_dim=96, named={"attention": "triton"})
