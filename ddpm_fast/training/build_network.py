"""Networks to train: a known architecture, a config.json or a checkpoint."""

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
    """Build or load a network for images of a shape.

    Args:
        source: One of NETWORKS or a config.json of a UNet2DModel, with random weights; or a
            checkpoint (`ddpm_fast.load`), whose weights the training starts from.
        sample_shape: Shape of an image, (C, H, W).
        classes: Labels of a conditional network, the null label included. None: unconditional.
        learned: Twice the output channels, for a learned variance.
        dropout: Dropout probability.
        seed: Seed of random weights. torch's global generator is left unchanged.

    Returns:
        A UNet or ThesisUNet in float32 on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: `source` is unknown or does not support an option.
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
        raise ValueError(f"dropout must be 0 for a checkpoint; got {dropout} for {source}")
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
