"""One step of a scheduler: rows by timestep, and the fused kernel that reads them."""

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
    """A row for each timestep of a schedule, [T, ROW_WIDTH]; NaN for those outside the chain.

    Args:
        rows: Rows of the timesteps, float64 [n, ROW_WIDTH]; they may be infinite or NaN.
        timesteps: Timesteps of the chain.
        T: Number of timesteps of the schedule.
        clip: Bound of x0, a `DynamicThreshold` or None.

    Attributes:
        flags: Flags of the rows, as in `StepTable`.
        learned: The step reads a learned variance.
        threshold: The dynamic threshold, or None.
        in_chain: True for the timesteps of the chain [T].
    """

    flags: int
    learned: bool
    threshold: DynamicThreshold | None
    in_chain: tuple[bool, ...]

    def __init__(self, rows: Tensor, timesteps: list[int], T: int, clip: Clip) -> None:
        chain = set(timesteps)
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
        self._set_tables(
            {"rows": by_timestep, "first": torch.zeros(1, dtype=torch.int64, device="cpu")},
            ("rows",),
            flags=int(flags),
            learned=bool(flags & RowFlag.LEARNED),
            threshold=threshold,
            in_chain=tuple(t in chain for t in range(T)),
        )

    def on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the rows on a device, in float32 or float64; the tensor is shared."""
        return self._on("rows", device, dtype)

    def prepare(self, device: torch.device | str | None) -> None:
        """Copy the rows to a device (None: the CPU) before their first use."""
        device = torch.device(device or "cpu")
        self.on(device, torch.float32)
        self.first_row(device)

    def first_row(self, device: torch.device) -> Tensor:
        """Return int64 [1], 0: the row index of all samples if a single row is passed."""
        return self._on("first", device, torch.int64)


class StepPosition(NamedTuple):
    """Timestep of a step: on the host if it can be read without synchronisation, else on a device.

    Attributes:
        timestep: The timestep, or None.
        on_device: Timesteps, int64 [N], if `timestep` is None.
    """

    timestep: int | None
    on_device: Tensor | None


def fused_step(
    table: TimestepRows,
    x: Tensor,
    out: Tensor,
    log_variance: Tensor | None,
    position: StepPosition,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute one step by one kernel, plus a quantile for a dynamic threshold.

    It does not synchronise. If a gradient is required, the reference backend computes the step.

    Args:
        table: Rows by timestep.
        x: State [N, ...].
        out: Prediction of the model, like `x`.
        log_variance: Learned variance, like `x`, or None.
        position: Timestep of the step.
        noise: Standard normal noise, like `x`. None: no noise.

    Returns:
        The next state and x0, new tensors like `x`.
    """
    rows = table.on(x.device, checks.compute_dtype(x.dtype))
    if position.timestep is not None:
        step = table.first_row(x.device).expand(x.shape[0])
        rows = rows[position.timestep : position.timestep + 1]
    else:
        step = checks.instance("timestep", position.on_device, Tensor)
    run = get_backend(backend_for(x, out, log_variance, noise), x.device, x.dtype)
    bound = None
    if table.threshold is not None:
        bound = thresholds(table.threshold, x, out, None, rows, step).to(rows.dtype)
    return run.reverse_step(x, out, rows, step, noise, table.flags, log_variance, bound)


def backend_for(*tensors: Tensor | None, backward: bool = False) -> str:
    """Return "reference" if derivatives are required that only this backend has, else "auto".

    Args:
        tensors: Inputs of the operator.
        backward: The operator has a gradient in every backend.
    """
    present = [t for t in tensors if t is not None]
    if not backward and torch.is_grad_enabled() and any(t.requires_grad for t in present):
        return "reference"
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return "auto"
    tangents = any(forward_ad.unpack_dual(t).tangent is not None for t in present)
    return "reference" if tangents else "auto"


def step_tensors(
    sample: Any, model_output: Any, learned: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check the tensors of a step, and split a learned variance from the model output.

    Args:
        sample: State [N, ...].
        model_output: Model output, with twice the channels of `sample` for a learned variance.
        learned: The model output contains a variance.

    Returns:
        The state, in the dtype to which the two promote; the prediction; and the variance or None.

    Raises:
        TypeError: An argument is no tensor or has another dtype.
        ValueError: An argument has another shape or device.
    """
    x = checks.batch("sample", sample)
    out = checks.batch("model_output", model_output)
    checks.same_device("model_output", out, "sample", x)
    if not learned and out.shape != x.shape:
        raise ValueError(
            f"model_output must have the shape of sample, {checks.shape_text(x)}, without a learned"
            f" variance; got {checks.shape_text(out)}"
        )
    out, v = split_learned_variance("model_output", out, x, learned)
    return x.to(torch.promote_types(x.dtype, out.dtype)), out, v
