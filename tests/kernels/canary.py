"""What the interpreter gets wrong as shipped: a script, run with it as shipped or ``--corrected``.

Prints a JSON object: operation -> largest relative error against torch, or the name of the
exception. ``TRITON_INTERPRET=1`` must be set.
"""

import json
import sys
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from interpreter import E2M1, install
from torch import Tensor


@triton.jit
def _cast(x_ptr, out_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out_ptr + n, tl.load(x_ptr + n).to(out_ptr.dtype.element_ty))


@triton.jit
def _square_plus(x_ptr, out_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(out_ptr + tl.arange(0, N), x + x * x)


@triton.jit
def _fused(x_ptr, out_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(out_ptr + tl.arange(0, N), tl.fma(x, x, -(x * x)))


@triton.jit
def _at_least_one(x_ptr, out_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(out_ptr + tl.arange(0, N), tl.maximum(x, 1.0))
    tl.store(out_ptr + N + tl.arange(0, N), tl.clamp(x, 1.0, 2.0))


@triton.jit
def _constant(x_ptr, out_ptr, N: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, N), tl.full((N,), 1.5, tl.bfloat16))


@triton.jit
def _dot(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    at = n[:, None] * N + n[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def _dot_nvfp4(a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, out_ptr, N: tl.constexpr):
    n, half, block = tl.arange(0, N), tl.arange(0, N // 2), tl.arange(0, N // 16)
    a = tl.load(a_ptr + n[:, None] * (N // 2) + half[None, :])
    b = tl.load(b_ptr + n[None, :] * (N // 2) + half[:, None])
    scales = n[:, None] * (N // 16) + block[None, :]
    a_scale, b_scale = tl.load(a_scale_ptr + scales), tl.load(b_scale_ptr + scales)
    out = tl.dot_scaled(a, a_scale, "e2m1", b, b_scale, "e2m1")
    tl.store(out_ptr + n[:, None] * N + n[None, :], out)


def error(run: Callable[[], tuple[Tensor, Tensor]]) -> float | str:
    """The largest error of (result, expected), relative to the largest expected value."""
    try:
        result, expected = run()
    except Exception as failure:
        return type(failure).__name__
    result, expected = result.double(), expected.double()
    if not torch.isfinite(result).all():
        return "not finite"
    return ((result - expected).abs().max() / expected.abs().max()).item()


def cast(source: torch.dtype, target: torch.dtype) -> tuple[Tensor, Tensor]:
    x = (torch.randn(2048) * 8).to(source)
    out = torch.empty(2048, dtype=target)
    _cast[(1,)](x, out, 2048)
    return out, x.to(target)


def square_plus() -> tuple[Tensor, Tensor]:
    x = torch.randn(256, dtype=torch.bfloat16)
    out = torch.empty_like(x)
    _square_plus[(1,)](x, out, 256)
    return out, x + x * x


def fused() -> tuple[Tensor, Tensor]:
    """What is lost as a square is rounded."""
    x = torch.randn(256)
    out = torch.empty_like(x)
    _fused[(1,)](x, out, 256)
    return out, x.double().square() - x.square().double()


def of_nan() -> tuple[Tensor, Tensor]:
    out = torch.empty(32)
    _at_least_one[(1,)](torch.full((16,), torch.nan), out, 16)
    return out, torch.ones(32)


def constant() -> tuple[Tensor, Tensor]:
    x = torch.empty(16, dtype=torch.bfloat16)
    _constant[(1,)](x, x, 16)
    return x, torch.full_like(x, 1.5)


def dot(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    a, b = torch.randn(2, 32, 32).to(dtype)
    out = torch.empty(32, 32)
    _dot[(1,)](a, b, out, 32)
    return out, a.double() @ b.double()


def dot_nvfp4() -> tuple[Tensor, Tensor]:
    codes = torch.randint(0, 256, (2, 64, 32), dtype=torch.uint8)
    scales = (0.5 + torch.rand(2, 64, 4)).to(torch.float8_e4m3fn)
    out = torch.empty(64, 64)
    _dot_nvfp4[(1,)](codes[0], scales[0], codes[1], scales[1], out, 64)
    nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()
    a, b = torch.from_numpy(E2M1)[nibbles] * scales.float().repeat_interleave(16, -1)
    return out, a.double() @ b.double().T


def main() -> None:
    if "--corrected" in sys.argv:
        install()
    torch.manual_seed(0)
    bf16, e4m3 = torch.bfloat16, torch.float8_e4m3fn
    found = {
        "float32 to bfloat16": error(lambda: cast(torch.float32, bf16)),
        "float32 to e4m3": error(lambda: cast(torch.float32, e4m3)),
        "bfloat16 to e4m3": error(lambda: cast(bf16, e4m3)),
        "int32 to bfloat16": error(lambda: cast(torch.int32, bf16)),
        "bfloat16 arithmetic": error(square_plus),
        "bfloat16 constant": error(constant),
        "float32 fma": error(fused),
        "maximum of NaN": error(of_nan),
        "bfloat16 dot": error(lambda: dot(bf16)),
        "e4m3 dot": error(lambda: dot(e4m3)),
        "nvfp4 dot": error(dot_nvfp4),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
