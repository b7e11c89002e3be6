"""DDIM (Song et al. 2020), its inverse, and the same ODE in its variance-exploding form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import Literal

import torch
from torch import Tensor

from ddpm_fast.diffusion.noise_levels import (
    NoiseLevels,
    Start,
    reject_random_start,
    require_signal,
)
from ddpm_fast.diffusion.parameterization import Prediction
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.diffusion.thresholding import Clip, threshold_from_clip
from ddpm_fast.sampling.solvers.table import Table, rows_for
from ddpm_fast.utils import checks


def ddim(
    cls: type[Table],
    schedule: NoiseSchedule,
    steps: int | None = None,
    eta: float = 0.0,
    prediction: Prediction = "epsilon",
    clip: Clip = 1.0,
    spacing: str | Sequence[int] = "leading",
    rederive_epsilon: bool = True,
    start: Start = None,
) -> Table:
    """Make the table of DDIM (Eq. 12 with the sigma of Eq. 16, Song et al. 2020).

    Args:
        cls: Class of the table.
        schedule: Noise schedule of T timesteps.
        steps: As for `ddpm`.
        eta: 0 is deterministic; 1 has the posterior variance of `ddpm`. Values above 1 are
            accepted while 1 - abar_prev - sigma^2 >= 0.
        prediction: As for `ddpm`.
        clip: As for `ddpm`.
        spacing: As for `ddpm`.
        rederive_epsilon: Take epsilon = (x_t - sqrt(abar) x0) / sqrt(1 - abar) with the clipped x0
            (OpenAI, lucidrains; diffusers' use_clipped_model_output). False: take the epsilon of
            the model output (diffusers' default).
        start: As for `ddpm`.

    Returns:
        The step table.

    Raises:
        TypeError: An argument has another type.
        ValueError: An argument is out of range, or as for `ddpm`.
    """
    eta = checks.real("eta", eta, 0, inf, "[)")
    checks.instance("rederive_epsilon", rederive_epsilon, bool)
    c = NoiseLevels.from_schedule(schedule, steps, spacing, start, prediction)
    sigma = eta * c.posterior_variance.sqrt()
    # 1 - abar_prev - sigma^2, with one_minus_abar - beta written as alpha * one_minus_abar_prev.
    shrink = c.one_minus_abar_prev / c.one_minus_abar
    squared = shrink * (c.alpha * c.one_minus_abar_prev + (1 - eta**2) * c.beta)
    if (squared < 0).any():
        raise ValueError(f"eta must leave sigma^2 <= 1 - alphas_cumprod_prev; got {eta}")
    direction = squared.sqrt()
    if rederive_epsilon:
        Xx, Xo = direction / c.one_minus_abar.sqrt(), torch.zeros_like(direction)
        Xx0 = c.abar_prev.sqrt() - Xx * c.abar.sqrt()
    else:
        x_coef, out_coef = c.epsilon()
        Xx, Xo, Xx0 = direction * x_coef, direction * out_coef, c.abar_prev.sqrt()
    return cls(
        rows_for(c, clip, Xx=Xx, Xx0=Xx0, Xo=Xo, S=sigma),
        c.timesteps,
        prediction,
        start,
        f"ddim(eta={eta:g})",
        draws_always=True,
        threshold=threshold_from_clip(clip),
    )


def ddim_inverse(
    cls: type[Table],
    schedule: NoiseSchedule,
    steps: int | None = None,
    prediction: Prediction = "epsilon",
    clip: Clip = None,
    spacing: str | Sequence[int] = "leading",
    rederive_epsilon: bool = True,
    evaluate_at: Literal["next", "current"] = "next",
    start: int | None = None,
) -> Table:
    """Make the table of DDIM inversion: eta = 0, run from x_0 to noise.

    x' = sqrt(abar') x0 + sqrt(1 - abar') epsilon, the ODE of Eq. 14, Song et al. 2020, integrated
    forward through the noise levels of `ddim` with the same arguments. Decoding returns x_0 up to
    the discretisation error. The table begins at data: its `start` is "data", and a `Sampler` takes
    the images as x_T.

    The model output is read as an epsilon at the noise level of the timestep that the model gets,
    so that all predictions make the same chain.

    Args:
        cls: Class of the table.
        schedule: Noise schedule of T timesteps.
        steps: As for `ddpm`.
        prediction: As for `ddpm`.
        clip: As for `ddpm`. With a clip the inversion is lossy.
        spacing: As for `ddpm`.
        rederive_epsilon: As for `ddim`; matters only with a clip.
        evaluate_at: Timestep that the model gets. "next": that of the state after the step, as in
            diffusers' DDIMInverseScheduler and in the same step of decoding. "current": that of the
            state before the step, as in the papers; the first row, whose state has no noise, gets
            the lowest timestep. Both are of first order; on images the error of "next" is several
            times smaller.
        start: Ends at x_start instead of x_T; an int in 1..T.

    Returns:
        The step table.

    Raises:
        TypeError: An argument has another type.
        ValueError: An argument is out of range, or as for `ddpm`.
    """
    checks.choice("evaluate_at", evaluate_at, ("current", "next"))
    checks.instance("rederive_epsilon", rederive_epsilon, bool)
    if start == "random":
        raise ValueError("start must be None or a step for ddim_inverse; got 'random'")
    c = NoiseLevels.from_schedule(schedule, steps, spacing, start, prediction)
    up = c.timesteps[::-1]
    model_timesteps = up if evaluate_at == "next" else [up[0], *up[:-1]]
    abar, one_minus_abar = c.abar.flip(0), c.one_minus_abar.flip(0)
    here = replace(c, abar=c.abar_prev.flip(0), one_minus_abar=c.one_minus_abar_prev.flip(0))
    ahead = replace(here, abar=abar, one_minus_abar=one_minus_abar)
    P, Q, x_coef, out_coef = _inverse_factors(here, ahead, evaluate_at)
    x0_coef = torch.zeros_like(x_coef)
    if rederive_epsilon and clip is not None:
        # Not in the first row: its state is x_0, which determines no epsilon.
        clipped_x_coef, clipped_x0_coef = here.epsilon_from_x0()
        x_coef[1:], x0_coef[1:], out_coef[1:] = clipped_x_coef[1:], clipped_x0_coef[1:], 0
    direction = one_minus_abar.sqrt()
    rows = rows_for(
        c,
        clip,
        P=P,
        Q=Q,
        Xx=direction * x_coef,
        Xx0=abar.sqrt() + direction * x0_coef,
        Xo=direction * out_coef,
    )
    threshold = threshold_from_clip(clip)
    return cls(rows, model_timesteps, prediction, "data", "ddim_inverse", threshold=threshold)


def _inverse_factors(
    here: NoiseLevels, ahead: NoiseLevels, evaluate_at: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the factors of x and out in x0, and of x and out in epsilon.

    Args:
        here: Levels of the states before the steps.
        ahead: Levels of the states after the steps.
        evaluate_at: As for `ddim_inverse`.
    """
    levels = ahead
    if evaluate_at == "current":
        levels = replace(here, abar=here.abar.clone(), one_minus_abar=here.one_minus_abar.clone())
        levels.abar[0], levels.one_minus_abar[0] = ahead.abar[0], ahead.one_minus_abar[0]
    x_coef, out_coef = levels.epsilon()
    signal, noise = here.abar.sqrt(), here.one_minus_abar.sqrt()
    # Where the two levels agree, their own factors are free of the rounding of the difference.
    same = levels.one_minus_abar == here.one_minus_abar
    P = torch.where(same, levels.x0()[0], (1 - noise * x_coef) / signal)
    Q = torch.where(same, levels.x0()[1], -noise * out_coef / signal)
    return P, Q, x_coef, out_coef


def ve_ode(
    cls: type[Table],
    schedule: NoiseSchedule,
    steps: int | None = None,
    prediction: Prediction = "epsilon",
    clip: Clip = 1.0,
    spacing: str | Sequence[int] = "leading",
    start: int | None = None,
) -> Table:
    """Make the table of DDIM in variance-exploding form (Eq. 11, Khungurn 2022).

    The state is x_t / sqrt(abar_t) = x_0 + sigma(t) epsilon with sigma(t) = sqrt(1/abar_t - 1); the
    model reads the state divided by sqrt(1 + sigma^2). A step is Euler's, x' = x + (sigma' - sigma)
    epsilon, with the epsilon of the (clipped) x0. The chain begins at sqrt(1 + sigma^2) N(0, I),
    ends at x_0, and equals `ddim` up to rounding.

    Args:
        cls: Class of the table.
        schedule: Noise schedule of T timesteps; alphas_cumprod is above 0 at all timesteps used.
        steps: As for `ddpm`.
        prediction: As for `ddpm`.
        clip: As for `ddpm`.
        spacing: As for `ddpm`.
        start: As for `ddpm`; not "random".

    Returns:
        The step table.

    Raises:
        TypeError: An argument has another type.
        ValueError: An argument is out of range, or as for `ddpm`.
    """
    reject_random_start(start, "ve_ode")
    c = NoiseLevels.from_schedule(schedule, steps, spacing, start, prediction)
    require_signal(c, "ve_ode")
    x_coef, out_coef = c.x0()
    sigma = (c.one_minus_abar / c.abar).sqrt()
    ratio = (c.one_minus_abar_prev / c.abar_prev).sqrt() / sigma
    rows = rows_for(
        c,
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
