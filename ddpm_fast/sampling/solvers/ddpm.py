"""Ancestral sampling (Ho et al. 2020; Nichol & Dhariwal 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ddpm_fast.diffusion.noise_levels import NoiseLevels, Start
from ddpm_fast.diffusion.parameterization import Prediction
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.diffusion.thresholding import Clip, threshold_from_clip
from ddpm_fast.diffusion.variance import VARIANCES, Variance
from ddpm_fast.sampling.solvers.table import Table, rows_for
from ddpm_fast.utils import checks

SamplerVariance = Variance | Literal["posterior_log", "beta_log"]
SAMPLER_VARIANCES = (*VARIANCES, "posterior_log", "beta_log")


def ddpm(
    cls: type[Table],
    schedule: NoiseSchedule,
    steps: int | None = None,
    variance: SamplerVariance = "posterior",
    prediction: Prediction = "epsilon",
    clip: Clip = 1.0,
    spacing: str | Sequence[int] = "linspace",
    start: Start = None,
) -> Table:
    """Make the table of ancestral sampling (Algorithm 2, Eq. 6, 7 and 11, Ho et al. 2020).

    x' is the mean of q(x_prev | x_t, x0) plus noise; the last row adds none. The betas are those
    from each timestep of the chain to the next (Nichol & Dhariwal 2021, Section 4), and the
    variances follow from them.

    Args:
        cls: Class of the table.
        schedule: Noise schedule of T timesteps.
        steps: Number of timesteps, 1..T. None: all of them.
        variance: Variance of the noise. "posterior": Eq. 7. "beta": beta_t. "posterior_log" and
            "beta_log": the same through a logarithm, clamped to 1e-20. "learned": exp(v), where v
            is the second half of a model output of 2C channels. "learned_range": exp(u log beta +
            (1 - u) log posterior) with u = (v + 1)/2 (Eq. 15, Nichol & Dhariwal 2021).
        prediction: Output of the model: "epsilon", "x0", "v" or "score".
        clip: x0 is clipped to [-clip, clip]. None: not clipped. `DynamicThreshold`: thresholded.
        spacing: Spacing of the timesteps, or the timesteps (`timesteps`).
        start: 1..T begins at x_start, with the timesteps spaced over 0..start-1; "leading" and
            "quad" may leave out the highest. "random" makes the table of None, for which each
            sample draws its first row. None: x_T.

    Returns:
        The step table.

    Raises:
        TypeError: An argument has another type.
        ValueError: An argument is out of range, or the prediction is epsilon or the score and
            alphas_cumprod ends at 0.
    """
    checks.choice("variance", variance, SAMPLER_VARIANCES)
    c = NoiseLevels.from_schedule(schedule, steps, spacing, start, prediction)
    rows = rows_for(
        c,
        clip,
        Xx0=c.abar_prev.sqrt() * c.beta / c.one_minus_abar,
        Xx=c.alpha.sqrt() * c.one_minus_abar_prev / c.one_minus_abar,
        **_noise_columns(c, variance),
    )
    name, threshold = f"ddpm({variance})", threshold_from_clip(clip)
    return cls(rows, c.timesteps, prediction, start, name, threshold=threshold)


def _noise_columns(c: NoiseLevels, variance: str) -> dict[str, Tensor]:
    """Return the columns S, Lmin and Lmax; the last row has no noise."""
    small, large = c.posterior_variance, c.beta.clone()
    columns = {}
    if variance == "learned":
        sigma, columns["Lmax"] = torch.ones_like(small), torch.ones_like(small)
    elif variance == "learned_range":
        # S is the geometric mean; the exponent adds half of the logarithms' range on both sides.
        small = small.clamp(min=1e-20)
        sigma, columns["Lmax"] = (small * large) ** 0.25, (large / small).log() / 2
    else:
        sigma = (small if variance.startswith("posterior") else large).sqrt()
        if variance.endswith("_log"):
            sigma = (sigma.square().clamp(min=1e-20).log() / 2).exp()
    for values in (sigma, *columns.values()):
        values[-1] = 0
    return columns | {"S": sigma}
