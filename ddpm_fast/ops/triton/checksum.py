"""Triton backend of the checksum of tensors' bytes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.ops.reference.checksum import HIGH_KEY, LOW_KEY, span, words

_BLOCK = 2048  # words of a program
_LOW_KEY, _HIGH_KEY = tl.constexpr(LOW_KEY), tl.constexpr(HIGH_KEY)


@triton.jit
def _checksum_kernel(work: tl.tensor, sums: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Add the checksum of a block of words to its tensor's.

    `work` has four numbers a program: address of the tensor, number of its words, first word of the
    program, and row of `sums`.
    """
    program = work + 4 * tl.program_id(0).to(tl.int64)
    data = tl.load(program).to(tl.pointer_type(tl.int64))
    index = tl.load(program + 2) + tl.arange(0, BLOCK)
    inside = index < tl.load(program + 1)
    word = tl.load(data + index, mask=inside, other=0)
    i = index.to(tl.uint32)
    low = word.to(tl.uint32) + i * _LOW_KEY
    high = (word >> 32).to(tl.uint32) + i * _HIGH_KEY
    product = (low.to(tl.uint64) * high.to(tl.uint64)).to(tl.int64)
    out = sums + 2 * tl.load(program + 3)
    tl.atomic_add(out, tl.sum(word))
    tl.atomic_add(out + 1, tl.sum(tl.where(inside, product, 0)))


def checksum(tensors: list[Tensor]) -> Tensor:
    """Run `reference.checksum`."""
    device = tensors[0].device
    # Kept until the launch: copies of tensors that are not whole, aligned words.
    held = [_whole(tensor) for tensor in tensors]
    counts = torch.tensor([len(each) for each in held])
    programs = (counts + _BLOCK - 1) // _BLOCK
    row = torch.repeat_interleave(torch.arange(len(held)), programs)
    number = torch.arange(len(row)) - (programs.cumsum(0) - programs)[row]
    address = torch.tensor([each.data_ptr() for each in held])
    work = torch.stack([address[row], counts[row], number * _BLOCK, row], 1).to(device)
    sums = torch.zeros(len(held), 2, dtype=torch.int64, device=device)
    if len(row):
        with torch.cuda.device_of(sums):
            _checksum_kernel[(len(row),)](work, sums, BLOCK=_BLOCK)
    return sums


def _whole(tensor: Tensor) -> Tensor:
    """Return the words of a tensor: a view if its bytes are whole, aligned words, else a copy."""
    raw = span(tensor)
    aligned = raw.storage_offset() % 8 == 0 and raw.data_ptr() % 8 == 0
    return raw.view(torch.int64) if aligned and len(raw) % 8 == 0 else words(tensor)
