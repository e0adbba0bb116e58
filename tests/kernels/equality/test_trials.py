"""Right kernels pass the trial that they are put to at load, or a model would run without them."""

import pytest
import torch

from fluxkontext.kernels.candidates import CANDIDATES, Situation
from fluxkontext.kernels.chips import chip_of
from fluxkontext.kernels.proof import fault_of

from ..house_rule import DTYPES

KERNELS = {
    f"{op}={c.name}": (op, c)
    for op, known in CANDIDATES.items()
    for c in known
    if c.name in ("triton", "fp8", "scaled_mm", "cudnn", "fa3")
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("head_dim", "width"), [(64, 192), pytest.param(128, 3072, marks=pytest.mark.large)]
)
@pytest.mark.parametrize("name", KERNELS)
def test_kernel(
    name: str, head_dim: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    chip, (op, candidate) = chip_of(device), KERNELS[name]
    if op == "linear_w4a4" and not chip.fp4:
        pytest.skip("no FP4 on this GPU")
    if (op.endswith(("_rows", "_fp8")) or name.endswith("=fp8")) and not chip.fp8:
        pytest.skip("no FP8 on this GPU")
    if op.startswith(("linear_w4", "attention")) and dtype == torch.float32:
        pytest.skip("the kernel takes 16-bit types")
    if candidate.name == "scaled_mm" and dtype != torch.bfloat16:
        pytest.skip("it gives bfloat16")
    situation = Situation(device, dtype, head_dim)
    if candidate.name in ("cudnn", "fa3") and (reason := candidate.supports(situation)):
        pytest.skip(reason)
    assert fault_of(op, candidate, situation, width) is None
