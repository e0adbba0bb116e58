"""Every kernel with every configuration that a chip can be given, at the full model's sizes.

Arguments lie on the meta device: nothing is allocated, and no GPU is needed.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..kernels.attention import Rotation, launch_attention, launch_attention_fp8
from ..kernels.attention_inputs import (
    Fp8Inputs,
    launch_attention_inputs,
    launch_quantize_attention,
)
from ..kernels.chips import Chip
from ..kernels.gate_residual import launch_gate_residual
from ..kernels.gelu import launch_gelu, launch_gelu_beside_rows
from ..kernels.group_norm import launch_group_norm, moments_shape
from ..kernels.launch import Launch
from ..kernels.linear_fp8 import Fp8Product, launch_linear_fp8
from ..kernels.linear_w4a4 import (
    launch_linear_w4a4,
    launch_quantize_nvfp4,
    launch_round_nvfp4,
)
from ..kernels.linear_w4a16 import launch_linear_w4a16
from ..kernels.modulate import launch_modulate
from ..kernels.norm_rope import launch_norm_rope
from ..kernels.nvfp4 import NvFp4
from ..kernels.quantize import FP8, launch_quantize_rows, launch_quantize_tensor, storable

BF16, FP32 = torch.bfloat16, torch.float32
FLOATS = {"bf16": BF16, "fp32": FP32}
"""fp16 gets the configurations of bf16, and the same code but for the types of instructions."""

TOKENS, TEXT_TOKENS = 8704, 512
"""A target and a context of 1024² pixels, and the text: 4096 + 4096 + 512."""
WIDTH, HEADS, MLP = 3072, 24, 12288
HEAD_DIMS = {128: (16, 56, 56), 64: (16, 24, 24)}
"""Channels of a head (FLUX's, a miniature's) and how many of them each axis rotates."""

Cases = Iterator[tuple[str, Launch]]


def launches(chip: Chip) -> Cases:
    """(kernel and variant, launch) of all that ``chip`` supports."""
    yield from _norm_rope()
    yield from _modulate(chip)
    yield from _feed_forward(chip)
    yield from _attention(chip)
    yield from _linear_fp8(chip)
    yield from _linear_nvfp4(chip)
    yield from _group_norm()


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _norm_rope() -> Cases:
    for dim, axes in HEAD_DIMS.items():
        rope = empty(TOKENS, dim // 2, 2, dtype=FP32)
        ids = empty(TOKENS, 3, dtype=torch.int32)
        for name, dtype in FLOATS.items():
            qk = empty(1, TOKENS, 3, HEADS, dim, dtype=dtype)[:, :, :2]
            scales = empty(2, 2, dim, dtype=dtype)
            yield (
                f"norm_rope {name} d{dim} table",
                launch_norm_rope(qk, qk, scales, TEXT_TOKENS, rope),
            )
            if dtype == BF16:
                yield (
                    f"norm_rope {name} d{dim} by id",
                    launch_norm_rope(qk, qk, scales, TEXT_TOKENS, rope, ids, axes),
                )


def _modulate(chip: Chip) -> Cases:
    for name, dtype in FLOATS.items():
        x, y, out = (empty(1, TOKENS, WIDTH, dtype=dtype) for _ in range(3))
        shift, scale, gate = empty(2, 6, 1, WIDTH, dtype=dtype)[:, :3].unbind(1)
        residual = (x, gate, y)
        yield f"gate_residual {name}", launch_gate_residual(x, x, gate[:1], y)
        yield f"modulate {name}", launch_modulate(out, x, shift[:1], scale[:1])
        yield (
            f"modulate {name} residual",
            launch_modulate(out, x, shift, scale, TEXT_TOKENS, residual=residual),
        )
        out8, row_scale = empty(1, TOKENS, WIDTH, dtype=FP8), empty(1, TOKENS, 1, dtype=FP32)
        out8 = storable(out8, chip)
        yield (
            f"modulate {name} residual quantize",
            launch_modulate(out8, x, shift, scale, TEXT_TOKENS, row_scale, residual),
        )


def _feed_forward(chip: Chip) -> Cases:
    for name, dtype in FLOATS.items():
        x = empty(TOKENS, 3 * WIDTH + MLP, dtype=dtype)[:, 3 * WIDTH :]
        out = empty(TOKENS, WIDTH + MLP, dtype=dtype)[:, WIDTH:]
        yield f"gelu {name}", launch_gelu(out, x)
        out8, row_scale = storable(out.to(FP8), chip), empty(TOKENS, 1, dtype=FP32)
        yield f"gelu {name} rows", launch_gelu(out8, x, row_scale)
        beside8 = storable(empty(TOKENS, WIDTH + MLP, dtype=FP8), chip)
        left = empty(TOKENS, WIDTH, dtype=dtype)
        yield f"gelu {name} beside rows", launch_gelu_beside_rows(beside8, row_scale, left, x)
        yield f"quantize_rows {name}", launch_quantize_rows(out8, row_scale, out)
        yield f"quantize_tensor {name}", launch_quantize_tensor(out8, out, empty(1, dtype=FP32))


def _attention(chip: Chip) -> Cases:
    for dim in HEAD_DIMS:
        q, k, v = empty(1, TOKENS, 3, HEADS, dim).unbind(2)
        out = empty(1, TOKENS, HEADS * dim)
        norm, rope = empty(dim), empty(TOKENS, dim // 2, 2, dtype=FP32)
        rotation = Rotation(norm, norm, rope, rope)
        yield f"attention bf16 d{dim}", launch_attention(out, q, k, v, chip)
        yield f"attention bf16 d{dim} rotated", launch_attention(out, q, k, v, chip, rotation)
        if chip.fp8:
            inputs = Fp8Inputs.empty(1, TOKENS, HEADS, dim, "meta")
            scales = empty(2, 2, dim)
            yield (
                f"attention_inputs bf16 d{dim}",
                launch_attention_inputs(inputs, q, k, v, scales, TEXT_TOKENS, rope),
            )
            yield (
                f"attention_inputs bf16 d{dim} of some queries",
                launch_attention_inputs(inputs, q, k, v, scales[:1], 0, rope, rope),
            )
            yield (
                f"attention_inputs bf16 d{dim} rotated",
                launch_quantize_attention(inputs, q, k, v),
            )
            yield f"attention fp8 d{dim}", launch_attention_fp8(out, inputs, chip)


def _linear_fp8(chip: Chip) -> Cases:
    def product(
        tokens: int, one_scale: bool = False, dtype: torch.dtype = FP8
    ) -> tuple[Tensor, Fp8Product]:
        x, weight = empty(1, tokens, WIDTH, dtype=dtype), empty(3 * WIDTH, WIDTH, dtype=dtype)
        x_scale = empty(1, 1 if one_scale else tokens, 1, dtype=FP32)
        w_scale, bias = empty(1 if one_scale else 3 * WIDTH, dtype=FP32), empty(3 * WIDTH)
        return empty(1, tokens, 3 * WIDTH), Fp8Product(x, x_scale, weight, w_scale, bias)

    for kind, dtype in {"": FP8, " upcast": BF16}.items():
        if dtype == FP8 and not chip.fp8:
            continue
        for name, products in {
            "rows": [product(TOKENS, dtype=dtype)],
            "tensor": [product(TOKENS, True, dtype)],
            "rows two streams": [
                product(tokens, dtype=dtype) for tokens in (TEXT_TOKENS, TOKENS - TEXT_TOKENS)
            ],
        }.items():
            outs, given = zip(*products, strict=True)
            yield f"linear_fp8 {name}{kind}", launch_linear_fp8(outs, given, chip)


def _nvfp4(rows: int) -> NvFp4:
    packed = empty(rows, WIDTH // 2, dtype=torch.uint8)
    block_scale = empty(rows, WIDTH // 16, dtype=FP8)
    return NvFp4(packed, block_scale, torch.empty((), device="meta"))


def _linear_nvfp4(chip: Chip) -> Cases:
    x, out, bias = empty(TOKENS, WIDTH), empty(TOKENS, 3 * WIDTH), empty(3 * WIDTH)
    weight, x4 = _nvfp4(3 * WIDTH), _nvfp4(TOKENS)
    yield "linear_w4a16 bf16", launch_linear_w4a16(out, x, weight, bias, chip)
    yield "round_nvfp4 bf16", launch_round_nvfp4(x, x, weight.scale)
    if chip.fp4:
        yield "quantize_nvfp4 bf16", launch_quantize_nvfp4(x4, x)
        yield "linear_w4a4", launch_linear_w4a4(out, x4, weight, bias, chip)


def _group_norm() -> Cases:
    """The VAE's narrowest and widest feature maps."""
    for channels, side in ((128, 1024), (512, 128)):
        x = empty(1, channels, side, side)
        moments = empty(*moments_shape(x, 32), dtype=FP32)
        weight = empty(channels)
        steps = launch_group_norm(x, moments, x, 32, weight, weight, 1e-6, True)
        for step, launch in zip(("moments", "merge", "normalize"), steps, strict=True):
            yield f"group_norm bf16 c{channels} {step}", launch
