"""Argument checks. Every message has the form `NAME must be X; got Y`.

No check synchronises with a GPU: values in device memory are not read, because the kernels clamp
the indices that they read there.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SEED_END = 1 << 64
STREAM_END = 1 << 32
SAMPLE_END = 1 << 63
ELEMENTS_END = 1 << 34  # 2^32 Philox blocks of four normals

Kind = TypeVar("Kind")


def dtype_name(dtype: torch.dtype) -> str:
    """Return `float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def shape_text(tensor: Tensor) -> str:
    """Return the shape of a tensor as text, such as `[2, 3, 32, 32]`."""
    return str(list(tensor.shape))


def describe(value: object) -> str:
    """Return dtype, shape and device of a tensor, or the type of anything else, for a message."""
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)} {shape_text(value)} on {value.device}"
    return type(value).__name__


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def instance(name: str, value: Any, kind: type[Kind]) -> Kind:
    """Return `value` if it is an instance of `kind`.

    Args:
        name: Name of the argument in messages.
        value: Any object.
        kind: Accepted type.

    Raises:
        TypeError: `value` is of another type.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}; got {type(value).__name__}")
    return value


def integer(name: str, value: Any, low: int, end: int | None = None) -> int:
    """Return `value` as an int.

    Args:
        name: Name of the argument in messages.
        value: An integer of any type with `__index__`; no bool.
        low: Smallest accepted value.
        end: One more than the largest accepted value. None: no limit.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: `value` is out of range.
    """
    accepted = f"an integer >= {low}" if end is None else f"an integer in [{low}, {end - 1}]"
    try:
        number = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} must be {accepted}; got {_with_type(value)}")
    if number < low or (end is not None and number >= end):
        raise ValueError(f"{name} must be {accepted}; got {number}")
    return number


def real(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    closed: str = "()",
) -> float:
    """Return `value` as a float.

    Args:
        name: Name of the argument in messages.
        value: A real number; no bool. NaN is in no interval.
        low: Lower end of the accepted interval.
        high: Upper end of the accepted interval.
        closed: Which ends belong to the interval: `[]`, `(]`, `[)` or `()`.

    Raises:
        TypeError: `value` is not a real number.
        ValueError: `value` is outside the interval.
    """
    accepted = f"a number in {closed[0]}{low:g}, {high:g}{closed[1]}"
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be {accepted}; got {_with_type(value)}")
    number = float(value)
    above = number >= low if closed[0] == "[" else number > low
    below = number <= high if closed[1] == "]" else number < high
    if not (above and below):
        raise ValueError(f"{name} must be {accepted}; got {number}")
    return number


def choice(name: str, value: Any, accepted: Collection[str]) -> str:
    """Return `value` if it is one of the accepted names.

    Args:
        name: Name of the argument in messages.
        value: Any object.
        accepted: Accepted names.

    Raises:
        ValueError: `value` is not accepted; the message lists the names.
    """
    if not isinstance(value, str) or value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}; got {value!r}")
    return value


def device(name: str, value: Any) -> torch.device:
    """Return `value` as a device.

    Args:
        name: Name of the argument in messages.
        value: A torch.device, its name, or None for torch's default device.

    Raises:
        ValueError: `value` is no device.
    """
    try:
        return torch.get_default_device() if value is None else torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{name} must be a device, such as cpu or cuda:0; got {value!r}"
        ) from error


def sample_shape(name: str, value: Any) -> tuple[int, ...]:
    """Return `value` as the shape of one sample, such as (3, 32, 32).

    Args:
        name: Name of the argument in messages.
        value: Sequence of ints >= 0, with a product of at most 2^34.

    Raises:
        TypeError: `value` is no sequence of ints.
        ValueError: a size is negative, or there are too many elements.
    """
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


def as_list(value: Any) -> Any:
    """Return sequences, arrays and tensors as a list; numbers, strings and others unchanged."""
    if isinstance(value, np.ndarray | np.generic | Tensor):
        return value.tolist()
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def batch(
    name: str,
    value: Any,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    shape: Sequence[int | str] | None = None,
) -> Tensor:
    """Return `value` if it is a batch of samples [N, ...].

    Args:
        name: Name of the argument in messages.
        value: A strided tensor with at least one dimension.
        dtypes: Accepted dtypes.
        shape: Accepted shape. Letters stand for any size. None: any shape.

    Raises:
        TypeError: `value` is no strided tensor, or of another dtype.
        ValueError: `value` has another shape.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a strided tensor; got layout {value.layout}")
    if value.dtype not in dtypes:
        accepted = ", ".join(dtype_name(d) for d in dtypes)
        raise TypeError(f"{name} must be {accepted}; got {dtype_name(value.dtype)}")
    if value.ndim == 0:
        raise ValueError(f"{name} must have a batch dimension, [N, ...]; got a 0-d tensor")
    if shape is not None and not _fits(value, shape):
        accepted = ", ".join(map(str, shape))
        raise ValueError(f"{name} must be [{accepted}]; got {shape_text(value)}")
    return value


def _fits(value: Tensor, shape: Sequence[int | str]) -> bool:
    return value.ndim == len(shape) and all(
        isinstance(wanted, str) or size == wanted
        for size, wanted in zip(value.shape, shape, strict=True)
    )


def images(name: str, value: Any) -> Tensor:
    """Return `value` if it is a floating-point tensor [N, C, H, W].

    Args:
        name: Name of the argument in messages.
        value: Any object.

    Raises:
        TypeError: `value` is no strided floating-point tensor.
        ValueError: `value` has another number of dimensions.
    """
    return batch(name, value, shape=("N", "C", "H", "W"))


def floating(name: str, value: Any) -> Tensor:
    """Return `value` if it is a floating-point tensor, of any shape.

    Args:
        name: Name of the argument in messages.
        value: Any object.

    Raises:
        TypeError: `value` is no floating-point tensor.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = dtype_name(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a floating-point tensor; got {got}")
    return value


def like(
    name: str, value: Any, other_name: str, other: Tensor, dtypes: tuple[torch.dtype, ...]
) -> Tensor:
    """Return `value` if it is a batch with the shape and device of another tensor.

    Args:
        name: Name of the argument in messages.
        value: Any object.
        other_name: Name of the other tensor in messages.
        other: The other tensor.
        dtypes: Accepted dtypes.

    Raises:
        TypeError: `value` is no strided tensor, or of another dtype.
        ValueError: `value` has another shape, or is on another device.
    """
    value = batch(name, value, dtypes)
    if value.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape of {other_name}, {shape_text(other)};"
            f" got {shape_text(value)}"
        )
    return same_device(name, value, other_name, other)


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> Tensor:
    """Return `value` if it is on the device of another tensor.

    Args:
        name: Name of the argument in messages.
        value: A tensor.
        other_name: Name of the other tensor in messages.
        other: The other tensor.

    Raises:
        ValueError: `value` is on another device.
    """
    if value.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}; got {value.device}"
        )
    return value


def index(name: str, value: Any, like: Tensor, end: int | None) -> Tensor:
    """Return indices of samples, such as timesteps, as int64 [N] on the device of `like`.

    Args:
        name: Name of the argument in messages.
        value: An int, or an int64 or int32 tensor, 0-d, [1] or [N].
        like: The samples [N, ...].
        end: One more than the largest accepted value. Values in CPU memory are checked; the
            kernels clamp those on a GPU. None: not checked.

    Raises:
        TypeError: `value` is neither an int nor a tensor of integers.
        ValueError: a value is out of range, or the tensor has another shape or device.
    """
    samples = like.shape[0]
    accepted = f"{name} must be an integer or an int64 or int32 tensor [{samples}]"
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{accepted}; got {type(value).__name__}")
        value = integer(name, value, 0, end) if end is not None else operator.index(value)
        return torch.full((), value, dtype=torch.int64, device=like.device).expand(samples)
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{accepted}; got {dtype_name(value.dtype)}")
    if value.device != like.device:
        raise ValueError(
            f"{name} must be on the device of the samples, {like.device}; got {value.device}"
        )
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
        integer(name, low if low < 0 else high, 0, end)
    return value.to(torch.int64).expand(samples)


def sample_labels(labels: Tensor | int | None, num: int, device: torch.device) -> Tensor | None:
    """Return the label of each sample, [num, ...] on a device; None for None.

    Args:
        labels: One int >= 0 for all samples, or a tensor [num, ...].
        num: Number of samples.
        device: Device of the result.

    Raises:
        TypeError: `labels` is neither an int nor a tensor.
        ValueError: an int is negative, or the tensor has another number of labels.
    """
    if labels is None:
        return None
    if not isinstance(labels, Tensor):
        label = integer("labels", labels, 0, 1 << 62)
        return torch.full((num,), label, dtype=torch.int64, device=device)
    if labels.ndim == 0 or labels.shape[0] != num:
        raise ValueError(
            f"labels must be an integer or a tensor [{num}, ...]; got {shape_text(labels)}"
        )
    return labels.to(device)


def empty_samples(
    num: int, sample_shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None
) -> Tensor:
    """Allocate a batch [num, *sample_shape], channels-last for 4-D and 5-D batches.

    Args:
        num: Number of samples.
        sample_shape: Shape of one sample.
        dtype: Dtype of the batch.
        device: Device of the batch. None: torch's default.

    Returns:
        An uninitialised tensor.
    """
    shape = (num, *sample_shape)
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}
    memory_format = channels_last.get(len(shape), torch.contiguous_format)
    return torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)


def _with_type(value: object) -> str:
    kind = type(value).__name__
    return f"{value!r} ({kind})" if isinstance(value, bool | int | float | str) else kind
