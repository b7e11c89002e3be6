"""Noise schedules: betas and what follows from them, in float64."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.utils import checks
from ddpm_fast.utils.immutable import ImmutableTables

Values = Sequence[float] | np.ndarray | Tensor

# sqrt(alphas_cumprod[-1]) above which a schedule warns: a hundredth of the variance of x_T is x_0.
MAX_TERMINAL_SIGNAL = 0.1


class ScheduleWarning(UserWarning):
    """A schedule works, but its x_T is far from N(0, I), where sampling starts."""


class _Table:
    """Attribute that gives a fresh copy of a float64 CPU table."""

    def __init__(self, doc: str) -> None:
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, holder: ImmutableTables | None, owner: type | None = None) -> Tensor:
        if holder is None:
            return self  # type: ignore[return-value]
        return holder._tables[self.name].clone()


class NoiseSchedule(ImmutableTables):
    """The forward process q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I).

    Made by the classmethods: linear, scaled_linear, cosine, sigmoid, sigmoid_cumprod, power,
    sine_wave, from_betas, from_alphas, from_alphas_cumprod. Index t of every table is step t+1 of
    the papers. Betas lie in (0, 1]; only the last may be 1 (an earlier 1 leaves nothing of x_0 for
    the steps after it), and then alphas_cumprod ends at 0: zero terminal SNR.

    Every table is a float64 CPU tensor [T]; an attribute gives a fresh copy, so that writing to it
    changes nothing here. Schedules are immutable, compare and hash by their tables (the name is a
    label), and can be pickled and copied.

    A schedule that leaves more than a tenth of x_0's amplitude in x_T works, with a
    ScheduleWarning that gives the number: its chain does not end at N(0, I), where samplers start.
    """

    # Pickles name the class as users import it, so that a file can move.
    __module__ = "ddpm_fast"

    T: int
    num_timesteps: int
    zero_terminal_snr: bool  # alphas_cumprod ends at 0
    name: str
    betas = _Table("Variances of the forward steps, in (0, 1].")
    alphas = _Table("1 - betas.")
    alphas_cumprod = _Table("Products of the alphas up to t (Eq. 4, Ho et al. 2020).")
    alphas_cumprod_prev = _Table("alphas_cumprod one step earlier, 1 at index 0.")
    one_minus_alphas_cumprod = _Table("1 - alphas_cumprod, exact where that would cancel.")
    sqrt_alphas_cumprod = _Table("Factor of x_0 in x_t (Eq. 4, Ho et al. 2020).")
    sqrt_one_minus_alphas_cumprod = _Table("Factor of the noise in x_t (Eq. 4).")
    sigmas = _Table("sigma(t) = sqrt(1/abar_t - 1) of the variance-exploding form; inf at abar 0.")
    snr = _Table("Signal-to-noise ratio alphas_cumprod / (1 - alphas_cumprod).")
    posterior_variance = _Table("Variance of q(x_{t-1} | x_t, x_0), 0 at index 0 (Eq. 7).")
    posterior_log_variance = _Table("Its natural logarithm, of no less than 1e-20 (index 0).")
    posterior_mean_coef1 = _Table("Factor of x_0 in the mean of q(x_{t-1} | x_t, x_0) (Eq. 7).")
    posterior_mean_coef2 = _Table("Factor of x_t in that mean (Eq. 7).")

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
        self._freeze(tables, content, **lengths, zero_terminal_snr=ends_at_0, name=name)

    @classmethod
    def linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Self:
        """Betas evenly spaced from beta_start to beta_end (Section 4, Ho et al. 2020).

        T >= 1, 0 < beta_start <= beta_end <= 1 (OpenAI's linear multiplies both by 1000/T); falling
        betas go through from_betas. Raises TypeError, ValueError for other arguments.
        """
        ramp, low, high = _ramp(T, beta_start, beta_end)
        return cls._from_steps(_between(low, high, ramp), name="linear")

    @classmethod
    def scaled_linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Self:
        """Betas whose square roots are evenly spaced (diffusers' scaled_linear, ddim's quad).

        Arguments and errors are those of linear. Latent models use 0.00085..0.012.
        """
        ramp, low, high = _ramp(T, beta_start, beta_end)
        roots = _between(math.sqrt(low), math.sqrt(high), ramp)
        return cls._from_steps(roots.square(), name="scaled_linear")

    @classmethod
    def power(
        cls, exponent: float, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> Self:
        """beta_t = beta_start + (beta_end - beta_start) (t/(T-1))^exponent.

        exponent > 0; the other arguments and the errors are those of linear.
        """
        exponent = checks.real("exponent", exponent, 0, math.inf, "()")
        ramp, low, high = _ramp(T, beta_start, beta_end)
        return cls._from_steps(_between(low, high, ramp**exponent), name=f"power({exponent:g})")

    @classmethod
    def sine_wave(
        cls, cycles: float = 2.5, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> Self:
        """beta_t = beta_start + (beta_end - beta_start) sin^2(pi cycles t/(T-1)).

        cycles > 0; the other arguments and the errors are those of linear.
        """
        cycles = checks.real("cycles", cycles, 0, math.inf, "()")
        ramp, low, high = _ramp(T, beta_start, beta_end)
        wave = torch.sin(math.pi * cycles * ramp).square()
        return cls._from_steps(_between(low, high, wave), name=f"sine_wave({cycles:g})")

    @classmethod
    def sigmoid(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Self:
        """Betas on a sigmoid over [-6, 6] (diffusers' and ddim's sigmoid).

        Its alphas_cumprod form is sigmoid_cumprod. Arguments and errors are those of linear.
        """
        ramp, low, high = _ramp(T, beta_start, beta_end)
        betas = _between(low, high, torch.sigmoid(12 * ramp - 6))
        return cls._from_steps(betas, name="sigmoid")

    @classmethod
    def cosine(cls, T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> Self:
        """alphas_cumprod along cos^2((u + s)/(1 + s) pi/2), u in [0, 1] (Nichol & Dhariwal 2021).

        T >= 1, s >= 0, 0 < max_beta <= 1 (caps the betas); errors are those of linear.
        """
        s = checks.real("s", s, 0, math.inf, "[)")
        u = _unit(checks.integer("T", T, 1) + 1)
        curve = torch.cos((u + s) / (1 + s) * (math.pi / 2)).square()
        return cls._from_steps(_capped(curve, max_beta), name="cosine")

    @classmethod
    def sigmoid_cumprod(
        cls, T: int = 1000, start: float = -3, end: float = 3, tau: float = 1
    ) -> Self:
        """alphas_cumprod along a falling sigmoid of [start, end]/tau (Jabri et al. 2022).

        lucidrains' sigmoid: scaled to run from 1 to 0, betas above 0.999 lowered to it.
        T >= 1, start < end, tau > 0; errors are those of linear.
        """
        start = checks.real("start", start, -math.inf, math.inf, "()")
        end = checks.real("end", end, start, math.inf, "()")
        tau = checks.real("tau", tau, 0, math.inf, "()")
        u = _unit(checks.integer("T", T, 1) + 1)
        fall = torch.sigmoid(-(start + (end - start) * u) / tau)
        curve = (fall - fall[-1]) / (fall[0] - fall[-1])
        return cls._from_steps(_capped(curve, 0.999), name="sigmoid_cumprod")

    @classmethod
    def from_betas(cls, betas: Values, name: str = "betas") -> Self:
        """Schedule from given betas [T]: a list, NumPy array or tensor, each in (0, 1].

        Only the last may be 1. The values are taken in float64.

        Raises TypeError for what is no sequence of real numbers; ValueError for another shape, an
        empty sequence, NaN, infinity, or a value out of range.
        """
        return cls._from_steps(_vector("betas", betas), name=name)

    @classmethod
    def from_alphas(cls, alphas: Values, name: str = "alphas") -> Self:
        """Schedule from given alphas = 1 - betas [T], each in [0, 1); only the last may be 0.

        Input types and errors are those of from_betas.
        """
        values = _vector("alphas", alphas)
        _check("alphas", values, (values >= 0) & (values < 1), "in [0, 1)")
        _check("alphas", values[:-1], values[:-1] > 0, "above 0 but for the last")
        return cls._from_steps(1 - values, values, name=name)

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Values, name: str = "alphas_cumprod") -> Self:
        """Schedule from given alphas_cumprod [T], strictly falling in [0, 1); kept as given.

        Only the last may be 0. Input types and errors are those of from_betas.
        """
        abar = _vector("alphas_cumprod", alphas_cumprod)
        _check("alphas_cumprod", abar, (abar >= 0) & (abar < 1), "in [0, 1)")
        prev = torch.cat([abar.new_ones(1), abar[:-1]])
        _check("alphas_cumprod", abar, abar < prev, "strictly falling")
        schedule = cls((prev - abar) / prev, abar / prev, abar, 1 - abar, name)
        _warn_if_far_from_normal(schedule, stacklevel=3)
        return schedule

    @classmethod
    def _from_steps(cls, betas: Tensor, alphas: Tensor | None = None, *, name: str) -> Self:
        if alphas is None:
            _check("betas", betas, (betas > 0) & (betas <= 1), "in (0, 1]")
            _check("betas", betas[:-1], betas[:-1] < 1, "below 1 but for the last")
            alphas = 1 - betas
        abar = alphas.cumprod(0)
        normal = (abar >= torch.finfo(torch.float64).tiny) | (alphas == 0)
        _check("alphas_cumprod", abar, normal, "in float64's range (T or betas too large)")
        prev = torch.cat([abar.new_ones(1), abar[:-1]])
        # 1 - abar cancels where abar is near 1; the sum of what each step added does not.
        one_minus_abar = torch.where(abar < 0.5, 1 - abar, (betas * prev).cumsum(0))
        schedule = cls(betas, alphas, abar, one_minus_abar, name)
        _warn_if_far_from_normal(schedule, stacklevel=4)
        return schedule

    def rescale_zero_terminal_snr(self) -> Self:
        """Schedule scaled to alphas_cumprod[-1] = 0 (Algorithm 1, Lin et al. 2023).

        sqrt(alphas_cumprod) is shifted to end at 0 and scaled to keep its first value. The new
        schedule needs v or x0 prediction: at x_T an epsilon says nothing about x_0.

        Raises ValueError for T = 1, where the first value is the last.
        """
        if self.T == 1:
            raise ValueError("rescale_zero_terminal_snr needs T >= 2; got a schedule of T = 1")
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
        """Columns [T, 3] of beta_t, abar_t and 1 - abar_t, otherwise as q_sample_coefs."""
        return self._on("levels", device, dtype)

    def q_sample_coefs(
        self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Coefficients [T, 2] of x_0 and of the noise in x_t: sqrt(abar_t), sqrt(1 - abar_t).

        Eq. 4, Ho et al. 2020. dtype is float32 or float64, rounded once from float64. The tensor is
        shared by all callers and must not be written to; ask for it once before a CUDA graph is
        captured.

        Raises ValueError for another dtype and for a device that is none.
        """
        return self._on("q_sample", device, dtype)

    def q_posterior_coefs(
        self,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        log_variance: Literal["clamp", "repeat"] = "clamp",
    ) -> Tensor:
        """Coefficients [T, 4] of q(x_{t-1} | x_t, x_0), otherwise as q_sample_coefs.

        Columns: factor of x_0 and of x_t in the mean, variance, log-variance (Eq. 6-7, Ho et al.
        2020). log_variance: "clamp" takes the logarithm of no less than 1e-20, "repeat" puts the
        value of index 1 at index 0 (OpenAI's convention).

        Raises ValueError for another log_variance, and for "repeat" with T = 1.
        """
        if log_variance not in ("clamp", "repeat"):
            raise ValueError(f"log_variance must be 'clamp' or 'repeat'; got {log_variance!r}")
        if log_variance == "repeat" and self.T == 1:
            raise ValueError("log_variance 'repeat' needs T >= 2; got a schedule of T = 1")
        return self._on(f"q_posterior_{log_variance}", device, dtype)


def _unit(points: int) -> Tensor:
    return torch.linspace(0, 1, points, dtype=torch.float64, device="cpu")


def _ramp(T: int, beta_start: float, beta_end: float) -> tuple[Tensor, float, float]:
    """t/(T-1) of each step, and the two ends, checked."""
    beta_end = checks.real("beta_end", beta_end, 0, 1, "(]")
    beta_start = checks.real("beta_start", beta_start, 0, beta_end, "(]")
    return _unit(checks.integer("T", T, 1)), beta_start, beta_end


def _between(low: float, high: float, share: Tensor) -> Tensor:
    return low * (1 - share) + high * share


def _capped(curve: Tensor, max_beta: float) -> Tensor:
    """Betas of an alphas_cumprod curve [T + 1] that starts before the first step."""
    return (1 - curve[1:] / curve[:-1]).clamp(max=checks.real("max_beta", max_beta, 0, 1, "(]"))


def _vector(name: str, values: object) -> Tensor:
    """Float64 CPU copy of a sequence of finite real numbers [T], T >= 1."""
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
    _check(name, vector, vector.isfinite(), "finite")
    return vector


def _check(name: str, values: Tensor, good: Tensor, accepted: str) -> None:
    if not good.all():
        index = int((~good).nonzero()[0])
        raise ValueError(f"{name} must be {accepted}; got {float(values[index])} at index {index}")


def _warn_if_far_from_normal(schedule: NoiseSchedule, stacklevel: int) -> None:
    signal = float(schedule.sqrt_alphas_cumprod[-1])
    if signal > MAX_TERMINAL_SIGNAL:
        kl = -math.log(float(schedule.one_minus_alphas_cumprod[-1])) / 2
        warnings.warn(
            f"schedule {schedule.name}: x_T keeps {signal:.3g} of x_0's amplitude, {kl:.3g} nats "
            "per dimension from N(0, I) at |x_0| = 1; chains that start from N(0, I) will be off. "
            "Take a larger T or larger betas, or train with rescale_zero_terminal_snr()",
            ScheduleWarning,
            stacklevel=stacklevel,
        )
