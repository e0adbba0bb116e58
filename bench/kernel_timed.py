"""Every kernel at the full model's sizes, on random numbers, beside its reference and its peers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernels.attention import (
    Rotation,
    attention_ref,
    attention_rotated_ref,
    launch_attention,
    launch_attention_fp8,
)
from ..kernels.attention_inputs import (
    Fp8Inputs,
    attention_inputs_ref,
    launch_attention_inputs,
    launch_quantize_attention,
)
from ..kernels.attention_libraries import FA3_HEAD_DIM, attention_fa3, has_fa3
from ..kernels.chips import Chip
from ..kernels.gate_residual import gate_residual_ref, launch_gate_residual
from ..kernels.gelu import (
    gelu_beside_rows_ref,
    gelu_ref,
    launch_gelu,
    launch_gelu_beside_rows,
)
from ..kernels.group_norm import group_norm_silu_ref, launch_group_norm, moments_shape
from ..kernels.launch import Launch
from ..kernels.linear_fp8 import Fp8Product, launch_linear_fp8, linear_fp8_upcast
from ..kernels.linear_w4a4 import launch_linear_w4a4, launch_quantize_nvfp4, linear_w4a4_upcast
from ..kernels.linear_w4a16 import launch_linear_w4a16
from ..kernels.modulate import launch_modulate, modulate_ref, residual_modulate_ref
from ..kernels.norm_rope import id_table, launch_norm_rope, qk_norm_rope_ref, rope_table
from ..kernels.nvfp4 import pack
from ..kernels.quantize import (
    FP8,
    launch_quantize_rows,
    launch_quantize_tensor,
    quantize_rows_ref,
    quantize_tensor_ref,
    storable,
)
from .kernel_cases import HEAD_DIMS, HEADS, MLP, TEXT_TOKENS, TOKENS, WIDTH

DIM = WIDTH // HEADS
DTYPE = torch.bfloat16
LINEARS = {
    "qkv": (WIDTH, 3 * WIDTH),
    "proj": (WIDTH, WIDTH),
    "linear1": (WIDTH, 3 * WIDTH + MLP),
    "linear2": (WIDTH + MLP, WIDTH),
}
"""Inner and outer width of a double block's first layers, and of a single block's two."""


@dataclass(frozen=True)
class Timed:
    """One problem. bytes: least traffic; flops: of its products; ceiling: what does these. runs:
    implementation -> a call of it, whose name begins with ``triton`` where it is ours."""

    kernel: str
    bytes: int
    flops: int
    ceiling: str
    runs: dict[str, Callable[[], object]]


def problems(chip: Chip) -> Iterator[Timed]:
    """All that ``chip`` can run, on torch's default device; none keeps another's memory."""
    yield from _elementwise(chip)
    yield _norm_rope()
    for dim in HEAD_DIMS:
        yield from _attention(chip, dim)
    for name, (inner, columns) in LINEARS.items():
        yield from _linear(chip, name, inner, columns)
    for channels, side in ((128, 1024), (512, 128)):
        yield _group_norm(channels, side)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPE)


def size(*tensors: Tensor) -> int:
    """Bytes of all tensors together."""
    return sum(t.numel() * t.itemsize for t in tensors)


def in_turn(*launches: Launch) -> Callable[[], object]:
    """All of them as one piece of work."""

    def run() -> None:
        for launch in launches:
            launch()

    return run


def _elementwise(chip: Chip) -> Iterator[Timed]:
    x, y, out, total = (randn(1, TOKENS, WIDTH) for _ in range(4))
    rows = randn(2, 3, 1, WIDTH)
    shift, scale, gate = rows.unbind(1)
    s, c, g = (v[0].unsqueeze(1) for v in (shift, scale, gate))  # one stream, as [B, 1, D]
    residual = (total, gate, y)
    yield Timed(
        "gate_residual", size(x, y, out), 0, "bf16",
        {
            "triton": launch_gate_residual(out, x, g, y),
            "reference": lambda: gate_residual_ref(x, g, y),
        },
    )  # fmt: skip
    yield Timed(
        "modulate", size(x, out), 0, "bf16",
        {
            "triton": launch_modulate(out, x, shift[:1], scale[:1]),
            "reference": lambda: modulate_ref(x, s, c),
            "layer_norm alone": lambda: F.layer_norm(x, (WIDTH,)),
        },
    )  # fmt: skip
    yield Timed(
        "modulate residual", size(x, y, out, total), 0, "bf16",
        {
            "triton": launch_modulate(out, x, shift, scale, TEXT_TOKENS, residual=residual),
            "reference": lambda: residual_modulate_ref(x, g, y, s, c),
        },
    )  # fmt: skip
    up = randn(TOKENS, 3 * WIDTH + MLP)[:, 3 * WIDTH :]
    wide = torch.empty(TOKENS, WIDTH + MLP, dtype=DTYPE)[:, WIDTH:]
    yield Timed(
        "gelu", size(up, wide), 0, "bf16",
        {"triton": launch_gelu(wide, up), "reference": lambda: gelu_ref(up)},
    )  # fmt: skip
    out8, wide8 = (storable(it.to(FP8), chip) for it in (out, wide))
    row_scale, one = torch.empty(1, TOKENS, 1), torch.ones(())
    yield Timed(
        "modulate residual quantize", size(x, y, out8, total), 0, "bf16",
        {
            "triton": launch_modulate(
                out8, x, shift, scale, TEXT_TOKENS, row_scale, (total, gate, y)
            ),
            "reference": lambda: quantize_rows_ref(residual_modulate_ref(x, g, y, s, c)[1]),
        },
    )  # fmt: skip
    yield Timed(
        "gelu quantize", size(up, wide8), 0, "bf16",
        {
            "triton": launch_gelu(wide8, up, row_scale[0]),
            "reference": lambda: quantize_rows_ref(gelu_ref(up)),
        },
    )  # fmt: skip
    left = randn(TOKENS, WIDTH)
    beside8 = storable(torch.empty(TOKENS, WIDTH + MLP).to(FP8), chip)
    yield Timed(
        "gelu beside quantize", size(left, up, beside8), 0, "bf16",
        {
            "triton": launch_gelu_beside_rows(beside8, row_scale[0], left, up),
            "reference": lambda: gelu_beside_rows_ref(left, up),
        },
    )  # fmt: skip
    yield Timed(
        "quantize_rows", size(x, out8), 0, "bf16",
        {
            "triton": launch_quantize_rows(out8[0], row_scale[0], x[0]),
            "reference": lambda: quantize_rows_ref(x),
        },
    )  # fmt: skip
    yield Timed(
        "quantize_tensor", size(x, out8), 0, "bf16",
        {
            "triton": launch_quantize_tensor(out8[0], x[0], one),
            "reference": lambda: quantize_tensor_ref(x, one),
        },
    )  # fmt: skip


def _positions() -> Tensor:
    """``[tokens, 3]`` int32: text at the origin, a target and a context of 64 × 64."""
    n = torch.arange(TOKENS - TEXT_TOKENS)
    images = torch.stack((n // 4096, n % 4096 // 64, n % 64), -1)
    return F.pad(images, (0, 0, TEXT_TOKENS, 0)).int()


def _norm_rope() -> Timed:
    qkv, scales, axes = randn(1, TOKENS, 3, HEADS, DIM), randn(2, 2, DIM), HEAD_DIMS[DIM]
    qk, out = qkv[:, :, :2], randn(1, TOKENS, 2, HEADS, DIM)
    ids = _positions()
    rope, by_id = rope_table(ids, axes, 1e4), id_table(64, axes, 1e4, ids.device)
    return Timed(
        "norm_rope", 2 * size(qk), 0, "bf16",
        {
            "triton, table": launch_norm_rope(out, qk, scales, TEXT_TOKENS, rope),
            "triton, by id": launch_norm_rope(out, qk, scales, TEXT_TOKENS, by_id, ids, axes),
            "reference": lambda: qk_norm_rope_ref(qkv, scales, TEXT_TOKENS, rope),
        },
    )  # fmt: skip


def _attention(chip: Chip, dim: int) -> Iterator[Timed]:
    qkv, scales = randn(1, TOKENS, 3, WIDTH // dim, dim), randn(2, 2, dim)
    q, k, v = qkv.unbind(2)
    out, rope = randn(1, TOKENS, WIDTH), rope_table(_positions(), HEAD_DIMS[dim], 1e4)
    flops = 4 * TOKENS**2 * WIDTH
    fa3 = has_fa3() and dim == FA3_HEAD_DIM and chip.sm == 90
    plain = launch_attention(out, q, k, v, chip)
    prologue = launch_norm_rope(qkv[:, :, :2], qkv[:, :, :2], scales, TEXT_TOKENS, rope)
    rotation = Rotation(scales[0, 0], scales[0, 1], rope, rope)
    yield Timed(
        f"attention d{dim}", size(qkv, out), flops, "bf16",
        {
            "triton": plain,
            "cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v),
            **({"fa3": lambda: attention_fa3(q, k, v)} if fa3 else {}),
            "flash": _sdpa(SDPBackend.FLASH_ATTENTION, q, k, v),
        },
    )  # fmt: skip
    yield Timed(
        f"attention d{dim} with norm and rotation", size(qkv, out), flops, "bf16",
        {
            "triton, fused": launch_attention(out, q, k, v, chip, rotation),
            "triton, norm_rope before": in_turn(prologue, plain),
            "reference": lambda: attention_rotated_ref(q, k, v, rotation),
        },
    )  # fmt: skip
    if not chip.fp8:
        return
    inputs = Fp8Inputs.empty(1, TOKENS, WIDTH // dim, dim, rope.device)
    quantize = launch_attention_inputs(inputs, q, k, v, scales, TEXT_TOKENS, rope)
    plain_quantize = launch_quantize_attention(inputs, q, k, v)
    product = launch_attention_fp8(out, inputs, chip)
    yield Timed(
        f"attention_inputs d{dim}", size(qkv) * 3 // 2, 0, "bf16",
        {
            "triton": quantize,
            "reference": lambda: attention_inputs_ref(qkv, scales, TEXT_TOKENS, rope),
        },
    )  # fmt: skip
    quantize()
    yield Timed(
        f"attention fp8 d{dim}", size(qkv) // 2 + size(out), flops, "fp8",
        {
            "triton": product,
            "triton, inputs before": in_turn(quantize, product),
            "triton, norm_rope and inputs before": in_turn(prologue, plain_quantize, product),
        },
    )  # fmt: skip


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    def run() -> object:
        with sdpa_kernel(backend):
            return attention_ref(q, k, v)

    return run


def _linear(chip: Chip, name: str, inner: int, columns: int) -> Iterator[Timed]:
    x, weight, bias = randn(TOKENS, inner), 0.02 * randn(columns, inner), randn(columns)
    out, flops = randn(TOKENS, columns), 2 * TOKENS * inner * columns
    yield _linear_fp8(name, x, weight, bias, chip)
    packed = pack(weight)
    yield Timed(
        f"linear_w4a16 {name}", size(x, packed.packed, packed.block_scale, out), flops, "bf16",
        {
            "triton": launch_linear_w4a16(out, x, packed, bias, chip),
            "bf16 weights": lambda: F.linear(x, weight, bias),
        },
    )  # fmt: skip
    x4 = pack(x)
    runs: dict[str, Callable[[], object]] = {}
    if chip.fp4:
        quantize = launch_quantize_nvfp4(x4, x)
        product = launch_linear_w4a4(out, x4, packed, bias, chip)
        runs = {"triton": product, "triton, quantize before": in_turn(quantize, product)}
    yield Timed(
        f"linear_w4a4 {name}", size(x4.packed, packed.packed, out), flops,
        "nvfp4" if chip.fp4 else "bf16",
        {**runs, "triton, upcast": lambda: linear_w4a4_upcast(x, x4.scale, packed, bias)},
    )  # fmt: skip


def _linear_fp8(name: str, x: Tensor, weight: Tensor, bias: Tensor, chip: Chip) -> Timed:
    (x8, x_scale), (w8, w_scale) = quantize_rows_ref(x), quantize_rows_ref(weight)
    one, bf16 = torch.ones(()), torch.bfloat16
    out = torch.empty(1, len(x), len(weight), dtype=DTYPE)
    whole = Fp8Product(x8[None], x_scale[None], w8, w_scale.squeeze(-1), bias)
    parts = [slice(None, TEXT_TOKENS), slice(TEXT_TOKENS, None)]
    streams = [whole._replace(x=whole.x[:, it], x_scale=whole.x_scale[:, it]) for it in parts]
    problem = f"linear_fp8 {name}", size(x8, w8, out), 2 * x.numel() * len(weight)
    plain: dict[str, Callable[[], object]] = {
        "triton, upcast": lambda: linear_fp8_upcast([whole]),
        "bf16": lambda: F.linear(x, weight, bias),
    }
    if not chip.fp8:
        return Timed(*problem, "bf16", plain)
    return Timed(
        *problem, "fp8",
        {
            "triton, rows": launch_linear_fp8([out], [whole], chip),
            "triton, two streams": launch_linear_fp8([out[:, it] for it in parts], streams, chip),
            "triton, two streams in turn": in_turn(
                *(
                    launch_linear_fp8([out[:, it]], [stream], chip)
                    for it, stream in zip(parts, streams, strict=True)
                )
            ),
            "_scaled_mm, rows": lambda: torch._scaled_mm(
                x8, w8.T, x_scale, w_scale.view(1, -1), bias, out_dtype=bf16, use_fast_accum=True
            ),
            "_scaled_mm, tensor": lambda: torch._scaled_mm(
                x8, w8.T, one, one, bias, out_dtype=bf16, use_fast_accum=True
            ),
            **plain,
        },
    )  # fmt: skip


def _group_norm(channels: int, side: int) -> Timed:
    x = randn(1, channels, side, side)
    weight, out = randn(channels), torch.empty_like(x)
    moments = torch.empty(moments_shape(x, 32))
    steps = launch_group_norm(out, moments, x, 32, weight, weight, 1e-6, True)
    return Timed(
        f"group_norm c{channels}", size(x, x, out), 0, "bf16",
        {
            "triton": in_turn(*steps),
            "reference": lambda: group_norm_silu_ref(x, 32, weight, weight, 1e-6),
        },
    )  # fmt: skip
