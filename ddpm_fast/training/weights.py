"""What a network is trained to return, and the weights of its squared error."""

from __future__ import annotations

from math import inf
from typing import Literal

import torch
from torch import Tensor

from ddpm_fast.diffusion.parameterization import Prediction, epsilon_factors
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.utils import checks

Weighting = Literal["min_snr"] | Tensor | None


def error_weight(
    objective: str,
    weighting: Weighting,
    gamma: float,
    prediction: Prediction,
    t: Tensor,
    schedule: NoiseSchedule,
    dtype: torch.dtype,
) -> Tensor | None:
    """The weight [N] of each sample's squared error in its own target; None where it is 1.

    t: int64 [N], in [0, T).
    """
    gamma = checks.real("gamma", gamma, 0, inf, "()")
    own = _own(weighting, t, schedule) if isinstance(weighting, Tensor) else None
    if own is None and weighting is not None and weighting != "min_snr":
        raise ValueError(f"weighting must be None, 'min_snr' or a tensor [T]; got {weighting!r}")
    if objective != "score" and weighting is None:
        return None
    _, abar, one_minus_abar = schedule.levels(t.device, dtype).index_select(0, t).unbind(1)
    # Errors of all kinds are multiples of each other: this takes the weight of epsilon's.
    of_epsilon = epsilon_factors(prediction, abar, one_minus_abar)[1].square()
    if own is not None:
        own = own.to(dtype)
        return of_epsilon * own if objective == "score" else own
    if weighting is None:
        return of_epsilon
    # min(SNR, gamma) / SNR of epsilon, which is min(SNR, gamma) of x_0.
    return of_epsilon * (gamma * one_minus_abar / abar).clamp(max=1)


def _own(weighting: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    checks.floating("weighting", weighting)
    checks.same_device("weighting", weighting, "x0", t)
    if tuple(weighting.shape) != (schedule.T,):
        raise ValueError(
            f"weighting must be a tensor [{schedule.T}], a weight for each t of the schedule;"
            f" got {checks.shape_text(weighting)}"
        )
    return weighting.index_select(0, t)
