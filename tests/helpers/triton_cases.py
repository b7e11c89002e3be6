"""Random bits, their comparison, and layouts for the tests of the Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cases import BF16, F16, F32

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BITS = {F32: torch.int32, F16: torch.int16, BF16: torch.int16}


def crop(x: Tensor) -> Tensor:
    return x[..., 1:, 1:]


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


# Name, shape, layout and dtype: each way that the kernels of the updates walk their tensors.
PATHS = [
    (f"{name}-{str(dtype).removeprefix('torch.')}", shape, layout, dtype)
    for name, shape, layout in [
        ("linear", (4, 3, 32, 32), channels_last),
        ("strided", (4, 3, 33, 31), crop),
        ("short", (100, 2), torch.Tensor.contiguous),
        ("wide", (2, 3, 30000, 30000), channels_last),
    ]
    for dtype in (F32, F16, BF16)
]


def patterns(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Random bits: numbers of every size, subnormals, infinities and NaN."""
    info = torch.iinfo(BITS[dtype])
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(info.min, info.max + 1, shape, generator=generator, dtype=BITS[dtype])
    return bits.view(dtype)


def same(ours: Tensor, theirs: Tensor) -> bool:
    """The same dtype, strides and bits, but for the payload of a NaN."""
    bits = BITS[theirs.dtype]
    assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())
    ours = ours.cpu()
    return bool(((ours.view(bits) == theirs.view(bits)) | (ours.isnan() & theirs.isnan())).all())


def there(*tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.to(DEVICE, copy=True) for tensor in tensors]
