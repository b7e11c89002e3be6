"""Noise levels of the steps of a chain, and schedules of fewer timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ddpm_fast.diffusion.parameterization import check_prediction, epsilon_factors, x0_factors
from ddpm_fast.diffusion.schedule import NoiseSchedule
from ddpm_fast.diffusion.timesteps import timesteps
from ddpm_fast.utils import checks

Start = int | Literal["random"] | None


@dataclass(frozen=True)
class NoiseLevels:
    """Noise levels of the steps of a chain, descending in t.

    `_prev` is the level after a step: that of the next timestep of the chain; after the last one,
    that of the data.

    Attributes:
        timesteps: Timestep of each step.
        prediction: Kind of the model output.
        abar: alphas_cumprod before each step. All tensors are float64 [steps] on the CPU.
        one_minus_abar: 1 - abar, computed without cancellation.
        abar_prev: alphas_cumprod after each step.
        one_minus_abar_prev: 1 - abar_prev.
        alpha: abar / abar_prev.
        beta: 1 - alpha.
    """

    timesteps: list[int]
    prediction: str
    abar: Tensor
    one_minus_abar: Tensor
    abar_prev: Tensor
    one_minus_abar_prev: Tensor
    alpha: Tensor
    beta: Tensor

    @classmethod
    def from_schedule(
        cls,
        schedule: NoiseSchedule,
        steps: int | None,
        spacing: str | Sequence[int],
        start: Start,
        prediction: str,
        to_data: bool = False,
    ) -> NoiseLevels:
        """Return the levels of a chain; check the arguments of a solver.

        Args:
            schedule: Noise schedule of T timesteps.
            steps: As for `timesteps`.
            spacing: As for `timesteps`.
            start: 1..T: space the timesteps over 0..start-1. None, "random": over 0..T-1.
            prediction: Kind of the model output.
            to_data: As for `timesteps`.

        Raises:
            TypeError: An argument has another type.
            ValueError: An argument is out of range, or as `check_prediction`.
        """
        checks.instance("schedule", schedule, NoiseSchedule)
        check_prediction(prediction, schedule)
        begin = check_start(start, schedule.T)
        length = begin if isinstance(begin, int) else schedule.T
        chosen = timesteps(length, steps, spacing, to_data)
        abar, one_minus_abar = schedule.alphas_cumprod, schedule.one_minus_alphas_cumprod
        return cls._from_levels(chosen, prediction, abar[chosen], one_minus_abar[chosen])

    @classmethod
    def from_sigmas(cls, timesteps: list[int], sigmas: Tensor, prediction: str) -> NoiseLevels:
        """Return levels with alphas_cumprod = 1 / (1 + sigma^2).

        Args:
            timesteps: Timestep of each step.
            sigmas: float64 [steps + 1], descending; the last is the level after the last step (0:
                data).
            prediction: Kind of the model output.
        """
        square = sigmas.square()
        abar, one_minus_abar = 1 / (1 + square), square / (1 + square)
        alpha = abar[:-1] / abar[1:]
        levels = abar[:-1], one_minus_abar[:-1], abar[1:], one_minus_abar[1:]
        return cls(timesteps, prediction, *levels, alpha, 1 - alpha)

    @classmethod
    def _from_levels(
        cls, timesteps: list[int], prediction: str, abar: Tensor, one_minus_abar: Tensor
    ) -> NoiseLevels:
        abar_prev = torch.cat([abar[1:], abar.new_ones(1)])
        one_minus_abar_prev = torch.cat([one_minus_abar[1:], one_minus_abar.new_zeros(1)])
        # The logarithm of alpha keeps the digits that 1 - abar / abar_prev loses.
        log_abar = torch.where(abar < 0.5, abar.log(), torch.log1p(-one_minus_abar))
        log_alpha = log_abar - torch.cat([log_abar[1:], log_abar.new_zeros(1)])
        beta = -torch.expm1(log_alpha)
        beta[-1] = one_minus_abar[-1]
        levels = abar, one_minus_abar, abar_prev, one_minus_abar_prev
        return cls(timesteps, prediction, *levels, log_alpha.exp(), beta)

    def select(self, steps: list[int]) -> NoiseLevels:
        """Return these steps, in this order; the level after each is unchanged."""
        tensors = {
            field.name: getattr(self, field.name)[steps]
            for field in fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        return replace(self, timesteps=[self.timesteps[i] for i in steps], **tensors)

    @property
    def posterior_variance(self) -> Tensor:
        """Variance of q(x_prev | x_t, x_0), 0 for the last step (Eq. 7, Ho et al. 2020)."""
        return self.one_minus_abar_prev / self.one_minus_abar * self.beta

    def x0(self) -> tuple[Tensor, Tensor]:
        """Return P and Q of x0 = P x_t + Q out (Eq. 15, Ho et al. 2020, for epsilon)."""
        return x0_factors(self.prediction, self.abar, self.one_minus_abar)

    def epsilon(self) -> tuple[Tensor, Tensor]:
        """Return the factors of x_t and of the model output in epsilon."""
        return epsilon_factors(self.prediction, self.abar, self.one_minus_abar)

    def epsilon_from_x0(self) -> tuple[Tensor, Tensor]:
        """Return the factors of x_t and of a (clipped) x0 in epsilon."""
        return epsilon_factors("x0", self.abar, self.one_minus_abar)


def respace(
    schedule: NoiseSchedule, steps: int | None = None, spacing: str | Sequence[int] = "linspace"
) -> tuple[NoiseSchedule, list[int]]:
    """Return a schedule of fewer timesteps (Nichol & Dhariwal 2021, Section 4).

    The timesteps keep their alphas_cumprod; beta becomes 1 - abar_t / abar of the timestep before
    in the new schedule. Without the last timestep of the old schedule, x_T retains more of x_0:
    `NoiseSchedule` warns when it is far from N(0, I).

    Args:
        schedule: Noise schedule of T timesteps.
        steps: As for `timesteps`; None: all T, which returns `schedule` itself.
        spacing: As for `timesteps`.

    Returns:
        The new schedule, and the old timestep of each of its indices, ascending: the timestep that
        the model gets.

    Raises:
        TypeError: As `timesteps`.
        ValueError: As `timesteps`.
    """
    c = NoiseLevels.from_schedule(schedule, steps, spacing, None, "x0")
    chosen = c.timesteps[::-1]
    if len(chosen) == schedule.T:
        return schedule, chosen
    name = f"{schedule.name}, {len(chosen)} of {schedule.T} steps"
    betas, alphas, abar, one_minus_abar = (
        table.flip(0) for table in (c.beta, c.alpha, c.abar, c.one_minus_abar)
    )
    return NoiseSchedule(betas, alphas, abar, one_minus_abar, name), chosen


def check_start(start: Any, T: int | None = None) -> Start:
    """Return the argument `start` of a solver: None, a step in 1..T, or "random".

    Raises:
        TypeError: It is neither None, an integer nor a string.
        ValueError: It is out of range, or another string.
    """
    if isinstance(start, str):
        checks.choice("start", start, ("random",))
        return "random"
    return (
        None if start is None else checks.integer("start", start, 1, None if T is None else T + 1)
    )


def require_signal(levels: NoiseLevels, solver: str) -> None:
    """Raise ValueError if alphas_cumprod is 0 at a timestep: the solver divides by it."""
    if (levels.abar == 0).any():
        raise ValueError(
            f"schedule must have alphas_cumprod above 0 for {solver}; got 0 at t ="
            f" {levels.timesteps[0]}"
        )


def reject_random_start(start: Any, solver: str) -> None:
    """Raise ValueError if `start` is "random": a multistep solver cannot begin at any row."""
    if start == "random":
        raise ValueError(
            f"start must be None or a step for {solver}, whose steps read earlier ones; got"
            " 'random', which ddpm and ddim accept"
        )
