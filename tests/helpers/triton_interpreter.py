"""Corrections of Triton's interpreter, so that it rounds as a GPU does.

The interpreter of Triton 3.6 to 3.8 computes tl.fma as x * y + z, rounded twice, truncates float32
to bfloat16, reads bfloat16 subnormals, infinities and NaN as other numbers, and multiplies the bits
of bfloat16 in tl.dot. NumPy's warnings of overflow and NaN are off while a kernel runs. Compiled
kernels are not changed.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np


def fma32(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """float32 x * y + z, rounded once, to nearest even.

    The product is exact in float64. The sum is rounded to odd there: its last bit is set where it
    is inexact, and float64 has more than two bits beyond float32, so that rounding it again gives
    what rounding the exact sum would (Boldo and Melquiond, 2008).
    """
    with np.errstate(all="ignore"):
        product = x.astype(np.float64) * y.astype(np.float64)
        addend = z.astype(np.float64)
        total = np.asarray(product + addend)
        # Knuth's two-sum: total + error is the exact sum.
        back = total - product
        error = (product - (total - back)) + (addend - back)
        even = (total.view(np.uint64) & np.uint64(1)) == 0
        inexact = np.isfinite(total) & (error != 0) & even
        toward = np.where(error > 0, np.inf, -np.inf)
        return np.where(inexact, np.nextafter(total, toward), total).astype(np.float32)


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 as uint16, rounded to nearest even; NaN stays a quiet NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def float32_of(bits: np.ndarray) -> np.ndarray:
    """bfloat16 as uint16 -> float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def install() -> None:
    """Correct the interpreter of this process; without Triton, do nothing."""
    if importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

    if hasattr(InterpreterBuilder, "rounds_once"):
        return
    shipped_fma = InterpreterBuilder.create_fma
    shipped_cast = InterpreterBuilder.cast_impl
    shipped_dot = InterpreterBuilder.create_dot
    shipped_call = GridExecutor.__call__

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.dtype.scalar != tl.float32:
            return shipped_fma(self, x, y, z)
        return TensorHandle(fma32(x.data, y.data, z.data), tl.float32)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        pair = (src.dtype.scalar, dst_type.scalar)
        if pair == (tl.float32, tl.bfloat16):
            return TensorHandle(bfloat16_bits(src.data), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle(float32_of(src.data), tl.float32)
        return shipped_cast(self, src, dst_type)

    def float32_handle(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle(float32_of(x.data), tl.float32)

    def create_dot(self: Any, x: Any, y: Any, *others: Any) -> Any:
        return shipped_dot(self, float32_handle(x), float32_handle(y), *others)

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        with np.errstate(all="ignore"):
            shipped_call(self, *args, **kwargs)

    GridExecutor.__call__ = call
    InterpreterBuilder.create_fma = create_fma
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.rounds_once = True
