"""DPM-Solver++ of second order, multistep (Lu et al. 2022, "DPM-Solver++"), and its SDE form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ddpm_fast.diffusion.noise_levels import NoiseLevels, reject_random_start
from ddpm_fast.diffusion.parameterization import Prediction
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.diffusion.thresholding import Clip, threshold_from_clip
from ddpm_fast.utils import checks

if TYPE_CHECKING:
    from ddpm_fast.sampling.step_table import StepTable

Correction = Literal["midpoint", "heun"]


def dpmpp_2m(
    cls: type[StepTable],
    schedule: NoiseSchedule,
    steps: int | None = None,
    prediction: Prediction = "epsilon",
    clip: Clip = 1.0,
    spacing: str | Sequence[int] = "linspace",
    solver_type: Correction = "midpoint",
    start: int | None = None,
) -> StepTable:
    """DPM-Solver++(2M) (Algorithm 2, Lu et al. 2022): second order, one evaluation a step.

    x' = (sigma'/sigma) x + alpha' (1 - exp(-h)) D with D = x0 + (x0 - x0 of the step before)/(2 r),
    h the step in lambda = log(alpha/sigma) and r the step before it over h; alpha^2 = abar. The
    first step and the last, which leads to x_0 itself, are of first order. solver_type: "midpoint"
    as above, or "heun", whose factor of the difference is alpha' ((exp(-h) - 1)/h + 1).

    spacing: named ones place the timesteps as for a chain that goes on to x_0 (to_data of
    `spacing.timesteps`). start: None or 1..T. The other arguments and errors are those of ddpm.
    """
    c, h, second = multistep_chain(schedule, steps, spacing, start, prediction, "dpmpp_2m")
    rows = dpmpp_2m_rows(c, h, second, clip, solver_type)
    return cls(
        rows, c.timesteps, prediction, start, "dpmpp_2m", threshold=threshold_from_clip(clip)
    )


def dpmpp_2m_sde(
    cls: type[StepTable],
    schedule: NoiseSchedule,
    steps: int | None = None,
    prediction: Prediction = "epsilon",
    clip: Clip = 1.0,
    spacing: str | Sequence[int] = "linspace",
    solver_type: Correction = "midpoint",
    start: int | None = None,
) -> StepTable:
    """SDE-DPM-Solver++(2M) (Appendix B, Lu et al. 2022).

    x' = (sigma'/sigma) exp(-h) x + alpha' (1 - exp(-2h)) D + sigma' sqrt(1 - exp(-2h)) z, with the
    D and the arguments of dpmpp_2m. Of first order it is ancestral sampling with the posterior
    variance.
    """
    name = "dpmpp_2m_sde"
    c, h, second = multistep_chain(schedule, steps, spacing, start, prediction, name)
    return cls(
        dpmpp_2m_sde_rows(c, h, second, clip, solver_type),
        c.timesteps,
        prediction,
        start,
        name,
        draws_always=True,
        threshold=threshold_from_clip(clip),
    )


def multistep_chain(
    schedule: NoiseSchedule,
    steps: int | None,
    spacing: str | Sequence[int],
    start: int | None,
    prediction: str,
    name: str,
) -> tuple[NoiseLevels, Tensor, list[bool]]:
    """The chain of a multistep solver, h of each step, and which steps are of second order.

    Not the first, and not the last, which leads to x_0 itself.
    """
    reject_random_start(start, name)
    c = NoiseLevels.from_schedule(schedule, steps, spacing, start, prediction, to_data=True)
    last = len(c.timesteps) - 1
    return c, half_logsnr_steps(c), [0 < i < last for i in range(last + 1)]


def half_logsnr_steps(c: NoiseLevels) -> Tensor:
    """h of each step in lambda = log(alpha/sigma), infinite out of noise and into x_0."""
    half_logsnr = (c.abar.log() - c.one_minus_abar.log()) / 2
    return (c.abar_prev.log() - c.one_minus_abar_prev.log()) / 2 - half_logsnr


def of_second_order(rise: Tensor, h: Tensor, second: list[bool]) -> Tensor:
    """rise times h over the h of the step before it, 0 where the order is first."""
    chosen = torch.tensor(second, device=h.device)
    return torch.where(chosen, rise * (h / torch.cat([h[:1], h[:-1]])), 0.0)


def dpmpp_2m_rows(
    c: NoiseLevels, h: Tensor, second: list[bool], clip: Clip, solver_type: str
) -> Tensor:
    """The rows of dpmpp_2m for the steps of a chain."""
    checks.choice("solver_type", solver_type, ("midpoint", "heun"))
    gain = c.abar_prev.sqrt() * -torch.expm1(-h)
    rise = gain / 2
    if solver_type == "heun":
        rise = c.abar_prev.sqrt() * (torch.expm1(-h) / h + 1)
    return _rows(
        c,
        clip,
        (c.one_minus_abar_prev / c.one_minus_abar).sqrt(),
        gain,
        of_second_order(rise, h, second),
    )


def dpmpp_2m_sde_rows(
    c: NoiseLevels, h: Tensor, second: list[bool], clip: Clip, solver_type: str
) -> Tensor:
    """The rows of dpmpp_2m_sde for the steps of a chain."""
    checks.choice("solver_type", solver_type, ("midpoint", "heun"))
    share = -torch.expm1(-2 * h)
    gain = c.abar_prev.sqrt() * share
    rise = gain / 2
    if solver_type == "heun":
        rise = c.abar_prev.sqrt() * (1 - share / (2 * h))
    decay = (c.one_minus_abar_prev / c.one_minus_abar).sqrt() * (-h).exp()
    noise = (c.one_minus_abar_prev * share).sqrt()
    return _rows(c, clip, decay, gain, of_second_order(rise, h, second), S=noise)


def _rows(
    c: NoiseLevels, clip: Clip, decay: Tensor, gain: Tensor, rise: Tensor, **columns: Tensor
) -> Tensor:
    """x' = decay x + gain x0 + rise (x0 - h1), each x0 pushed."""
    one = torch.ones_like(gain)
    return c.rows(clip, Xx=decay, Xx0=gain + rise, Xh1=-rise, Hv=one, push=one, **columns)
