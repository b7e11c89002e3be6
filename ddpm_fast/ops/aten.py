"""Convolution and attention of the U-Net with ATen: cuDNN and cuBLAS, or oneDNN and MKL."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context without autocast: operators compute in the dtype of their inputs."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()  # a tenth of the overhead
    return torch.autocast(device.type, enabled=False)


def sdpa(name: str) -> Callable[[Tensor, Tensor, int, float], None]:
    """Return `attention_` with one of the kernels of `SDPA`; it raises if the kernel cannot run."""

    def run(out: Tensor, qkv: Tensor, heads: int, scale: float) -> None:
        # A kernel that cannot run warns of the reasons before it raises.
        with sdpa_kernel(SDPA[name]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attention_(out, qkv, heads, scale)

    return run


def attention_(out: Tensor, qkv: Tensor, heads: int, scale: float) -> None:
    """Run `reference.attention_` by scaled_dot_product_attention."""
    q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, 2))
    with no_autocast(qkv.device):
        got = F.scaled_dot_product_attention(q, k, v, scale=scale)
    out.unflatten(2, (heads, -1)).copy_(got.transpose(1, 2))


def conv_(
    out: Tensor,
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    padding: list[int],
) -> None:
    """Run `reference.conv_`; two sources are two convolutions, without a concatenation."""
    if weight.dim() == 5:
        for phase in range(4):
            a, b = divmod(phase, 2)
            sides = (1 - b, b, 1 - a, a)
            _windows(out[:, :, a::2, b::2], x, weight[phase], bias, 1, sides, add=False)
    elif _is_product(out, weight, stride, padding):
        _pixelwise(out, x, x2, weight[:, :, 0, 0], bias)
    else:
        first = weight[:, : x.shape[1]]
        _windows(out, x, first, bias, stride, padding, add=False)
        if x2 is not None:
            _windows(out, x2, weight[:, x.shape[1] :], None, stride, padding, add=True)
    if residual is not None:
        out.add_(residual)


def even_padding(
    padding: tuple[int, int, int, int] | list[int], stride: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return symmetric padding for a convolution with asymmetric padding.

    A convolution padded by p >= top rows, where p - top is a multiple of the stride, contains the
    rows of a convolution padded by (top, bottom) from row (p - top) / stride on. Asymmetric padding
    thus costs a few rows of output, but no padded copy of the input.

    Args:
        padding: Zeros at the left, right, top and bottom.
        stride: Stride of the convolution.

    Returns:
        The padding (vertical, horizontal), and the first row and column of the output to keep.
    """
    left, right, top, bottom = padding
    sizes, skips = [], []
    for before, after in ((top, bottom), (left, right)):
        even = before
        while even < after:
            even += stride
        sizes.append(even)
        skips.append((even - before) // stride)
    return (sizes[0], sizes[1]), (skips[0], skips[1])


def window(y: Tensor, skips: tuple[int, int], size: torch.Size) -> Tensor:
    """Crop the output of an evenly padded convolution to a size."""
    row, column = skips
    return y[:, :, row : row + size[2], column : column + size[3]]


def _windows(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: tuple[int, int, int, int] | list[int],
    add: bool,
) -> None:
    even, skips = even_padding(padding, stride)
    with no_autocast(x.device):
        y = window(F.conv2d(x, weight, bias, stride, even), skips, out.shape)
    if add:
        out.add_(y)
    else:
        out.copy_(y)


def _is_product(
    out: Tensor, weight: Tensor, stride: int, padding: tuple[int, int, int, int] | list[int]
) -> bool:
    """Return True if a convolution is a matrix product, and `out` a matrix in memory."""
    alone = weight.shape[2] == 1 and stride == 1 and not any(padding)
    return alone and out.is_contiguous(memory_format=torch.channels_last)


def _pixelwise(
    out: Tensor, x: Tensor, x2: Tensor | None, weight: Tensor, bias: Tensor | None
) -> None:
    """Compute a 1x1 convolution as matrix products over the pixels."""
    first = weight[:, : x.shape[1]]
    rows = pixels(out)
    if bias is None:
        torch.mm(pixels(x), first.t(), out=rows)
    else:
        torch.addmm(bias, pixels(x), first.t(), out=rows)
    if x2 is not None:
        rows.addmm_(pixels(x2), weight[:, x.shape[1] :].t())


def pixels(x: Tensor) -> Tensor:
    """Return [N, C, H, W] in channels-last memory as a view [N H W, C]."""
    return x.permute(0, 2, 3, 1).flatten(0, 2) if x.dim() == 4 else x.flatten(0, 1)
