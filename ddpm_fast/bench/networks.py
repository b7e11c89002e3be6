"""The networks that are measured, by name: known architectures with even random weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import ddpm_fast
from ddpm_fast.models import UNet, UNetConfig
from ddpm_fast.models.architectures import ARCHITECTURES

TRIANGLES = Path(ddpm_fast.__file__).parent / "assets" / "triangles"
NETWORKS = ("cifar32", "ddpm256", "triangles")


def build(name: str) -> UNet:
    """A network in float32 on the CPU, in eval mode: the same weights in every run.

    cifar32 and ddpm256 get random weights (`even`), triangles is the model that is shipped. Raises
    ValueError for another name.
    """
    if name == "triangles":
        return cast(UNet, ddpm_fast.load(TRIANGLES).unet)
    if name not in NETWORKS:
        raise ValueError(f"network must be {', '.join(NETWORKS)}; got {name!r}")
    with torch.device("meta"):
        unet = UNet(UNetConfig(**ARCHITECTURES[name]))
    return even(unet.to_empty(device="cpu"))


def even(module: UNet, seed: int = 0) -> UNet:
    """Fill a network with weights that keep activations near an rms of 1, and set it to eval mode.

    Convolutions and linear layers: normal, of variance 1 / fan-in; biases 0.1 of a normal one,
    normalisations 1 and 0 with 0.1 of a normal one added.
    """
    generator = torch.Generator().manual_seed(seed)

    def fill(parameter: Any, mean: float, deviation: float) -> None:
        # Made contiguous: normal_ on channels_last memory is several times slower.
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation + mean)

    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                fill(layer.weight, 0, 1 / math.sqrt(layer.weight[0].numel()))
                fill(layer.bias, 0, 0.1)
            elif isinstance(layer, nn.GroupNorm):
                fill(layer.weight, 1, 0.1)
                fill(layer.bias, 0, 0.1)
    return module.eval()


def image_size(unet: UNet) -> tuple[int, int]:
    """Height and width of the images that a network is made for."""
    size = unet.config.sample_size
    if size is None:
        raise ValueError("the network must have a sample_size; its config has none")
    return size if isinstance(size, tuple) else (size, size)
