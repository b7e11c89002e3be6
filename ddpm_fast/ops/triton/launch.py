"""What the launchers of the U-Net's Triton kernels share: maps, and how a kernel is started."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

# Programmatic dependent launch: a kernel starts while the one before it in the stream ends, and
# waits for that one's results itself. Off until it has been timed; needs compute capability 9.0.
OVERLAP = False
_MAX_NARROW = 2**31 - 2**16  # elements that 32-bit indices reach, with room for a tile


class Map(NamedTuple):
    """A tensor [N, C, H, W] by its strides."""

    data: Any
    sample: int
    channel: int
    row: int
    pixel: int


def map_of(tensor: Tensor) -> Map:
    """A tensor's Map. Strides of dimensions of size 1, which say nothing, are such as help."""
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
    """Whether pixel p of a sample lies at p * view.pixel."""
    return view.row == view.data.shape[3] * view.pixel


def extent(tensor: Tensor, first: int = 0) -> int:
    """How many elements lie between the ends of a tensor's dimensions from `first` on."""
    dims = list(zip(tensor.shape, tensor.stride(), strict=True))[first:]
    return 1 + sum((size - 1) * abs(stride) for size, stride in dims if size > 0)


def wide(*tensors: Tensor | None, first: int = 0) -> bool:
    """Whether an index into one of these, within the dimensions from `first` on, needs 64 bits."""
    return any(t is not None and extent(t, first) > _MAX_NARROW for t in tensors)


def overlaps(tensor: Tensor) -> bool:
    """Whether kernels on the tensor's device are started by programmatic dependent launch."""
    return OVERLAP and tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= (9, 0)


def launch(kernel: Any, grid: tuple[int, ...], on: Tensor, *args: object, **options: Any) -> None:
    """Start a kernel that has the constexpr OVERLAP on the device and current stream of `on`."""
    overlap = overlaps(on)
    if overlap:
        options["launch_pdl"] = True
    with torch.cuda.device_of(on):
        kernel[grid](*args, OVERLAP=overlap, **options)


@triton.jit
def after_previous(OVERLAP: tl.constexpr) -> None:
    """What comes first in a kernel: what the one before wrote is there, and the next may start."""
    if OVERLAP:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
