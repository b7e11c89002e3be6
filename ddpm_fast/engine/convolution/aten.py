"""Convolutions of the plan by torch's own kernels; every convolution has one here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_fast.engine.specs import ConvSpec
from ddpm_fast.ops.reference.network import doubling_weight

# Rows and columns of the output that a phase (a, b) of a doubling owns: out[:, :, a::2, b::2].
PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))


def pack_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of the weight [.., O, C, K, K] in `dtype` whose memory is [.., O, K, K, C]."""
    last = weight.detach().to(dtype).movedim(-3, -1).clone(memory_format=torch.contiguous_format)
    return last.movedim(-1, -3)


def copy_bias(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A copy of the bias in `dtype`."""
    return None if bias is None else bias.detach().to(dtype, copy=True).contiguous()


def phase_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`doubling_weight`, summed in at least float32 and then rounded, laid out as by `prepared`."""
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return pack_weight(doubling_weight(wide), dtype)


def upsampled_bytes(spec: ConvSpec) -> int:
    """Size of the enlarged input of an upsampling convolution."""
    return 4 * spec.batch * spec.in_channels * spec.height * spec.width * spec.dtype.itemsize


def upsample_into(workspace: Tensor | None, x: Tensor, spec: ConvSpec) -> Tensor:
    """x [N, C, H, W] with every pixel repeated 2 x 2, in the workspace, channels_last."""
    assert workspace is not None
    flat = workspace.flatten()[: upsampled_bytes(spec)].view(spec.dtype)
    shape = (spec.batch, 2 * spec.height, 2 * spec.width, spec.in_channels)
    big = flat.view(shape).permute(0, 3, 1, 2)
    pairs = big.unflatten(3, (spec.width, 2)).unflatten(2, (spec.height, 2))
    pairs.copy_(x[:, :, :, None, :, None].expand_as(pairs))
    return big


@dataclass
class OperatorVariant:
    """A call of an operator with the schema of ``torch.ops.ddpm_fast.conv_``.

    doubled: the spec of an upsampling convolution whose input is enlarged in the workspace first.
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
        """That of the enlarged input."""
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
    """``torch.ops.ddpm_fast.conv_``: cuDNN and cuBLAS, or oneDNN and MKL, as torch calls them."""

    name = "aten"

    def unavailable_reason(self, spec: ConvSpec) -> str | None:
        """It runs everything."""
        return None

    def variants(
        self, spec: ConvSpec, weight: Tensor, bias: Tensor | None
    ) -> list[OperatorVariant]:
        """One, or for an upsampling convolution two: by an enlarged input and by four phases."""
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
