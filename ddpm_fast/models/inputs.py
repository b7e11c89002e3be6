"""What the networks are called with: images, timesteps and labels, refused in the same words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_fast.utils import checks


def check_images(x: Any, channels: int, multiple: int, device: torch.device) -> None:
    """That x is a floating [N, channels, H, W] on `device`, H and W multiples of `multiple`.

    Raises:
        ValueError: it is not; the message says what is accepted and what came.
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
    """The timesteps of a batch x, int64: [N], or [1] where all of it shares one.

    Raises:
        ValueError: t is neither int64 of [N] or 0-d on the device of x, nor an integer >= 0.
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
    """The labels of a batch x, [N] or [N, channels], on its device.

    accepted: "int64", "real" or "floating", their dtype.

    Raises:
        ValueError: they are missing or something else.
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
    """That integer labels are below `classes`, where that can be seen without waiting.

    It looks at values, so neither inside a compiled graph nor on another device than the CPU.

    Raises:
        ValueError: one of them is not.
    """
    if torch.compiler.is_compiling() or labels.device.type != "cpu":
        return
    outside = labels[(labels < 0) | (labels >= classes)]
    if outside.numel():
        raise ValueError(f"class_labels must be in [0, {classes - 1}]; got {int(outside[0])}")


def reject_labels(labels: Any) -> None:
    """Raises ValueError for labels that a network without classes was given."""
    if labels is not None:
        raise ValueError(
            "class_labels must be None for a network without class embedding;"
            f" got {checks.describe(labels)}"
        )
