"""Convolutions by torch's kernels, which support every convolution of a plan."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_fast.engine.specs import ConvSpec
from ddpm_fast.ops.reference.network import doubling_weight

# Phase (a, b) of an upsampling convolution writes out[:, :, a::2, b::2].
PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))


def pack_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy a weight [.., O, C, K, K] in `dtype`, with memory order [.., O, K, K, C]."""
    last = weight.detach().to(dtype).movedim(-3, -1).clone(memory_format=torch.contiguous_format)
    return last.movedim(-1, -3)


def copy_bias(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a copy of the bias in `dtype`."""
    return None if bias is None else bias.detach().to(dtype, copy=True).contiguous()


def phase_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `doubling_weight`, summed in at least float32, rounded and packed."""
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return pack_weight(doubling_weight(wide), dtype)


def upsampled_bytes(spec: ConvSpec) -> int:
    """Return the size of the upsampled input of a convolution."""
    return 4 * spec.batch * spec.in_channels * spec.height * spec.width * spec.dtype.itemsize


def upsample_into(workspace: Tensor | None, x: Tensor, spec: ConvSpec) -> Tensor:
    """Upsample x [N, C, H, W] by 2 (nearest neighbour) into the workspace, channels_last."""
    assert workspace is not None
    flat = workspace.flatten()[: upsampled_bytes(spec)].view(spec.dtype)
    shape = (spec.batch, 2 * spec.height, 2 * spec.width, spec.in_channels)
    big = flat.view(shape).permute(0, 3, 1, 2)
    pairs = big.unflatten(3, (spec.width, 2)).unflatten(2, (spec.height, 2))
    pairs.copy_(x[:, :, :, None, :, None].expand_as(pairs))
    return big


@dataclass
class OperatorVariant:
    """Call of an operator with the schema of `torch.ops.ddpm_fast.conv_`.

    Attributes:
        upsampled: spec of a convolution whose input is upsampled into the workspace first.
    """

    name: str
    operator: torch._ops.OpOverloadPacket
    weight: Tensor
    bias: Tensor | None
    stride: int
    padding: tuple[int, int, int, int]
    upsampled: ConvSpec | None = None

    @property
    def workspace_bytes(self) -> int:
        """Size of the upsampled input."""
        return upsampled_bytes(self.upsampled) if self.upsampled else 0

    def __call__(
        self,
        out: Tensor,
        x: Tensor,
        x2: Tensor | None,
        residual: Tensor | None,
        workspace: Tensor | None,
    ) -> None:
        """Write the convolution to `out`."""
        if self.upsampled:
            x = upsample_into(workspace, x, self.upsampled)
        self.operator(out, x, x2, self.weight, self.bias, residual, self.stride, self.padding)


class AtenProvider:
    """`torch.ops.ddpm_fast.conv_`: cuDNN and cuBLAS, or oneDNN and MKL, as torch calls them."""

    name = "aten"

    def unavailable_reason(self, spec: ConvSpec) -> str | None:
        """Return None: every convolution is supported."""
        return None

    def variants(
        self, spec: ConvSpec, weight: Tensor, bias: Tensor | None
    ) -> list[OperatorVariant]:
        """Return one variant; two with upsampling, by the upsampled input and by four phases."""
        operator = torch.ops.ddpm_fast.conv_
        common = (copy_bias(bias, spec.dtype), spec.stride, spec.padding)
        whole = pack_weight(weight, spec.dtype)
        if not spec.upsample:
            return [OperatorVariant("aten", operator, whole, *common)]
        phases = phase_weight(weight, spec.dtype)
        return [
            OperatorVariant("aten.nearest", operator, whole, *common, upsampled=spec),
            OperatorVariant("aten.phases", operator, phases, *common),
        ]
