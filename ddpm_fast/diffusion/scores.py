"""The score of x_t, the noise it stands for, and Tweedie's estimate of x_0.

The score is the gradient of log q(x_t) in x_t. Tensors are [N, ...], float32, float16, bfloat16 or
float64; arithmetic is in float32 (float64 for float64 inputs), and the result has the dtype of the
input. Index t is step t + 1 of the papers. On the CPU a timestep outside the schedule is a
ValueError; on a GPU it is clamped, because looking would make the host wait.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.utils import checks


def tweedie(x_t: Tensor, score: Tensor, t: Tensor | int, schedule: NoiseSchedule) -> Tensor:
    """E[x_0 | x_t] = (x_t + (1 - abar_t) score) / sqrt(abar_t), Tweedie's formula for x_t.

    Theorem 3 of Khungurn 2022 with the forward process of Eq. 4, Ho et al. 2020. x_t, score:
    [N, ...] of one shape, dtype and device. t: int64 [N] or an int, in [0, T). Differentiable.

    Raises TypeError or ValueError naming the argument, also for a t with abar_t = 0 that is an int
    or on the CPU: that x_t says nothing about x_0.
    """
    x_t = checks.batch("x_t", x_t)
    score = checks.like("score", score, "x_t", x_t, (x_t.dtype,))
    signal, noise = _coefficients(x_t, schedule, t)
    if schedule.alphas_cumprod[-1] == 0 and _reaches(t, schedule.T - 1):
        raise ValueError(
            f"t must be below {schedule.T - 1}, where alphas_cumprod is 0 and x_t holds nothing of"
            f" x_0; got {schedule.T - 1}"
        )
    return ((x_t.to(noise.dtype) + noise.square() * score) / signal).to(x_t.dtype)


def score_from_noise(epsilon: Tensor, t: Tensor | int, schedule: NoiseSchedule) -> Tensor:
    """The score -epsilon / sqrt(1 - abar_t) of a predicted noise (Eq. 9, Khungurn 2022).

    epsilon: [N, ...]. t: int64 [N] or an int, in [0, T). Differentiable.

    Raises TypeError or ValueError naming the argument.
    """
    epsilon = checks.batch("epsilon", epsilon)
    _, noise = _coefficients(epsilon, schedule, t)
    return (-epsilon / noise).to(epsilon.dtype)


def noise_from_score(score: Tensor, t: Tensor | int, schedule: NoiseSchedule) -> Tensor:
    """The noise -sqrt(1 - abar_t) score, the inverse of `score_from_noise`; errors are the same."""
    score = checks.batch("score", score)
    _, noise = _coefficients(score, schedule, t)
    return (-noise * score).to(score.dtype)


def _coefficients(like: Tensor, schedule: NoiseSchedule, t: Tensor | int) -> tuple[Tensor, Tensor]:
    """sqrt(abar_t) and sqrt(1 - abar_t) of each sample, [N, 1, ...], where the arithmetic is."""
    T = checks.instance("schedule", schedule, NoiseSchedule).T
    index = checks.index("t", t, like, T).clamp(0, T - 1)
    table = schedule.q_sample_coefs(like.device, checks.arithmetic(like.dtype))
    chosen = table.index_select(0, index).view(-1, 2, *[1] * (like.ndim - 1))
    return chosen[:, 0], chosen[:, 1]


def _reaches(t: Tensor | int, last: int) -> bool:
    """Whether a t that can be looked at without waiting has that value."""
    if not isinstance(t, Tensor):
        return t == last
    return t.device.type == "cpu" and not torch.compiler.is_compiling() and bool((t == last).any())
