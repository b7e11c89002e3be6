"""A repair of products of bfloat16 in Triton's interpreter, which multiplies their bits."""

from __future__ import annotations

import importlib.util
from typing import Any

from triton_interpreter import float32_of


def install() -> None:
    """Repair the interpreter of this process; without Triton, do nothing."""
    if importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if hasattr(InterpreterBuilder, "multiplies_bfloat16"):
        return
    shipped = InterpreterBuilder.create_dot

    def single(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle(float32_of(x.data), tl.float32)

    def create_dot(self: Any, x: Any, y: Any, *rest: Any) -> Any:
        return shipped(self, single(x), single(y), *rest)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.multiplies_bfloat16 = True
