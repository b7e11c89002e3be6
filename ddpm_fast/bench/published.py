"""Reference timings of the compiled baseline, which validate a run on the same GPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch

SOURCE = "measured 2026-11-22, torch 2.11, H100 80GB HBM3"
WITHIN = 0.15
# (GPU, network, batch) -> ms of a forward pass of diffusers' UNet2DModel in float16 with
# torch.compile, channels_last memory and a CUDA graph.
COMPILED_MS: Mapping[tuple[str, str, int], float] = {
    ("NVIDIA H100 80GB HBM3", "cifar32", 1): 1.09,
    ("NVIDIA H100 80GB HBM3", "cifar32", 64): 3.63,
    ("NVIDIA H100 80GB HBM3", "cifar32", 512): 20.6,
    ("NVIDIA H100 80GB HBM3", "ddpm256", 1): 3.27,
    ("NVIDIA H100 80GB HBM3", "ddpm256", 8): 19.8,
}


def counts(
    gpu: str, network: str, batch: int, dtype: torch.dtype, compiled_ms: float | None
) -> str:
    """Compare a run's compiled baseline with the reference timing for its GPU.

    Args:
        gpu: name of the GPU.
        network: name of the network.
        batch: images in a batch.
        dtype: dtype of the network.
        compiled_ms: milliseconds of the compiled baseline; None if it was not measured.

    Returns:
        "yes" within 15% of the reference timing, "no" beyond it in either direction, "unknown"
        without a reference timing, without a compiled baseline or for a dtype other than float16.
    """
    known = COMPILED_MS.get((gpu, network, batch))
    if known is None or compiled_ms is None or dtype != torch.float16:
        return "unknown"
    return "yes" if abs(compiled_ms / known - 1) <= WITHIN else "no"
