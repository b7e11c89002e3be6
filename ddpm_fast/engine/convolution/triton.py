"""Convolutions by the Triton kernel of `ddpm_fast.ops.triton.conv`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor

from ddpm_fast.engine.convolution.aten import copy_bias, pack_weight, phase_weight
from ddpm_fast.engine.specs import ConvSpec
from ddpm_fast.ops.dispatch import DTYPES, unavailable_reason


@dataclass
class TritonVariant:
    """The kernel in one configuration.

    Attributes:
        split_k_locks: number of int32 zeros, one for each output tile whose sum is split among
            programs; the kernel leaves them at zero. Concurrent calls must not share them.
    """

    name: str
    config: Any
    weight: Tensor
    bias: Tensor | None
    stride: int
    padding: tuple[int, int, int, int]
    split_k_locks: int
    workspace_bytes: int = 0

    def __call__(
        self,
        out: Tensor,
        x: Tensor,
        x2: Tensor | None,
        residual: Tensor | None,
        workspace: Tensor | None,
        split_k_locks: Tensor | None = None,
    ) -> None:
        """Write the convolution to `out`; without `split_k_locks`, locks are allocated."""
        import_module("ddpm_fast.ops.triton.conv").conv(
            *(out, x, x2, self.weight, self.bias, residual, self.stride, list(self.padding)),
            config=self.config,
            split_k_locks=split_k_locks,
        )


class TritonProvider:
    """`ddpm_fast.ops.triton.conv` in each of its configurations.

    Args:
        interpreted: support CPU tensors in Triton's interpreter, for tests.
    """

    name = "triton"

    def __init__(self, interpreted: bool = False) -> None:
        self.interpreted = interpreted

    def unavailable_reason(self, spec: ConvSpec) -> str | None:
        """Check the GPU, Triton and the dtype."""
        if spec.device.type != "cuda" and not self.interpreted:
            return f"it runs on NVIDIA GPUs; this is {spec.device}"
        if spec.dtype not in DTYPES["triton"]:
            return f"it does not take {spec.dtype}"
        return unavailable_reason("triton", spec.device)

    def variants(self, spec: ConvSpec, weight: Tensor, bias: Tensor | None) -> list[TritonVariant]:
        """Return one variant for each configuration; upsampling convolutions run as four phases."""
        kernels = import_module("ddpm_fast.ops.triton.conv")
        laid_out = (phase_weight if spec.upsample else pack_weight)(weight, spec.dtype)
        bias = copy_bias(bias, spec.dtype)
        phases, taps = (4, 4) if spec.upsample else (1, spec.kernel**2)
        height, width = spec.out_size
        pixels = spec.batch * height * width // phases
        sizes = (pixels, spec.out_channels, spec.in_channels, spec.in_channels2, taps, phases)
        found = []
        for config in kernels.configurations(kernels.Spec(*sizes, spec.dtype.itemsize)):
            tiles = -(-pixels // config.rows) * -(-spec.out_channels // config.columns) * phases
            split_k_locks = tiles if config.split > 1 else 0
            tile = f"{config.rows}x{config.columns}x{config.depth}"
            how = f"w{config.num_warps}s{config.num_stages}k{config.split}"
            fixed = (laid_out, bias, spec.stride, spec.padding, split_k_locks)
            found.append(TritonVariant(f"triton.{tile}.{how}", config, *fixed))
        return found
