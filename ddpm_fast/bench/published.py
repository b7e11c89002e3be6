"""Figures of the compiled peer that were measured before: a run counts where it comes near them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

SOURCE = "measured 2026-11-22, torch 2.11, H100 80GB HBM3"
WITHIN = 0.15
# (GPU, network, batch) -> ms a forward pass in float16 of diffusers' UNet2DModel with
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
    """Whether a run counts: its compiled peer within 15% of the figure for this GPU.

    "unknown" where there is no figure, no compiled peer (None), or another dtype than float16;
    otherwise "yes" or "no". A peer that is faster by more than that is another peer too: "no".
    """
    known = COMPILED_MS.get((gpu, network, batch))
    if known is None or compiled_ms is None or dtype != torch.float16:
        return "unknown"
    return "yes" if abs(compiled_ms / known - 1) <= WITHIN else "no"
