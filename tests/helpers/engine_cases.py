"""Networks and engines that the tests of the engine share."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast import Tuner, UNet, UNetConfig, UNetEngine
from ddpm_fast.engine.autotune.tuner import TunerChoice
from ddpm_fast.engine.plan.memory import ALIGNMENT, Lifetime
from unet_cases import SMALL, inputs, scramble

CPU = torch.device("cpu")


def small(**options) -> UNet:
    return scramble(UNet(**SMALL | options)).eval()


def engine(unet: UNet, x: Tensor, dtype=torch.float32, mode="off", **options) -> UNetEngine:
    """Create an engine for images like x; by default without tuning."""
    tuner = Tuner(unet.device, mode=mode)
    return UNetEngine(unet, x.shape[0], tuple(x.shape[2:]), dtype, tuner=tuner, **options)


def arguments(config: UNetConfig, **options) -> tuple:
    """Return x, t and, for a class-conditional network, labels."""
    x, t, labels = inputs(config, **options)
    return (x, t) if labels is None else (x, t, labels)


def busiest(lifetimes: list[Lifetime]) -> int:
    """Most bytes that are needed at once: a lower bound of any placement."""
    moments = (Lifetime(0, one.first, one.first) for one in lifetimes)
    sizes = (
        sum(-(-one.nbytes // ALIGNMENT) * ALIGNMENT for one in lifetimes if one.meets(moment))
        for moment in moments
    )
    return max(sizes, default=0)


class Prefers(Tuner):
    """Tuner that chooses a given network instead of timing."""

    def __init__(self, name):
        super().__init__(CPU, mode="off")
        self.wanted = name
        self.requests = []

    def fastest(self, key, candidates):
        if not key.startswith("network"):
            return super().fastest(key, candidates)
        for call in candidates.values():
            call()
        self.requests.append(list(candidates))
        self._choices[key] = TunerChoice(self.wanted, dict.fromkeys(candidates, 0.5))
        return self.wanted
