"""Checks of arguments, with messages that name the argument, what came and what is accepted.

Nothing here waits for a GPU: values on a device are not looked at, because the kernels clamp what
they read there.
"""

from __future__ import annotations

import math
import operator
from typing import Any, TypeVar

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SEED_END = 1 << 64
STREAM_END = 1 << 32
SAMPLE_END = 1 << 63
ELEMENTS_END = 1 << 34  # 2^32 Philox blocks of four normals

Kind = TypeVar("Kind")


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``float32``."""
    return str(dtype).removeprefix("torch.")


def shape_text(tensor: Tensor) -> str:
    """A shape as people write it: ``[2, 3, 32, 32]``."""
    return str(list(tensor.shape))


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype that tensors of ``dtype`` are computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def instance(name: str, value: Any, kind: type[Kind]) -> Kind:
    """``value``, which must be a ``kind``."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}; got {type(value).__name__}")
    return value


def batch(name: str, value: Any, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Tensor:
    """``value`` as a batch of samples [N, ...] of one of ``dtypes``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a strided tensor; got layout {value.layout}")
    if value.dtype not in dtypes:
        accepted = ", ".join(dtype_name(d) for d in dtypes)
        raise TypeError(f"{name} must be {accepted}; got {dtype_name(value.dtype)}")
    if value.ndim == 0:
        raise ValueError(f"{name} must have a batch dimension, [N, ...]; got a 0-d tensor")
    return value


def floating(name: str, value: Any) -> Tensor:
    """``value`` as a floating-point tensor of any shape."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = dtype_name(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a floating-point tensor; got {got}")
    return value


def like(
    name: str, value: Any, other_name: str, other: Tensor, dtypes: tuple[torch.dtype, ...]
) -> Tensor:
    """``value`` as a batch of the shape and device of ``other``."""
    value = batch(name, value, dtypes)
    if value.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape of {other_name}, {shape_text(other)};"
            f" got {shape_text(value)}"
        )
    return same_device(name, value, other_name, other)


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> Tensor:
    """``value``, if it is on the device of ``other``."""
    if value.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}; got {value.device}"
        )
    return value


def written(name: str, value: Tensor) -> Tensor:
    """``value`` as a tensor that is written in place: no two elements share memory."""
    if any(
        size > 1 and stride == 0 for size, stride in zip(value.shape, value.stride(), strict=True)
    ):
        raise ValueError(f"{name} is written in place and must not be expanded; .clone() it first")
    if value.requires_grad:
        raise ValueError(f"{name} is written in place and must not require grad; .detach() it")
    return value


def apart(value: Tensor, *targets: Tensor | None) -> Tensor:
    """``value``, or a copy where it is another view of memory that is about to be written.

    The very same view is fine: an update reads each element before it writes it. A compiled graph
    sees to aliases itself.
    """
    if torch.compiler.is_compiling():
        return value
    for target in targets:
        if target is not None and _overlaps(value, target):
            return value.clone()
    return value


def _overlaps(value: Tensor, target: Tensor) -> bool:
    """Whether two views share memory other than element for element."""
    first, last = _extent(value)
    target_first, target_last = _extent(target)
    if last <= target_first or target_last <= first:
        return False
    same = first == target_first and value.stride() == target.stride()
    return not same or value.dtype != target.dtype


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses of its first byte and of the one past its last; equal where it is empty."""
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return 0, 0
    reach = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    start = tensor.data_ptr()
    return start, start + (reach + 1) * tensor.element_size()


def distinct(**tensors: Tensor | None) -> None:
    """That no two of the tensors that a call writes begin at the same place."""
    seen: dict[int, str] = {}
    for name, tensor in tensors.items():
        if tensor is None or torch.compiler.is_compiling() or _extent(tensor) == (0, 0):
            continue
        other = seen.setdefault(tensor.data_ptr(), name)
        if other != name:
            raise ValueError(f"{name} must not share its memory with {other}; both are written")


def note_written(*tensors: Tensor | None) -> None:
    """Tell autograd that an operator wrote to these, so that a stale graph is noticed."""
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            if tensor is not None and not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)


def index(name: str, value: Any, like: Tensor, end: int | None) -> Tensor:
    """``value``, an int or integers [N], as int64 [N] on the device of ``like``.

    Values on the CPU are checked against [0, ``end``); on a GPU they are clamped by the kernels.
    """
    samples = like.shape[0]
    accepted = f"{name} must be an int or an int64 or int32 tensor [{samples}]"
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{accepted}; got {type(value).__name__}")
        value = operator.index(value)
        if end is not None and not 0 <= value < end:
            raise ValueError(f"{name} must lie in [0, {end}); got {value}")
        return torch.full((), value, dtype=torch.int64, device=like.device).expand(samples)
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{accepted}; got {dtype_name(value.dtype)}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, as the samples; got {value.device}")
    if value.ndim > 1 or (value.ndim == 1 and value.shape[0] not in (1, samples)):
        raise ValueError(
            f"{name} must have one value for each of {samples} samples; got {shape_text(value)}"
        )
    if (
        end is not None
        and value.device.type == "cpu"
        and value.numel() > 0
        and not torch.compiler.is_compiling()
    ):
        low, high = (int(v) for v in value.aminmax())
        if low < 0 or high >= end:
            raise ValueError(f"{name} must lie in [0, {end}); got {low if low < 0 else high}")
    return value.to(torch.int64).expand(samples)


def device(name: str, value: Any) -> torch.device:
    """``value`` as a device; None is torch's default."""
    try:
        return torch.get_default_device() if value is None else torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{name} must be a device, such as cpu or cuda:0; got {value!r}"
        ) from error


def integer(name: str, value: Any, low: int, end: int) -> int:
    """``value`` as an int in [low, end)."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an int; got {type(value).__name__}")
    if not low <= number < end:
        raise ValueError(f"{name} must lie in [{low}, {end}); got {number}")
    return number


def sample_shape(name: str, value: Any) -> tuple[int, ...]:
    """``value`` as the shape of one sample, such as (3, 32, 32)."""
    try:
        shape = tuple(operator.index(size) for size in value)
    except TypeError:
        raise TypeError(
            f"{name} must be a sequence of ints, such as (3, 32, 32); got {value!r}"
        ) from None
    if any(size < 0 for size in shape):
        raise ValueError(f"{name} must have no negative size; got {shape}")
    if math.prod(shape) > ELEMENTS_END:
        raise ValueError(f"{name} must have at most 2^34 elements; got {shape}")
    return shape
