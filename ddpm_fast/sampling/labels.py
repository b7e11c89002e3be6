"""Labels of conditional models."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.utils import checks


def as_null_label(null: Tensor | int | None, labels: Tensor) -> Tensor:
    """Return the null label, checked against the labels.

    Args:
        null: An int for integer labels [N], or a tensor with the shape and dtype of one label.
        labels: Labels [N, ...].

    Returns:
        The null label on the device and in the dtype of `labels`.

    Raises:
        ValueError: `null` is not a label.
    """
    if isinstance(null, Tensor):
        fits = null.shape in (labels.shape[1:], ()) and null.dtype == labels.dtype
        got = f"{checks.dtype_name(null.dtype)} {checks.shape_text(null)}"
    else:
        whole = isinstance(null, int) and not isinstance(null, bool) and null >= 0
        fits, got = whole and not labels.is_floating_point() and labels.ndim == 1, repr(null)
    if not fits:
        accepted = f"{checks.dtype_name(labels.dtype)} {list(labels.shape[1:])}"
        raise ValueError(
            f"null_label must be a label, {accepted}, or an int >= 0 for integer labels; got {got}"
        )
    return torch.as_tensor(null).to(labels.device, labels.dtype)
