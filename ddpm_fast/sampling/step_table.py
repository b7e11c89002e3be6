"""Step tables: a sampler written as one row of coefficients per step, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from ddpm_fast.diffusion.noise_levels import check_start
from ddpm_fast.diffusion.parameterization import PREDICTIONS, Prediction
from ddpm_fast.diffusion.thresholding import DynamicThreshold
from ddpm_fast.ops.row import ROW_FIELDS, RowFlag, column, complete, flags_for, history_depth
from ddpm_fast.sampling.solvers.ddim import ddim, ddim_inverse, ve_ode
from ddpm_fast.sampling.solvers.ddpm import ddpm
from ddpm_fast.sampling.solvers.dpm_solver import dpmpp_2m, dpmpp_2m_sde
from ddpm_fast.sampling.solvers.plms import plms
from ddpm_fast.sampling.solvers.unipc import unipc
from ddpm_fast.utils import checks
from ddpm_fast.utils.immutable import ImmutableTables


class StepMemory(NamedTuple):
    """What a chain keeps from step to step beside its state; None where its table needs none.

    second: a second state, of the shape of the state. history: past values [depth, *state.shape].
    """

    second: Tensor | None
    history: Tensor | None


class StepTable(ImmutableTables):
    """The rows of a reverse chain and the timesteps fed to the network, first step first.

    rows: float64 [steps, ROW_WIDTH], laid out as the row module says; slot and ratio are filled in.
    timesteps: int64 [steps], 0-based. prediction: what the network returns, "epsilon", "x0", "v"
    (Salimans & Ho 2022) or "score" (the gradient of log q(x_t), -epsilon / sqrt(1 - abar)). start:
    None for a chain from x_T, 1..T for one from x_start, "random" for one whose first row each
    sample draws, "data" for one that begins at given data. draws_always: a generator is drawn from
    at t = 0 too, as diffusers' DDIM with eta > 0 does. threshold: x0 is thresholded by the sample.
    init_scale: the state begins at N(0, init_scale^2), and the network reads it over init_scale.

    flags: what an update has to be specialised on. uses_noise: some row has S != 0. depth: past
    values kept, 0..3. guided: a step needs two outputs of the network. learned: a step needs a
    network of 2C channels, the second half its variance.

    Made by ddpm, ddim, ddim_inverse, ve_ode, dpmpp_2m, dpmpp_2m_sde, unipc and plms, or from rows
    of one's own. Tables are immutable (rows gives a copy), compare and hash by content (the name is
    a label), and can be pickled and copied.

    Raises TypeError, ValueError for rows that flags_for refuses or that leave float32's range, for
    timesteps that are not one integer per row, and for an unknown prediction or start.
    """

    __module__ = "ddpm_fast"  # as in NoiseSchedule

    steps: int
    prediction: str
    start: int | Literal["random", "data"] | None
    name: str
    draws_always: bool
    threshold: DynamicThreshold | None
    init_scale: float
    flags: RowFlag
    uses_noise: bool
    depth: int
    guided: bool
    learned: bool

    ddpm = classmethod(ddpm)
    ddim = classmethod(ddim)
    ddim_inverse = classmethod(ddim_inverse)
    ve_ode = classmethod(ve_ode)
    dpmpp_2m = classmethod(dpmpp_2m)
    dpmpp_2m_sde = classmethod(dpmpp_2m_sde)
    unipc = classmethod(unipc)
    plms = classmethod(plms)

    def __init__(
        self,
        rows: Tensor,
        timesteps: Sequence[int] | Tensor,
        prediction: Prediction = "epsilon",
        start: int | Literal["random", "data"] | None = None,
        name: str = "custom",
        draws_always: bool = False,
        threshold: DynamicThreshold | None = None,
        init_scale: float = 1.0,
    ) -> None:
        if not isinstance(threshold, DynamicThreshold | None):
            raise TypeError(f"threshold must be a DynamicThreshold or None; got {threshold!r}")
        flags = flags_for(rows, threshold is not None)
        depth = history_depth(flags)
        rows = complete(rows.detach().to("cpu", torch.float64), depth)
        beyond = (rows.abs() > torch.finfo(torch.float32).max) & rows.isfinite()
        if beyond.any():
            row, index = beyond.nonzero()[0].tolist()
            raise ValueError(
                f"rows: {ROW_FIELDS[index]} is {float(rows[row, index]):.3g} in row {row}, beyond "
                "float32; where alphas_cumprod is that small, prediction must be 'x0' or 'v'"
            )
        visited = [checks.integer(f"timesteps[{i}]", t, 0) for i, t in enumerate(timesteps)]
        if len(visited) != len(rows) or not visited:
            raise ValueError(f"timesteps must be one per row; got {len(visited)} for {len(rows)}")
        checks.choice("prediction", prediction, PREDICTIONS)
        start = "data" if start == "data" else check_start(start)
        if start == "random" and (depth or flags & RowFlag.SECOND):
            raise ValueError("start must not be 'random' for rows that read earlier steps")
        self._freeze(
            {"rows": rows, "timesteps": torch.tensor(visited, dtype=torch.int64, device="cpu")},
            ("rows", "timesteps", *_LABELS),
            steps=len(visited),
            prediction=prediction,
            start=start,
            name=name,
            draws_always=bool(draws_always),
            threshold=threshold,
            init_scale=checks.real("init_scale", init_scale, 0, math.inf, "()"),
            flags=flags,
            uses_noise=bool(rows[:, column("S")].any()),
            depth=depth,
            guided=bool(flags & RowFlag.GUIDE),
            learned=bool(flags & RowFlag.LEARNED),
        )

    def with_guidance(self, scale: float | Sequence[float] | Tensor) -> Self:
        """The table under classifier-free guidance (Ho & Salimans 2022).

        Each output becomes scale * conditional + (1 - scale) * unconditional, whatever the network
        predicts: 1 is the conditional model, 0 the unconditional one, more pushes away from it
        (scale is diffusers' guidance_scale, and w + 1 of the paper). A learned variance is the
        conditional one. scale: a finite number, or one for each row.

        Raises TypeError, ValueError for another scale.
        """
        given = checks.as_list(scale)
        given = given if isinstance(given, list) else [given] * self.steps
        if len(given) != self.steps:
            raise ValueError(
                f"scale must be a number or one for each of {self.steps} rows; got {len(given)}"
            )
        scales = [checks.real("scale", w, -math.inf, math.inf, "()") for w in given]
        rows = self.rows
        rows[:, column("G0")] = torch.tensor(scales, dtype=rows.dtype)
        rows[:, column("G1")] = 1 - rows[:, column("G0")]
        return self._like(rows)

    def memory(self, x: Tensor) -> StepMemory:
        """Zeros for what a chain of this table keeps beside its state x [N, ...]; x's layout."""
        like = torch.zeros_like(x)
        history = None
        if self.depth:
            strides = (like.numel(), *like.stride())
            history = x.new_empty_strided((self.depth, *x.shape), strides).zero_()
        return StepMemory(like if self.flags & RowFlag.SECOND else None, history)

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
        row = checks.integer("row", row, 0, self.steps)
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

    def _like(self, rows: Tensor) -> Self:
        """The same chain with other rows."""
        return type(self)(rows, *self.__reduce__()[1][1:])

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        labels = (self.prediction, self.start, self.name, self.draws_always)
        return type(self), (self.rows, self.timesteps, *labels, self.threshold, self.init_scale)

    def __repr__(self) -> str:
        start = "" if self.start is None else f", start={self.start}"
        return f"StepTable({self.name}, {self.steps} steps, {self.prediction}{start})"


_LABELS = ("prediction", "start", "draws_always", "threshold", "init_scale")
