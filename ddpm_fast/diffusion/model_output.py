"""What a network returned, as a step reads it: its halves, and the thresholds of its x0."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.diffusion.noise_levels import DynamicThreshold
from ddpm_fast.ops.reference.diffusion import predicted_x0
from ddpm_fast.utils import checks


def tensor_of(out: Any) -> Tensor:
    """What a model returned: a floating-point tensor, or an object whose ``.sample`` is one.

    Raises TypeError for anything else.
    """
    tensor = out if isinstance(out, Tensor) else getattr(out, "sample", out)
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = checks.dtype_name(tensor.dtype) if isinstance(tensor, Tensor) else type(out).__name__
        raise TypeError(
            "model must return a floating-point tensor, or an object whose .sample is one;"
            f" it returned {got}"
        )
    return tensor


def halves(
    name: str, out: Tensor, x: Tensor, learned: bool, samples: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """The prediction and, where it is learned, v: views of an output [N, C or 2C, ...].

    samples: of out, where they are not those of x. A table without a learned variance leaves the
    second half of 2C channels alone. Raises ValueError, naming ``name``, for another shape, and
    for C channels where a variance is needed.
    """
    samples = x.shape[0] if samples is None else samples
    plain = (samples, *x.shape[1:])
    doubled = (samples, 2 * x.shape[1], *x.shape[2:]) if x.ndim > 1 else None
    if tuple(out.shape) == doubled:
        channels = x.shape[1]
        return out[:, :channels], out[:, channels:] if learned else None
    if learned:
        raise ValueError(
            f"{name} must have 2C channels for a learned variance,"
            f" {list(doubled or plain)}; got {checks.shape_text(out)}"
        )
    if tuple(out.shape) != plain:
        raise ValueError(
            f"{name} must have the shape of x, {list(plain)}, or twice the channels;"
            f" got {checks.shape_text(out)}"
        )
    return out, None


def prediction_of(output: Any, x: Tensor, learned: bool) -> tuple[Tensor, Tensor | None]:
    """The prediction and, where it is learned, v, of what a model returned for x, in x's dtype.

    Raises as `tensor_of` and `halves`, and ValueError for a tensor on another device.
    """
    out = tensor_of(output)
    if out.device != x.device:
        raise ValueError(
            f"model must return a tensor on {x.device}, the device of x0; it returned one on"
            f" {out.device}"
        )
    mean, raw = halves("the model's output", out, x, learned)
    return mean.to(x.dtype), None if raw is None else raw.to(x.dtype)


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
    return threshold_of(how, predicted_x0(row, x, out, out2)[1])


def threshold_of(how: DynamicThreshold, x0: Tensor) -> Tensor:
    """The threshold s of each sample [N] of x0 [N, ...] (Saharia et al. 2022, Section 2.3).

    The quantile of |x0| is interpolated linearly between neighbours, as torch.quantile does, for
    samples of any size and without sorting them. A NaN counts as the largest value. Nothing waits
    for a GPU.
    """
    sizes = x0.abs().flatten(1)
    count = math.prod(x0.shape[1:])
    if count == 0:
        return sizes.new_ones(len(x0))
    place = how.quantile * (count - 1)
    below = math.floor(place)
    low = sizes.kthvalue(below + 1, dim=1).values
    high = sizes.kthvalue(min(below + 2, count), dim=1).values
    return torch.lerp(low, high, place - below).clamp_(1, how.cap)
