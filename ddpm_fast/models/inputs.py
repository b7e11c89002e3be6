"""Checks of the inputs of networks: images, timesteps and labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_fast.utils import checks


def check_images(x: Any, channels: int, multiple: int, device: torch.device) -> None:
    """Check a batch of images.

    Args:
        x: Must be a floating-point tensor [N, channels, H, W].
        channels: Number of channels.
        multiple: H and W must be multiples of it, and not 0.
        device: Device of the network.

    Raises:
        ValueError: `x` is something else.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor; got {checks.describe(x)}")
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"x must be [N, {channels}, H, W]; got {checks.describe(x)}")
    if min(x.shape[2:]) < 1 or x.shape[2] % multiple or x.shape[3] % multiple:
        raise ValueError(
            f"x must have height and width that are multiples of {multiple};"
            f" got {checks.describe(x)}"
        )
    if x.device != device:
        raise ValueError(f"x must be a tensor on {device}; got {checks.describe(x)}")


def as_timesteps(x: Tensor, t: Tensor | int) -> Tensor:
    """Return the timesteps of a batch as int64 [N], or [1] for one shared timestep.

    Args:
        x: Images [N, C, H, W].
        t: int64 tensor, [N] or 0-d, on the device of `x`, or an integer >= 0.

    Raises:
        ValueError: `t` is something else.
    """
    if isinstance(t, Tensor):
        if t.dtype != torch.int64 or t.dim() > 1 or t.device != x.device:
            raise ValueError(
                f"t must be int64, 0-d or [{x.shape[0]}], on {x.device}; got {checks.describe(t)}"
            )
        if t.dim() == 1 and t.shape[0] != x.shape[0]:
            raise ValueError(
                f"t must be one timestep or {x.shape[0]}, as many as x has images;"
                f" got {checks.describe(t)}"
            )
        return t.reshape(-1)
    if not isinstance(t, int) or isinstance(t, bool) or t < 0:
        raise ValueError(f"t must be an int64 tensor or an integer >= 0; got {t!r}")
    return torch.full((1,), t, dtype=torch.int64, device=x.device)


def check_labels(
    x: Tensor, labels: Any, accepted: str = "int64", channels: int | None = None
) -> Tensor:
    """Return the labels of a batch, [N] or [N, channels], after a check.

    Args:
        x: Images [N, C, H, W].
        labels: Tensor on the device of `x`.
        accepted: Accepted dtypes: "int64", "real" (any but complex) or "floating".
        channels: Length of the embedding of a label. None: labels are [N].

    Raises:
        ValueError: `labels` is None or something else.
    """
    if labels is None:
        raise ValueError("class_labels must be given to a class-conditional network; got None")
    shape = [x.shape[0]] if channels is None else [x.shape[0], channels]
    if not isinstance(labels, Tensor):
        fits = False
    elif accepted == "int64":
        fits = labels.dtype == torch.int64
    else:
        fits = labels.is_floating_point() or (accepted == "real" and not labels.is_complex())
    if not fits or list(labels.shape) != shape or labels.device != x.device:
        raise ValueError(
            f"class_labels must be {accepted} {shape} on {x.device}; got {checks.describe(labels)}"
        )
    return labels


def check_label_range(labels: Tensor, classes: int) -> None:
    """Check that integer labels in CPU memory are in [0, classes).

    Labels on a GPU are not read, which would synchronise; neither are those of a compiled graph.

    Raises:
        ValueError: A label is out of range.
    """
    if torch.compiler.is_compiling() or labels.device.type != "cpu":
        return
    outside = labels[(labels < 0) | (labels >= classes)]
    if outside.numel():
        raise ValueError(f"class_labels must be in [0, {classes - 1}]; got {int(outside[0])}")


def reject_labels(labels: Any) -> None:
    """Raise ValueError unless the labels of a network without classes are None."""
    if labels is not None:
        raise ValueError(
            "class_labels must be None for a network without class embedding;"
            f" got {checks.describe(labels)}"
        )
