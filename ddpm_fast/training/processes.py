"""The processes of a training run, and the device of each, by accelerate."""

from __future__ import annotations

from typing import Any

import torch

from ddpm_fast.utils.optional import require


def processes(device: torch.device | str | None) -> Any:
    """An `accelerate.Accelerator` of one process, or of several on CPUs or GPUs.

    device: None for a GPU where there is one. Raises ImportError saying what to install, and
    ValueError for another device than the process has been given.
    """
    accelerate: Any = require("accelerate", "training")
    place = None if device is None else torch.device(device)
    on_cpu = place.type == "cpu" if place is not None else not torch.cuda.is_available()
    # Autocast and compilation are the options', not those of `accelerate config`.
    found = accelerate.Accelerator(cpu=on_cpu, mixed_precision="no", dynamo_backend="no")
    kind = str(getattr(found.distributed_type, "value", found.distributed_type))
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise ValueError(f"training is for one process, or several on CPUs or GPUs; got {kind}")
    given = found.device
    if place is not None and (place.type != given.type or place.index not in (None, given.index)):
        raise ValueError(
            f"device must be cpu, or the one that accelerate gives this process, {given}; got"
            f" {place}. Set CUDA_VISIBLE_DEVICES to choose a GPU"
        )
    return found
