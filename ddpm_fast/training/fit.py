"""Whether network, data and options go together, and what a run cannot go on without."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.training.config import TrainOptions


def parts(data: Any, options: TrainOptions) -> tuple[Any, Any]:
    """The images that are trained on, and those held out; None where there is no test_share."""
    if options.test_share == 0:
        return data, None
    held_out = round(options.test_share * len(data))
    if not 0 < held_out < len(data):
        raise ValueError(
            f"test_share must leave an image to either part, or be 0; {options.test_share:g} of"
            f" {len(data)} images is {held_out}"
        )
    train, test = data.split(options.test_share, options.seed)
    return train, test


def check_fit(network: Any, data: Any, options: TrainOptions) -> None:
    """That the images and their labels are those of the network."""
    if not hasattr(network, "config"):
        raise TypeError(f"network must be a UNet or ThesisUNet; got {type(network).__name__}")
    if (dtype := next(network.parameters()).dtype) != torch.float32:
        raise ValueError(f"network must have weights of float32, see precision; got {dtype}")
    config, (channels, *_) = network.config, data.sample_shape
    if tuple(data.sample_shape) != config.sample_shape:
        raise ValueError(
            f"data: images are {list(data.sample_shape)}, those of the network"
            f" {list(config.sample_shape or ())}"
        )
    expected = 2 * channels if options.learned else channels
    out = getattr(config, "out_channels", channels)
    if out != expected:
        raise ValueError(
            f"network must have {expected} output channels for variance {options.variance!r};"
            f" it has {out}"
        )
    classes, labels = network.config.num_classes, data.num_classes
    if (classes is None) != (labels is None):
        takes = "takes none" if classes is None else f"takes {classes} labels"
        has = "have none" if labels is None else f"have {labels} labels"
        raise ValueError(f"network {takes}, and the images {has}")
    if labels is None and options.label_dropout:
        raise ValueError(f"label_dropout needs labels, and {data.name} has none")
    if classes is not None and classes != labels + bool(options.label_dropout):
        raise ValueError(
            f"network must take {labels + bool(options.label_dropout)} labels: the images have"
            f" {labels} classes"
            + (", and one is for none" if options.label_dropout else "")
            + f"; it takes {classes}"
        )


def identity(network: Any, data: Any, schedule: NoiseSchedule) -> dict[str, Any]:
    """What a run cannot go on without: its network, schedule and data set."""
    digest = hashlib.sha256(schedule.betas.numpy().tobytes()).hexdigest()[:16]
    return {
        "network": {"class": type(network).__name__, **network.config.to_dict()},
        "schedule": {"name": schedule.name, "T": schedule.T, "digest": digest},
        "data": {"name": data.name, "images": len(data), "fingerprint": data.fingerprint[:16]},
    }
