"""DPM-Solver++ of second order, multistep (Lu et al. 2022, "DPM-Solver++"), and its SDE form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ddpm_fast.diffusion.noise_levels import NoiseLevels, reject_random_start
from ddpm_fast.diffusion.parameterization import Prediction
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.diffusion.thresholding import Clip, threshold_from_clip
from ddpm_fast.sampling.solvers.table import Table, rows_for
from ddpm_fast.utils import checks

Correction = Literal["midpoint", "heun"]
CORRECTIONS = ("midpoint", "heun")


def dpmpp_2m(
    cls: type[Table],
    schedule: NoiseSchedule,
    steps: int | None = None,
    prediction: Prediction = "epsilon",
    clip: Clip = 1.0,
    spacing: str | Sequence[int] = "linspace",
    solver_type: Correction = "midpoint",
    start: int | None = None,
) -> Table:
    """Make the table of DPM-Solver++(2M) (Algorithm 2, Lu et al. 2022).

    x' = (sigma'/sigma) x + alpha' (1 - exp(-h)) D with D = x0 + (x0 - x0 of the previous step)/(2
    r), where alpha^2 = abar, h is the step in lambda = log(alpha/sigma), and r is the previous step
    divided by h. The first step, and the last, which ends at x_0, are of first order.

    Args:
        cls: Class of the table.
        schedule: Noise schedule of T timesteps.
        steps: As for `ddpm`.
        prediction: As for `ddpm`.
        clip: As for `ddpm`.
        spacing: As for `ddpm`; a named spacing ends above x_0 (`to_data` of `timesteps`).
        solver_type: "midpoint": as above. "heun": the factor of the difference is
            alpha' ((exp(-h) - 1)/h + 1).
        start: As for `ddpm`; not "random".

    Returns:
        The step table.

    Raises:
        TypeError: An argument has another type.
        ValueError: An argument is out of range, or as for `ddpm`.
    """
    c, h, second = multistep_levels(schedule, steps, spacing, start, prediction, "dpmpp_2m")
    rows = dpmpp_2m_rows(c, h, second, clip, solver_type)
    threshold = threshold_from_clip(clip)
    return cls(rows, c.timesteps, prediction, start, "dpmpp_2m", threshold=threshold)


def dpmpp_2m_sde(
    cls: type[Table],
    schedule: NoiseSchedule,
    steps: int | None = None,
    prediction: Prediction = "epsilon",
    clip: Clip = 1.0,
    spacing: str | Sequence[int] = "linspace",
    solver_type: Correction = "midpoint",
    start: int | None = None,
) -> Table:
    """Make the table of SDE-DPM-Solver++(2M) (Appendix B, Lu et al. 2022).

    x' = (sigma'/sigma) exp(-h) x + alpha' (1 - exp(-2h)) D + sigma' sqrt(1 - exp(-2h)) z, with the
    D of `dpmpp_2m`. The steps of first order are ancestral sampling with the posterior variance.

    Args:
        cls: Class of the table.
        schedule: Noise schedule of T timesteps.
        steps: As for `ddpm`.
        prediction: As for `ddpm`.
        clip: As for `ddpm`.
        spacing: As for `dpmpp_2m`.
        solver_type: "midpoint" or "heun".
        start: As for `ddpm`; not "random".

    Returns:
        The step table.

    Raises:
        TypeError: An argument has another type.
        ValueError: An argument is out of range, or as for `ddpm`.
    """
    c, h, second = multistep_levels(schedule, steps, spacing, start, prediction, "dpmpp_2m_sde")
    return cls(
        dpmpp_2m_sde_rows(c, h, second, clip, solver_type),
        c.timesteps,
        prediction,
        start,
        "dpmpp_2m_sde",
        draws_always=True,
        threshold=threshold_from_clip(clip),
    )


def multistep_levels(
    schedule: NoiseSchedule,
    steps: int | None,
    spacing: str | Sequence[int],
    start: int | None,
    prediction: str,
    name: str,
) -> tuple[NoiseLevels, Tensor, list[bool]]:
    """Return the noise levels of a multistep solver, h of each step, and the second-order steps.

    The first step and the last, which ends at x_0, are of first order.
    """
    reject_random_start(start, name)
    c = NoiseLevels.from_schedule(schedule, steps, spacing, start, prediction, to_data=True)
    last = len(c.timesteps) - 1
    return c, half_logsnr_steps(c), [0 < i < last for i in range(last + 1)]


def half_logsnr_steps(c: NoiseLevels) -> Tensor:
    """Return h, the step in lambda = log(alpha/sigma); infinite from pure noise and to x_0."""
    half_logsnr = (c.abar.log() - c.one_minus_abar.log()) / 2
    return (c.abar_prev.log() - c.one_minus_abar_prev.log()) / 2 - half_logsnr


def second_order_coef(rise: Tensor, h: Tensor, second: list[bool]) -> Tensor:
    """Return rise / r, r the previous step divided by h; 0 for the steps of first order."""
    chosen = torch.tensor(second, device=h.device)
    return torch.where(chosen, rise * (h / torch.cat([h[:1], h[:-1]])), 0.0)


def dpmpp_2m_rows(
    c: NoiseLevels, h: Tensor, second: list[bool], clip: Clip, solver_type: str
) -> Tensor:
    """Return the rows of `dpmpp_2m` for given noise levels, steps h and orders."""
    checks.choice("solver_type", solver_type, CORRECTIONS)
    gain = c.abar_prev.sqrt() * -torch.expm1(-h)
    rise = gain / 2
    if solver_type == "heun":
        rise = c.abar_prev.sqrt() * (torch.expm1(-h) / h + 1)
    decay = (c.one_minus_abar_prev / c.one_minus_abar).sqrt()
    return _rows(c, clip, decay, gain, second_order_coef(rise, h, second))


def dpmpp_2m_sde_rows(
    c: NoiseLevels, h: Tensor, second: list[bool], clip: Clip, solver_type: str
) -> Tensor:
    """Return the rows of `dpmpp_2m_sde` for given noise levels, steps h and orders."""
    checks.choice("solver_type", solver_type, CORRECTIONS)
    share = -torch.expm1(-2 * h)
    gain = c.abar_prev.sqrt() * share
    rise = gain / 2
    if solver_type == "heun":
        rise = c.abar_prev.sqrt() * (1 - share / (2 * h))
    decay = (c.one_minus_abar_prev / c.one_minus_abar).sqrt() * (-h).exp()
    noise = (c.one_minus_abar_prev * share).sqrt()
    return _rows(c, clip, decay, gain, second_order_coef(rise, h, second), S=noise)


def _rows(
    c: NoiseLevels, clip: Clip, decay: Tensor, gain: Tensor, rise: Tensor, **columns: Tensor
) -> Tensor:
    """Return the rows of x' = decay x + gain x0 + rise (x0 - h1), which push every x0."""
    one = torch.ones_like(gain)
    return rows_for(c, clip, Xx=decay, Xx0=gain + rise, Xh1=-rise, Hv=one, push=one, **columns)
