"""Clipping and dynamic thresholding of the predicted x0."""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from ddpm_fast.utils import checks
from ddpm_fast.utils.batching import by_sample


@dataclass(frozen=True)
class DynamicThreshold:
    """Dynamic thresholding of x0 (Saharia et al. 2022, Section 2.3).

    For each sample, s is a quantile of |x0|, at least 1 and at most `cap`; x0 is clipped to
    [-s, s] and divided by s.

    Attributes:
        quantile: Quantile in (0, 1], interpolated linearly between neighbours.
        cap: Largest s, above 0. If at most 1, s is the cap for all samples; 1 is plain clipping.

    Raises:
        TypeError: An argument is not a number.
        ValueError: An argument is out of range.
    """

    __module__ = "ddpm_fast"  # as in NoiseSchedule

    quantile: float = 0.995
    cap: float = inf

    def __post_init__(self) -> None:
        checks.real("quantile", self.quantile, 0, 1, "(]")
        if self.cap != inf:
            checks.real("cap", self.cap, 0)


Clip = float | DynamicThreshold | None


def clip_bound(clip: Clip) -> float:
    """Return the bound that x0 is clipped to; infinity if it is not clipped, or thresholded."""
    if clip is None or isinstance(clip, DynamicThreshold):
        return inf
    return checks.real("clip", clip, 0)


def threshold_from_clip(clip: Clip) -> DynamicThreshold | None:
    """Return the dynamic thresholding in a `clip` argument, or None."""
    return clip if isinstance(clip, DynamicThreshold) else None


def dynamic_threshold(config: DynamicThreshold, x0: Tensor) -> Tensor:
    """Return the threshold s of each sample.

    The quantile is that of torch.quantile, for samples of any size and without a sort. A NaN counts
    as the largest value. Does not synchronise with a GPU.

    Args:
        config: Quantile and cap.
        x0: Predicted x0 [N, ...].

    Returns:
        Thresholds [N] in the dtype of `x0`.
    """
    magnitudes = by_sample(x0.abs())
    count = math.prod(x0.shape[1:])
    if count == 0:
        return magnitudes.new_ones(len(x0))
    position = config.quantile * (count - 1)
    below = math.floor(position)
    low = magnitudes.kthvalue(below + 1, dim=1).values
    high = magnitudes.kthvalue(min(below + 2, count), dim=1).values
    return torch.lerp(low, high, position - below).clamp_(1, config.cap)
