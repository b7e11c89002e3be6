"""Clipping and dynamic thresholding of the predicted x0."""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from ddpm_fast.utils import checks


@dataclass(frozen=True)
class DynamicThreshold:
    """Dynamic thresholding of x0 (Saharia et al. 2022, Section 2.3), by the sample.

    s is the given quantile of |x0| over a sample, in (0, 1], interpolated between neighbours, then
    raised to 1 and lowered to cap; x0 is clipped to [-s, s] and divided by s. cap > 0; at 1 and
    below s is the cap, and 1 is plain clipping.

    Raises TypeError, ValueError for other numbers.
    """

    __module__ = "ddpm_fast"  # as in NoiseSchedule

    quantile: float = 0.995
    cap: float = inf

    def __post_init__(self) -> None:
        checks.real("quantile", self.quantile, 0, 1, "(]")
        if self.cap != inf:
            checks.real("cap", self.cap, 0, inf, "()")


Clip = float | DynamicThreshold | None


def clip_bound(clip: Clip) -> float:
    """The column clip: infinite where x0 is not clipped, or is thresholded."""
    if clip is None or isinstance(clip, DynamicThreshold):
        return inf
    return checks.real("clip", clip, 0, inf, "()")


def threshold_from_clip(clip: Clip) -> DynamicThreshold | None:
    """The thresholding that a solver's argument clip asks for."""
    return clip if isinstance(clip, DynamicThreshold) else None


def dynamic_threshold(how: DynamicThreshold, x0: Tensor) -> Tensor:
    """The threshold s of each sample [N] of x0 [N, ...] (Saharia et al. 2022, Section 2.3).

    The quantile of |x0| is interpolated linearly between neighbours, as torch.quantile does, for
    samples of any size and without sorting them. A NaN counts as the largest value. Nothing waits
    for a GPU.
    """
    sizes = x0.abs().flatten(1)
    count = math.prod(x0.shape[1:])
    if count == 0:
        return sizes.new_ones(len(x0))
    place = how.quantile * (count - 1)
    below = math.floor(place)
    low = sizes.kthvalue(below + 1, dim=1).values
    high = sizes.kthvalue(min(below + 2, count), dim=1).values
    return torch.lerp(low, high, place - below).clamp_(1, how.cap)
