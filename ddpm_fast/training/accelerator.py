"""The processes of a training and the device of each, by the package accelerate."""

from __future__ import annotations

from typing import Any

import torch

from ddpm_fast.utils.optional import require


def make_accelerator(device: torch.device | str | None) -> Any:
    """Return an `accelerate.Accelerator` for one process, or several on CPUs or GPUs.

    Args:
        device: Device of this process. None: a GPU if there is one.

    Raises:
        ImportError: accelerate is not installed.
        ValueError: `device` is not the one that accelerate assigned to this process, or the
            processes are of another kind.
    """
    accelerate: Any = require("accelerate", "training")
    wanted = None if device is None else torch.device(device)
    on_cpu = wanted.type == "cpu" if wanted is not None else not torch.cuda.is_available()
    # Autocast and compilation are options of the training, not of `accelerate config`.
    accelerator = accelerate.Accelerator(cpu=on_cpu, mixed_precision="no", dynamo_backend="no")
    distributed = accelerator.distributed_type
    kind = str(getattr(distributed, "value", distributed))
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise ValueError(f"training is for one process, or several on CPUs or GPUs; got {kind}")
    own = accelerator.device
    if wanted is not None and (wanted.type != own.type or wanted.index not in (None, own.index)):
        raise ValueError(
            f"device must be cpu, or the one that accelerate gives this process, {own}; got"
            f" {wanted}. Set CUDA_VISIBLE_DEVICES to choose a GPU"
        )
    return accelerator
