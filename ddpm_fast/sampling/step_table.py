"""Step tables: a sampler as one row of coefficients for each step, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, Self, cast

import torch
from torch import Tensor

from ddpm_fast.ops.row import column
from ddpm_fast.sampling.solvers.ddim import ddim, ddim_inverse, ve_ode
from ddpm_fast.sampling.solvers.ddpm import ddpm
from ddpm_fast.sampling.solvers.dpm_solver import dpmpp_2m, dpmpp_2m_sde
from ddpm_fast.sampling.solvers.plms import plms
from ddpm_fast.sampling.solvers.table import StepMemory, Table
from ddpm_fast.sampling.solvers.unipc import unipc
from ddpm_fast.utils import checks

__all__ = ["StepMemory", "StepTable"]

P = ParamSpec("P")


def _solver(
    function: Callable[Concatenate[type[Table], P], Table],
) -> classmethod[StepTable, P, StepTable]:
    """Return a solver as a classmethod of `StepTable`."""
    return cast(Any, classmethod(function))


class StepTable(Table):
    """Rows of a reverse chain and the timesteps passed to the model, first step first.

    The classmethods `ddpm`, `ddim`, `ddim_inverse`, `ve_ode`, `dpmpp_2m`, `dpmpp_2m_sde`, `unipc`
    and `plms` make the tables of the solvers. Tables are immutable, compare and hash by content
    (except for the name), and can be pickled and copied.

    Args:
        rows: float64 [steps, ROW_WIDTH], laid out as in `ddpm_fast.ops.row`. The columns slot and
            ratio are computed.
        timesteps: int64 [steps], 0-based.
        prediction: Output of the model: "epsilon", "x0", "v" (Salimans & Ho 2022) or "score", the
            gradient of log q(x_t), -epsilon / sqrt(1 - abar).
        start: Beginning of the chain. None: x_T. 1..T: x_start. "random": each sample draws its
            first row. "data": data passed by the caller.
        name: Label of the table in `repr`.
        draws_always: A generator is advanced at t = 0 too, as by diffusers' DDIM with eta > 0.
        threshold: Dynamic thresholding of x0, or None.
        init_scale: Standard deviation of the initial state. The model reads the state divided by
            it.

    Attributes:
        steps: Number of rows.
        flags: Terms that the rows use; kernels are specialised on them.
        uses_noise: True if some row has S != 0.
        depth: Number of past values that are kept, 0..3.
        guided: True if a step needs two outputs of the model.
        learned: True if the model must return 2C channels, the second half its variance.

    Raises:
        TypeError: An argument has another type.
        ValueError: `flags_for` rejects the rows, the rows exceed the range of float32, the
            timesteps are not one for each row, or prediction or start is unknown.
    """

    __module__ = "ddpm_fast"  # as in NoiseSchedule

    ddpm = _solver(ddpm)
    ddim = _solver(ddim)
    ddim_inverse = _solver(ddim_inverse)
    ve_ode = _solver(ve_ode)
    dpmpp_2m = _solver(dpmpp_2m)
    dpmpp_2m_sde = _solver(dpmpp_2m_sde)
    unipc = _solver(unipc)
    plms = _solver(plms)

    def with_guidance(self, scale: float | Sequence[float] | Tensor) -> Self:
        """Return the table with classifier-free guidance (Ho & Salimans 2022).

        Each model output becomes scale * conditional + (1 - scale) * unconditional, for any
        prediction. A learned variance is that of the conditional output.

        Args:
            scale: diffusers' guidance_scale, w + 1 in the paper: a finite number, or one for each
                row. 1 is the conditional model, 0 the unconditional one.

        Raises:
            TypeError: `scale` is not a number or a sequence of numbers.
            ValueError: `scale` is not finite, or has another length than the table.
        """
        scales = checks.as_list(scale)
        scales = scales if isinstance(scales, list) else [scales] * self.steps
        if len(scales) != self.steps:
            raise ValueError(
                f"scale must be a number or one for each of {self.steps} rows; got {len(scales)}"
            )
        scales = [checks.real("scale", each) for each in scales]
        rows = self.rows
        rows[:, column("G0")] = torch.tensor(scales, dtype=rows.dtype)
        rows[:, column("G1")] = 1 - rows[:, column("G0")]
        return self._with_rows(rows)
