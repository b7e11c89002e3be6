"""The rows of a reverse chain, checked, and the functions that solvers build them with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from ddpm_fast.diffusion.noise_levels import NoiseLevels, check_start
from ddpm_fast.diffusion.parameterization import PREDICTIONS, Prediction
from ddpm_fast.diffusion.thresholding import Clip, DynamicThreshold, clip_bound
from ddpm_fast.ops.row import (
    ROW_FIELDS,
    ROW_WIDTH,
    RowFlag,
    column,
    complete,
    flags_for,
    history_depth,
)
from ddpm_fast.utils import checks
from ddpm_fast.utils.immutable import ImmutableTables

_LABELS = ("prediction", "start", "draws_always", "threshold", "init_scale")


class StepMemory(NamedTuple):
    """Buffers that a multistep solver keeps between steps.

    Attributes:
        second: Second state, of the shape of the state; None if the table has none.
        history: Past values [depth, *state.shape]; None if the table reads none.
    """

    second: Tensor | None
    history: Tensor | None


class Table(ImmutableTables):
    """Rows of a reverse chain and their timesteps; `StepTable` adds the solvers.

    Arguments and attributes are those of `StepTable`.
    """

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
                f"rows must be in the range of float32; got {ROW_FIELDS[index]} ="
                f" {float(rows[row, index]):.3g} in row {row}; where alphas_cumprod is that small,"
                " prediction must be 'x0' or 'v'"
            )
        listed = [checks.integer(f"timesteps[{i}]", t, 0) for i, t in enumerate(timesteps)]
        if len(listed) != len(rows) or not listed:
            raise ValueError(f"timesteps must be one per row; got {len(listed)} for {len(rows)}")
        checks.choice("prediction", prediction, PREDICTIONS)
        start = "data" if start == "data" else check_start(start)
        if start == "random" and (depth or flags & RowFlag.SECOND):
            raise ValueError("start must not be 'random' for rows that read earlier steps")
        self._set_tables(
            {"rows": rows, "timesteps": torch.tensor(listed, dtype=torch.int64, device="cpu")},
            ("rows", "timesteps", *_LABELS),
            steps=len(listed),
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

    @property
    def rows(self) -> Tensor:
        """Coefficients, float64 [steps, ROW_WIDTH] on the CPU; a new copy."""
        return self._tables["rows"].clone()

    @property
    def timesteps(self) -> Tensor:
        """Timesteps passed to the model, int64 [steps] on the CPU; a new copy."""
        return self._tables["timesteps"].clone()

    def memory(self, x: Tensor) -> StepMemory:
        """Allocate the buffers of a chain, filled with zeros.

        Args:
            x: State [N, ...].

        Returns:
            Buffers with the dtype, device and strides of `x`; None for those the table does not
            use.
        """
        like = torch.zeros_like(x)
        history = None
        if self.depth:
            strides = (like.numel(), *like.stride())
            history = x.new_empty_strided((self.depth, *x.shape), strides).zero_()
        return StepMemory(like if self.flags & RowFlag.SECOND else None, history)

    def draws(self, row: int) -> bool:
        """Return True if diffusers draws noise from a generator for a row.

        It draws where t > 0, or for every row if `draws_always` is set; never for a table without
        noise.

        Args:
            row: Row in [0, steps).

        Raises:
            TypeError: `row` is not an integer.
            ValueError: `row` is out of range.
        """
        row = checks.integer("row", row, 0, self.steps)
        later = self.draws_always or bool(self._tables["timesteps"][row] > 0)
        return self.uses_noise and later

    def to(
        self, device: str | torch.device, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Return rows and timesteps on a device.

        The tensors are cached and shared: do not write to them. Call this once before a CUDA graph
        is captured.

        Args:
            device: Device of both tensors.
            dtype: float32 or float64. The rows are rounded once, from float64.

        Returns:
            Rows [steps, ROW_WIDTH] and timesteps int64 [steps].

        Raises:
            ValueError: `dtype` or `device` is not accepted.
        """
        return self._on("rows", device, dtype), self._on("timesteps", device, torch.int64)

    def _with_rows(self, rows: Tensor) -> Self:
        return type(self)(rows, *self.__reduce__()[1][1:])

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        labels = (self.prediction, self.start, self.name, self.draws_always)
        return type(self), (self.rows, self.timesteps, *labels, self.threshold, self.init_scale)

    def __repr__(self) -> str:
        start = "" if self.start is None else f", start={self.start}"
        return f"{type(self).__name__}({self.name}, {self.steps} steps, {self.prediction}{start})"


def pack_rows(columns: dict[str, Tensor]) -> Tensor:
    """Return rows, float64 [steps, ROW_WIDTH], with these columns [steps]; the others are 0."""
    steps = len(next(iter(columns.values())))
    rows = torch.zeros(steps, ROW_WIDTH, dtype=torch.float64, device="cpu")
    for name, values in columns.items():
        rows[:, column(name)] = values.double()
    return rows


def rows_for(levels: NoiseLevels, clip: Clip, **columns: Tensor) -> Tensor:
    """Return the rows of a solver.

    Args:
        levels: Noise levels of the steps.
        clip: Clipping of x0.
        columns: Columns of `ddpm_fast.ops.row`. P and Q default to those of the prediction, G0 and
            Cin to 1, all others to 0.

    Returns:
        Rows, float64 [steps, ROW_WIDTH].
    """
    P, Q = levels.x0()
    one = torch.ones_like(P)
    known = {"G0": one, "P": P, "Q": Q, "clip": clip_bound(clip) * one, "Cin": one}
    return pack_rows(known | columns)
