"""UniPC of second order (Zhao et al. 2023), predicting x0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ddpm_fast.diffusion.noise_levels import NoiseLevels
from ddpm_fast.diffusion.parameterization import Prediction
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.diffusion.thresholding import Clip, threshold_from_clip
from ddpm_fast.sampling.solvers.dpm_solver import multistep_chain, of_second_order
from ddpm_fast.utils import checks

if TYPE_CHECKING:
    from ddpm_fast.sampling.step_table import StepTable


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
    c, h, second = multistep_chain(schedule, steps, spacing, start, prediction, "unipc")
    rows = unipc_rows(c, h, second, clip, solver_type)
    return cls(rows, c.timesteps, prediction, start, "unipc", threshold=threshold_from_clip(clip))


def unipc_rows(
    c: NoiseLevels,
    h: Tensor,
    second: list[bool],
    clip: Clip,
    solver_type: str,
    uncorrected: Sequence[int] = (),
) -> Tensor:
    """The rows of unipc for the steps of a chain.

    second: the steps whose predictor is of second order; a corrector has the order of the predictor
    that led to it. uncorrected: steps after which nothing is corrected.
    """
    checks.choice("solver_type", solver_type, ("bh1", "bh2"))
    if solver_type == "bh1" and c.abar[0] == 0:
        raise ValueError(
            "solver_type must be 'bh2' for a schedule of zero terminal SNR, where the first step in"
            " log-SNR has no length; got 'bh1'"
        )
    columns = {name: torch.zeros_like(h) for name in ("Yx", "Yy", "Yx0", "Yh1", "Yh2")}
    for i in range(len(h)):
        if i == 0 or i - 1 in uncorrected:
            columns["Yx"][i] = 1
            continue
        corrected = _corrector(c, h, i, second[i - 1], solver_type)
        for name, value in zip(("Yy", "Yx0", "Yh1", "Yh2"), corrected, strict=True):
            columns[name][i] = value
    decay = (c.one_minus_abar_prev / c.one_minus_abar).sqrt()
    gain = c.abar_prev.sqrt() * -torch.expm1(-h)
    # Half of B times the step before it over h.
    rise = (gain if solver_type == "bh2" else c.abar_prev.sqrt() * h) / 2
    rise = of_second_order(rise, h, second)
    return c.rows(
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


def _corrector(
    c: NoiseLevels, h: Tensor, i: int, second_order: bool, solver_type: str
) -> tuple[Tensor, ...]:
    """Factors of y, m, m_1 and m_2 in the corrected sample of step i >= 1 (UniC, Algorithm 5)."""
    step = h[i - 1]
    expm1 = torch.expm1(-step)
    B = expm1 if solver_type == "bh2" else -step
    phi_2 = expm1 / -step - 1
    first = phi_2 / B
    r_0, r_1, r = torch.zeros_like(step), torch.full_like(step, 0.5), torch.ones_like(step)
    if second_order:
        # The system [[1, 1], [r, 1]] (r_0, r_1) = (first, second), solved by hand: r may be -inf.
        second = 2 * (phi_2 / -step - 0.5) / B
        r = -h[i - 2] / step
        r_0 = (second - first) / (r - 1)
        r_1 = first - r_0
    alpha = c.abar[i].sqrt()
    of_m2 = -alpha * B * r_0 / r
    of_m = -alpha * B * r_1
    return (
        (c.one_minus_abar[i] / c.one_minus_abar[i - 1]).sqrt(),
        of_m,
        -alpha * expm1 - of_m - of_m2,
        of_m2,
    )
