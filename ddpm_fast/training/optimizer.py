"""The optimizer of a training."""

from __future__ import annotations

import torch
from torch import nn

from ddpm_fast.training.config import TrainOptions


def make_optimizer(parameters: list[nn.Parameter], options: TrainOptions) -> torch.optim.Optimizer:
    """Return Adam or AdamW for the parameters."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[options.optimizer]
    return kind(
        parameters,
        options.lr,
        betas=options.betas,
        weight_decay=options.weight_decay,
        fused=parameters[0].is_cuda,  # the fused one does not synchronise with a GradScaler
    )
