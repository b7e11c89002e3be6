"""Convolutions by oneDNN, with a packed weight and the sum in its accumulator.

torch's inductor calls oneDNN by operators of the namespace `mkldnn`, which torch may change: if one
is missing, the provider is unavailable. `_convolution_pointwise_.binary` adds its result to an
existing tensor, so that residual and second source need no separate pass and no allocation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_fast.engine.convolution.aten import (
    PHASES,
    copy_bias,
    phase_weight,
    upsample_into,
    upsampled_bytes,
)
from ddpm_fast.engine.specs import ConvSpec
from ddpm_fast.ops.aten import even_padding, window

_OPERATORS = ("_convolution_pointwise", "_convolution_pointwise_", "_reorder_convolution_weight")


@dataclass
class _PackedConv:
    """Convolution of one source with symmetric padding, its weight packed for the input's size."""

    weight: Tensor
    bias: Tensor | None
    stride: int
    padding: tuple[int, int]
    skips: tuple[int, int]

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        stride: int,
        padding: tuple[int, int, int, int],
        input_size: list[int],
    ) -> _PackedConv:
        even, skips = even_padding(padding, stride)
        packed = torch.ops.mkldnn._reorder_convolution_weight(
            weight.contiguous(), list(even), [stride] * 2, [1, 1], 1, input_size
        )
        return cls(packed, bias, stride, even, skips)

    def add_to(self, out: Tensor, x: Tensor) -> None:
        """Compute out += convolution."""
        steps = (list(self.padding), [self.stride] * 2, [1, 1], 1)
        if any(self.skips) or not _is_channels_last(out):
            out.add_(self._new(x, out.shape))
        else:
            torch.ops.mkldnn._convolution_pointwise_.binary(
                out, x, self.weight, self.bias, *steps, "add", None, None, [], None
            )

    def write_to(self, out: Tensor, x: Tensor) -> None:
        """Compute out = convolution."""
        if any(self.skips) or not _is_channels_last(out):
            out.copy_(self._new(x, out.shape))
        else:
            self.add_to(out.zero_(), x)

    def _new(self, x: Tensor, size: torch.Size) -> Tensor:
        steps = (list(self.padding), [self.stride] * 2, [1, 1], 1)
        y = torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, *steps, "none", [], ""
        )
        return window(y, self.skips, size)


def _is_channels_last(out: Tensor) -> bool:
    return out.is_contiguous(memory_format=torch.channels_last)


@dataclass
class OnednnVariant:
    """Convolution of one or two sources."""

    name: str
    first: _PackedConv
    second: _PackedConv | None
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
        if residual is None:
            self.first.write_to(out, x)
        else:
            out.copy_(residual)
            self.first.add_to(out, x)
        if self.second is not None:
            assert x2 is not None
            self.second.add_to(out, x2)


@dataclass
class OnednnPhases:
    """3x3 convolution after upsampling, as four 2x2 convolutions of summed weights."""

    name: str
    parts: list[_PackedConv]
    workspace_bytes: int = 0

    def __call__(
        self,
        out: Tensor,
        x: Tensor,
        x2: Tensor | None,
        residual: Tensor | None,
        workspace: Tensor | None,
    ) -> None:
        """Write the convolution to `out`."""
        for part, (a, b) in zip(self.parts, PHASES, strict=True):
            phase_out = out[:, :, a::2, b::2]
            if residual is None:
                part.write_to(phase_out, x)
            else:
                phase_out.copy_(residual[:, :, a::2, b::2])
                part.add_to(phase_out, x)


class OnednnProvider:
    """oneDNN by torch's private operators."""

    name = "onednn"

    def unavailable_reason(self, spec: ConvSpec) -> str | None:
        """Check the device, the operators, the dtype and that the input is not empty."""
        if spec.device.type != "cpu":
            return f"it runs on the CPU; this is {spec.device}"
        if not torch.backends.mkldnn.is_available():
            return "this torch was built without oneDNN"
        for name in _OPERATORS:
            if not hasattr(torch.ops.mkldnn, name):
                return f"this torch has no operator mkldnn.{name}"
        if not _supports(spec.dtype):
            return f"oneDNN does not take {spec.dtype} on this processor"
        return None if spec.batch * spec.height * spec.width else "the input is empty"

    def variants(
        self, spec: ConvSpec, weight: Tensor, bias: Tensor | None
    ) -> list[OnednnVariant | OnednnPhases]:
        """Return one variant; two with upsampling, by the upsampled input and by four phases."""
        bias = copy_bias(bias, spec.dtype)
        rounded = weight.detach().to(spec.dtype)
        scale = 2 if spec.upsample else 1
        height, width = scale * spec.height, scale * spec.width

        def part(weight: Tensor, bias: Tensor | None, channels: int) -> _PackedConv:
            size = [spec.batch, channels, height, width]
            return _PackedConv.of(weight, bias, spec.stride, spec.padding, size)

        first = part(rounded[:, : spec.in_channels], bias, spec.in_channels)
        if spec.upsample:
            phases = phase_weight(weight, spec.dtype)
            size = [spec.batch, spec.in_channels, spec.height, spec.width]
            parts = [
                _PackedConv.of(phases[2 * a + b], bias, 1, (1 - b, b, 1 - a, a), size)
                for a, b in PHASES
            ]
            return [
                OnednnVariant("onednn.nearest", first, None, spec),
                OnednnPhases("onednn.phases", parts),
            ]
        second = None
        if spec.in_channels2:
            second = part(rounded[:, spec.in_channels :], None, spec.in_channels2)
        return [OnednnVariant("onednn", first, second)]


def _supports(dtype: torch.dtype) -> bool:
    if dtype == torch.float32:
        return True
    asks = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    supported = getattr(torch.ops.mkldnn, asks.get(dtype, ""), None) if dtype in asks else None
    return bool(supported is not None and supported())
