"""Ancestral sampling (Ho et al. 2020; Nichol & Dhariwal 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ddpm_fast.diffusion.noise_levels import NoiseLevels, Start
from ddpm_fast.diffusion.parameterization import Prediction
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.diffusion.thresholding import Clip, threshold_from_clip
from ddpm_fast.utils import checks

if TYPE_CHECKING:
    from ddpm_fast.sampling.step_table import StepTable

Variance = Literal["posterior", "beta", "posterior_log", "beta_log", "learned", "learned_range"]
VARIANCES = ("posterior", "beta", "posterior_log", "beta_log", "learned", "learned_range")


def ddpm(
    cls: type[StepTable],
    schedule: NoiseSchedule,
    steps: int | None = None,
    variance: Variance = "posterior",
    prediction: Prediction = "epsilon",
    clip: Clip = 1.0,
    spacing: str | Sequence[int] = "linspace",
    start: Start = None,
) -> StepTable:
    """Ancestral sampling (Algorithm 2 with Eq. 6, 7 and 11, Ho et al. 2020).

    x' is the mean of q(x_prev | x_t, x0) plus noise; the last row adds none. prediction is what the
    network returns (StepTable). clip: x0 is clipped to [-clip, clip] (above 0), left alone (None),
    or thresholded (`DynamicThreshold`).

    variance of the noise: "posterior" (Eq. 7) or "beta"; "posterior_log" and "beta_log", the same
    through the logarithm of no less than 1e-20. For networks of 2C channels, whose second half is
    v: "learned", exp(v), and "learned_range", exp(u log beta + (1 - u) log posterior) with
    u = (v + 1)/2 (Eq. 15, Nichol & Dhariwal 2021). A chain of one row adds no noise and reads none.

    steps, spacing: the timesteps kept (spacing.timesteps). The chain's betas are rebuilt to lead
    from each to the next (Nichol & Dhariwal 2021, Section 4); every variance means those.
    start: 1..T begins at x_start, the timesteps spaced over 0..start-1, of which "leading" and
    "quad" may leave out the highest (timesteps[0] is where the chain begins); "random" gives the
    table of None, of which each sample draws its first row.

    Raises TypeError, ValueError for other arguments, and for epsilon or score prediction where
    alphas_cumprod is 0.
    """
    checks.choice("variance", variance, VARIANCES)
    c = NoiseLevels.from_schedule(schedule, steps, spacing, start, prediction)
    rows = c.rows(
        clip,
        Xx0=c.abar_prev.sqrt() * c.beta / c.one_minus_abar,
        Xx=c.alpha.sqrt() * c.one_minus_abar_prev / c.one_minus_abar,
        **_noise(c, variance),
    )
    return cls(
        rows,
        c.timesteps,
        prediction,
        start,
        f"ddpm({variance})",
        threshold=threshold_from_clip(clip),
    )


def _noise(c: NoiseLevels, variance: str) -> dict[str, Tensor]:
    """The columns S, Lmin and Lmax; no noise in the last row."""
    small, large = c.posterior_variance, c.beta.clone()
    columns = {}
    if variance == "learned":
        sigma, columns["Lmax"] = torch.ones_like(small), torch.ones_like(small)
    elif variance == "learned_range":
        # Half of the logarithms' range on both sides of their mean, which goes into S.
        small = small.clamp(min=1e-20)
        sigma, columns["Lmax"] = (small * large) ** 0.25, (large / small).log() / 2
    else:
        sigma = (small if variance.startswith("posterior") else large).sqrt()
        if variance.endswith("_log"):
            sigma = (sigma.square().clamp(min=1e-20).log() / 2).exp()
    for values in (sigma, *columns.values()):
        values[-1] = 0
    return columns | {"S": sigma}
