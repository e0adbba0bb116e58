"""What a launch refuses before a kernel could read other numbers than those meant."""

import pytest
import torch

from fluxkontext.kernels.linear_w4a4 import launch_quantize_nvfp4, launch_round_nvfp4
from fluxkontext.kernels.nvfp4 import pack
from fluxkontext.kernels.quantize import FP8, launch_quantize_rows, launch_quantize_tensor


def test_quantisation_takes_rows_whose_channels_lie_side_by_side() -> None:
    dense, turned = torch.zeros(32, 32), torch.zeros(32, 32).T
    out, scale, one = dense.to(FP8), torch.zeros(32, 1), torch.ones(())
    x4 = pack(dense)
    for launch in (
        lambda x: launch_quantize_rows(out, scale, x),
        lambda x: launch_quantize_tensor(out, x, one),
        lambda x: launch_quantize_nvfp4(x4, x),
        lambda x: launch_round_nvfp4(dense, x, one),
    ):
        launch(dense)
        with pytest.raises(AssertionError, match="strided rows"):
            launch(turned)
    with pytest.raises(AssertionError, match="strided rows"):
        launch_quantize_rows(out.T, scale, dense)
