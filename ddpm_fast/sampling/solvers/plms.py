"""PLMS: pseudo linear multistep of fourth order (Liu et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ddpm_fast.diffusion.noise_levels import NoiseLevels, reject_random_start, require_signal
from ddpm_fast.diffusion.parameterization import Prediction
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.diffusion.thresholding import Clip, threshold_from_clip

if TYPE_CHECKING:
    from ddpm_fast.sampling.step_table import StepTable

# Adams-Bashforth: weights of the present epsilon and of those before it, by how many there are.
_WEIGHTS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def plms(
    cls: type[StepTable],
    schedule: NoiseSchedule,
    steps: int | None = None,
    prediction: Prediction = "epsilon",
    clip: Clip = None,
    spacing: str | Sequence[int] = "leading",
    start: int | None = None,
) -> StepTable:
    """PLMS (Eq. 11 and 12 with the start of Liu et al. 2022 that diffusers' PNDMScheduler takes).

    A step is DDIM's (eta = 0) with epsilon replaced by the combination of the last four by
    Adams-Bashforth. It starts by a step of Heun's: the first step is taken, the network asked again
    where it leads, and the step taken anew with the mean of both; so a table of ``steps`` >= 2 has
    one row more, and its second timestep twice. clip: with a clip, off unless given, the epsilons
    are those of the clipped x0. The other arguments and errors are those of dpmpp_2m, but for
    spacing, which is that of ddim.
    """
    reject_random_start(start, "plms")
    c = NoiseLevels.from_schedule(schedule, steps, spacing, start, prediction)
    require_signal(c, "plms")
    kept = list(range(len(c.timesteps)))
    heun = len(kept) > 1
    c = c.select([0, 1, *kept[1:]] if heun else kept)
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
        # From where the first step led: x' = x + (turn of the first step) (epsilon - h1) / 2.
        x_coef[1], push[1] = 1, 0
        weights[1] = turn[0] / 2 * turn.new_tensor([1, -1, 0, 0])
    columns = {f"Xh{k}": weights[:, k] for k in (1, 2, 3)} | {"push": push}
    if clip is None:
        by_x, by_out = c.epsilon()
        columns |= {"Ho": by_out, "Xo": weights[:, 0] * by_out}
    else:
        by_x, by_x0 = c.epsilon_from_x0()
        columns |= {"Hv": by_x0, "Xx0": weights[:, 0] * by_x0}
    rows = c.rows(clip, Xx=x_coef + weights[:, 0] * by_x, Hx=by_x, **columns)
    return cls(rows, c.timesteps, prediction, start, "plms", threshold=threshold_from_clip(clip))
