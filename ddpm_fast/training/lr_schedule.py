"""The learning-rate schedule: linear warmup, then a constant rate, then decay to 0."""

from __future__ import annotations

import math

from ddpm_fast.training.config import TrainOptions


def learning_rate(options: TrainOptions, step: int, steps: int) -> float:
    """Return the learning rate of a step.

    Args:
        options: `lr`, `warmup`, `decay` and `decay_share` are used.
        step: Number of the step, in [0, steps).
        steps: Steps of the whole training.
    """
    rate = options.lr * min(1.0, (step + 1) / max(options.warmup, 1))
    begin = steps - math.ceil(options.decay_share * steps)
    if options.decay == "none" or step < begin:
        return rate
    done = (step - begin) / max(steps - begin, 1)
    if options.decay == "linear":
        return rate * (1 - done)
    return rate * (1 + math.cos(math.pi * done)) / 2
