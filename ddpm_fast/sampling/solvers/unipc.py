"""UniPC of second order (Zhao et al. 2023), predicting x0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ddpm_fast.diffusion.noise_levels import NoiseLevels
from ddpm_fast.diffusion.parameterization import Prediction
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.diffusion.thresholding import Clip, threshold_from_clip
from ddpm_fast.sampling.solvers.dpm_solver import multistep_levels, second_order_coef
from ddpm_fast.sampling.solvers.table import Table, rows_for
from ddpm_fast.utils import checks


def unipc(
    cls: type[Table],
    schedule: NoiseSchedule,
    steps: int | None = None,
    prediction: Prediction = "epsilon",
    clip: Clip = 1.0,
    spacing: str | Sequence[int] = "linspace",
    solver_type: Literal["bh1", "bh2"] = "bh2",
    start: int | None = None,
) -> Table:
    """Make the table of UniPC-2 (Algorithms 5 and 6, Zhao et al. 2023).

    A row has the corrector and the predictor. The state x is the predicted sample, which the model
    reads; y is the corrected one. With m the x0 of a step and h the step that led to it, a row
    first corrects y (UniC): y' = (sigma/sigma_1) y + alpha (1 - exp(-h)) m_1 - alpha B (r_0 (m_2 -
    m_1)/r + r_1 (m - m_1)), and then predicts x' (UniP) from y' and m. The first step, and the
    last, which ends at x_0, are of first order.

    Args:
        cls: Class of the table.
        schedule: Noise schedule of T timesteps.
        steps: As for `ddpm`.
        prediction: As for `ddpm`.
        clip: As for `ddpm`.
        spacing: As for `dpmpp_2m`.
        solver_type: B is expm1(-h) for "bh2", -h for "bh1".
        start: As for `ddpm`; not "random".

    Returns:
        The step table.

    Raises:
        TypeError: An argument has another type.
        ValueError: An argument is out of range, or as for `ddpm`.
    """
    c, h, second = multistep_levels(schedule, steps, spacing, start, prediction, "unipc")
    rows = unipc_rows(c, h, second, clip, solver_type)
    threshold = threshold_from_clip(clip)
    return cls(rows, c.timesteps, prediction, start, "unipc", threshold=threshold)


def unipc_rows(
    c: NoiseLevels,
    h: Tensor,
    second: list[bool],
    clip: Clip,
    solver_type: str,
    uncorrected: Sequence[int] = (),
) -> Tensor:
    """Return the rows of `unipc` for given noise levels.

    Args:
        c: Noise levels of the steps.
        h: Steps in lambda = log(alpha/sigma).
        second: True for the steps whose predictor is of second order. The corrector has the order
            of the predictor before it.
        clip: As for `ddpm`.
        solver_type: "bh1" or "bh2".
        uncorrected: Steps after which the corrector is skipped.
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
    # Half of B, divided by the ratio of the previous step to h.
    rise = (gain if solver_type == "bh2" else c.abar_prev.sqrt() * h) / 2
    rise = second_order_coef(rise, h, second)
    return rows_for(
        c,
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
    """Return the factors of y, m, m_1 and m_2 in the corrected sample of step i >= 1 (UniC)."""
    step = h[i - 1]
    expm1 = torch.expm1(-step)
    B = expm1 if solver_type == "bh2" else -step
    phi_2 = expm1 / -step - 1
    first = phi_2 / B
    r_0, r_1, r = torch.zeros_like(step), torch.full_like(step, 0.5), torch.ones_like(step)
    if second_order:
        # The system [[1, 1], [r, 1]] (r_0, r_1) = (first, second), in closed form: r may be -inf.
        second = 2 * (phi_2 / -step - 0.5) / B
        r = -h[i - 2] / step
        r_0 = (second - first) / (r - 1)
        r_1 = first - r_0
    alpha = c.abar[i].sqrt()
    m2_coef = -alpha * B * r_0 / r
    m_coef = -alpha * B * r_1
    return (
        (c.one_minus_abar[i] / c.one_minus_abar[i - 1]).sqrt(),
        m_coef,
        -alpha * expm1 - m_coef - m2_coef,
        m2_coef,
    )
