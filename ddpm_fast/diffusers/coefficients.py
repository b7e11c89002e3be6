"""Coefficients of DDPMScheduler and DDIMScheduler of diffusers, as rows of a step table.

They are computed in the dtype of the noise levels, by the operations of diffusers in their order.
In float32 they equal those of diffusers, where 1 - abar_t / abar_prev has only three correct digits
at the end of a long chain. In float64 they are accurate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.diffusion.noise_levels import NoiseLevels
from ddpm_fast.diffusion.parameterization import epsilon_factors, x0_factors
from ddpm_fast.diffusion.thresholding import Clip, clip_bound
from ddpm_fast.sampling.solvers.table import pack_rows


def noise_levels(
    timesteps: list[int], prediction: str, abar: Tensor, abar_prev: Tensor
) -> NoiseLevels:
    """Return the noise levels of steps, in the dtype of `abar` and by diffusers' operations.

    Args:
        timesteps: Timesteps at which the steps begin.
        prediction: "epsilon", "x0" or "v".
        abar: alphas_cumprod at the timesteps [n].
        abar_prev: alphas_cumprod at the timesteps that the steps lead to [n].
    """
    alpha = abar / abar_prev
    return NoiseLevels(
        timesteps, prediction, abar, 1 - abar, abar_prev, 1 - abar_prev, alpha, 1 - alpha
    )


def ddpm_rows(
    levels: NoiseLevels, noisy: Tensor, clip: Clip, variance: str, corrected: bool
) -> Tensor:
    """Return the rows of DDPMScheduler.step (Eq. 6, 7 and 15, Ho et al. 2020).

    Args:
        levels: Noise levels of n steps.
        noisy: Steps that add noise, bool [n].
        clip: Bound of x0, a `DynamicThreshold` or None.
        variance: variance_type of the scheduler.
        corrected: False: as in diffusers, where the deviation of "fixed_large_log" is the square
            root of a negative logarithm, NaN, and the caller scales the noise of "learned".

    Returns:
        Rows, float64 [n, ROW_WIDTH].
    """
    columns = {
        "Xx0": levels.abar_prev.sqrt() * levels.beta / levels.one_minus_abar,
        "Xx": levels.alpha.sqrt() * levels.one_minus_abar_prev / levels.one_minus_abar,
        **_noise(levels, variance, corrected),
    }
    for name in ("S", "Lmax"):
        if name in columns:
            columns[name] = torch.where(noisy, columns[name], 0)
    return _rows(levels, clip, columns)


def _noise(levels: NoiseLevels, variance: str, corrected: bool) -> dict[str, Tensor]:
    """Return the columns S and Lmax."""
    small, large = levels.posterior_variance.clamp(min=1e-20), levels.beta
    one = torch.ones_like(large)
    if variance == "learned":
        return {"S": one, "Lmax": one} if corrected else {"S": one}
    if variance == "learned_range":
        low, high = small.log(), large.log()
        return {"S": ((low + high) / 4).exp(), "Lmax": (high - low) / 2}
    if variance == "fixed_large":
        return {"S": large.sqrt()}
    if variance == "fixed_large_log":
        return {"S": (large.log() if not corrected else large).sqrt()}
    # diffusers treats any other name as fixed_small.
    return {"S": (0.5 * small.log()).exp() if variance == "fixed_small_log" else small.sqrt()}


def ddim_rows(levels: NoiseLevels, clip: Clip, eta: float, rederive_epsilon: bool) -> Tensor:
    """Return the rows of DDIMScheduler.step (Eq. 12 and 16, Song et al. 2020).

    Args:
        levels: Noise levels of n steps.
        clip: Bound of x0, a `DynamicThreshold` or None.
        eta: Factor of the noise; 0 is deterministic.
        rederive_epsilon: use_clipped_model_output of diffusers: compute epsilon from the clipped
            x0.

    Returns:
        Rows, float64 [n, ROW_WIDTH].
    """
    sigma = eta * levels.posterior_variance.sqrt()
    direction = (1 - levels.abar_prev - sigma.square()).sqrt().double()
    kind = "x0" if rederive_epsilon else levels.prediction
    x_coef, other = epsilon_factors(kind, levels.abar, levels.one_minus_abar, torch.float64)
    none = torch.zeros_like(direction)
    x0_coef, out_coef = (other, none) if rederive_epsilon else (none, other)
    columns = {
        "Xx": direction * x_coef,
        "Xx0": levels.abar_prev.sqrt().double() + direction * x0_coef,
        "Xo": direction * out_coef,
        "S": sigma,
    }
    return _rows(levels, clip, columns)


def _rows(levels: NoiseLevels, clip: Clip, columns: dict[str, Tensor]) -> Tensor:
    """Return rows with the given columns and those of x0.

    If abar is 0, the x0 of an epsilon is infinite as in diffusers, with the sign of x - epsilon,
    which clipping preserves.
    """
    P, Q = x0_factors(levels.prediction, levels.abar, levels.one_minus_abar, torch.float64)
    ratio = torch.where(P != 0, Q / P, 0)
    if levels.prediction == "epsilon":
        ratio = -levels.one_minus_abar.sqrt().double()
    one = torch.ones_like(P)
    common = {"G0": one, "Cin": one, "P": P, "Q": Q, "ratio": ratio, "clip": clip_bound(clip) * one}
    return pack_rows(common | columns)
