"""Maps and launches of the U-Net's Triton kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

# Programmatic dependent launch: a kernel starts while the previous kernel of the stream ends, and
# waits for its results. Off until it has been timed; needs compute capability 9.0.
OVERLAP = False
_MAX_NARROW = 2**31 - 2**16  # largest extent for 32-bit offsets, with room for a tile


class Map(NamedTuple):
    """Address and strides of a tensor [N, C, H, W]."""

    data: Any
    sample: int
    channel: int
    row: int
    pixel: int


def map_of(tensor: Tensor) -> Map:
    """Return the Map of a tensor. Strides of dimensions of size 1 are chosen freely."""
    sample, channel, row, pixel = tensor.stride()
    _, channels, height, width = tensor.shape
    if channels == 1:
        channel = 1
    if width == 1:
        pixel = row
    elif height == 1:
        row = width * pixel
    return Map(tensor, sample, channel, row, pixel)


def is_linear(view: Map) -> bool:
    """Return True if pixel p of a sample is at offset p * view.pixel."""
    return view.row == view.data.shape[3] * view.pixel


def extent(tensor: Tensor, first: int = 0) -> int:
    """Return the extent in memory of the dimensions from `first` on, in elements."""
    dims = list(zip(tensor.shape, tensor.stride(), strict=True))[first:]
    return 1 + sum((size - 1) * abs(stride) for size, stride in dims if size > 0)


def wide(*tensors: Tensor | None, first: int = 0) -> bool:
    """Return True if an offset within the dimensions from `first` on needs 64 bits."""
    return any(t is not None and extent(t, first) > _MAX_NARROW for t in tensors)


def overlaps(tensor: Tensor) -> bool:
    """Return True if kernels on the device are started by programmatic dependent launch."""
    return OVERLAP and tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= (9, 0)


def launch(kernel: Any, grid: tuple[int, ...], on: Tensor, *args: object, **options: Any) -> None:
    """Launch a kernel with the constexpr OVERLAP on the device and current stream of `on`."""
    overlap = overlaps(on)
    if overlap:
        options["launch_pdl"] = True
    with torch.cuda.device_of(on):
        kernel[grid](*args, OVERLAP=overlap, **options)


@triton.jit
def after_previous(OVERLAP: tl.constexpr) -> None:
    """Wait for the previous kernel's results, and let the next kernel start; first in a kernel."""
    if OVERLAP:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
