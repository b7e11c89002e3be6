"""What a network returned, as a step reads it: its halves, and the thresholds of its x0."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ddpm_fast.utils import checks


def model_tensor(out: Any) -> Tensor:
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


def split_learned_variance(
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

    Raises as `model_tensor` and `split_learned_variance`, and ValueError for a tensor on another
    device.
    """
    out = model_tensor(output)
    if out.device != x.device:
        raise ValueError(
            f"model must return a tensor on {x.device}, the device of x0; it returned one on"
            f" {out.device}"
        )
    mean, learned_output = split_learned_variance("the model's output", out, x, learned)
    return mean.to(x.dtype), None if learned_output is None else learned_output.to(x.dtype)
