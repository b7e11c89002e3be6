"""The step tables of diffusers' schedulers, as they are set."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UniPCMultistepScheduler
from torch import Tensor

from ddpm_fast.diffusers.coefficients import ddim_rows, ddpm_rows, noise_levels
from ddpm_fast.diffusers.scheduler_options import (
    Compat,
    base_class,
    check_compat,
    exact_schedule,
    get_clip,
    get_options,
    get_prediction,
    reject_subclass,
)
from ddpm_fast.diffusion.noise_levels import NoiseLevels
from ddpm_fast.diffusion.thresholding import threshold_from_clip
from ddpm_fast.sampling.solvers.dpm_solver import (
    dpmpp_2m_rows,
    dpmpp_2m_sde_rows,
    half_logsnr_steps,
)
from ddpm_fast.sampling.solvers.unipc import unipc_rows
from ddpm_fast.sampling.step_table import StepTable


def step_table(
    scheduler: Any,
    compat: Compat = "diffusers",
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
) -> StepTable:
    """The chain of a scheduler on which set_timesteps was called.

    scheduler: DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler (order 1 and 2) or
    UniPCMultistepScheduler (the same), or one of ours. compat: "diffusers" for the coefficients
    that the library computes in float32, its slips included; "corrected" for those of the papers in
    float64. eta, use_clipped_model_output: of DDIMScheduler.step.

    Raises TypeError, ValueError for another scheduler, an option that is not supported, eta for a
    scheduler that has none, timesteps outside of the schedule, and coefficients of the library's
    that are not finite; each is named.
    """
    reject_subclass(scheduler)
    kind = base_class(scheduler)
    corrected = check_compat(compat) == "corrected"
    if kind is not DDIMScheduler and (eta or use_clipped_model_output):
        raise ValueError(
            f"eta and use_clipped_model_output are for DDIMScheduler; got {kind.__name__}"
        )
    if kind in (DDPMScheduler, DDIMScheduler):
        timesteps = chain_timesteps(scheduler, corrected)
        if kind is DDPMScheduler:
            _refuse_learned(scheduler, corrected)
            rows = ddpm_scheduler_rows(scheduler, timesteps, corrected)
        else:
            rows = ddim_scheduler_rows(
                scheduler, timesteps, eta, use_clipped_model_output, corrected
            )
        always = kind is DDIMScheduler
    else:
        rows, timesteps = _multistep(scheduler, kind, corrected)
        always = True
    _check_finite(scheduler, rows, timesteps)
    return StepTable(
        rows,
        timesteps,
        get_prediction(scheduler),
        name=kind.__name__,
        draws_always=always,
        threshold=threshold_from_clip(get_clip(scheduler)),
    )


def chain_timesteps(scheduler: Any, corrected: bool) -> list[int]:
    """The timesteps of a chain, first step first.

    corrected: without the one below 0 that rounding adds to some trailing spacings, and without
    repetitions. Raises ValueError for a timestep outside of the schedule.
    """
    found = [int(t) for t in scheduler.timesteps.tolist()]
    if corrected:
        found = list(dict.fromkeys(t for t in found if t >= 0))
    T = len(scheduler.alphas_cumprod)
    outside = [t for t in found if not 0 <= t < T]
    if outside:
        raise ValueError(
            f"timesteps must be in [0, {T - 1}]; got {outside[0]} from set_timesteps"
            f" (timestep_spacing={scheduler.config.timestep_spacing!r}, steps_offset="
            f"{scheduler.config.steps_offset}). Take another number of steps"
            + (", or compat='corrected'" if outside[0] < 0 else "")
        )
    return found


def alphas_cumprod(scheduler: Any, corrected: bool) -> Tensor:
    """[T] on the CPU: the library's in float32, or those of its configuration in float64."""
    if corrected:
        return exact_schedule(scheduler).alphas_cumprod
    return scheduler.alphas_cumprod.detach().to("cpu", torch.float32)


def _chain_levels(scheduler: Any, corrected: bool) -> Tensor:
    """`alphas_cumprod` for the steps of a chain. Raises ValueError where none would be right."""
    abar = alphas_cumprod(scheduler, corrected)
    if corrected and float(abar[-1]) == 0 and get_prediction(scheduler) == "epsilon":
        raise ValueError(
            "prediction_type must be 'sample' or 'v_prediction' with rescale_betas_zero_snr, where"
            " alphas_cumprod ends at 0; got 'epsilon'"
        )
    return abar


def _levels(
    scheduler: Any, abar: Tensor, timesteps: list[int], next_timesteps: list[int], end: Tensor
) -> NoiseLevels:
    """Noise levels of steps from timesteps to the next ones, where -1 is the level `end`."""
    after = torch.tensor(next_timesteps, device="cpu")
    abar_prev = torch.where(after >= 0, abar[after.clamp(min=0)], end)
    return noise_levels(timesteps, get_prediction(scheduler), abar[timesteps], abar_prev)


def ddpm_scheduler_rows(scheduler: Any, timesteps: list[int], corrected: bool) -> Tensor:
    """Rows for DDPMScheduler's steps at these timesteps of its chain."""
    abar = _chain_levels(scheduler, corrected)
    next_of = {t: t - 1 for t in timesteps}
    if scheduler.custom_timesteps or scheduler.num_inference_steps:
        chain = chain_timesteps(scheduler, corrected)
        next_of = dict(zip(chain, [*chain[1:], -1], strict=True))
    next_timesteps = [next_of[t] for t in timesteps]
    levels = _levels(scheduler, abar, timesteps, next_timesteps, abar.new_ones(()))
    # The library adds noise wherever t > 0, after the last step of a chain too.
    noisy = torch.tensor(next_timesteps if corrected else timesteps, device="cpu") > (
        -1 if corrected else 0
    )
    variance = scheduler.variance_type
    return ddpm_rows(levels, noisy, get_clip(scheduler), variance, corrected)


def ddim_scheduler_rows(
    scheduler: Any,
    timesteps: list[int],
    eta: float,
    use_clipped_model_output: bool,
    corrected: bool,
) -> Tensor:
    """Rows for DDIMScheduler's steps at these timesteps, of its chain where corrected."""
    abar, config = _chain_levels(scheduler, corrected), scheduler.config
    if corrected:
        chain = chain_timesteps(scheduler, corrected)
        next_of = dict(zip(chain, [*chain[1:], -1], strict=True))
        next_timesteps = [next_of[t] for t in timesteps]
        end = abar.new_ones(()) if config.set_alpha_to_one else abar[0]
    else:
        stride = config.num_train_timesteps // scheduler.num_inference_steps
        next_timesteps = [t - stride for t in timesteps]
        end = scheduler.final_alpha_cumprod.detach().cpu()
    levels = _levels(scheduler, abar, timesteps, next_timesteps, end)
    return ddim_rows(levels, get_clip(scheduler), eta, bool(use_clipped_model_output))


def _multistep(scheduler: Any, kind: type, corrected: bool) -> tuple[Tensor, list[int]]:
    """Rows and timesteps of DPMSolverMultistepScheduler and UniPCMultistepScheduler."""
    config, options = scheduler.config, get_options(scheduler)
    timesteps = chain_timesteps(scheduler, corrected)
    prediction, clip = get_prediction(scheduler), get_clip(scheduler)
    own_sigmas = any(
        options.get(f"use_{name}")
        for name in ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas")
    )
    if corrected and not own_sigmas:
        c = NoiseLevels.from_schedule(exact_schedule(scheduler), None, timesteps, None, prediction)
        if config.final_sigmas_type == "sigma_min":
            c.abar_prev[-1] = alphas_cumprod(scheduler, corrected)[0]
            c = replace(c, one_minus_abar_prev=1 - c.abar_prev)
    else:
        timesteps = chain_timesteps(scheduler, False)
        c = NoiseLevels.from_sigmas(timesteps, scheduler.sigmas.double(), prediction)
    h = half_logsnr_steps(c)
    if kind is UniPCMultistepScheduler:
        if not corrected and config.solver_type == "bh1" and config.final_sigmas_type == "zero":
            raise ValueError(
                "solver_type='bh1' with final_sigmas_type='zero' ends in NaN in diffusers; take"
                " 'bh2' or compat='corrected'"
            )
        second = _second_order(config, len(timesteps), config.lower_order_final)
        off = config.disable_corrector
        return unipc_rows(c, h, second, clip, config.solver_type, off), timesteps
    lower = config.euler_at_final or (config.lower_order_final and len(timesteps) < 15)
    second = _second_order(config, len(timesteps), lower or config.final_sigmas_type == "zero")
    make = dpmpp_2m_rows if config.algorithm_type == "dpmsolver++" else dpmpp_2m_sde_rows
    return make(c, h, second, clip, config.solver_type), timesteps


def _second_order(config: Any, steps: int, lower_at_the_end: bool) -> list[bool]:
    """Which steps are of second order: not the first, and the last only where it may be."""
    last = steps - (1 if lower_at_the_end else 0)
    return [config.solver_order > 1 and 0 < i < last for i in range(steps)]


def _refuse_learned(scheduler: Any, corrected: bool) -> None:
    if scheduler.variance_type == "learned" and not corrected:
        raise ValueError(
            "variance_type='learned' is refused with compat='diffusers': the library takes the"
            " square root of the network's output, which is a logarithm; take compat='corrected'"
        )


def _check_finite(scheduler: Any, rows: Tensor, timesteps: list[int]) -> None:
    bad = (rows.isnan() | (rows == -torch.inf)).any(1)
    if bad.any():
        raise ValueError(
            f"scheduler: diffusers' coefficients are not finite at timestep"
            f" {timesteps[int(bad.nonzero()[0])]} with {get_options(scheduler)}; compat='corrected'"
            " has those of the papers, where there are any"
        )
