"""Weights of the squared error in the training objectives: the full bound and the simple one."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ddpm_fast.diffusion.parameterization import PREDICTIONS
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.utils import checks


def objective_weights(
    schedule: NoiseSchedule,
    variance: Literal["posterior", "beta"] = "beta",
    target: Literal["epsilon", "x0", "v", "score"] = "epsilon",
    objective: Literal["full", "simple"] = "full",
) -> Tensor:
    """Weight w_t of the squared error ||target - prediction||^2 at each t, float64 [T] on the CPU.

    objective "full": the terms of the variational bound in nats. L_{t-1} is w_t times the squared
    error, plus what does not depend on the model; for an epsilon that is w_t = beta_t^2 /
    (2 sigma_t^2 alpha_t (1 - abar_t)) (Eq. 12, Ho et al. 2020): with sigma_t^2 = beta_t ("beta")
    beta_t / (2 alpha_t (1 - abar_t)), with the posterior variance (1 - alpha_t) /
    (2 alpha_t (1 - abar_{t-1})). Index 0 is L_0 as a Gaussian of variance beta_1, whatever the
    variance: 1 / (2 alpha_1) (Claim 16, Khungurn 2022).
    objective "simple": L_simple (Eq. 14, Ho et al. 2020), which weights epsilon's error by 1. Of
    other targets it weights the same error, so that of x_0 has abar_t / (1 - abar_t).
    target: what the model is trained for: epsilon, x0, v = sqrt(abar_t) epsilon - sqrt(1 - abar_t)
    x_0 (Salimans & Ho 2022), or the score -epsilon / sqrt(1 - abar_t).

    Raises TypeError for what is no NoiseSchedule; ValueError for an unknown name, and for epsilon
    or score on a schedule of zero terminal SNR, where no weight is finite in the full objective.
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
    # The means of q and p differ by their x_0 alone (Eq. 7), and its error is a multiple of theirs.
    x0_coef = schedule.posterior_mean_coef1.square() / (2 * sigma2)
    return {
        "x0": x0_coef,
        "v": x0_coef * one_minus_abar,
        "epsilon": x0_coef * one_minus_abar / abar,
        "score": x0_coef * one_minus_abar.square() / abar,
    }[target]
