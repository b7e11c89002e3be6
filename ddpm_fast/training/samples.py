"""Samples of a network that is being trained."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ddpm_fast.sampling.sampler import Sampler
from ddpm_fast.sampling.step_table import StepTable
from ddpm_fast.training.trainer import Trainer
from ddpm_fast.utils.files import prepare_folder
from ddpm_fast.utils.images import save_png, sheet

SEED = 0x5A3D  # of all sheets, so that they show the same starting points


def draw_samples(trainer: Trainer, num: int = 16, steps: int | None = 50) -> Tensor:
    """Images of the averaged network by ancestral sampling, float32 [num, C, H, W].

    The starting points are the same at every call. The labels of a conditional network go through
    its classes, but for the null label where labels are dropped.
    """
    network, options = trainer.averaged.eval(), trainer.options
    table = StepTable.ddpm(
        trainer.schedule,
        steps if steps is None else min(steps, trainer.schedule.T),
        options.variance,
        options.prediction,
    )
    classes = network.config.num_classes
    labels = None
    if classes is not None:
        kept = classes - 1 if options.label_dropout else classes
        labels = torch.arange(num) % kept
    sampler = Sampler(network, table, network.config.sample_shape, num)
    return sampler.sample(num, SEED, labels=labels, progress=False)


def save_samples(trainer: Trainer, path: Path, num: int = 16, steps: int | None = 50) -> None:
    """`draw_samples` as a sheet, by the main process. Raises OSError from the disk."""
    if trainer.is_main:
        prepare_folder(path.parent)
        save_png(sheet(draw_samples(trainer, num, steps)), path)
