"""Networks and engines that the tests of the engine share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ddpm_fast import Tuner, UNet, UNetConfig, UNetEngine
from ddpm_fast.engine.plan.memory import ALIGNMENT, Lifetime
from unet_cases import SMALL, inputs, scramble

CPU = torch.device("cpu")


def small(**options) -> UNet:
    return scramble(UNet(**SMALL | options)).eval()


def even(module: nn.Module, seed: int = 0) -> nn.Module:
    """Set normal weights of variance 1 / fan-in, which keep activations near an rms of 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                fan_in = layer.weight[0].numel()
                normal = torch.randn(layer.weight.shape, generator=generator)
                layer.weight.copy_(normal / math.sqrt(fan_in))
                layer.bias.copy_(0.1 * torch.randn(layer.bias.shape, generator=generator))
            elif isinstance(layer, nn.GroupNorm):
                layer.weight.copy_(1 + 0.1 * torch.randn(layer.weight.shape, generator=generator))
                layer.bias.copy_(0.1 * torch.randn(layer.bias.shape, generator=generator))
    return module.eval()


def engine(unet: UNet, x: Tensor, dtype=torch.float32, mode="off", **options) -> UNetEngine:
    """An engine for images like x; by default with the first implementation of everything."""
    tuner = Tuner(unet.device, mode=mode)
    return UNetEngine(unet, x.shape[0], tuple(x.shape[2:]), dtype, tuner=tuner, **options)


def arguments(config: UNetConfig, **options) -> tuple:
    """x, t and, where the network takes them, labels."""
    x, t, labels = inputs(config, **options)
    return (x, t) if labels is None else (x, t, labels)


def distance(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference, relative to that of `want`."""
    want = want.double()
    return float((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt())


def busiest(lifetimes: list[Lifetime]) -> int:
    """Most bytes that are needed at once: a lower bound of any placement."""
    moments = (Lifetime(0, one.first, one.first) for one in lifetimes)
    sizes = (
        sum(-(-one.nbytes // ALIGNMENT) * ALIGNMENT for one in lifetimes if one.meets(moment))
        for moment in moments
    )
    return max(sizes, default=0)
