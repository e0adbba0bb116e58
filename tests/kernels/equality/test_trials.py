"""Right kernels pass the trial that they are put to at load, or a model would run without them."""

import pytest
import torch

from fluxkontext.kernels import candidates, gelu, modulate, quantize
from fluxkontext.kernels.candidates import CANDIDATES, Situation
from fluxkontext.kernels.chips import CHIPS
from fluxkontext.kernels.proof import fault_of

from ..house_rule import DTYPES

KERNELS = {
    f"{op}={c.name}": (op, c)
    for op, known in CANDIDATES.items()
    for c in known
    if c.name in ("triton", "upcast", "rotated", "fp8", "scaled_mm", "cudnn", "fa3")
}


@pytest.fixture
def _interpreted(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernels are interpreted, they run on a CPU too."""
    if device.type == "cpu":
        monkeypatch.setattr(candidates, "unsupported", lambda _: None)


ROWS = ("modulate_rows", "residual_modulate_rows", "gelu_rows", "gelu_beside_rows")


@pytest.mark.usefixtures("_interpreted")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [*ROWS, "quantize_rows", "quantize_tensor"])
def test_fp8_as_bytes(
    op: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What GPUs are given that do not have the type."""
    for module in (gelu, modulate, quantize):
        monkeypatch.setattr(module, "chip_of", lambda _: CHIPS[86])
    kernel = CANDIDATES[op][0]
    assert fault_of(op, kernel, Situation(device, dtype, 64), 192) is None


@pytest.mark.usefixtures("_interpreted")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("head_dim", "width"), [(64, 192), pytest.param(128, 3072, marks=pytest.mark.large)]
)
@pytest.mark.parametrize("name", KERNELS)
def test_kernel(
    name: str, head_dim: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    op, candidate = KERNELS[name]
    situation = Situation(device, dtype, head_dim)
    if reason := candidate.supports(situation):
        pytest.skip(reason)
    if candidate.name in ("cudnn", "fa3") and device.type == "cpu":
        pytest.skip("the library has no kernel for a CPU")
    assert fault_of(op, candidate, situation, width) is None
