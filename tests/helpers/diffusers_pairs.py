"""Pairs of a diffusers scheduler and a step table, closed-form models, and trajectories."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from ddpm_fast import NoiseSchedule, StepTable

SCHEDULES = {"linear": NoiseSchedule.linear(), "cosine": NoiseSchedule.cosine()}
THEIR_SCHEDULE = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
THEIR_PREDICTION = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
MEAN, VARIANCE = 0.2, 0.25  # of the data of the closed-form model


def closed_form(schedule: NoiseSchedule, prediction: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the exact network for data N(0.2, 0.25), in float64 (Eq. 15, Ho et al. 2020)."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        abar = schedule.alphas_cumprod[t].view(-1, *[1] * (x.ndim - 1))
        off = x.double() - MEAN * abar.sqrt()
        epsilon = (1 - abar).sqrt() * off / (VARIANCE * abar + 1 - abar)
        x0 = MEAN + VARIANCE * abar.sqrt() * off / (VARIANCE * abar + 1 - abar)
        v = abar.sqrt() * epsilon - (1 - abar).sqrt() * x0
        return {"epsilon": epsilon, "x0": x0, "v": v}[prediction].to(x.dtype)

    return model


def rough(model: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a model with waves in its output, so that every past output matters."""

    def waved(x: Tensor, t: Tensor) -> Tensor:
        phase = t.view(-1, *[1] * (x.ndim - 1)).to(x.dtype) / 37
        return model(x, t) + 0.3 * torch.sin(5 * x + phase)

    return waved


@dataclass(frozen=True)
class Pair:
    """A scheduler of diffusers, its step table, and further arguments of its step."""

    name: str
    scheduler: Any
    table: StepTable
    schedule: str = "linear"
    prediction: str = "epsilon"
    options: dict[str, Any] = field(default_factory=dict)
    noise: str | None = None  # the argument of step that takes the noise of a row

    @property
    def model(self) -> Callable[[Tensor, Tensor], Tensor]:
        return closed_form(SCHEDULES[self.schedule], self.prediction)

    def __str__(self) -> str:
        return f"{self.name}-{self.schedule}-{self.prediction}"

    def trajectory(
        self, x: Tensor, noises: Tensor, model=None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the states of diffusers, `x` first, and the outputs of the model."""
        self.scheduler.set_timesteps(self.table.steps - (self.name == "plms"))
        assert self.scheduler.timesteps.tolist() == self.table.timesteps.tolist()
        states, outputs = [x], []
        for row, t in enumerate(self.scheduler.timesteps):
            outputs.append((model or self.model)(states[-1], t.expand(len(x))))
            extra = {} if self.noise is None else {self.noise: noises[row]}
            step = self.scheduler.step(outputs[-1], t, states[-1], **self.options, **extra)
            states.append(step.prev_sample)
        return states, outputs


def config(schedule: str, prediction: str, **options: Any) -> dict[str, Any]:
    return {
        "beta_schedule": THEIR_SCHEDULE[schedule],
        "prediction_type": THEIR_PREDICTION[prediction],
        **options,
    }


def ddim_pair(
    schedule, prediction, spacing="leading", eta=0.0, clip=1.0, unclipped_epsilon=True
) -> Pair:
    options = config(schedule, prediction, timestep_spacing=spacing, clip_sample=clip is not None)
    table = StepTable.ddim(
        SCHEDULES[schedule],
        20,
        eta,
        prediction,
        clip,
        spacing,
        rederive_epsilon=not unclipped_epsilon,
    )
    step = {"eta": eta, "use_clipped_model_output": not unclipped_epsilon}
    name = f"ddim-{spacing}-eta{eta:g}-{'raw' if unclipped_epsilon else 'rederived'}-clip{clip}"
    noise = "variance_noise" if eta else None
    scheduler = diffusers.DDIMScheduler(**options)
    return Pair(name, scheduler, table, schedule, prediction, step, noise)


def dpm_pair(
    schedule, prediction, spacing="linspace", solver="midpoint", sde=False, steps=12
) -> Pair:
    options = config(schedule, prediction, timestep_spacing=spacing, solver_type=solver)
    kind = "sde-dpmsolver++" if sde else "dpmsolver++"
    make = StepTable.dpmpp_2m_sde if sde else StepTable.dpmpp_2m
    table = make(SCHEDULES[schedule], steps, prediction, None, spacing, solver)
    scheduler = diffusers.DPMSolverMultistepScheduler(**options, algorithm_type=kind)
    name = f"{table.name}-{spacing}-{solver}-{steps}"
    noise = "variance_noise" if sde else None
    return Pair(name, scheduler, table, schedule, prediction, {}, noise)


def unipc_pair(schedule, prediction, spacing="linspace", solver="bh2", steps=12) -> Pair:
    options = config(schedule, prediction, timestep_spacing=spacing, solver_type=solver)
    table = StepTable.unipc(SCHEDULES[schedule], steps, prediction, None, spacing, solver)
    scheduler = diffusers.UniPCMultistepScheduler(**options)
    return Pair(f"unipc-{spacing}-{solver}-{steps}", scheduler, table, schedule, prediction)


def plms_pair(schedule, prediction, steps=20) -> Pair:
    options = config(schedule, prediction, skip_prk_steps=True, set_alpha_to_one=True)
    table = StepTable.plms(SCHEDULES[schedule], steps, prediction)
    return Pair("plms", diffusers.PNDMScheduler(**options), table, schedule, prediction)


def inverse_pair(schedule, prediction, spacing="leading", clip=None) -> Pair:
    options = config(schedule, prediction, timestep_spacing=spacing, clip_sample=clip is not None)
    table = StepTable.ddim_inverse(
        SCHEDULES[schedule], 20, prediction, clip, spacing, False, evaluate_at="next"
    )
    scheduler = diffusers.DDIMInverseScheduler(**options)
    return Pair(f"inverse-{spacing}-clip{clip}", scheduler, table, schedule, prediction)


def pairs() -> list[Any]:
    """Return test parameters: every solver and option that both packages have.

    Options do not depend on the schedule or the prediction: all of them are tested with one, and
    one pair of each solver with the others. The rest of the product is slow.
    """
    found: list[Any] = []
    for schedule in SCHEDULES:
        for prediction in ("epsilon", "x0", "v"):
            of = schedule, prediction
            found += [
                ddim_pair(*of),
                ddim_pair(*of, spacing="trailing", eta=0.5),
                ddim_pair(*of, eta=1.0, unclipped_epsilon=False),
                ddim_pair(*of, eta=0.3, clip=None),
                ddim_pair(*of, unclipped_epsilon=False),
                dpm_pair(*of),
                dpm_pair(*of, spacing="leading", solver="heun"),
                dpm_pair(*of, spacing="trailing", steps=20),
                dpm_pair(*of, sde=True),
                dpm_pair(*of, sde=True, solver="heun", spacing="trailing"),
                unipc_pair(*of),
                unipc_pair(*of, spacing="trailing", steps=20),
                unipc_pair(*of, spacing="leading"),
            ]
        of = schedule, "epsilon"
        found += [inverse_pair(*of), inverse_pair(*of, "trailing", clip=1.0), plms_pair(*of)]
    first: set[tuple[str, str, str]] = set()
    parameters = []
    for pair in found:
        key = pair.table.name.split("(")[0], pair.schedule, pair.prediction
        default = key[1:] == ("linear", "epsilon") or key not in first
        first.add(key)
        marks = () if default else pytest.mark.slow
        parameters.append(pytest.param(pair, id=str(pair), marks=marks))
    return parameters
