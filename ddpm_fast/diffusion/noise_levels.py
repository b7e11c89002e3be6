"""The kept timesteps of a schedule, and what every solver reads of them."""

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
    """The kept timesteps of a schedule, each with the next one kept (prev), 1 and 0 after the last.

    Float64 [steps], descending in t: abar and one_minus_abar = 1 - abar at t and at prev, and alpha
    and beta = 1 - alpha of the step from prev to t.
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
        """Check a solver's arguments and look up its steps in the schedule.

        to_data: see `spacing.timesteps`.
        """
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(f"schedule must be a NoiseSchedule; got {type(schedule).__name__}")
        check_prediction(prediction, schedule)
        begin = check_start(start, schedule.T)
        length = begin if isinstance(begin, int) else schedule.T
        kept = timesteps(length, steps, spacing, to_data)
        abar = schedule.alphas_cumprod
        return cls._from_levels(
            kept, prediction, abar[kept], schedule.one_minus_alphas_cumprod[kept]
        )

    @classmethod
    def from_sigmas(cls, timesteps: list[int], sigmas: Tensor, prediction: str) -> NoiseLevels:
        """The steps between noise levels of one's own, alphas_cumprod = 1 / (1 + sigma^2).

        sigmas: float64 [steps + 1], descending, the last where the last step leads (0: data).
        """
        square = sigmas.square()
        abar, one_minus_abar = 1 / (1 + square), square / (1 + square)
        alpha = abar[:-1] / abar[1:]
        levels = abar[:-1], one_minus_abar[:-1], abar[1:], one_minus_abar[1:]
        return cls(timesteps, prediction, *levels, alpha, 1 - alpha)

    @classmethod
    def _from_levels(
        cls, kept: list[int], prediction: str, abar: Tensor, one_minus_abar: Tensor
    ) -> NoiseLevels:
        abar_prev = torch.cat([abar[1:], abar.new_ones(1)])
        one_minus_abar_prev = torch.cat([one_minus_abar[1:], one_minus_abar.new_zeros(1)])
        # The logarithm of alpha keeps the digits that 1 - abar / abar_prev loses.
        log_abar = torch.where(abar < 0.5, abar.log(), torch.log1p(-one_minus_abar))
        log_alpha = log_abar - torch.cat([log_abar[1:], log_abar.new_zeros(1)])
        beta = -torch.expm1(log_alpha)
        beta[-1] = one_minus_abar[-1]
        return cls(
            kept,
            prediction,
            abar,
            one_minus_abar,
            abar_prev,
            one_minus_abar_prev,
            log_alpha.exp(),
            beta,
        )

    def select(self, rows: list[int]) -> NoiseLevels:
        """The chain with these steps, in this order; each still leads to its own prev."""
        tensors = {
            field.name: getattr(self, field.name)[rows]
            for field in fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        return replace(self, timesteps=[self.timesteps[i] for i in rows], **tensors)

    @property
    def posterior_variance(self) -> Tensor:
        """Variance of q(x_prev | x_t, x_0), 0 after the last (Eq. 7, Ho et al. 2020)."""
        return self.one_minus_abar_prev / self.one_minus_abar * self.beta

    def x0(self) -> tuple[Tensor, Tensor]:
        """P and Q of x0 = P x_t + Q out (Eq. 15, Ho et al. 2020, for epsilon)."""
        return x0_factors(self.prediction, self.abar, self.one_minus_abar)

    def epsilon(self) -> tuple[Tensor, Tensor]:
        """Factors of x_t and out in the epsilon that the network's output stands for."""
        return epsilon_factors(self.prediction, self.abar, self.one_minus_abar)

    def epsilon_from_x0(self) -> tuple[Tensor, Tensor]:
        """Factors of x_t and x0 in the epsilon that a (clipped) x0 stands for."""
        return 1 / self.one_minus_abar.sqrt(), -self.abar.sqrt() / self.one_minus_abar.sqrt()


def check_start(start: Any, T: int | None = None) -> Start:
    """A solver's argument start: None, a step in 1..T, or "random"."""
    if isinstance(start, str):
        checks.choice("start", start, ("random",))
        return "random"
    if start is None:
        return None
    return checks.integer("start", start, 1, None if T is None else T + 1)


def require_signal(c: NoiseLevels, solver: str) -> None:
    """A solver that divides by alphas_cumprod needs some of x_0 at every timestep."""
    if (c.abar == 0).any():
        raise ValueError(
            f"schedule: alphas_cumprod must be above 0 for {solver}; it is 0 at t ="
            f" {c.timesteps[0]}"
        )


def reject_random_start(start: Any, solver: str) -> None:
    """A chain that looks back cannot begin at any row."""
    if start == "random":
        raise ValueError(
            f"start must be None or a step for {solver}, whose steps read earlier ones; got "
            "'random', which ddpm and ddim take"
        )


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
    chain = NoiseLevels.from_schedule(schedule, steps, spacing, None, "x0")
    kept = chain.timesteps[::-1]
    if len(kept) == schedule.T:
        return schedule, kept
    name = f"{schedule.name}, {len(kept)} of {schedule.T} steps"
    betas, alphas, abar, one_minus_abar = (
        table.flip(0) for table in (chain.beta, chain.alpha, chain.abar, chain.one_minus_abar)
    )
    return NoiseSchedule(betas, alphas, abar, one_minus_abar, name), kept
