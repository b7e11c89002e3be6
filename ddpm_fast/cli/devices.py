"""The option `--device`, and the description of a device."""

from __future__ import annotations

import torch


def device_of(name: str | None) -> torch.device:
    """Parse `--device`; None stands for a GPU if there is one, else the CPU.

    Raises:
        ValueError: the text is no device.
        RuntimeError: there is no GPU.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N; got {name!r}")
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not found:
            raise RuntimeError(f"--device {name}: torch finds no NVIDIA GPU (see nvidia-smi)")
        if (device.index or 0) >= found:
            raise ValueError(f"--device must be below cuda:{found}; got {name!r}")
    return device


def device_text(device: torch.device) -> str:
    """Describe a device, with the name of the GPU or the number of threads."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"cpu ({threads} thread{'s' if threads > 1 else ''})"
