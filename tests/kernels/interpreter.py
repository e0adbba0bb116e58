"""Triton's CPU interpreter, corrected where its results silently differ from a GPU's.

As shipped (3.6, 3.7) it does bf16 arithmetic on the raw bits, truncates when it rounds to bf16,
carries wrongly when it rounds to FP8, keeps every NaN, rounds the product of an FMA, and has no
``tl.dot_scaled``. The builder below computes in
float32 whatever numpy has no type for, and rounds as torch does: to nearest, ties to even.
FP8 saturates, as PTX's ``cvt.rn.satfinite`` does; where chips differ, it is as imprecise as any:
rounded to float16 before, as on Ada, and its products summed as on Hopper.

``TRITON_INTERPRET=1`` must be in the environment before triton is imported.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

Array = NDArray[Any]

TORCH = {
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
PACKED = (tl.bfloat16, tl.float8e4nv, tl.float8e5)
"""Types that the interpreter keeps as integers, for want of a numpy type."""
FP8 = (tl.float8e4nv, tl.float8e5)
BITS = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}
MMA_DEPTH = 32
"""FP8 products that one instruction sums."""
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def to_torch(bits: Array, dtype: Any) -> torch.Tensor:
    """The values that the interpreter holds as ``bits`` of a floating-point ``dtype``."""
    bits = np.array(bits, ndmin=1)  # a contiguous copy
    return torch.from_numpy(bits.view(BITS[bits.itemsize])).view(TORCH[dtype])


def to_bits(values: torch.Tensor, dtype: Any) -> Array:
    """``values``, rounded to ``dtype``, as the interpreter holds them."""
    target = TORCH[dtype]
    if target.itemsize == 1:
        limit = torch.finfo(target).max
        values = values.float()
        values = torch.where(values.isnan(), values, values.clamp(-limit, limit))
    rounded = values.to(target).contiguous()
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[target.itemsize]
    return rounded.view(integer).numpy().view(interpreter._get_np_dtype(dtype))


def computable(handle: TensorHandle) -> Array:
    """The data of ``handle`` in a type that numpy computes in."""
    dtype = handle.dtype.scalar
    if dtype not in PACKED:
        return handle.data
    return to_torch(handle.data, dtype).float().numpy().reshape(handle.data.shape)


def rounded(values: Array, dtype: Any) -> TensorHandle:
    """float32 ``values`` as a handle of a packed ``dtype``; comparisons stay booleans."""
    if values.dtype == np.bool_:
        return TensorHandle(values, tl.int1)
    bits = to_bits(torch.from_numpy(np.array(values, np.float32, ndmin=1)), dtype)
    return TensorHandle(bits.reshape(values.shape), dtype)


class CorrectedBuilder(InterpreterBuilder):
    """The interpreter's operations, right for bf16 and FP8."""

    def cast_impl(self, src: TensorHandle, dst_type: Any) -> TensorHandle:
        source, target = src.dtype.scalar, dst_type.scalar
        if source in TORCH and target in TORCH:
            values = to_torch(src.data, source)
            bits = to_bits(values.half() if target in FP8 else values, target)
            return TensorHandle(bits.reshape(src.data.shape), target)
        if target in PACKED:  # from integers
            return rounded(src.data.astype(np.float32), target)
        data = computable(src).astype(interpreter._get_np_dtype(dst_type))
        return TensorHandle(data, target)

    def create_fp_to_fp(
        self, src: TensorHandle, dst_type: Any, rounding_mode: object
    ) -> TensorHandle:
        if rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ:
            raise NotImplementedError("rounding towards zero")
        return self.cast_impl(src, dst_type)

    def binary_op(
        self, lhs: TensorHandle, rhs: TensorHandle, op: Callable[[Array, Array], Array]
    ) -> TensorHandle:
        if lhs.dtype.scalar not in PACKED:
            return super().binary_op(lhs, rhs, op)
        return rounded(op(computable(lhs), computable(rhs)), lhs.dtype.scalar)

    def unary_op(self, arg: TensorHandle, op: Callable[[Array], Array]) -> TensorHandle:
        if arg.dtype.scalar not in PACKED:
            return super().unary_op(arg, op)
        return rounded(op(computable(arg)), arg.dtype.scalar)

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        """In float64, which has all bits of the product."""
        dtype = z.dtype.scalar
        left, right, term = (computable(it).astype(np.float64) for it in (x, y, z))
        total = left * right + term
        if dtype in PACKED:
            return rounded(total, dtype)
        return TensorHandle(total.astype(interpreter._get_np_dtype(dtype)), dtype)

    def create_maxnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_minnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self.binary_op(lhs, rhs, np.fmin)

    def create_clampf(
        self, arg: TensorHandle, low: TensorHandle, high: TensorHandle, propagate_nans: object
    ) -> TensorHandle:
        """As PTX: the other number where one is NaN, if that is not to stay."""
        stays = propagate_nans == tl.PropagateNan.ALL
        larger, smaller = (np.maximum, np.minimum) if stays else (np.fmax, np.fmin)
        return self.binary_op(self.binary_op(arg, low, larger), high, smaller)

    def get_bf16(self, value: float) -> TensorHandle:
        return rounded(np.array([value], np.float32), tl.bfloat16)

    def create_dot(
        self, a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: object, limit: int
    ) -> TensorHandle:
        """Products are exact and sums kept in the accumulator's type, as tensor cores do, but for
        FP8. limit: how many of its products may be summed in fewer bits, or 0 for any number."""
        if d.dtype.scalar in PACKED:
            raise NotImplementedError(f"a dot that accumulates in {d.dtype}")
        left, right = computable(a), computable(b)
        if a.dtype.scalar not in FP8:
            product = np.matmul(left, right, dtype=d.data.dtype)
            return TensorHandle(product + d.data, d.dtype.scalar)
        if limit not in (0, left.shape[1]):
            raise NotImplementedError(f"sums of {limit} of {left.shape[1]} products")
        summed = np.zeros_like(d.data) if limit else d.data
        for k in range(0, left.shape[1], MMA_DEPTH):
            step = slice(k, k + MMA_DEPTH)
            summed = shortened(summed + np.matmul(left[:, step], right[step], dtype=np.float32))
        return TensorHandle(summed + d.data if limit else summed, d.dtype.scalar)

    def create_dot_scaled(
        self,
        a: TensorHandle,
        a_scale: TensorHandle | None,
        a_format: object,
        b: TensorHandle,
        b_scale: TensorHandle | None,
        b_format: object,
        fast_math: bool,
        a_k_pack: bool,
        b_k_pack: bool,
        acc: TensorHandle,
    ) -> TensorHandle:
        """``a [M, K]`` times ``b [K, N]``; scales are ``[M or N, K / block]``."""
        if not (a_k_pack and b_k_pack):
            raise NotImplementedError("operands packed along another axis than K")
        left = operand(a, a_format) * repeated(a_scale, operand(a, a_format).shape[1])
        right = operand(b, b_format, axis=0).T
        right = (right * repeated(b_scale, right.shape[1])).T
        return TensorHandle(np.matmul(left, right, dtype=np.float32) + acc.data, tl.float32)


def shortened(sums: Array) -> Array:
    """float32 ``sums`` as an accumulator of FP8 products holds them on Ada and Hopper: 13 bits
    behind the point, the rest cut off (SageAttention2, arXiv 2411.10958, 3.4)."""
    return (sums.view(np.int32) & ~0x3FF).view(np.float32)


def operand(handle: TensorHandle, kind: object, axis: int = 1) -> Array:
    """An operand of a scaled dot, its two E2M1 values a byte (the lower nibble first) unpacked."""
    if kind != interpreter._ir.ScaleDotElemTypeTY.E2M1:
        return computable(handle).astype(np.float32)
    packed = np.moveaxis(handle.data.view(np.uint8), axis, -1)
    values = np.stack((E2M1[packed & 15], E2M1[packed >> 4]), -1)
    return np.moveaxis(values.reshape(*packed.shape[:-1], -1), -1, axis)


def repeated(scale: TensorHandle | None, size: int) -> Array:
    """Block scales (E4M3, or E8M0 as bytes), each repeated over its block."""
    if scale is None:
        return np.ones((1, 1), np.float32)
    if scale.dtype.scalar == tl.float8e4nv:
        values = computable(scale)
    else:
        values = np.exp2(scale.data.view(np.uint8).astype(np.float32) - 127)
    return np.repeat(values, size // values.shape[1], axis=1)


def pairwise_sum(self: ReduceOps, values: Any) -> Any:
    """Sum as a tree along any axis, as a GPU does; numpy does so along the last one only."""
    last = np.ascontiguousarray(np.moveaxis(computable(values.handle), self.axis, -1))
    total = last.sum(axis=-1)
    if self.keep_dims:
        total = np.expand_dims(total, self.axis)
    return self.to_tensor(total, values.dtype)


def install() -> None:
    """Let the corrected builder interpret every kernel from now on, silent as a GPU."""
    np.seterr(all="ignore")
    builder = CorrectedBuilder()
    interpreter.interpreter_builder = builder
    interpreter.interpreter_semantic.builder = builder
    ReduceOps.sum = pairwise_sum
    original = TritonSemantic.dot_scaled

    def dot_scaled(self: Any, a: Any, a_scale: Any, a_format: Any, *rest: Any) -> Any:
        """Up to 3.7 the interpreter passes the formats as plain strings."""
        b, b_scale, b_format, *others = rest
        formats = (f if hasattr(f, "value") else tl.constexpr(f) for f in (a_format, b_format))
        a_format, b_format = formats
        return original(self, a, a_scale, a_format, b, b_scale, b_format, *others)

    TritonSemantic.dot_scaled = dot_scaled
