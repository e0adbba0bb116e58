"""Right kernels pass the trial that they are put to at load, or a model would run without them."""

import pytest
import torch

from fluxkontext.kernels import candidates
from fluxkontext.kernels.candidates import CANDIDATES, Situation
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
