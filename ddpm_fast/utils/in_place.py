"""Checks of tensors that a call writes in place, and of memory that they share."""

from __future__ import annotations

import torch
from torch import Tensor


def writable(name: str, value: Tensor) -> Tensor:
    """Return `value` if an operator can write to it in place.

    Args:
        name: Name of the argument in messages.
        value: A tensor. No two of its elements may share memory.

    Raises:
        ValueError: `value` is expanded, or requires grad.
    """
    if any(
        size > 1 and stride == 0 for size, stride in zip(value.shape, value.stride(), strict=True)
    ):
        raise ValueError(f"{name} is written in place and must not be expanded; .clone() it first")
    if value.requires_grad:
        raise ValueError(f"{name} is written in place and must not require grad; .detach() it")
    return value


def without_overlap(value: Tensor, *targets: Tensor | None) -> Tensor:
    """Return `value`, or a copy if it is another view of memory that a call is about to write.

    The same view is accepted: an update reads each element before it writes it. In a compiled
    graph, torch.compile handles aliases.

    Args:
        value: A tensor that is read.
        targets: Tensors that are written; None is ignored.
    """
    if torch.compiler.is_compiling():
        return value
    for target in targets:
        if target is not None and _overlaps(value, target):
            return value.clone()
    return value


def _overlaps(value: Tensor, target: Tensor) -> bool:
    """Return True if two views share memory in any other way than element for element."""
    first, last = _extent(value)
    target_first, target_last = _extent(target)
    if last <= target_first or target_last <= first:
        return False
    same = first == target_first and value.stride() == target.stride()
    return not same or value.dtype != target.dtype


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Return the address of the first byte and of the byte after the last; equal if empty."""
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return 0, 0
    reach = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    start = tensor.data_ptr()
    return start, start + (reach + 1) * tensor.element_size()


def distinct(**tensors: Tensor | None) -> None:
    """Check that no two of the tensors that a call writes begin at the same address.

    Raises:
        ValueError: two of them do.
    """
    seen: dict[int, str] = {}
    for name, tensor in tensors.items():
        if tensor is None or torch.compiler.is_compiling() or _extent(tensor) == (0, 0):
            continue
        other = seen.setdefault(tensor.data_ptr(), name)
        if other != name:
            raise ValueError(f"{name} must not share memory with {other}; both are written")


def mark_written(*tensors: Tensor | None) -> None:
    """Increment the version of tensors that an operator wrote, so that autograd sees the change."""
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            if tensor is not None and not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)
