"""reverse_step_ with every term of the row: inputs, and the judge of what it writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cases import F32, FIRST, SEED, STREAM, assert_rounded_once, normals
from ddpm_fast.ops import reference
from ddpm_fast.ops.philox import philox_rng
from ddpm_fast.ops.row import ROW_FIELDS, ROW_WIDTH, RowFlag, column, history_depth

STEPS = 12
WRITTEN = ("x", "model_input", "pred_x0", "second", "history")
Inputs = dict[str, Any]

PLAIN = RowFlag.CLIP | RowFlag.SCALE_IN
PAST = RowFlag.H1 | RowFlag.H2 | RowFlag.H3
EVERY = RowFlag(sum(RowFlag)) & ~RowFlag.CLIP
# Each further term, then the terms of known solvers, then all.
FLAGS = {
    "guided": PLAIN | RowFlag.GUIDE,
    "learned": PLAIN | RowFlag.LEARNED,
    "thresholded": RowFlag.THRESHOLD,
    "thresholded-not-clipped": RowFlag.THRESHOLD | RowFlag.CLIP,
    "one-past": PLAIN | RowFlag.H1 | RowFlag.PUSH,
    "third-past": RowFlag.H3 | RowFlag.PUSH,
    "outputs-past": RowFlag.RAW_OUT | PAST | RowFlag.PUSH | RowFlag.PUSH_OUT,
    "second": PLAIN | RowFlag.SECOND,
    "second-and-past": PLAIN | RowFlag.SECOND | RowFlag.H1 | RowFlag.H2 | RowFlag.PUSH,
    "guided-and-learned": PLAIN | RowFlag.GUIDE | RowFlag.LEARNED,
    "every": EVERY,
}


def random_rows(depth: int, seed: int = 6) -> Tensor:
    """float32 [STEPS, ROW_WIDTH]: a table that uses every term; two rows of three push."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.zeros(STEPS, ROW_WIDTH)
    rows[:, : len(ROW_FIELDS)] = torch.randn(STEPS, len(ROW_FIELDS), generator=generator)
    slots = torch.randint(max(depth, 1), (STEPS,), generator=generator)
    fixed = {"clip": 0.8, "Yo": 0, "M": 0, "push": torch.arange(STEPS) % 3 != 0, "slot": slots}
    for name, values in fixed.items():
        rows[:, column(name)] = torch.as_tensor(values).float()
    rows[6, column("P")] = 0  # x0 is the output itself, scaled
    return rows


def step_inputs(
    flags: RowFlag,
    shape: Sequence[int] = (5, 3, 11, 13),
    layout: str = "channels-last",
    other: str = "contiguous",
    dtype: torch.dtype = F32,
    device: str = "cpu",
    made: bool = False,
) -> Inputs:
    """Arguments of reverse_step_ with the tensors that the flags ask for, new at each call.

    layout: of the state and what is shaped as it; other: of the network's. The rows of the samples
    differ. made: whether noise is made.
    """

    def state(seed: int) -> Tensor:
        return normals(shape, layout, F32, seed, device)

    def network(seed: int) -> Tensor:
        return normals(shape, other, dtype, seed, device)

    depth = history_depth(flags)
    slots = normals((depth * shape[0], *shape[1:]), layout, F32, 9, device) if depth else None
    bounds = torch.rand(2 * shape[0], generator=torch.Generator().manual_seed(8)) + 0.5
    return {
        "x": state(1),
        "model_output": network(2),
        "rows": random_rows(depth).to(device),
        "step": (5 * torch.arange(shape[0], device=device) + 1) % STEPS,
        "noise": None if made else state(3),
        "rng": philox_rng(SEED, STREAM, FIRST, device) if made else None,
        "model_input": network(4),
        "pred_x0": state(5),
        "flags": int(flags),
        "model_output2": network(6) if flags & RowFlag.GUIDE else None,
        "log_variance": network(7) if flags & RowFlag.LEARNED else None,
        "threshold": bounds.to(device)[::2] if flags & RowFlag.THRESHOLD else None,
        "second": state(10) if flags & RowFlag.SECOND else None,
        "history": None if slots is None else slots.unflatten(0, (depth, shape[0])),
    }


def copied(inputs: Inputs, **others: Any) -> Inputs:
    """The same values in tensors of the same strides; others replace some."""

    def copy(tensor: Tensor) -> Tensor:
        strided = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )
        return strided.copy_(tensor)

    return {k: copy(v) if isinstance(v, Tensor) else v for k, v in inputs.items()} | others


def written(inputs: Inputs) -> dict[str, Tensor]:
    return {name: inputs[name] for name in WRITTEN if inputs[name] is not None}


def _in_float64(inputs: Inputs, magnitudes: bool = False) -> Inputs:
    """The inputs on the CPU in float64; magnitudes: the absolute values of what is multiplied."""
    found = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    for name, tensor in found.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            wide = tensor.double()
            signed = name in {"rows", "log_variance", "threshold"}
            found[name] = wide.abs() if magnitudes and not signed else wide.clone()
    return found


def magnitudes(before: Inputs) -> Inputs:
    """What a step would write if nothing cancelled and nothing was clipped."""
    inputs = _in_float64(before, magnitudes=True)
    signed = inputs["rows"][inputs["step"].clamp(0, STEPS - 1)]
    rows = signed.abs()
    for name in ("Lmin", "Lmax"):
        rows[:, column(name)] = signed[:, column(name)]
    if (bound := inputs["threshold"]) is not None:
        rows[:, [column("P"), column("Q")]] /= bound[:, None]
    if (v := inputs["log_variance"]) is not None:
        # The error of its argument is one of the exponential's.
        largest = rows[:, column("Lmin")].abs() + rows[:, column("Lmax")].abs()
        rows[:, column("S")] *= 2 + largest * (1 + v.abs().reshape(len(v), -1).amax(1))
    inputs |= {"rows": rows, "step": torch.arange(len(rows)), "threshold": None}
    inputs["flags"] &= ~int(RowFlag.CLIP | RowFlag.THRESHOLD)
    reference.reverse_step_(**inputs)
    return inputs


def assert_is_the_equation(after: Inputs, before: Inputs) -> None:
    """What was written is the reference in float64 on what was there before, rounded."""
    exact, magnitude = _in_float64(before), magnitudes(before)
    reference.reverse_step_(**exact)
    for name, tensor in written(after).items():
        # Up to sixteen roundings of a term: guidance, x0, its threshold and a sum of seven.
        assert_rounded_once(tensor, exact[name], 4 * magnitude[name])
