"""The reverse step: one row of a step table, applied in place.

One kernel in the backends cpu, triton and cuda, and plain PyTorch in reference. Inputs may be
contiguous, channels-last, sliced or expanded, with any number of dimensions. Arithmetic is in
float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.diffusion.model_output import split_learned_variance
from ddpm_fast.diffusion.thresholding import DynamicThreshold, dynamic_threshold
from ddpm_fast.ops import get_backend
from ddpm_fast.ops.reference.diffusion import predicted_x0
from ddpm_fast.ops.row import RowFlag
from ddpm_fast.sampling.step_table import StepMemory, StepTable
from ddpm_fast.utils import checks, in_place


def reverse_step_(
    x: Tensor,
    model_output: Tensor,
    table: StepTable,
    step: Tensor | int,
    *,
    noise: Tensor | None = None,
    rng: Tensor | None = None,
    model_input: Tensor | None = None,
    pred_x0: Tensor | None = None,
    model_output2: Tensor | None = None,
    memory: StepMemory | None = None,
    backend: str = "auto",
) -> Tensor:
    """Apply row `step` of a table to the state x in place.

    The equation of a row is in `ddpm_fast.ops.row`.

    Args:
        x: State [N, ...], float32 (float64 in reference and cpu). Overwritten with x'.
        model_output: Output of the model, float32, float16 or bfloat16 (float64 if `x` is): the
            shape of `x`, or twice its channels for a learned variance.
        table: The step table.
        step: Row of each sample, int64 [N], or one int. A sample whose row is outside the table is
            not changed, so chains of different length can share a batch.
        noise: Noise, with the shape and dtype of `x`. Ignored if the table has no noise; otherwise
            exactly one of `noise` and `rng` is required.
        rng: Result of `philox_rng`: the kernel generates the noise; row i uses stream rng[1] + i.
        model_input: Tensor of the shape of `x`, float32, float16 or bfloat16. Overwritten with the
            next model input.
        pred_x0: Tensor of the shape and dtype of `x`. Overwritten with the clipped x_0.
        model_output2: Unconditional model output, for a table with guidance.
        memory: Buffers of a multistep solver: `table.memory(x)`, the same in every step of a chain.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        x.

    Raises:
        TypeError: An argument has another type or dtype.
        ValueError: An argument has another shape or device, is missing or superfluous, or overlaps
            a tensor that is written.
        RuntimeError: The backend cannot run.
    """
    wide = (torch.float64,)
    x = in_place.writable("x", checks.batch("x", x, (torch.float32, torch.float64)))
    outputs = wide if x.dtype == torch.float64 else checks.FLOATS[:3]
    checks.instance("table", table, StepTable)
    out, v, out2 = _outputs(x, model_output, model_output2, table, outputs)
    second, history = _memory(memory, x, table)
    if not table.uses_noise:
        noise = rng = None
    elif (noise is None) == (rng is None):
        raise ValueError(
            "noise or rng must be given for a table with noise, and only one of them;"
            f" got {'neither' if noise is None else 'both'}"
        )
    if noise is not None:
        noise = checks.like("noise", noise, "x", x, (x.dtype,))
    if rng is not None:
        rng = _rng(rng, x)
    if model_input is not None:
        in_place.writable("model_input", checks.like("model_input", model_input, "x", x, outputs))
    if pred_x0 is not None:
        in_place.writable("pred_x0", checks.like("pred_x0", pred_x0, "x", x, (x.dtype,)))
    step = checks.index("step", step, x, None)
    run = get_backend(backend, x.device, x.dtype)
    rows, _ = table.to(x.device, x.dtype)
    in_place.distinct(x=x, model_input=model_input, pred_x0=pred_x0, second=second, history=history)
    written = (x, model_input, pred_x0, second, history)
    out = in_place.without_overlap(out.detach(), *written)
    v, out2, noise = (
        read if read is None else in_place.without_overlap(read.detach(), *written)
        for read in (v, out2, noise)
    )
    s = None
    if table.threshold is not None:
        s = thresholds(table.threshold, x, out, out2, rows, step)
    plain = (x, out, rows, step, noise, rng, model_input, pred_x0, int(table.flags))
    run.reverse_step_(*plain, out2, v, s, second, history)
    in_place.mark_written(*written)
    return x


def _outputs(
    x: Tensor,
    model_output: Tensor,
    model_output2: Tensor | None,
    table: StepTable,
    dtypes: tuple[torch.dtype, ...],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the prediction, the learned v, and the second prediction; None for missing ones."""
    checks.batch("model_output", model_output, dtypes)
    checks.same_device("model_output", model_output, "x", x)
    out, v = split_learned_variance("model_output", model_output, x, table.learned)
    if (model_output2 is not None) != table.guided:
        wanted = "a tensor for a table with" if table.guided else "None for a table without"
        got = "None" if model_output2 is None else "a tensor"
        raise ValueError(f"model_output2 must be {wanted} guidance; got {got}")
    if model_output2 is None:
        return out, v, None
    checks.like("model_output2", model_output2, "model_output", model_output, dtypes)
    return out, v, split_learned_variance("model_output2", model_output2, x, False)[0]


def _memory(
    memory: StepMemory | None, x: Tensor, table: StepTable
) -> tuple[Tensor | None, Tensor | None]:
    """Check the memory; return the second state and the past values."""
    second, history = memory if memory is not None else (None, None)
    shapes = {
        "second": (second, list(x.shape) if table.flags & RowFlag.SECOND else None),
        "history": (history, [table.depth, *x.shape] if table.depth else None),
    }
    for name, (tensor, shape) in shapes.items():
        got = None if tensor is None else list(tensor.shape)
        if got != shape:
            raise ValueError(f"memory.{name} must be {shape}, as from table.memory(x); got {got}")
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(
                f"memory.{name} must have the dtype and device of x,"
                f" {checks.dtype_name(x.dtype)} on {x.device};"
                f" got {checks.dtype_name(tensor.dtype)} on {tensor.device}"
            )
        if tensor is not None:
            in_place.writable(f"memory.{name}", tensor)
    return second, history


def _rng(rng: Tensor, x: Tensor) -> Tensor:
    accepted = "rng must be int64 [3] = (seed, stream, first_sample), as from philox_rng"
    if not isinstance(rng, Tensor):
        raise TypeError(f"{accepted}; got {type(rng).__name__}")
    if rng.dtype != torch.int64:
        raise TypeError(f"{accepted}; got {checks.dtype_name(rng.dtype)}")
    if tuple(rng.shape) != (3,):
        raise ValueError(f"{accepted}; got {checks.shape_text(rng)}")
    if rng.device != x.device:
        raise ValueError(f"rng must be on the device of x, {x.device}; got {rng.device}")
    return rng.contiguous()


def thresholds(
    config: DynamicThreshold,
    x: Tensor,
    out: Tensor,
    out2: Tensor | None,
    rows: Tensor,
    step: Tensor,
) -> Tensor:
    """Return the threshold s of each sample in a step, [N] in the dtype of `x`.

    Args:
        config: Dynamic thresholding.
        x: State [N, ...].
        out: Model output.
        out2: Second model output under guidance, or None.
        rows: Rows of the table on the device of `x`.
        step: Row of each sample, int64 [N].
    """
    row = rows.index_select(0, step.clamp(0, rows.shape[0] - 1))
    return dynamic_threshold(config, predicted_x0(row, x, out, out2)[1])
