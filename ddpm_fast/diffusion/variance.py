"""Variance of p(x_{t-1} | x_t).

Tables are float64 [T, ...] on the device where they are used, computed from the tables that the
schedule caches there, without synchronisation. Index t is step t + 1 of the papers.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.utils import checks

Variance = Literal["posterior", "beta", "learned", "learned_range"]
VARIANCES = ("posterior", "beta", "learned", "learned_range")
LEARNED = ("learned", "learned_range")
FirstLogVariance = Literal["repeat", "clamp"]


def model_variance(
    x_t: Tensor,
    t: Tensor | int,
    schedule: NoiseSchedule,
    kind: Variance,
    learned_output: Tensor | None = None,
    log_variance: FirstLogVariance = "repeat",
) -> tuple[Tensor, Tensor]:
    """Return the variance of p(x_{t-1} | x_t) and its natural logarithm.

    Differentiable in `learned_output`.

    Args:
        x_t: State [N, ...].
        t: Timesteps in [0, T), int64 [N], or one int.
        schedule: Noise schedule of T timesteps.
        kind: "posterior": the variance of q(x_{t-1} | x_t, x_0) (Eq. 7, Ho et al. 2020). "beta":
            beta_t. "learned": exp(v) with v = `learned_output`. "learned_range": exp(u log beta_t +
            (1 - u) log posterior variance) with u = (v + 1) / 2 (Eq. 15, Nichol & Dhariwal 2021).
        learned_output: v, with the shape and device of `x_t`: the second half of the channels of a
            model output. For the learned kinds only.
        log_variance: Logarithm of the posterior variance at index 0, where it is 0. "repeat": that
            at index 1, for "beta" too (OpenAI's convention). "clamp": that of 1e-20, and of beta_1
            for "beta" (samplers of diffusers and lucidrains). A likelihood needs "repeat": a
            decoder of variance 1e-20 assigns almost no probability to any data.

    Returns:
        Variance and log-variance, float32 (float64 for float64): [N, 1, ...] for the fixed kinds,
        the shape of `x_t` for the learned ones.

    Raises:
        TypeError: An argument has another type or dtype.
        ValueError: An argument has another shape or device or is out of range; `learned_output` is
            missing or superfluous; "repeat" with T = 1.
    """
    x_t = checks.batch("x_t", x_t)
    checks.instance("schedule", schedule, NoiseSchedule)
    checks.choice("kind", kind, VARIANCES)
    if (learned_output is None) == (kind in LEARNED):
        wanted = "a tensor" if kind in LEARNED else "None"
        got = "None" if learned_output is None else "a tensor"
        raise ValueError(f"learned_output must be {wanted} for the variance {kind!r}; got {got}")
    index = checks.index("t", t, x_t, schedule.T).clamp(0, schedule.T - 1)
    dtype = checks.compute_dtype(x_t.dtype)
    table = log_variances(schedule, kind, log_variance, x_t.device).to(dtype)
    ends = table.index_select(0, index).view(-1, 2, *[1] * (x_t.ndim - 1))
    if learned_output is not None:
        learned_output = checks.like("learned_output", learned_output, "x_t", x_t, checks.FLOATS)
        learned_output = learned_output.to(dtype)
    log = chosen_log_variance(kind, ends[:, 0], ends[:, 1], learned_output)
    return log.exp(), log


def log_variances(
    schedule: NoiseSchedule,
    kind: Variance,
    log_variance: FirstLogVariance = "repeat",
    device: str | torch.device = "cpu",
) -> Tensor:
    """Return the lowest and the highest log-variance of a kind at each timestep.

    Args:
        schedule: Noise schedule of T timesteps.
        kind: As for `model_variance`.
        log_variance: As for `model_variance`.
        device: Device of the result.

    Returns:
        Table float64 [T, 2]. Both columns are equal for the fixed kinds, and unused for "learned".

    Raises:
        ValueError: "repeat" with T = 1.
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
    """Return the log-variance of a kind from the columns of `log_variances` and v."""
    if learned_output is None:
        return low
    if kind == "learned":
        return learned_output
    return torch.lerp(low, high, (learned_output + 1) / 2)
