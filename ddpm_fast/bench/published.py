"""Reference timings of the compiled baseline, which validate a run on the same GPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch

SOURCE = "measured 2026-11-22, torch 2.11, H100 80GB HBM3"
WITHIN = 0.15
_H100 = "NVIDIA H100 80GB HBM3"
# (network, batch) -> ms of a forward pass of diffusers' UNet2DModel in float16 with torch.compile,
# channels_last memory and a CUDA graph, on an H100.
COMPILED_MS: Mapping[tuple[str, int], float] = {
    ("cifar32", 1): 1.09,
    ("cifar32", 64): 3.63,
    ("cifar32", 512): 20.6,
    ("ddpm256", 1): 3.27,
    ("ddpm256", 8): 19.8,
}
# GPU -> ratio of its memory's bandwidth to that of the H100 above. The processors are the same, so
# that a run takes between the time of the H100 and that time divided by the ratio.
BANDWIDTH_RATIO: Mapping[str, float] = {_H100: 1.0, "NVIDIA H200": 4.8 / 3.35}


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
        "yes" within 15% of the reference timing (for an H200, of the range from it down to what its
        faster memory allows), "no" beyond it in either direction, "unknown" without a reference
        timing, without a compiled baseline or for a dtype other than float16.
    """
    known, ratio = COMPILED_MS.get((network, batch)), BANDWIDTH_RATIO.get(gpu)
    if known is None or ratio is None or compiled_ms is None or dtype != torch.float16:
        return "unknown"
    within = (1 - WITHIN) / ratio <= compiled_ms / known <= 1 + WITHIN
    return "yes" if within else "no"
