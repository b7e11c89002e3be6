"""Networks that are measured: known architectures with scaled random weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import ddpm_fast
from ddpm_fast.models import UNet, UNetConfig
from ddpm_fast.models.architectures import ARCHITECTURES
from ddpm_fast.utils import checks

TRIANGLES = Path(ddpm_fast.__file__).parent / "assets" / "triangles"
NETWORKS = ("cifar32", "ddpm256", "triangles")


def build(name: str) -> UNet:
    """Build a network, float32 on the CPU, in evaluation mode, with the same weights in every run.

    Args:
        name: cifar32 or ddpm256 (random weights by `even`), or triangles (the shipped model).

    Raises:
        ValueError: `name` is another name.
    """
    if name == "triangles":
        return cast(UNet, ddpm_fast.load(TRIANGLES).unet)
    checks.choice("network", name, NETWORKS)
    with torch.device("meta"):
        unet = UNet(UNetConfig(**ARCHITECTURES[name]))
    return even(unet.to_empty(device="cpu"))


def even(module: UNet, seed: int = 0) -> UNet:
    """Fill a network with weights that keep activations near an rms of 1; set evaluation mode.

    Convolutions and linear layers have normal weights of variance 1 / fan-in and biases of
    standard deviation 0.1; normalisations have weights around 1 and biases around 0, both with a
    standard deviation of 0.1.
    """
    generator = torch.Generator().manual_seed(seed)

    def fill(parameter: Any, mean: float, deviation: float) -> None:
        # Contiguous: normal_ on channels_last memory is several times slower.
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
    """Return the height and width of the images that a network was made for.

    Raises:
        ValueError: the network's config has no sample_size.
    """
    size = unet.config.sample_size
    if size is None:
        raise ValueError("sample_size of the network must be set; got None")
    return size if isinstance(size, tuple) else (size, size)
