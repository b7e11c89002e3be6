"""p(x_{t-1} | x_t): the variances a model can have, and the x_0 its output stands for.

Tables of coefficients are float64 [T, ...], made where they are used out of what the schedule keeps
there, so that nothing waits for a GPU; index t is step t + 1 of the papers.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ddpm_fast.diffusion.parameterization import check_prediction, x0_factors
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.utils import checks

Variance = Literal["posterior", "beta", "learned", "learned_range"]
VARIANCES = ("posterior", "beta", "learned", "learned_range")
LEARNED = ("learned", "learned_range")
First = Literal["repeat", "clamp"]


def model_variance(
    x_t: Tensor,
    t: Tensor | int,
    schedule: NoiseSchedule,
    kind: Variance,
    learned_output: Tensor | None = None,
    log_variance: First = "repeat",
) -> tuple[Tensor, Tensor]:
    """Variance of p(x_{t-1} | x_t) and its natural logarithm.

    kind: "posterior": that of q(x_{t-1} | x_t, x_0) (Eq. 7, Ho et al. 2020). "beta": beta_t.
    "learned": learned_output is the log-variance. "learned_range": exp(v log beta_t + (1 - v) log
    posterior variance) with v = (learned_output + 1) / 2 (Eq. 15, Nichol & Dhariwal 2021).
    x_t: [N, ...]. t: int64 [N] or an int, in [0, T). learned_output: of the shape and device of
    x_t, the second half of what a network returns that has twice the channels; for the learned
    kinds alone.
    log_variance: the posterior variance is 0 at index 0. "repeat" takes its logarithm at index 1
    there, for "beta" too (OpenAI's convention). "clamp" takes that of 1e-20, as the samplers of
    diffusers and lucidrains do, and of beta_1 for "beta". A likelihood needs "repeat": a decoder of
    variance 1e-20 finds next to no data possible.

    Returns float32 (float64 for float64), [N, 1, ...] for the fixed kinds, the shape of x_t for the
    learned ones. Differentiable in learned_output.

    Raises TypeError or ValueError naming the argument; ValueError for "repeat" on a single step.
    """
    x_t = checks.batch("x_t", x_t)
    checks.instance("schedule", schedule, NoiseSchedule)
    checks.choice("kind", kind, VARIANCES)
    if (learned_output is None) == (kind in LEARNED):
        wanted = "given" if kind in LEARNED else "left out"
        raise ValueError(f"learned_output must be {wanted} for the variance {kind!r}")
    index = checks.index("t", t, x_t, schedule.T).clamp(0, schedule.T - 1)
    dtype = checks.compute_dtype(x_t.dtype)
    table = log_variances(schedule, kind, log_variance, x_t.device).to(dtype)
    ends = table.index_select(0, index).view(-1, 2, *[1] * (x_t.ndim - 1))
    if learned_output is not None:
        learned_output = checks.like(
            "learned_output", learned_output, "x_t", x_t, checks.FLOATS
        ).to(dtype)
    log = chosen_log_variance(kind, ends[:, 0], ends[:, 1], learned_output)
    return log.exp(), log


def log_variances(
    schedule: NoiseSchedule,
    kind: Variance,
    log_variance: First = "repeat",
    device: str | torch.device = "cpu",
) -> Tensor:
    """Float64 [T, 2]: the lowest and the highest log-variance that a kind allows at each t.

    Equal for the fixed kinds; not bounds, and not used, for "learned". Errors are those of
    `model_variance`.
    """
    beta = schedule.levels(device, torch.float64)[:, 0].log()
    if kind == "learned" or (kind == "beta" and schedule.T == 1):
        return torch.stack([beta, beta], 1)
    posterior = schedule.q_posterior_coefs(device, torch.float64, log_variance)[:, 3]
    if kind == "beta":
        if log_variance == "repeat":
            beta[0] = posterior[0]
        return torch.stack([beta, beta], 1)
    return torch.stack([posterior, posterior if kind == "posterior" else beta], 1)


def chosen_log_variance(
    kind: Variance, low: Tensor, high: Tensor, learned_output: Tensor | None
) -> Tensor:
    """The log-variance of a kind, from its ends of `log_variances` and the learned output."""
    if learned_output is None:
        return low
    return learned_output if kind == "learned" else torch.lerp(low, high, (learned_output + 1) / 2)


def x0_coefficients(
    schedule: NoiseSchedule, prediction: str, device: str | torch.device = "cpu"
) -> Tensor:
    """Float64 [T, 2]: P and Q of x_0 = P x_t + Q out (Eq. 15, Ho et al. 2020, for epsilon).

    prediction: "epsilon", "x0", "v" (Salimans & Ho 2022) or "score". Raises ValueError for another
    one, and for epsilon or score on a schedule of zero terminal SNR.
    """
    check_prediction(prediction, schedule)
    _, abar, one_minus_abar = schedule.levels(device, torch.float64).unbind(1)
    return torch.stack(x0_factors(prediction, abar, one_minus_abar), 1)
