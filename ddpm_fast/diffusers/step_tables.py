"""Step tables of the schedulers of diffusers."""

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
    """Return the step table of a scheduler, after a call of its set_timesteps.

    Args:
        scheduler: DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler or
            UniPCMultistepScheduler (both of order 1 and 2), or a drop-in of `ddpm_fast.diffusers`.
        compat: "diffusers": coefficients as diffusers computes them in float32, including its known
            bugs. "corrected": those of the papers, in float64.
        eta: Factor of the noise of DDIMScheduler.
        use_clipped_model_output: DDIMScheduler computes epsilon from the clipped x0.

    Returns:
        The step table, for a `Sampler`.

    Raises:
        TypeError: The scheduler is of another class.
        ValueError: An option is not supported, `eta` or `use_clipped_model_output` is set for
            another scheduler than DDIMScheduler, timesteps are outside of the schedule, or
            coefficients of diffusers are not finite.
    """
    reject_subclass(scheduler)
    kind = base_class(scheduler)
    corrected = check_compat(compat) == "corrected"
    if kind is not DDIMScheduler and (eta or use_clipped_model_output):
        raise ValueError(
            f"eta and use_clipped_model_output must be 0 and False for {kind.__name__}; got"
            f" {eta} and {use_clipped_model_output}"
        )
    if kind in (DDPMScheduler, DDIMScheduler):
        timesteps = chain_timesteps(scheduler, corrected)
        if kind is DDPMScheduler:
            _reject_learned(scheduler, corrected)
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
    """Return the timesteps of a scheduler, in the order of the steps.

    Args:
        scheduler: A scheduler.
        corrected: Without the timestep below 0 that rounding adds to some trailing spacings, and
            without repetitions.

    Raises:
        ValueError: A timestep is outside of the schedule.
    """
    found = [int(t) for t in scheduler.timesteps.tolist()]
    if corrected:
        found = list(dict.fromkeys(t for t in found if t >= 0))
    T = len(scheduler.alphas_cumprod)
    outside = [t for t in found if not 0 <= t < T]
    if outside and scheduler.config.num_train_timesteps > T:
        raise ValueError(
            f"num_train_timesteps must be {T}, as many as trained_betas (its default is 1000); got"
            f" {scheduler.config.num_train_timesteps}"
        )
    if outside:
        raise ValueError(
            f"timesteps must be in [0, {T - 1}]; got {outside[0]} from set_timesteps"
            f" (timestep_spacing={scheduler.config.timestep_spacing!r}, steps_offset="
            f"{scheduler.config.steps_offset}). Use another number of steps"
            + (", or compat='corrected'" if outside[0] < 0 else "")
        )
    return found


def alphas_cumprod(scheduler: Any, corrected: bool) -> Tensor:
    """Return alphas_cumprod [T] on the CPU: those of diffusers in float32, or exact in float64."""
    if corrected:
        return exact_schedule(scheduler).alphas_cumprod
    return scheduler.alphas_cumprod.detach().to("cpu", torch.float32)


def _chain_levels(scheduler: Any, corrected: bool) -> Tensor:
    """Return `alphas_cumprod`; raise ValueError if a corrected step from abar = 0 is undefined."""
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
    """Return the noise levels of steps; next timestep -1 is the level `end`."""
    after = torch.tensor(next_timesteps, device="cpu")
    abar_prev = torch.where(after >= 0, abar[after.clamp(min=0)], end)
    return noise_levels(timesteps, get_prediction(scheduler), abar[timesteps], abar_prev)


def ddpm_scheduler_rows(scheduler: Any, timesteps: list[int], corrected: bool) -> Tensor:
    """Return the rows of DDPMScheduler for steps at the given timesteps."""
    abar = _chain_levels(scheduler, corrected)
    next_of = {t: t - 1 for t in timesteps}
    if scheduler.custom_timesteps or scheduler.num_inference_steps:
        chain = chain_timesteps(scheduler, corrected)
        next_of = dict(zip(chain, [*chain[1:], -1], strict=True))
    next_timesteps = [next_of[t] for t in timesteps]
    levels = _levels(scheduler, abar, timesteps, next_timesteps, abar.new_ones(()))
    # diffusers adds noise for all t > 0, also in the last step of a chain.
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
    """Return the rows of DDIMScheduler for steps at the given timesteps."""
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
    """Return rows and timesteps of DPMSolverMultistepScheduler or UniPCMultistepScheduler."""
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
                "solver_type must be 'bh2' with final_sigmas_type='zero', where 'bh1' of diffusers"
                " gives NaN; got 'bh1'. Use 'bh2' or compat='corrected'"
            )
        second = _second_order(config, len(timesteps), config.lower_order_final)
        off = config.disable_corrector
        return unipc_rows(c, h, second, clip, config.solver_type, off), timesteps
    lower = config.euler_at_final or (config.lower_order_final and len(timesteps) < 15)
    second = _second_order(config, len(timesteps), lower or config.final_sigmas_type == "zero")
    make = dpmpp_2m_rows if config.algorithm_type == "dpmsolver++" else dpmpp_2m_sde_rows
    return make(c, h, second, clip, config.solver_type), timesteps


def _second_order(config: Any, steps: int, lower_order_final: bool) -> list[bool]:
    """Return True for each step of second order: not the first, and the last only if allowed."""
    last = steps - (1 if lower_order_final else 0)
    return [config.solver_order > 1 and 0 < i < last for i in range(steps)]


def _reject_learned(scheduler: Any, corrected: bool) -> None:
    if scheduler.variance_type == "learned" and not corrected:
        raise ValueError(
            "variance_type must not be 'learned' with compat='diffusers', because diffusers takes"
            " the square root of the model output, which is a logarithm. Use compat='corrected'"
        )


def _check_finite(scheduler: Any, rows: Tensor, timesteps: list[int]) -> None:
    bad = (rows.isnan() | (rows == -torch.inf)).any(1)
    if bad.any():
        raise ValueError(
            "scheduler must have finite coefficients; those of diffusers are not at timestep"
            f" {timesteps[int(bad.nonzero()[0])]} with {get_options(scheduler)}. Use"
            " compat='corrected', if the papers define them"
        )
