"""Checks of tensors that a call writes in place, and of memory that they share."""

from __future__ import annotations

import torch
from torch import Tensor

_MOST_COMPARED = 1 << 24  # elements or bytes whose addresses are listed


def writable(name: str, value: Tensor) -> Tensor:
    """Return `value` if an operator can write to it in place.

    Args:
        name: Name of the argument in messages.
        value: A tensor. No two of its elements may share memory.

    Raises:
        ValueError: Elements of `value` share memory, or it requires grad.
    """
    if not value.is_contiguous():
        if any(
            size > 1 and stride == 0
            for size, stride in zip(value.shape, value.stride(), strict=True)
        ):
            raise ValueError(
                f"{name} is written in place and must not be expanded; .clone() it first"
            )
        if not torch.compiler.is_compiling() and _overlaps_itself(value):
            raise ValueError(
                f"{name} is written in place and its elements must not share memory; got shape"
                f" {list(value.shape)} with strides {list(value.stride())}; .clone() it first"
            )
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
    """Check that no two of the tensors that a call writes share memory.

    Raises:
        ValueError: two of them do.
    """
    if torch.compiler.is_compiling():
        return
    seen: list[tuple[str, Tensor, int, int]] = []
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        first, last = _extent(tensor)
        for other_name, other, other_first, other_last in seen:
            if first < other_last and other_first < last and _share_memory(tensor, other):
                raise ValueError(
                    f"{name} must not share memory with {other_name}; both are written"
                )
        seen.append((name, tensor, first, last))


def _overlaps_itself(value: Tensor) -> bool:
    """Return True if two elements have the same address; tensors of too many are assumed to."""
    if value.numel() == 0:
        return False
    reach = 0
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1:
            if stride <= reach:  # the smaller dimensions reach the next index of this one
                return value.numel() > _MOST_COMPARED or len(_offsets(value, "cpu").unique()) < (
                    value.numel()
                )
            reach += (size - 1) * stride
    return False


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Return True if two tensors of intersecting extents have a byte in common.

    Views that interleave, such as channels of one channels-last buffer, do not. Those of too many
    elements are not compared: they are assumed to interleave unless they begin at one address.
    """
    if a.data_ptr() == b.data_ptr() or (_is_dense(a) and _is_dense(b)):
        return True
    if max(a.numel() * a.element_size(), b.numel() * b.element_size()) > _MOST_COMPARED:
        return False
    return bool(torch.isin(_addresses(a), _addresses(b)).any())


def _is_dense(value: Tensor) -> bool:
    return value.is_contiguous() or (
        value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last)
    )


def _offsets(value: Tensor, device: str) -> Tensor:
    """Return the offset of each element from the first, in elements."""
    offsets = torch.zeros(1, dtype=torch.int64, device=device)
    for size, stride in zip(value.shape, value.stride(), strict=True):
        steps = stride * torch.arange(size, device=device)
        offsets = (offsets[:, None] + steps).flatten()
    return offsets


def _addresses(value: Tensor) -> Tensor:
    """Return the address of each byte."""
    size = value.element_size()
    elements = value.data_ptr() + size * _offsets(value, "cpu")
    return (elements[:, None] + torch.arange(size, device="cpu")).flatten()


def mark_written(*tensors: Tensor | None) -> None:
    """Increment the version of tensors that an operator wrote, so that autograd sees the change."""
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            if tensor is not None and not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)
