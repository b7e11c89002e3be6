"""Noise schedules: betas and the tables derived from them, in float64."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.diffusion.schedule_values import (
    TableAttribute,
    beta_ramp,
    capped_betas,
    check_values,
    float64_vector,
    interpolate,
    unit_interval,
)
from ddpm_fast.utils import checks
from ddpm_fast.utils.immutable import ImmutableTables

Values = Sequence[float] | np.ndarray | Tensor

# Largest sqrt(alphas_cumprod[-1]) without a warning: 1% of the variance of x_T is that of x_0.
MAX_TERMINAL_SIGNAL = 0.1


class ScheduleWarning(UserWarning):
    """Warning that x_T of a schedule is far from N(0, I), where sampling starts."""


class NoiseSchedule(ImmutableTables):
    """Forward process q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I).

    Made by the classmethods `linear`, `scaled_linear`, `cosine`, `sigmoid`, `sigmoid_cumprod`,
    `power`, `sine_wave`, `from_betas`, `from_alphas` and `from_alphas_cumprod`. Schedules are
    immutable, compare and hash by their tables (not the name), and can be pickled and copied. Index
    t of every table is step t + 1 of the papers.

    Betas are in (0, 1]. Only the last may be 1, because a beta of 1 removes all of x_0;
    alphas_cumprod then ends at 0 (zero terminal SNR). A schedule whose x_T keeps more than a tenth
    of the amplitude of x_0 raises a `ScheduleWarning`: its chain does not end at N(0, I), where
    samplers start.

    Every table is a float64 CPU tensor [T]; an attribute returns a new copy.

    Args:
        betas: Variances of the forward steps [T].
        alphas: 1 - betas.
        abar: alphas_cumprod.
        one_minus_abar: 1 - alphas_cumprod, without cancellation.
        name: Label of the schedule in `repr`.

    Attributes:
        T: Number of timesteps.
        num_timesteps: The same, with OpenAI's name.
        zero_terminal_snr: True if alphas_cumprod ends at 0.
        name: Label of the schedule.

    Raises:
        TypeError: In the classmethods: an argument has another type.
        ValueError: In the classmethods: an argument is out of range.
    """

    # Pickles refer to the public name, not to this file.
    __module__ = "ddpm_fast"

    T: int
    num_timesteps: int
    zero_terminal_snr: bool  # alphas_cumprod ends at 0
    name: str
    betas = TableAttribute("Variances of the forward steps, in (0, 1].")
    alphas = TableAttribute("1 - betas.")
    alphas_cumprod = TableAttribute("Products of the alphas up to t (Eq. 4, Ho et al. 2020).")
    alphas_cumprod_prev = TableAttribute("alphas_cumprod one step earlier, 1 at index 0.")
    one_minus_alphas_cumprod = TableAttribute("1 - alphas_cumprod, exact where that would cancel.")
    sqrt_alphas_cumprod = TableAttribute("Factor of x_0 in x_t (Eq. 4, Ho et al. 2020).")
    sqrt_one_minus_alphas_cumprod = TableAttribute("Factor of the noise in x_t (Eq. 4).")
    sigmas = TableAttribute(
        "sigma(t) = sqrt(1/abar_t - 1) of the variance-exploding form; inf at abar 0."
    )
    snr = TableAttribute("Signal-to-noise ratio alphas_cumprod / (1 - alphas_cumprod).")
    posterior_variance = TableAttribute("Variance of q(x_{t-1} | x_t, x_0), 0 at index 0 (Eq. 7).")
    posterior_log_variance = TableAttribute(
        "Its natural logarithm, of no less than 1e-20 (index 0)."
    )
    posterior_mean_coef1 = TableAttribute(
        "Factor of x_0 in the mean of q(x_{t-1} | x_t, x_0) (Eq. 7)."
    )
    posterior_mean_coef2 = TableAttribute("Factor of x_t in that mean (Eq. 7).")

    def __init__(
        self, betas: Tensor, alphas: Tensor, abar: Tensor, one_minus_abar: Tensor, name: str
    ) -> None:
        abar_prev = torch.cat([abar.new_ones(1), abar[:-1]])
        one_minus_abar_prev = torch.cat([one_minus_abar.new_zeros(1), one_minus_abar[:-1]])
        variance = one_minus_abar_prev / one_minus_abar * betas
        log_variance = variance.clamp(min=1e-20).log()
        posterior = [
            abar_prev.sqrt() * betas / one_minus_abar,
            alphas.sqrt() * one_minus_abar_prev / one_minus_abar,
            variance,
        ]
        repeated = torch.cat([log_variance[1:2], log_variance[1:]])
        tables = {
            "betas": betas,
            "alphas": alphas,
            "alphas_cumprod": abar,
            "alphas_cumprod_prev": abar_prev,
            "one_minus_alphas_cumprod": one_minus_abar,
            "sqrt_alphas_cumprod": abar.sqrt(),
            "sqrt_one_minus_alphas_cumprod": one_minus_abar.sqrt(),
            "sigmas": (one_minus_abar / abar).sqrt(),
            "snr": abar / one_minus_abar,
            "posterior_variance": variance,
            "posterior_log_variance": log_variance,
            "posterior_mean_coef1": posterior[0],
            "posterior_mean_coef2": posterior[1],
            "levels": torch.stack([betas, abar, one_minus_abar], dim=1),
            "q_sample": torch.stack([abar.sqrt(), one_minus_abar.sqrt()], dim=1),
            "q_posterior_clamp": torch.stack([*posterior, log_variance], dim=1),
        }
        if len(betas) > 1:
            tables["q_posterior_repeat"] = torch.stack([*posterior, repeated], dim=1)
        content = ("betas", "alphas", "alphas_cumprod", "one_minus_alphas_cumprod")
        lengths = {"T": len(betas), "num_timesteps": len(betas)}
        ends_at_0 = bool(abar[-1] == 0)
        self._set_tables(tables, content, **lengths, zero_terminal_snr=ends_at_0, name=name)

    @classmethod
    def linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Self:
        """Return a schedule of evenly spaced betas (Section 4, Ho et al. 2020).

        Args:
            T: Number of timesteps, at least 1.
            beta_start: First beta, 0 < beta_start <= beta_end.
            beta_end: Last beta, at most 1. OpenAI's linear schedule multiplies both by 1000/T.
        """
        ramp, low, high = beta_ramp(T, beta_start, beta_end)
        return cls._from_steps(interpolate(low, high, ramp), name="linear")

    @classmethod
    def scaled_linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Self:
        """Return a schedule of betas with evenly spaced square roots (diffusers' scaled_linear).

        Args:
            T: Number of timesteps, at least 1.
            beta_start: First beta; 0.00085 for latent models.
            beta_end: Last beta; 0.012 for latent models.
        """
        ramp, low, high = beta_ramp(T, beta_start, beta_end)
        roots = interpolate(math.sqrt(low), math.sqrt(high), ramp)
        return cls._from_steps(roots.square(), name="scaled_linear")

    @classmethod
    def power(
        cls, exponent: float, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> Self:
        """Return beta_t = beta_start + (beta_end - beta_start) (t/(T-1))^exponent.

        Args:
            exponent: Exponent, above 0.
            T: Number of timesteps, at least 1.
            beta_start: First beta, 0 < beta_start <= beta_end.
            beta_end: Last beta, at most 1.
        """
        exponent = checks.real("exponent", exponent, 0, math.inf, "()")
        ramp, low, high = beta_ramp(T, beta_start, beta_end)
        return cls._from_steps(interpolate(low, high, ramp**exponent), name=f"power({exponent:g})")

    @classmethod
    def sine_wave(
        cls, cycles: float = 2.5, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> Self:
        """Return beta_t = beta_start + (beta_end - beta_start) sin^2(pi cycles t/(T-1)).

        Args:
            cycles: Number of cycles, above 0.
            T: Number of timesteps, at least 1.
            beta_start: Lowest beta, 0 < beta_start <= beta_end.
            beta_end: Highest beta, at most 1.
        """
        cycles = checks.real("cycles", cycles, 0, math.inf, "()")
        ramp, low, high = beta_ramp(T, beta_start, beta_end)
        wave = torch.sin(math.pi * cycles * ramp).square()
        return cls._from_steps(interpolate(low, high, wave), name=f"sine_wave({cycles:g})")

    @classmethod
    def sigmoid(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Self:
        """Return a schedule of betas on a sigmoid over [-6, 6] (diffusers' and ddim's sigmoid).

        Args:
            T: Number of timesteps, at least 1.
            beta_start: Lowest beta, 0 < beta_start <= beta_end.
            beta_end: Highest beta, at most 1.
        """
        ramp, low, high = beta_ramp(T, beta_start, beta_end)
        betas = interpolate(low, high, torch.sigmoid(12 * ramp - 6))
        return cls._from_steps(betas, name="sigmoid")

    @classmethod
    def cosine(cls, T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> Self:
        """Return the cosine schedule of Nichol & Dhariwal 2021.

        alphas_cumprod follows cos^2((u + s)/(1 + s) pi/2) for u in [0, 1].

        Args:
            T: Number of timesteps, at least 1.
            s: Offset, at least 0.
            max_beta: Largest beta, in (0, 1].
        """
        s = checks.real("s", s, 0, math.inf, "[)")
        u = unit_interval(checks.integer("T", T, 1) + 1)
        curve = torch.cos((u + s) / (1 + s) * (math.pi / 2)).square()
        return cls._from_steps(capped_betas(curve, max_beta), name="cosine")

    @classmethod
    def sigmoid_cumprod(
        cls, T: int = 1000, start: float = -3, end: float = 3, tau: float = 1
    ) -> Self:
        """Return alphas_cumprod on a falling sigmoid (Jabri et al. 2022; lucidrains' sigmoid).

        The curve is scaled to run from 1 to 0, and betas are clamped to 0.999.

        Args:
            T: Number of timesteps, at least 1.
            start: Argument of the sigmoid at t = 0, times tau.
            end: Argument at the end, times tau, above `start`.
            tau: Temperature, above 0.
        """
        start = checks.real("start", start, -math.inf, math.inf, "()")
        end = checks.real("end", end, start, math.inf, "()")
        tau = checks.real("tau", tau, 0, math.inf, "()")
        u = unit_interval(checks.integer("T", T, 1) + 1)
        fall = torch.sigmoid(-(start + (end - start) * u) / tau)
        curve = (fall - fall[-1]) / (fall[0] - fall[-1])
        return cls._from_steps(capped_betas(curve, 0.999), name="sigmoid_cumprod")

    @classmethod
    def from_betas(cls, betas: Values, name: str = "betas") -> Self:
        """Return the schedule of given betas.

        Args:
            betas: Sequence, NumPy array or tensor [T] of values in (0, 1]; only the last may be 1.
                Converted to float64.
            name: Label of the schedule.

        Raises:
            TypeError: `betas` is no sequence of real numbers.
            ValueError: It has another shape, is empty, or a value is not finite or out of range.
        """
        return cls._from_steps(float64_vector("betas", betas), name=name)

    @classmethod
    def from_alphas(cls, alphas: Values, name: str = "alphas") -> Self:
        """Return the schedule of given alphas = 1 - betas.

        Args:
            alphas: As `betas` of `from_betas`, in [0, 1); only the last may be 0.
            name: Label of the schedule.

        Raises:
            TypeError: As `from_betas`.
            ValueError: As `from_betas`.
        """
        values = float64_vector("alphas", alphas)
        check_values("alphas", values, (values >= 0) & (values < 1), "in [0, 1)")
        check_values("alphas", values[:-1], values[:-1] > 0, "above 0 except for the last")
        return cls._from_steps(1 - values, values, name=name)

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Values, name: str = "alphas_cumprod") -> Self:
        """Return the schedule of given alphas_cumprod, which are kept exactly.

        Args:
            alphas_cumprod: As `betas` of `from_betas`, strictly falling in [0, 1); only the last
                may be 0.
            name: Label of the schedule.

        Raises:
            TypeError: As `from_betas`.
            ValueError: As `from_betas`.
        """
        abar = float64_vector("alphas_cumprod", alphas_cumprod)
        check_values("alphas_cumprod", abar, (abar >= 0) & (abar < 1), "in [0, 1)")
        prev = torch.cat([abar.new_ones(1), abar[:-1]])
        check_values("alphas_cumprod", abar, abar < prev, "strictly falling")
        schedule = cls((prev - abar) / prev, abar / prev, abar, 1 - abar, name)
        _warn_if_far_from_normal(schedule, stacklevel=3)
        return schedule

    @classmethod
    def _from_steps(cls, betas: Tensor, alphas: Tensor | None = None, *, name: str) -> Self:
        if alphas is None:
            check_values("betas", betas, (betas > 0) & (betas <= 1), "in (0, 1]")
            check_values("betas", betas[:-1], betas[:-1] < 1, "below 1 except for the last")
            alphas = 1 - betas
        abar = alphas.cumprod(0)
        normal = (abar >= torch.finfo(torch.float64).tiny) | (alphas == 0)
        check_values("alphas_cumprod", abar, normal, "in the range of float64 (smaller T or betas)")
        prev = torch.cat([abar.new_ones(1), abar[:-1]])
        # 1 - abar cancels for abar near 1; the sum of the variances of the steps does not.
        one_minus_abar = torch.where(abar < 0.5, 1 - abar, (betas * prev).cumsum(0))
        schedule = cls(betas, alphas, abar, one_minus_abar, name)
        _warn_if_far_from_normal(schedule, stacklevel=4)
        return schedule

    def rescale_zero_terminal_snr(self) -> Self:
        """Return the schedule rescaled to alphas_cumprod[-1] = 0 (Algorithm 1, Lin et al. 2023).

        sqrt(alphas_cumprod) is shifted to end at 0 and scaled to keep its first value. The model
        must predict v or x0: at x_T an epsilon does not determine x_0.

        Raises:
            ValueError: T is 1.
        """
        if self.T == 1:
            raise ValueError("T must be at least 2 for rescale_zero_terminal_snr; got 1")
        root = self._tables["alphas_cumprod"].sqrt()
        scaled = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        return self.from_alphas_cumprod(scaled.square(), f"{self.name}_zero_snr")

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        base = (self.betas, self.alphas, self.alphas_cumprod, self.one_minus_alphas_cumprod)
        return type(self), (*base, self.name)

    def __repr__(self) -> str:
        end = float(self.alphas_cumprod[-1])
        return f"NoiseSchedule({self.name}, T={self.T}, alphas_cumprod[-1]={end:.3g})"

    def levels(
        self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Return beta_t, abar_t and 1 - abar_t, [T, 3]; otherwise as `q_sample_coefs`.

        Args:
            device: Device of the table.
            dtype: float32 or float64.
        """
        return self._on("levels", device, dtype)

    def q_sample_coefs(
        self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Return sqrt(abar_t) and sqrt(1 - abar_t), [T, 2] (Eq. 4, Ho et al. 2020).

        The tensor is cached and shared: do not write to it. Call this once before a CUDA graph is
        captured.

        Args:
            device: Device of the table.
            dtype: float32 or float64; rounded once, from float64.

        Raises:
            ValueError: `dtype` or `device` is not accepted.
        """
        return self._on("q_sample", device, dtype)

    def q_posterior_coefs(
        self,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        log_variance: Literal["clamp", "repeat"] = "clamp",
    ) -> Tensor:
        """Return the coefficients of q(x_{t-1} | x_t, x_0), [T, 4] (Eq. 6-7, Ho et al. 2020).

        Columns: factor of x_0 and of x_t in the mean, variance, log-variance. Otherwise as
        `q_sample_coefs`.

        Args:
            device: Device of the table.
            dtype: float32 or float64.
            log_variance: Logarithm of the variance at index 0, where it is 0. "clamp": that of
                1e-20. "repeat": that at index 1 (OpenAI's convention).

        Raises:
            ValueError: An argument is not accepted, or "repeat" with T = 1.
        """
        if log_variance not in ("clamp", "repeat"):
            raise ValueError(f"log_variance must be 'clamp' or 'repeat'; got {log_variance!r}")
        if log_variance == "repeat" and self.T == 1:
            raise ValueError("log_variance must be 'clamp' for T = 1; got 'repeat'")
        return self._on(f"q_posterior_{log_variance}", device, dtype)


def _warn_if_far_from_normal(schedule: NoiseSchedule, stacklevel: int) -> None:
    signal = float(schedule.sqrt_alphas_cumprod[-1])
    if signal > MAX_TERMINAL_SIGNAL:
        kl = -math.log(float(schedule.one_minus_alphas_cumprod[-1])) / 2
        warnings.warn(
            f"schedule {schedule.name}: x_T keeps {signal:.3g} of x_0's amplitude, {kl:.3g} nats "
            "per dimension from N(0, I) at |x_0| = 1; chains that start from N(0, I) are biased. "
            "Use a larger T or larger betas, or train with rescale_zero_terminal_snr()",
            ScheduleWarning,
            stacklevel=stacklevel,
        )
