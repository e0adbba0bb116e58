"""What a compiler or an exporter sees of every op: schemas and fake results that tell the truth."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fluxkontext.kernels import (
    attend,
    attention,
    gate_residual,
    gelu,
    group_norm,
    linear_fp8,
    linear_w4a4,
    linear_w4a16,
    modulate,
    norm_rope,
    quantize,
)
from fluxkontext.kernels.chips import chip_of
from fluxkontext.kernels.norm_rope import rope_table
from fluxkontext.kernels.nvfp4 import pack

Op = Any


def ops(device: torch.device) -> dict[str, tuple[Op, tuple[Any, ...]]]:
    """Every functional op, with arguments whose strides are not the usual ones."""

    def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape).to(device, dtype)

    x, vector = randn(2, 5, 80)[..., :64], randn(2, 1, 64)
    q, k, v = randn(2, 9, 3, 2, 64).unbind(2)
    scales = randn(1, 2, 64)
    rope = rope_table(torch.arange(9, device=device)[:, None].expand(-1, 3), (16, 24, 24), 1e4)
    x8, x_scale = quantize.quantize_rows_ref(x)
    w8, w_scale = quantize.quantize_rows_ref(randn(24, 64))
    w4, bias = pack(randn(24, 64)), randn(24)
    image = randn(1, 16, 3, 5).to(memory_format=torch.channels_last)
    affine = randn(16)
    found: dict[str, tuple[Op, tuple[Any, ...]]] = {
        "modulate": (modulate._modulate, (x, vector, vector)),
        "residual_modulate": (modulate._residual_modulate, (x, vector, x, vector, vector)),
        "gate_residual": (gate_residual._gate_residual, (x, vector, x)),
        "gelu": (gelu._gelu, (x,)),
        "gelu_beside": (gelu._gelu_beside, (x[..., :16], x)),
        "norm_rope": (norm_rope._norm_rope, (q[:, :, None], randn(1, 1, 64), 0, rope)),
        "attention": (attention._attention, (q, k, v)),
        "attend_rotated": (
            attend._attend_rotated,
            (q[:, 5:], k, v, *scales[0].unbind(0), rope[5:], rope),
        ),
        "linear_w4a16": (
            linear_w4a16._linear_w4a16,
            (x, w4.packed, w4.block_scale, w4.scale, bias),
        ),
        "quantize_rows": (quantize._quantize_rows, (x,)),
        "quantize_tensor": (quantize._quantize_tensor, (x, torch.tensor(0.01, device=device))),
        "modulate_rows": (modulate._modulate_rows, (x, vector, vector)),
        "residual_modulate_rows": (
            modulate._residual_modulate_rows,
            (x, vector, x, vector, vector),
        ),
        "gelu_rows": (gelu._gelu_rows, (x,)),
        "gelu_beside_rows": (gelu._gelu_beside_rows, (x[..., :16], x)),
        "round_nvfp4": (linear_w4a4._round_nvfp4, (x, torch.tensor(0.01, device=device))),
        "group_norm_silu": (
            group_norm._group_norm_silu,
            (image, 4, affine, affine, 1e-6, True),
        ),
    }
    if chip_of(device).fp8:
        cut = (q[:, 5:], k, v, scales, 0, rope[5:], rope)
        found["attend_fp8"] = (attend._attend_fp8, cut)
        product = ([x8], [x_scale], [w8], [w_scale.squeeze(-1)], [bias])
        found["linear_fp8"] = (linear_fp8._linear_fp8, tuple(2 * it for it in product))
    if chip_of(device).fp4:
        scale = torch.tensor(0.01, device=device)
        w4a4 = (x, scale, w4.packed, w4.block_scale, w4.scale, bias)
        found["linear_w4a4"] = (linear_w4a4._linear_w4a4, w4a4)
    return found


def test_ops_are_what_they_say(device: torch.device) -> None:
    for name, (op, arguments) in ops(device).items():
        tensors = [it for it in tree_leaves(arguments) if isinstance(it, Tensor)]
        # torch's own check of a schema compares its arguments, which it cannot in FP8.
        plain = all(tensor.itemsize > 1 for tensor in tensors)
        checks = ("test_schema", "test_faketensor") if plain else ("test_faketensor",)
        result = torch.library.opcheck(op, arguments, test_utils=checks, raise_exception=False)
        assert set(result.values()) == {"SUCCESS"}, (name, result)


@pytest.mark.parametrize("name", ["norm_rope", "attention", "group_norm_silu"])
def test_fake_results_have_the_strides_of_real_ones(name: str, device: torch.device) -> None:
    op, arguments = ops(device)[name]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = op(*arguments)
    real = op(*arguments)
    assert fake.stride() == real.stride()
