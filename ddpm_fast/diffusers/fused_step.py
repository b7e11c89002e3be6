"""What one step of a scheduler runs: its rows by timestep, and the fused kernel over them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ddpm_fast.diffusion.model_output import split_learned_variance
from ddpm_fast.diffusion.thresholding import Clip, DynamicThreshold, threshold_from_clip
from ddpm_fast.ops import get_backend
from ddpm_fast.ops.row import RowFlag, column
from ddpm_fast.sampling.reverse_step import thresholds
from ddpm_fast.utils import checks
from ddpm_fast.utils.immutable import ImmutableTables


class TimestepRows(ImmutableTables):
    """A row for each timestep of a schedule, [T, ROW_WIDTH]; NaN where a chain does not come.

    rows: float64 [n, ROW_WIDTH] of these timesteps, which need not be finite. flags, learned and
    threshold are as those of `StepTable`.
    """

    flags: int
    learned: bool
    threshold: DynamicThreshold | None
    in_chain: tuple[bool, ...]

    def __init__(self, rows: Tensor, timesteps: list[int], T: int, clip: Clip) -> None:
        by_timestep = torch.full((T, rows.shape[1]), math.nan, dtype=torch.float64, device="cpu")
        by_timestep[timesteps] = rows
        threshold = threshold_from_clip(clip)
        flags = RowFlag(0)
        if threshold is not None:
            flags |= RowFlag.THRESHOLD
        elif clip is not None:
            flags |= RowFlag.CLIP
        if rows[:, column("Xo")].any():
            flags |= RowFlag.RAW_OUT
        if rows[:, column("Lmax")].any():
            flags |= RowFlag.LEARNED
        places = set(timesteps)
        self._freeze(
            {"rows": by_timestep, "first": torch.zeros(1, dtype=torch.int64, device="cpu")},
            ("rows",),
            flags=int(flags),
            learned=bool(flags & RowFlag.LEARNED),
            threshold=threshold,
            in_chain=tuple(t in places for t in range(T)),
        )

    def on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The rows on a device, in float32 or float64; shared by all callers."""
        return self._on("rows", device, dtype)

    def prepare(self, device: torch.device | str | None) -> None:
        """Have the rows on a device (None: the CPU) before they are asked for."""
        device = torch.device(device or "cpu")
        self.on(device, torch.float32)
        self.first_row(device)

    def first_row(self, device: torch.device) -> Tensor:
        """int64 [1], 0: the row of every sample where a single one is handed over."""
        return self._on("first", device, torch.int64)


class StepPosition(NamedTuple):
    """Where in its chain a step is: the timestep, if the host knows it, else one on the device."""

    known: int | None
    on_device: Tensor | None


def fused_step(
    table: TimestepRows,
    x: Tensor,
    out: Tensor,
    log_variance: Tensor | None,
    where: StepPosition,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """x' and x0 of a step, new tensors like x: one kernel, but for a threshold's quantile.

    Nothing waits for a GPU. Where a gradient is wanted the reference backend runs, which has one.
    """
    rows = table.on(x.device, checks.compute_dtype(x.dtype))
    if where.known is not None:
        step = table.first_row(x.device).expand(x.shape[0])
        rows = rows[where.known : where.known + 1]
    else:
        step = checks.instance("timestep", where.on_device, Tensor)
    run = get_backend(backend_for(x, out, log_variance, noise), x.device, x.dtype)
    bound = None
    if table.threshold is not None:
        bound = thresholds(table.threshold, x, out, None, rows, step).to(rows.dtype)
    return run.reverse_step(x, out, rows, step, noise, table.flags, log_variance, bound)


def backend_for(*tensors: Tensor | None, backward: bool = False) -> str:
    """The backend that has the derivatives that are wanted: "reference", or "auto" for none.

    backward: the compiled operator has its gradient.
    """
    given = [t for t in tensors if t is not None]
    if not backward and torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return "reference"
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return "auto"
    tangents = any(forward_ad.unpack_dual(t).tangent is not None for t in given)
    return "reference" if tangents else "auto"


def step_tensors(
    sample: Any, model_output: Any, learned: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The state, the prediction, and the second half of the channels where it is a variance.

    The state has the dtype that the two promote to, which is that of the results. Raises TypeError,
    ValueError naming the argument.
    """
    x = checks.batch("sample", sample)
    out = checks.batch("model_output", model_output)
    checks.same_device("model_output", out, "sample", x)
    if not learned and out.shape != x.shape:
        raise ValueError(
            f"model_output must have the shape of sample, {checks.shape_text(x)}, where no variance"
            f" is learned; got {checks.shape_text(out)}"
        )
    out, v = split_learned_variance("model_output", out, x, learned)
    return x.to(torch.promote_types(x.dtype, out.dtype)), out, v
