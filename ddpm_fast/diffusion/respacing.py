"""A schedule of fewer steps: the timesteps that are kept, with betas from each to the next.

A diffusion of K of the T steps is one of its own (Nichol & Dhariwal 2021, Section 4): x_t keeps its
alphas_cumprod, and beta becomes 1 - abar_t / abar of the timestep kept before.
"""

from __future__ import annotations

from collections.abc import Sequence

from ddpm_fast.diffusion.noise_levels import Chain
from ddpm_fast.diffusion.schedule import NoiseSchedule


def respace(
    schedule: NoiseSchedule, steps: int | None = None, spacing: str | Sequence[int] = "linspace"
) -> tuple[NoiseSchedule, list[int]]:
    """The schedule of the timesteps that are kept, and these timesteps, ascending.

    Index i of the new schedule is timestep kept[i] of the old one, which is what the model is told.
    steps, spacing: as for `StepTable.ddpm` (spacing.timesteps); all T by default, which gives back
    the schedule itself. Where the last timestep is left out, the chain ends at an x_t that keeps
    more of x_0: `NoiseSchedule` says how far that may be from N(0, I).

    Raises TypeError, ValueError for other arguments, as spacing.timesteps does.
    """
    chain = Chain.of(schedule, steps, spacing, None, "x0")
    kept = chain.timesteps[::-1]
    if len(kept) == schedule.T:
        return schedule, kept
    name = f"{schedule.name}, {len(kept)} of {schedule.T} steps"
    betas, alphas, abar, rest = (
        table.flip(0) for table in (chain.beta, chain.alpha, chain.abar, chain.rest)
    )
    return NoiseSchedule(betas, alphas, abar, rest, name), kept
