"""Checksums of tensors' bytes, which tell whether tensors were written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm_fast.ops.dispatch import get_backend


@torch.no_grad()
def checksum(tensors: Sequence[Tensor], backend: str = "auto") -> Tensor:
    """Compute a checksum of each tensor's bytes; see `ddpm_fast.ops.reference.checksum`.

    It changes with any single 64-bit word, however it was written: by an optimizer, through
    `.data`, a NumPy view or another process. Other changes leave it as it was with a probability of
    about 2^-64. It is the same in every backend and does not synchronize with a GPU.

    Args:
        tensors: Tensors of any dtypes, shapes and strides, all on one device.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        int64 [len(tensors), 2], on the device of the tensors: sum and product.

    Raises:
        ValueError: The backend is unknown, or the tensors are on several devices.
        RuntimeError: The backend cannot run.
    """
    if not tensors:
        return torch.empty(0, 2, dtype=torch.int64)
    device = tensors[0].device
    other = next((tensor.device for tensor in tensors if tensor.device != device), None)
    if other is not None:
        raise ValueError(f"tensors must be on one device; got {device} and {other}")
    return get_backend(backend, device, torch.float32).checksum(list(tensors))
