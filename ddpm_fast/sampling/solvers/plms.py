"""PLMS: pseudo linear multistep of fourth order (Liu et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ddpm_fast.diffusion.noise_levels import NoiseLevels, reject_random_start, require_signal
from ddpm_fast.diffusion.parameterization import Prediction
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.diffusion.thresholding import Clip, threshold_from_clip
from ddpm_fast.sampling.solvers.table import Table, rows_for

# Adams-Bashforth weights of the current epsilon and the earlier ones, by their number.
_WEIGHTS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def plms(
    cls: type[Table],
    schedule: NoiseSchedule,
    steps: int | None = None,
    prediction: Prediction = "epsilon",
    clip: Clip = None,
    spacing: str | Sequence[int] = "leading",
    start: int | None = None,
) -> Table:
    """Make the table of PLMS (Eq. 11 and 12, Liu et al. 2022, started as diffusers' PNDMScheduler).

    A step is that of DDIM with eta = 0, with epsilon replaced by the Adams-Bashforth combination of
    the last four. The chain starts with a step of Heun's method: the first step is taken, the model
    is evaluated at its end, and the step is repeated with the mean of both epsilons. A table of
    `steps` >= 2 therefore has one row more, and its second timestep twice.

    Args:
        cls: Class of the table.
        schedule: Noise schedule of T timesteps; alphas_cumprod is above 0 at all timesteps used.
        steps: As for `ddpm`.
        prediction: As for `ddpm`.
        clip: As for `ddpm`. With a clip the epsilons are those of the clipped x0.
        spacing: As for `ddpm`.
        start: As for `ddpm`; not "random".

    Returns:
        The step table.

    Raises:
        TypeError: An argument has another type.
        ValueError: An argument is out of range, or as for `ddpm`.
    """
    reject_random_start(start, "plms")
    c = NoiseLevels.from_schedule(schedule, steps, spacing, start, prediction)
    require_signal(c, "plms")
    rows = list(range(len(c.timesteps)))
    heun = len(rows) > 1
    c = c.select([0, 1, *rows[1:]] if heun else rows)
    # Eq. 11: x' = x_coef x + turn epsilon. The difference of two roots would cancel.
    x_coef = (c.abar_prev / c.abar).sqrt()
    turn = -(c.abar_prev - c.abar) / (
        c.abar * c.one_minus_abar_prev.sqrt() + (c.abar * c.one_minus_abar * c.abar_prev).sqrt()
    )
    push = torch.ones_like(x_coef)
    weights = x_coef.new_zeros(len(x_coef), 4)
    for i in range(len(x_coef)):
        known = _WEIGHTS[min(max(i - 1, 0) if heun else i, 3)]
        weights[i, : len(known)] = turn[i] * turn.new_tensor(known)
    if heun:
        # From the end of the first step: x' = x + (turn of the first step) (epsilon - h1) / 2.
        x_coef[1], push[1] = 1, 0
        weights[1] = turn[0] / 2 * turn.new_tensor([1, -1, 0, 0])
    columns = {f"Xh{k}": weights[:, k] for k in (1, 2, 3)} | {"push": push}
    if clip is None:
        Hx, Ho = c.epsilon()
        columns |= {"Ho": Ho, "Xo": weights[:, 0] * Ho}
    else:
        Hx, Hv = c.epsilon_from_x0()
        columns |= {"Hv": Hv, "Xx0": weights[:, 0] * Hv}
    table_rows = rows_for(c, clip, Xx=x_coef + weights[:, 0] * Hx, Hx=Hx, **columns)
    threshold = threshold_from_clip(clip)
    return cls(table_rows, c.timesteps, prediction, start, "plms", threshold=threshold)
