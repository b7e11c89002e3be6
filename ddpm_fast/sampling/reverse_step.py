"""The three fused updates: q_sample, q_posterior and the in-place reverse step.

Each is one kernel in the backends cpu, triton and cuda, and plain PyTorch in reference. Inputs may
be contiguous, channels-last, sliced or expanded, with any number of dimensions; outputs keep the
strides of the input they stand for. Arithmetic is in float32 (float64 for float64 inputs), whatever
the dtype of the tensors. Index t is step t + 1 of the papers. On the CPU a timestep outside the
schedule is a ValueError; on a GPU it is clamped, because looking would make the host wait.
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
    """One reverse step in place: row ``step`` of a table applied to the state x; returns x.

    x: [N, ...] float32 (float64 in reference and cpu). model_output: the shape of x, or twice its
    channels for a network with a learned variance, float32, float16 or bfloat16 (float64 where x
    is); model_output2: the unconditional one beside it, for a table with guidance. memory: what a
    multistep solver keeps, `StepTable.memory` of x, made once and handed to every step. step: int64
    [N] or an int, the row of each sample; a sample whose row lies outside the table is left alone,
    so that chains of unequal length share a batch. Noise, where the table has any: `noise` of the
    shape and dtype of x, or `rng` from `philox_rng`, to make it in the kernel (row i uses stream
    rng[1] + i); it is not read where the table has none. model_input: written with x' in its own
    dtype (float32, float16, bfloat16), the tensor that the network reads next. pred_x0: dtype of x,
    written with the clipped x_0.

    The equation of a row is in `ddpm_fast.ops.row`. Raises TypeError or ValueError naming the
    argument,
    RuntimeError where the backend cannot run.
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
            "this table adds noise: give either noise or rng;"
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
    """The prediction, the learned v, and the second prediction; None where there is none."""
    checks.batch("model_output", model_output, dtypes)
    checks.same_device("model_output", model_output, "x", x)
    out, v = split_learned_variance("model_output", model_output, x, table.learned)
    if (model_output2 is not None) != table.guided:
        needed = "a table with guidance needs it" if table.guided else "the table has no guidance"
        got = "nothing" if model_output2 is None else "a tensor"
        raise ValueError(f"model_output2: {needed}; got {got}")
    if model_output2 is None:
        return out, v, None
    checks.like("model_output2", model_output2, "model_output", model_output, dtypes)
    return out, v, split_learned_variance("model_output2", model_output2, x, False)[0]


def _memory(
    memory: StepMemory | None, x: Tensor, table: StepTable
) -> tuple[Tensor | None, Tensor | None]:
    """The second state and the past values, checked."""
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
    how: DynamicThreshold,
    x: Tensor,
    out: Tensor,
    out2: Tensor | None,
    rows: Tensor,
    step: Tensor,
) -> Tensor:
    """The threshold s of each sample [N] in a step, in the dtype of x."""
    row = rows.index_select(0, step.clamp(0, rows.shape[0] - 1))
    return dynamic_threshold(how, predicted_x0(row, x, out, out2)[1])
