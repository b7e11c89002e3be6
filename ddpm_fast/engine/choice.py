"""Choice of the fastest of a network's implementations."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.engine.autotune.tuner import Tuner
from ddpm_fast.models import UNet
from ddpm_fast.utils import checks

_log = logging.getLogger("ddpm_fast")

Run = Callable[..., Tensor]


@dataclass(frozen=True)
class Choice:
    """Implementation chosen for one shape.

    Attributes:
        name: the implementation.
        seconds: seconds of one call of everything that was timed.
        drift: largest difference from the original network, relative to its largest output, on
            random images; None if they were not compared.
        failed: implementations that raised when they were timed.
    """

    name: str
    seconds: Mapping[str, float]
    drift: float | None
    failed: tuple[str, ...] = ()


def choose(tuner: Tuner, unet: UNet, shape: tuple[int, ...], runs: Mapping[str, Run]) -> Choice:
    """Time the implementations of a network, and compare the fastest with the network.

    Args:
        tuner: Times them, or knows the times.
        unet: The network.
        shape: Shape of the images [N, C, H, W].
        runs: Implementations by name. "module" is the network.
    """
    arguments = _example(unet, shape)
    key = _key(unet, shape, list(runs))
    name = tuner.fastest(key, {k: _thunk(run, *arguments) for k, run in runs.items()})
    want, got = runs["module"](*arguments).double(), runs[name](*arguments).double()
    drift = float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))
    _log.info("accelerate: %s for %s", name, list(shape))
    seconds = tuner.seconds(key)
    failed = tuple(other for other in runs if seconds and other not in seconds)
    if failed:
        _log.warning("accelerate: without %s, which failed; the log says why", failed)
    return Choice(name, seconds, drift, failed)


def _example(unet: UNet, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Create random images, timesteps and labels to time a network."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(unet.device, unet.dtype)
    x = x.to(memory_format=torch.channels_last)
    t = torch.arange(shape[0], device=unet.device) % 1000
    labels: Tensor | None = None
    if unet.config.class_embed_type == "identity":
        labels = torch.zeros(shape[0], unet.config.time_channels, device=unet.device)
    elif unet.class_embedding is not None:
        labels = torch.zeros(shape[0], dtype=torch.int64, device=unet.device)
    return x, t, labels


def _key(unet: UNet, shape: tuple[int, ...], names: list[str]) -> str:
    """Return the tuner's key for the choice among `names`."""
    text = json.dumps(unet.config.to_dict(), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    size, dtype = "x".join(map(str, shape)), checks.dtype_name(unet.dtype)
    return f"network {digest} {size} {dtype} of {', '.join(names)}"


def _thunk(run: Run, *args: Any) -> Callable[[], Any]:
    return lambda: run(*args)
