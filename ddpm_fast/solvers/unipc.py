"""UniPC of second order (Zhao et al. 2023), predicting x0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ddpm_fast.chain import Chain, Clip, Prediction, threshold_of
from ddpm_fast.schedules import NoiseSchedule
from ddpm_fast.solvers.dpm_solver import half_logsnr_steps
from ddpm_fast.spacing import check_name

if TYPE_CHECKING:
    from ddpm_fast.tables import StepTable


def unipc(
    cls: type[StepTable],
    schedule: NoiseSchedule,
    steps: int | None = None,
    prediction: Prediction = "epsilon",
    clip: Clip = 1.0,
    spacing: str | Sequence[int] = "linspace",
    solver_type: Literal["bh1", "bh2"] = "bh2",
    start: int | None = None,
) -> StepTable:
    """UniPC-2 (Algorithms 5 and 6, Zhao et al. 2023), its predictor and corrector in one row.

    The state x is the predicted sample, which the network reads; y is the corrected one. With m the
    x0 of a step, a row first corrects y (UniC): y' = (sigma/sigma_1) y + alpha (1 - exp(-h)) m_1 -
    alpha B (r_0 (m_2 - m_1)/r + r_1 (m - m_1)), where h leads here from the step before, and then
    predicts x' (UniP) from y' and m. B is expm1(-h) ("bh2") or -h ("bh1"). Orders rise from 1 at
    the start and the last step, which leads to x_0 itself, is of first order. The arguments and
    errors are those of dpmpp_2m.
    """
    check_name("solver_type", solver_type, ("bh1", "bh2"))
    c, h, ratio = half_logsnr_steps(schedule, steps, spacing, start, prediction, "unipc")
    if solver_type == "bh1" and c.abar[0] == 0:
        raise ValueError(
            "solver_type must be 'bh2' for a schedule of zero terminal SNR, where the first step in"
            " log-SNR has no length; got 'bh1'"
        )
    columns = {name: torch.zeros_like(h) for name in ("Yx", "Yy", "Yx0", "Yh1", "Yh2")}
    columns["Yx"][0] = 1
    for i in range(1, len(h)):
        corrected = _corrector(c, h, i, solver_type)
        for name, value in zip(("Yy", "Yx0", "Yh1", "Yh2"), corrected, strict=True):
            columns[name][i] = value
    decay = (c.rest_prev / c.rest).sqrt()
    gain = c.abar_prev.sqrt() * -torch.expm1(-h)
    # Half of B times the step before it over h; only inner steps are of second order.
    rise = torch.zeros_like(h)
    rise[1:-1] = (gain if solver_type == "bh2" else c.abar_prev.sqrt() * h)[1:-1] / 2
    rise[1:-1] *= ratio[1:-1]
    rows = c.rows(
        clip,
        **columns,
        Xx=decay * columns["Yx"],
        Xy=decay * columns["Yy"],
        Xx0=decay * columns["Yx0"] + gain + rise,
        Xh1=decay * columns["Yh1"] - rise,
        Xh2=decay * columns["Yh2"],
        Hv=torch.ones_like(h),
        push=torch.ones_like(h),
    )
    return cls(rows, c.timesteps, prediction, start, "unipc", threshold=threshold_of(clip))


def _corrector(c: Chain, h: Tensor, i: int, solver_type: str) -> tuple[Tensor, ...]:
    """Factors of y, m, m_1 and m_2 in the corrected sample of step i >= 1 (UniC, Algorithm 5)."""
    step = h[i - 1]
    expm1 = torch.expm1(-step)
    B = expm1 if solver_type == "bh2" else -step
    phi_2 = expm1 / -step - 1
    first = phi_2 / B
    r_0, r_1, r = torch.zeros_like(step), torch.full_like(step, 0.5), torch.ones_like(step)
    if i >= 2:
        # The system [[1, 1], [r, 1]] (r_0, r_1) = (first, second), solved by hand: r may be -inf.
        second = 2 * (phi_2 / -step - 0.5) / B
        r = -h[i - 2] / step
        r_0 = (second - first) / (r - 1)
        r_1 = first - r_0
    alpha = c.abar[i].sqrt()
    of_m2 = -alpha * B * r_0 / r
    of_m = -alpha * B * r_1
    return (c.rest[i] / c.rest[i - 1]).sqrt(), of_m, -alpha * expm1 - of_m - of_m2, of_m2
