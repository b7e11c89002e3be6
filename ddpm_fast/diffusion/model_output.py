"""Outputs of a model: the tensor, and its split into prediction and learned variance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_fast.utils import checks


def model_placement(model: Any) -> tuple[torch.device | None, torch.dtype | None]:
    """Return device and dtype of a model; None for what it does not have.

    Args:
        model: A module, for those of its first floating-point parameter, or another callable, for
            its attributes `device` and `dtype`. An attribute `input_dtype` comes before both.
    """
    source: Any = model
    if isinstance(model, torch.nn.Module):
        source = next((p for p in model.parameters() if p.is_floating_point()), None)
    device, dtype = getattr(source, "device", None), getattr(model, "input_dtype", None)
    dtype = getattr(source, "dtype", None) if dtype is None else dtype
    return (
        device if isinstance(device, torch.device) else None,
        dtype if isinstance(dtype, torch.dtype) else None,
    )


def model_tensor(out: Any) -> Tensor:
    """Return the tensor in a model output: the output itself, or its attribute `sample`.

    Raises:
        TypeError: It is not a floating-point tensor.
    """
    tensor = out if isinstance(out, Tensor) else getattr(out, "sample", out)
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = checks.dtype_name(tensor.dtype) if isinstance(tensor, Tensor) else type(out).__name__
        raise TypeError(
            "model must return a floating-point tensor, or an object whose .sample is one;"
            f" got {got}"
        )
    return tensor


def split_learned_variance(
    name: str, out: Tensor, x: Tensor, learned: bool, samples: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Split a model output into the prediction and the learned variance v.

    Args:
        name: Name of the output in messages.
        out: Model output [N, C, ...] or [N, 2C, ...].
        x: Model input [N, C, ...].
        learned: Return the second half of the channels. If False, it is ignored.
        samples: Number of samples in `out`. Default: that of `x`.

    Returns:
        Views of the prediction and of v; None for v if not `learned`.

    Raises:
        ValueError: `out` has another shape, or C channels where a learned variance needs 2C.
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
    """Return the prediction and the learned variance v in a model output, in the dtype of x.

    Args:
        output: Return value of the model for `x`.
        x: Model input [N, C, ...].
        learned: The output has 2C channels, of which v is the second half.

    Returns:
        The prediction and v; None for v if not `learned`.

    Raises:
        TypeError: As `model_tensor`.
        ValueError: As `split_learned_variance`, or the output is on another device.
    """
    out = model_tensor(output)
    if out.device != x.device:
        raise ValueError(
            f"model must return a tensor on {x.device}, the device of x0; got one on {out.device}"
        )
    mean, learned_output = split_learned_variance("the model's output", out, x, learned)
    return mean.to(x.dtype), None if learned_output is None else learned_output.to(x.dtype)
