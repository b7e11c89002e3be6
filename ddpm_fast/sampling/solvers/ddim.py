"""DDIM (Song et al. 2020), its inverse, and the same ODE in its variance-exploding form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ddpm_fast.diffusion.noise_levels import NoiseLevels, Start, reject_random_start, require_signal
from ddpm_fast.diffusion.parameterization import Prediction
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.diffusion.thresholding import Clip, threshold_from_clip
from ddpm_fast.utils import checks

if TYPE_CHECKING:
    from ddpm_fast.sampling.step_table import StepTable


def ddim(
    cls: type[StepTable],
    schedule: NoiseSchedule,
    steps: int | None = None,
    eta: float = 0.0,
    prediction: Prediction = "epsilon",
    clip: Clip = 1.0,
    spacing: str | Sequence[int] = "leading",
    rederive_epsilon: bool = True,
    start: Start = None,
) -> StepTable:
    """DDIM (Eq. 12 with the sigma of Eq. 16, Song et al. 2020).

    eta: 0 is deterministic, 1 has the variance of ddpm's posterior; above 1 as long as
    1 - abar_prev - sigma^2 stays at or above 0. rederive_epsilon: the epsilon of Eq. 12 is
    (x_t - sqrt(abar) x0) / sqrt(1 - abar) with the clipped x0 (OpenAI, lucidrains; diffusers'
    use_clipped_model_output), otherwise the network's own (diffusers' default). The other arguments
    and errors are those of ddpm.
    """
    eta = checks.real("eta", eta, 0, inf, "[)")
    _check_bool("rederive_epsilon", rederive_epsilon)
    c = NoiseLevels.from_schedule(schedule, steps, spacing, start, prediction)
    sigma = eta * c.posterior_variance.sqrt()
    # 1 - abar_prev - sigma^2, with one_minus_abar - beta written as alpha * one_minus_abar_prev.
    squared = (
        c.one_minus_abar_prev
        / c.one_minus_abar
        * (c.alpha * c.one_minus_abar_prev + (1 - eta**2) * c.beta)
    )
    if (squared < 0).any():
        raise ValueError(f"eta must leave sigma^2 <= 1 - alphas_cumprod_prev; got {eta}")
    direction = squared.sqrt()
    if rederive_epsilon:
        Xx, Xo = direction / c.one_minus_abar.sqrt(), torch.zeros_like(direction)
        Xx0 = c.abar_prev.sqrt() - Xx * c.abar.sqrt()
    else:
        x_coef, out_coef = c.epsilon()
        Xx, Xo, Xx0 = direction * x_coef, direction * out_coef, c.abar_prev.sqrt()
    rows = c.rows(clip, Xx=Xx, Xx0=Xx0, Xo=Xo, S=sigma)
    return cls(
        rows,
        c.timesteps,
        prediction,
        start,
        f"ddim(eta={eta:g})",
        draws_always=True,
        threshold=threshold_from_clip(clip),
    )


def ddim_inverse(
    cls: type[StepTable],
    schedule: NoiseSchedule,
    steps: int | None = None,
    prediction: Prediction = "epsilon",
    clip: Clip = None,
    spacing: str | Sequence[int] = "leading",
    rederive_epsilon: bool = True,
    evaluate_at: Literal["next", "current"] = "next",
    start: int | None = None,
) -> StepTable:
    """The chain of ddim with eta = 0 run from x_0 to noise, to encode an image.

    The state begins as x_0 and passes the noise levels of ``ddim(schedule, steps, spacing=spacing,
    start=start)`` from the lowest to the highest: x' = sqrt(abar') x0 + sqrt(1 - abar') epsilon,
    the ODE of Eq. 14, Song et al. 2020, run forward. Decoding comes back to x_0 up to the error of
    the steps; what a clip (off unless given) cuts is lost for good.

    evaluate_at: the timestep that the network is told: "next", of the state that the step leads to,
    as diffusers' DDIMInverseScheduler does, which is what the same step of decoding is told; or
    "current", of the state that it sees, as the papers write the ODE (the first row, whose state
    has no noise, is told the lowest timestep). Both are of first order; on images "next" comes back
    several times closer. The output is read as an epsilon of the level that the network is told, so
    that every prediction makes the same chain. The table begins at data (its start is "data"): a
    `Sampler` is given them as x_T. The other arguments and the errors are those of ddpm.
    """
    checks.choice("evaluate_at", evaluate_at, ("current", "next"))
    _check_bool("rederive_epsilon", rederive_epsilon)
    rederived = rederive_epsilon and clip is not None
    if start == "random":
        raise ValueError("start must be None or a step for ddim_inverse; got 'random'")
    c = NoiseLevels.from_schedule(schedule, steps, spacing, start, prediction)
    up = c.timesteps[::-1]
    told = up if evaluate_at == "next" else [up[0], *up[:-1]]
    abar, one_minus_abar = c.abar.flip(0), c.one_minus_abar.flip(0)  # where a step leads
    here = replace(c, abar=c.abar_prev.flip(0), one_minus_abar=c.one_minus_abar_prev.flip(0))
    P, Q, x_coef, out_coef = _told_of(
        here, replace(here, abar=abar, one_minus_abar=one_minus_abar), evaluate_at
    )
    x0_coef = torch.zeros_like(x_coef)
    if rederived:
        # Not in the first row: at x_0 itself an x0 says nothing of epsilon.
        clipped_x_coef, clipped_x0_coef = here.epsilon_from_x0()
        x_coef[1:], x0_coef[1:], out_coef[1:] = clipped_x_coef[1:], clipped_x0_coef[1:], 0
    direction = one_minus_abar.sqrt()
    rows = c.rows(
        clip,
        P=P,
        Q=Q,
        Xx=direction * x_coef,
        Xx0=abar.sqrt() + direction * x0_coef,
        Xo=direction * out_coef,
    )
    return cls(rows, told, prediction, "data", "ddim_inverse", threshold=threshold_from_clip(clip))


def _told_of(here: NoiseLevels, ahead: NoiseLevels, evaluate_at: str) -> tuple[Tensor, ...]:
    """Factors of x and out in x0, and of both in epsilon, of a state at the levels of ``here``.

    The output is read as an epsilon at the level that the network is told, so that every prediction
    makes the same chain; x0 is what that epsilon leaves of the state.
    """
    told = ahead
    if evaluate_at == "current":
        told = replace(here, abar=here.abar.clone(), one_minus_abar=here.one_minus_abar.clone())
        told.abar[0], told.one_minus_abar[0] = ahead.abar[0], ahead.one_minus_abar[0]
    x_coef, out_coef = told.epsilon()
    signal, noise = here.abar.sqrt(), here.one_minus_abar.sqrt()
    same = told.one_minus_abar == here.one_minus_abar  # without the rounding of what cancels
    P = torch.where(same, told.x0()[0], (1 - noise * x_coef) / signal)
    Q = torch.where(same, told.x0()[1], -noise * out_coef / signal)
    return P, Q, x_coef, out_coef


def ve_ode(
    cls: type[StepTable],
    schedule: NoiseSchedule,
    steps: int | None = None,
    prediction: Prediction = "epsilon",
    clip: Clip = 1.0,
    spacing: str | Sequence[int] = "leading",
    start: int | None = None,
) -> StepTable:
    """DDIM with eta = 0 in the variance-exploding form of its ODE (Eq. 11 of Khungurn 2022).

    The state is x_t / sqrt(abar_t) = x_0 + sigma(t) epsilon with sigma(t) = sqrt(1/abar_t - 1), the
    schedule's ``sigmas``; the network reads the state over sqrt(1 + sigma^2). A step is Euler's,
    x' = x + (sigma' - sigma) epsilon, with the epsilon of the (clipped) x0; it begins at
    sqrt(1 + sigma^2) N(0, I) and ends at x_0, and equals ddim up to rounding. The arguments and
    errors are those of ddim; alphas_cumprod must be above 0 at every timestep kept.
    """
    reject_random_start(start, "ve_ode")
    c = NoiseLevels.from_schedule(schedule, steps, spacing, start, prediction)
    require_signal(c, "ve_ode")
    x_coef, out_coef = c.x0()
    sigma, sigma_prev = (
        (c.one_minus_abar / c.abar).sqrt(),
        (c.one_minus_abar_prev / c.abar_prev).sqrt(),
    )
    ratio = sigma_prev / sigma
    rows = c.rows(
        clip,
        P=x_coef * c.abar.sqrt(),
        Q=out_coef,
        Xx=ratio,
        Xx0=1 - ratio,
        Cin=c.abar_prev.sqrt(),
    )
    return cls(
        rows,
        c.timesteps,
        prediction,
        start,
        "ve_ode",
        threshold=threshold_from_clip(clip),
        init_scale=float(1 / c.abar[0].sqrt()),
    )


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool; got {value!r}")
