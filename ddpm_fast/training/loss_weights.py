"""Weights of the squared error in the training objectives."""

from __future__ import annotations

from math import inf
from typing import Literal

import torch
from torch import Tensor

from ddpm_fast.diffusion.parameterization import PREDICTIONS, Prediction, epsilon_factors
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.utils import checks

Weighting = Literal["min_snr"] | Tensor | None


def objective_weights(
    schedule: NoiseSchedule,
    variance: Literal["posterior", "beta"] = "beta",
    target: Literal["epsilon", "x0", "v", "score"] = "epsilon",
    objective: Literal["full", "simple"] = "full",
) -> Tensor:
    """Return the weight w_t of the squared error ||target - prediction||^2 for each t.

    For the full objective, L_{t-1} in nats is w_t times the squared error, plus a constant. For
    epsilon, w_t = beta_t^2 / (2 sigma_t^2 alpha_t (1 - abar_t)) (Eq. 12, Ho et al. 2020). Index 0
    is L_0 as a Gaussian of variance beta_1 for either variance: 1 / (2 alpha_1) (Claim 16,
    Khungurn 2022).

    Args:
        schedule: The noise schedule.
        variance: sigma_t^2 of the reverse process: beta_t or the posterior variance.
        target: Quantity that the network predicts: epsilon, x0, v = sqrt(abar_t) epsilon -
            sqrt(1 - abar_t) x_0 (Salimans & Ho 2022) or the score -epsilon / sqrt(1 - abar_t).
        objective: "full" for the variational bound; "simple" for L_simple (Eq. 14, Ho et al.
            2020), which weights the error of epsilon by 1, so that of x_0 by
            abar_t / (1 - abar_t).

    Returns:
        The weights, float64 [T] on the CPU.

    Raises:
        TypeError: `schedule` is not a NoiseSchedule.
        ValueError: A name is unknown, or `target` is epsilon or score for the full objective on a
            schedule of zero terminal SNR, where the last weight is infinite.
    """
    checks.instance("schedule", schedule, NoiseSchedule)
    checks.choice("variance", variance, ("posterior", "beta"))
    checks.choice("target", target, PREDICTIONS)
    checks.choice("objective", objective, ("full", "simple"))
    abar, one_minus_abar = schedule.alphas_cumprod, schedule.one_minus_alphas_cumprod
    if objective == "simple":
        return {
            "epsilon": abar.new_ones(len(abar)),
            "x0": schedule.snr,
            "v": abar,
            "score": one_minus_abar,
        }[target]
    if abar[-1] == 0 and target in ("epsilon", "score"):
        raise ValueError(
            "target must be 'x0' or 'v' for a schedule of zero terminal SNR, where alphas_cumprod"
            f" ends at 0; got {target!r}"
        )
    sigma2 = schedule.posterior_variance if variance == "posterior" else schedule.betas
    sigma2[0] = schedule.betas[0]
    # The means of q and p differ in x_0 alone (Eq. 7), and its error is a multiple of the others'.
    x0_weight = schedule.posterior_mean_coef1.square() / (2 * sigma2)
    return {
        "x0": x0_weight,
        "v": x0_weight * one_minus_abar,
        "epsilon": x0_weight * one_minus_abar / abar,
        "score": x0_weight * one_minus_abar.square() / abar,
    }[target]


def error_weight(
    objective: str,
    weighting: Weighting,
    gamma: float,
    prediction: Prediction,
    t: Tensor,
    schedule: NoiseSchedule,
    dtype: torch.dtype,
) -> Tensor | None:
    """Return the weight [N] of each sample's squared error; None if all weights are 1.

    `t` is int64 [N], in [0, T). The other arguments are those of `training_losses`.
    """
    gamma = checks.real("gamma", gamma, 0, inf, "()")
    custom = _custom_weight(weighting, t, schedule) if isinstance(weighting, Tensor) else None
    if custom is None and weighting is not None and weighting != "min_snr":
        raise ValueError(f"weighting must be None, 'min_snr' or a tensor [T]; got {weighting!r}")
    if objective != "score" and weighting is None:
        return None
    _, abar, one_minus_abar = schedule.levels(t.device, dtype).index_select(0, t).unbind(1)
    # The errors of all predictions are multiples of each other: relative to that of epsilon.
    epsilon_weight = epsilon_factors(prediction, abar, one_minus_abar)[1].square()
    if custom is not None:
        custom = custom.to(dtype)
        return epsilon_weight * custom if objective == "score" else custom
    if weighting is None:
        return epsilon_weight
    # min(SNR, gamma) / SNR for epsilon, which is min(SNR, gamma) for x_0.
    return epsilon_weight * (gamma * one_minus_abar / abar).clamp(max=1)


def _custom_weight(weighting: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    checks.floating("weighting", weighting)
    checks.same_device("weighting", weighting, "x0", t)
    if tuple(weighting.shape) != (schedule.T,):
        raise ValueError(
            f"weighting must be a tensor [{schedule.T}], a weight for each t of the schedule;"
            f" got {checks.shape_text(weighting)}"
        )
    return weighting.index_select(0, t)
