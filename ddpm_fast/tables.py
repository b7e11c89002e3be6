"""Step tables: a sampler written as one row of coefficients per step, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal, Self

import torch
from torch import Tensor

from ddpm_fast.row import ROW_FIELDS, ROW_WIDTH, RowFlag, column, flags_for
from ddpm_fast.schedules import Frozen, NoiseSchedule
from ddpm_fast.spacing import check_int, check_real, timesteps

Prediction = Literal["epsilon", "x0", "v", "score"]
PREDICTIONS = ("epsilon", "x0", "v", "score")


class StepTable(Frozen):
    """The rows of a reverse chain and the timesteps fed to the network, first step first.

    rows: float64 [steps, ROW_WIDTH], laid out as the row module says. timesteps: int64 [steps],
    0-based. prediction: what the network returns, "epsilon", "x0", "v" (Salimans & Ho 2022) or
    "score" (the gradient of log q(x_t), -epsilon / sqrt(1 - alphas_cumprod)). start: None for a
    chain from x_T, 1..T for one from x_start, "random" for one whose first row each sample draws.
    flags: what an update has to be specialised on. uses_noise: some row has S != 0. draws_always:
    a generator is drawn from at t = 0 too, as diffusers' DDIM with eta > 0 does.

    Made by ddpm and ddim, or from rows of one's own. Tables are immutable (rows gives a copy),
    compare and hash by content (the name is a label), and can be pickled and copied.

    Raises TypeError, ValueError for rows that flags_for refuses or that leave float32's range, for
    timesteps that are not one integer per row, and for an unknown prediction or start.
    """

    steps: int
    prediction: str
    start: int | Literal["random"] | None
    name: str
    flags: RowFlag
    uses_noise: bool
    draws_always: bool

    def __init__(
        self,
        rows: Tensor,
        timesteps: Sequence[int] | Tensor,
        prediction: Prediction = "epsilon",
        start: int | Literal["random"] | None = None,
        name: str = "custom",
        draws_always: bool = False,
    ) -> None:
        flags = flags_for(rows)
        rows = rows.detach().to("cpu", torch.float64)
        beyond = (rows.abs() > torch.finfo(torch.float32).max) & rows.isfinite()
        if beyond.any():
            row, index = beyond.nonzero()[0].tolist()
            raise ValueError(
                f"rows: {ROW_FIELDS[index]} is {float(rows[row, index]):.3g} in row {row}, beyond "
                "float32; where alphas_cumprod is that small, prediction must be 'x0' or 'v'"
            )
        visited = [check_int(f"timesteps[{i}]", t, 0) for i, t in enumerate(timesteps)]
        if len(visited) != len(rows) or not visited:
            raise ValueError(f"timesteps must be one per row, got {len(visited)} for {len(rows)}")
        _check_name("prediction", prediction, PREDICTIONS)
        self._freeze(
            {"rows": rows, "timesteps": torch.tensor(visited, dtype=torch.int64, device="cpu")},
            ("rows", "timesteps", "prediction", "start", "draws_always"),
            steps=len(visited),
            prediction=prediction,
            start=_checked_start(start),
            name=name,
            flags=flags,
            uses_noise=bool(rows[:, column("S")].any()),
            draws_always=bool(draws_always),
        )

    @classmethod
    def ddpm(
        cls,
        schedule: NoiseSchedule,
        steps: int | None = None,
        variance: Literal["posterior", "beta"] = "posterior",
        prediction: Prediction = "epsilon",
        clip: float | None = 1.0,
        spacing: str | Sequence[int] = "linspace",
        start: int | Literal["random"] | None = None,
    ) -> Self:
        """Ancestral sampling (Algorithm 2 with Eq. 6, 7 and 11, Ho et al. 2020).

        x' is the mean of q(x_prev | x_t, x0) plus S times noise, x0 clipped to [-clip, clip] (None:
        not clipped; otherwise above 0). variance: S^2 is the posterior variance of Eq. 7 or beta;
        the last row adds no noise either way. prediction is what the network returns (StepTable).

        steps, spacing: the timesteps kept (spacing.timesteps). The chain's betas are rebuilt to
        lead from each to the next (Nichol & Dhariwal 2021, Section 4); "beta" means those.
        start: 1..T begins at x_start, the timesteps spaced over 0..start-1; "random" gives the
        table of None, of which each sample draws its first row.

        Raises TypeError, ValueError for other arguments, and for epsilon or score prediction on a
        schedule of zero terminal SNR.
        """
        _check_name("variance", variance, ("posterior", "beta"))
        c = _Chain.of(schedule, steps, spacing, start, prediction)
        sigma = (c.beta if variance == "beta" else c.rest_prev / c.rest * c.beta).sqrt()
        sigma[-1] = 0
        rows = c.rows(
            clip,
            Xx0=c.abar_prev.sqrt() * c.beta / c.rest,
            Xx=c.alpha.sqrt() * c.rest_prev / c.rest,
            S=sigma,
        )
        return cls(rows, c.timesteps, prediction, start, f"ddpm({variance})")

    @classmethod
    def ddim(
        cls,
        schedule: NoiseSchedule,
        steps: int | None = None,
        eta: float = 0.0,
        prediction: Prediction = "epsilon",
        clip: float | None = 1.0,
        spacing: str | Sequence[int] = "leading",
        rederive_epsilon: bool = True,
        start: int | Literal["random"] | None = None,
    ) -> Self:
        """DDIM (Eq. 12 with the sigma of Eq. 16, Song et al. 2020).

        eta: 0 is deterministic, 1 has the variance of ddpm's posterior; above 1 as long as
        1 - abar_prev - sigma^2 stays at or above 0. rederive_epsilon: the epsilon of Eq. 12 is
        (x_t - sqrt(abar) x0) / sqrt(1 - abar) with the clipped x0 (OpenAI, lucidrains; diffusers'
        use_clipped_model_output), otherwise the network's own (diffusers' default). The other
        arguments and errors are those of ddpm.
        """
        eta = check_real("eta", eta, 0, inf, "[)")
        if not isinstance(rederive_epsilon, bool):
            raise TypeError(f"rederive_epsilon must be a bool, got {rederive_epsilon!r}")
        c = _Chain.of(schedule, steps, spacing, start, prediction)
        sigma = eta * (c.rest_prev / c.rest * c.beta).sqrt()
        # 1 - abar_prev - sigma^2, with rest - beta written as alpha * rest_prev.
        squared = c.rest_prev / c.rest * (c.alpha * c.rest_prev + (1 - eta**2) * c.beta)
        if (squared < 0).any():
            raise ValueError(f"eta must leave sigma^2 <= 1 - alphas_cumprod_prev, got {eta}")
        direction = squared.sqrt()
        if rederive_epsilon:
            Xx, Xo = direction / c.rest.sqrt(), torch.zeros_like(direction)
            Xx0 = c.abar_prev.sqrt() - Xx * c.abar.sqrt()
        else:
            of_x, of_out = c.epsilon()
            Xx, Xo, Xx0 = direction * of_x, direction * of_out, c.abar_prev.sqrt()
        rows = c.rows(clip, Xx=Xx, Xx0=Xx0, Xo=Xo, S=sigma)
        name = f"ddim(eta={eta:g})"
        return cls(rows, c.timesteps, prediction, start, name, draws_always=True)

    @property
    def rows(self) -> Tensor:
        """Coefficients, float64 [steps, ROW_WIDTH] on the CPU; a fresh copy."""
        return self._tables["rows"].clone()

    @property
    def timesteps(self) -> Tensor:
        """Timesteps fed to the network, int64 [steps] on the CPU; a fresh copy."""
        return self._tables["timesteps"].clone()

    def draws(self, row: int) -> bool:
        """Whether noise is drawn from a generator for a row, 0..steps-1, as diffusers draws it.

        Where t > 0, or in every row where draws_always is set; never for a table without noise.
        Raises TypeError, ValueError for a row that is no integer or out of range.
        """
        row = check_int("row", row, 0, self.steps - 1)
        later = self.draws_always or bool(self._tables["timesteps"][row] > 0)
        return self.uses_noise and later

    def to(
        self, device: str | torch.device, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Rows [steps, ROW_WIDTH] in float32 or float64, and timesteps int64 [steps], on a device.

        Rounded once from float64. Both tensors are shared by all callers and must not be written
        to; ask for them once before a CUDA graph is captured.

        Raises ValueError for another dtype and for a device that is none.
        """
        return self._on("rows", device, dtype), self._on("timesteps", device, torch.int64)

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        labels = (self.prediction, self.start, self.name, self.draws_always)
        return type(self), (self.rows, self.timesteps, *labels)

    def __repr__(self) -> str:
        start = "" if self.start is None else f", start={self.start}"
        return f"StepTable({self.name}, {self.steps} steps, {self.prediction}{start})"


@dataclass(frozen=True)
class _Chain:
    """The kept timesteps of a schedule, each with the next one kept (prev), 1 and 0 after the last.

    Float64 [steps], descending in t: abar and rest = 1 - abar at t and at prev, and alpha and beta
    = 1 - alpha of the step from prev to t.
    """

    timesteps: list[int]
    prediction: str
    abar: Tensor
    rest: Tensor
    abar_prev: Tensor
    rest_prev: Tensor
    alpha: Tensor
    beta: Tensor

    @classmethod
    def of(
        cls,
        schedule: NoiseSchedule,
        steps: int | None,
        spacing: str | Sequence[int],
        start: int | Literal["random"] | None,
        prediction: str,
    ) -> _Chain:
        """Check a solver's arguments and look up its steps in the schedule."""
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(f"schedule must be a NoiseSchedule, got {type(schedule).__name__}")
        _check_name("prediction", prediction, PREDICTIONS)
        all_abar, all_rest = schedule.alphas_cumprod, schedule.one_minus_alphas_cumprod
        if all_abar[-1] == 0 and prediction in ("epsilon", "score"):
            raise ValueError(
                f"prediction must be 'x0' or 'v' for a schedule of zero terminal SNR, where "
                f"alphas_cumprod ends at 0; got {prediction!r}"
            )
        length = _checked_start(start, schedule.T)
        kept = timesteps(length if isinstance(length, int) else schedule.T, steps, spacing)
        abar, rest = all_abar[kept], all_rest[kept]
        abar_prev = torch.cat([abar[1:], abar.new_ones(1)])
        rest_prev = torch.cat([rest[1:], rest.new_zeros(1)])
        # The logarithm of alpha keeps the digits that 1 - abar / abar_prev loses.
        log_abar = torch.where(abar < 0.5, abar.log(), torch.log1p(-rest))
        log_alpha = log_abar - torch.cat([log_abar[1:], log_abar.new_zeros(1)])
        beta = -torch.expm1(log_alpha)
        beta[-1] = rest[-1]
        alpha = log_alpha.exp()
        return cls(kept, prediction, abar, rest, abar_prev, rest_prev, alpha, beta)

    def x0(self) -> tuple[Tensor, Tensor]:
        """P and Q of x0 = P x_t + Q out (Eq. 15, Ho et al. 2020, for epsilon)."""
        signal, noise, none = self.abar.sqrt(), self.rest.sqrt(), torch.zeros_like(self.abar)
        if self.prediction == "epsilon":
            return 1 / signal, -noise / signal
        if self.prediction == "score":
            return 1 / signal, self.rest / signal
        return (none, none + 1) if self.prediction == "x0" else (signal, -noise)

    def epsilon(self) -> tuple[Tensor, Tensor]:
        """Factors of x_t and out in the epsilon that the network's output stands for."""
        signal, noise, none = self.abar.sqrt(), self.rest.sqrt(), torch.zeros_like(self.abar)
        if self.prediction == "epsilon":
            return none, none + 1
        if self.prediction == "score":
            return none, -noise
        return (1 / noise, -signal / noise) if self.prediction == "x0" else (noise, signal)

    def rows(self, clip: float | None, **columns: Tensor) -> Tensor:
        """Rows with the given columns, x0 of the prediction, and G0 = Cin = 1."""
        bound = inf if clip is None else check_real("clip", clip, 0, inf, "()")
        P, Q = self.x0()
        one = torch.ones_like(P)
        columns |= {"G0": one, "P": P, "Q": Q, "clip": bound * one, "Cin": one}
        rows = one.new_zeros(len(one), ROW_WIDTH)
        for name, values in columns.items():
            rows[:, column(name)] = values
        return rows


def _check_name(argument: str, value: object, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{argument} must be one of {', '.join(accepted)}; got {value!r}")


def _checked_start(start: object, T: int | None = None) -> int | Literal["random"] | None:
    if isinstance(start, str):
        _check_name("start", start, ("random",))
        return "random"
    return None if start is None else check_int("start", start, 1, T)
