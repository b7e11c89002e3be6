"""Checksum of tensors' bytes, from its definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Odd multipliers of a word's index, as in csrc/core/checksum.h.
LOW_KEY, HIGH_KEY = 0x9E3779B1, 0x85EBCA77
_HALF = 0xFFFFFFFF


def span(tensor: Tensor) -> Tensor:
    """View the memory from a tensor's first to its last element as bytes.

    Args:
        tensor: A tensor of any dtype and strides.

    Returns:
        uint8 [bytes], a view.
    """
    if tensor.numel() == 0:
        return tensor.new_empty(0, dtype=torch.uint8)
    last = sum((s - 1) * step for s, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.detach().as_strided((last + 1,), (1,)).view(torch.uint8)


def words(tensor: Tensor) -> Tensor:
    """Copy the bytes of `span` as int64 words, padded with zeros."""
    raw = span(tensor)
    return F.pad(raw, (0, -len(raw) % 8)).view(torch.int64)


def checksum(tensors: list[Tensor]) -> Tensor:
    """Compute a checksum of each tensor's bytes, which tells whether it was written.

    With w_i the little-endian 64-bit words of the memory from the first to the last element, low_i
    and high_i their halves, and i counted from 0:

        sum     = sum_i w_i                                                             mod 2^64
        product = sum_i ((low_i + LOW_KEY i) mod 2^32) ((high_i + HIGH_KEY i) mod 2^32) mod 2^64

    Args:
        tensors: At least one tensor, all on one device, of any dtypes and strides.

    Returns:
        int64 [len(tensors), 2]: sum and product.
    """
    sums = []
    for tensor in tensors:
        word = words(tensor)
        index = torch.arange(len(word), device=word.device)
        low = ((word & _HALF) + index * LOW_KEY) & _HALF
        high = (((word >> 32) & _HALF) + index * HIGH_KEY) & _HALF
        sums.append(torch.stack([word.sum(), (low * high).sum()]))
    return torch.stack(sums)
