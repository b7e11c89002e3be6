"""Curves, checked values and table attributes of schedules, in float64 on the CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.utils import checks
from ddpm_fast.utils.immutable import ImmutableTables


class TableAttribute:
    """Attribute that returns a new copy of a float64 CPU table."""

    def __init__(self, doc: str) -> None:
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, holder: ImmutableTables | None, owner: type | None = None) -> Tensor:
        if holder is None:
            return self  # type: ignore[return-value]
        return holder._tables[self.name].clone()


def unit_interval(points: int) -> Tensor:
    """Return evenly spaced points in [0, 1], both ends included."""
    return torch.linspace(0, 1, points, dtype=torch.float64, device="cpu")


def beta_ramp(T: int, beta_start: float, beta_end: float) -> tuple[Tensor, float, float]:
    """Return t/(T-1) of each step, and both ends, checked."""
    beta_end = checks.real("beta_end", beta_end, 0, 1, "(]")
    beta_start = checks.real("beta_start", beta_start, 0, beta_end, "(]")
    return unit_interval(checks.integer("T", T, 1)), beta_start, beta_end


def interpolate(low: float, high: float, share: Tensor) -> Tensor:
    """Interpolate linearly."""
    return low * (1 - share) + high * share


def capped_betas(curve: Tensor, max_beta: float) -> Tensor:
    """Return the betas of an alphas_cumprod curve [T + 1] that starts before the first step."""
    return (1 - curve[1:] / curve[:-1]).clamp(max=checks.real("max_beta", max_beta, 0, 1, "(]"))


def laplace_curve(T: int) -> Tensor:
    """Return the laplace curve of diffusers [T + 1], whose log-SNR has a Laplace distribution.

    It is the square root of SNR / (1 + SNR), and starts below 1 (Hang et al. 2024, as in
    betas_for_alpha_bar).
    """
    from_middle = 0.5 - unit_interval(T + 1)
    sign = torch.where(from_middle >= 0, 1.0, -1.0)
    log_snr = -0.5 * sign * torch.log(1 - 2 * from_middle.abs() + 1e-6)
    return torch.sigmoid(log_snr).sqrt()


def float64_vector(name: str, values: object) -> Tensor:
    """Return a float64 CPU copy of a sequence of finite real numbers [T], T >= 1."""
    try:
        vector = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
    except (TypeError, ValueError):
        vector = torch.empty(0, dtype=torch.bool)
    if vector.is_complex() or vector.dtype == torch.bool:
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name} must be a 1-D sequence of real numbers; got {got}")
    vector = vector.detach().to("cpu", torch.float64)
    if vector.ndim != 1 or len(vector) == 0:
        raise ValueError(f"{name} must have shape [T] with T >= 1; got {list(vector.shape)}")
    check_values(name, vector, vector.isfinite(), "finite")
    return vector


def check_values(name: str, values: Tensor, good: Tensor, accepted: str) -> None:
    """Raise ValueError for the first value that is not good."""
    if not good.all():
        index = int((~good).nonzero()[0])
        raise ValueError(f"{name} must be {accepted}; got {float(values[index])} at index {index}")
