"""The networks that a checkpoint may hold, and what its files call them."""

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
class Kind:
    """A class of networks.

    name: in config.json, and behind `library` in model_index.json. config: reads and writes the
    options. build: a network of such options. own_key: a weight that all of them have, and none of
    another class.
    """

    name: str
    library: str
    config: type[UNetConfig] | type[ThesisUNetConfig]
    build: Callable[[Any], AnyUNet]
    own_key: str


UNET = Kind("UNet2DModel", "diffusers", UNetConfig, UNet, "conv_in.weight")
THESIS_UNET = Kind(
    "ThesisUNet", "ddpm_fast", ThesisUNetConfig, ThesisUNet, "downsampling.0.conv1.weight"
)
KINDS = (UNET, THESIS_UNET)


def kind_named(name: object) -> Kind | None:
    """The kind that files call `name`; None for another name."""
    return next((kind for kind in KINDS if kind.name == name), None)


def kind_of(unet: object) -> Kind:
    """The kind of a network. Raises TypeError for what is none."""
    if isinstance(unet, UNet):
        return UNET
    if isinstance(unet, ThesisUNet):
        return THESIS_UNET
    raise TypeError(f"unet must be a UNet or ThesisUNet; got {type(unet).__name__}")
