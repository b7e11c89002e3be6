"""Classes of networks that a checkpoint can hold, and their names in its files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ddpm_fast.models.thesis_unet import ThesisUNet
from ddpm_fast.models.thesis_unet_config import ThesisUNetConfig
from ddpm_fast.models.unet import UNet
from ddpm_fast.models.unet_config import UNetConfig

AnyUNet = UNet | ThesisUNet


@dataclass(frozen=True)
class NetworkKind:
    """Class of networks that a checkpoint can hold.

    Attributes:
        name: Class name in config.json and in model_index.json.
        library: Library in model_index.json.
        config: Class of the configuration.
        build: Makes a network from a configuration.
        marker_key: Key of a weight that every network of the class has, and no other class.
    """

    name: str
    library: str
    config: type[UNetConfig] | type[ThesisUNetConfig]
    build: Callable[[Any], AnyUNet]
    marker_key: str


UNET = NetworkKind("UNet2DModel", "diffusers", UNetConfig, UNet, "conv_in.weight")
THESIS_UNET = NetworkKind(
    "ThesisUNet", "ddpm_fast", ThesisUNetConfig, ThesisUNet, "downsampling.0.conv1.weight"
)
NETWORK_KINDS = (UNET, THESIS_UNET)


def find_kind(name: object) -> NetworkKind | None:
    """Return the class of networks with this name in files; None for another name."""
    return next((kind for kind in NETWORK_KINDS if kind.name == name), None)


def network_kind(unet: object) -> NetworkKind:
    """Return the class of a network; raise TypeError for anything else."""
    if isinstance(unet, UNet):
        return UNET
    if isinstance(unet, ThesisUNet):
        return THESIS_UNET
    raise TypeError(f"unet must be a UNet or ThesisUNet; got {type(unet).__name__}")
