"""Right kernels pass the trial that they are put to at load, or a model would run without them."""

import pytest
import torch

from fluxkontext.kernels.chips import chip_of
from fluxkontext.kernels.kernel_set import CANDIDATES, Candidate, Situation
from fluxkontext.kernels.proof import fault_of

from ..house_rule import DTYPES

OPS = {op: c for op, known in CANDIDATES.items() for c in known if c.name == "triton"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("head_dim", "width"), [(64, 192), pytest.param(128, 3072, marks=pytest.mark.large)]
)
@pytest.mark.parametrize("op", OPS)
def test_kernel(
    op: str, head_dim: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    chip = chip_of(device)
    if op == "linear_w4a4" and not chip.fp4:
        pytest.skip("no FP4 on this GPU")
    if op in ("quantize_rows", "linear_fp8") and not chip.fp8:
        pytest.skip("no FP8 on this GPU")
    if op.startswith(("linear_w4", "attention")) and dtype == torch.float32:
        pytest.skip("the kernel takes 16-bit types")
    candidate: Candidate = OPS[op]
    assert fault_of(op, candidate, Situation(device, dtype, head_dim), width) is None
