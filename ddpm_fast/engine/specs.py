"""Shapes, dtypes and options of the operations of a plan, without weights or memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Padding = tuple[int, int, int, int]  # left, right, top, bottom


@dataclass(frozen=True)
class ConvSpec:
    """Convolution of one or two channels_last sources, with bias and residual.

    Attributes:
        batch: images in the batch.
        height: height of the input [batch, in_channels (+ in_channels2), height, width].
        width: width of the input.
        in_channels: channels of the first source.
        in_channels2: channels of the second source, concatenated after the first; 0 without one.
        out_channels: channels of the output.
        kernel: side of the kernel, 1 or 3.
        stride: stride in both directions.
        padding: zeros (left, right, top, bottom).
        upsample: upsample the input by 2 (nearest neighbour) before the convolution.
        bias: add a bias [out_channels].
        residual: add a tensor of the output's shape.
        dtype: dtype of the tensors.
        device: device of the tensors.
    """

    batch: int
    height: int
    width: int
    in_channels: int
    in_channels2: int
    out_channels: int
    kernel: int
    stride: int
    padding: Padding
    upsample: bool
    bias: bool
    residual: bool
    dtype: torch.dtype
    device: torch.device

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        scale = 2 if self.upsample else 1
        left, right, top, bottom = self.padding
        height = (scale * self.height + top + bottom - self.kernel) // self.stride + 1
        width = (scale * self.width + left + right - self.kernel) // self.stride + 1
        return height, width

    @property
    def flops(self) -> int:
        """Multiplications and additions of the convolution's definition."""
        height, width = self.out_size
        taps = self.kernel**2 * (self.in_channels + self.in_channels2)
        return 2 * self.batch * height * width * self.out_channels * taps

    def __str__(self) -> str:
        sources = f"{self.in_channels}" + (f"+{self.in_channels2}" if self.in_channels2 else "")
        extras = [
            *(["x2"] if self.upsample else []),
            *([f"/{self.stride}"] if self.stride != 1 else []),
            f"p{''.join(map(str, self.padding))}",
            *(["bias"] if self.bias else []),
            *(["residual"] if self.residual else []),
        ]
        return (
            f"conv{self.kernel} {sources}>{self.out_channels} @{self.height}x{self.width}"
            f" b{self.batch} {' '.join(extras)} {str(self.dtype).removeprefix('torch.')}"
        )


@dataclass(frozen=True)
class NormSpec:
    """GroupNorm of one or two sources: the options of the operator `group_norm_`.

    Attributes:
        batch: images in the batch.
        height: height of the images.
        width: width of the images.
        in_channels: channels of the first source.
        in_channels2: channels of the second source, concatenated after the first; 0 without one.
        groups: number of groups.
        eps: added to the variance.
        silu: apply SiLU to the result.
        vector: add a vector to the input, one value for each channel.
        modulation: scale and shift the normalised input.
        residual: add a tensor to the input.
        total: write the sum of input, vector and residual.
        dtype: dtype of the tensors.
        device: device of the tensors.
    """

    batch: int
    height: int
    width: int
    in_channels: int
    in_channels2: int
    groups: int
    eps: float
    silu: bool
    vector: bool
    modulation: bool
    residual: bool
    total: bool
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        sources = f"{self.in_channels}" + (f"+{self.in_channels2}" if self.in_channels2 else "")
        extras = [
            name for name in ("silu", "vector", "modulation", "residual", "total")
            if getattr(self, name)
        ]  # fmt: skip
        return (
            f"group_norm {sources} in {self.groups} @{self.height}x{self.width} b{self.batch}"
            f" {' '.join([*extras, str(self.dtype).removeprefix('torch.')])}"
        )


@dataclass(frozen=True)
class AttentionSpec:
    """Self-attention over the pixels of a fused tensor [batch, tokens, 3 heads head_dim].

    Attributes:
        batch: images in the batch.
        tokens: pixels of an image.
        heads: number of heads.
        head_dim: channels of a head.
        dtype: dtype of the tensors.
        device: device of the tensors.
    """

    batch: int
    tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def flops(self) -> int:
        """Multiplications and additions of the two matrix products."""
        return 4 * self.batch * self.heads * self.tokens**2 * self.head_dim

    def __str__(self) -> str:
        return (
            f"attention {self.tokens} tokens {self.heads}x{self.head_dim} b{self.batch}"
            f" {str(self.dtype).removeprefix('torch.')}"
        )
