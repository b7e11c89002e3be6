"""The network of a training run: a known architecture, or one from a file, for some images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ddpm_fast.models import ThesisUNet, UNet, UNetConfig
from ddpm_fast.models.architectures import ARCHITECTURES
from ddpm_fast.models.checkpoint.checkpoint import load
from ddpm_fast.utils.files import read_json

NETWORKS = (*ARCHITECTURES, "thesis")


def build_network(
    source: str,
    sample_shape: tuple[int, int, int],
    classes: int | None = None,
    learned: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
) -> Any:
    """A network for images [C, H, W], in float32 on the CPU.

    source: one of NETWORKS, with random weights; a config.json of a UNet2DModel, likewise; or a
    checkpoint (`ddpm_fast.load`), whose weights training begins with. classes: labels of a
    conditional network, the null label included. learned: twice the output channels. seed: of
    random weights; torch's generator is left as it was.

    Raises ValueError for a network that does not fit, naming what differs; FileNotFoundError.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return _build(source, sample_shape, classes, learned, dropout)


def _build(
    source: str,
    sample_shape: tuple[int, int, int],
    classes: int | None,
    learned: bool,
    dropout: float,
) -> Any:
    if source == "thesis":
        if learned or dropout:
            raise ValueError("network 'thesis' has neither a learned variance nor dropout")
        return ThesisUNet(
            img_channels=sample_shape[0], num_classes=classes, sample_size=_size(sample_shape)
        )
    options = _for_images(sample_shape, classes, learned)
    if source in ARCHITECTURES:
        return UNet(UNetConfig(**ARCHITECTURES[source] | options | {"dropout": dropout}))
    path = Path(source)
    if path.suffix == ".json":
        return UNet(UNetConfig.from_dict(read_json(path) | options | {"dropout": dropout}))
    if not path.exists() and "/" not in source:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}, or a path; got {source!r}")
    if dropout:
        raise ValueError(f"dropout is for networks that begin anew; {source} is a checkpoint")
    return load(source).unet


def _for_images(
    sample_shape: tuple[int, int, int], classes: int | None, learned: bool
) -> dict[str, Any]:
    channels = sample_shape[0]
    return {
        "in_channels": channels,
        "out_channels": 2 * channels if learned else channels,
        "sample_size": _size(sample_shape),
        "num_class_embeds": classes,
    }


def _size(sample_shape: tuple[int, int, int]) -> int | tuple[int, int]:
    height, width = sample_shape[1:]
    return height if height == width else (height, width)
