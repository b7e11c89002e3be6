"""Samples during a training."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ddpm_fast.sampling.sampler import Sampler
from ddpm_fast.sampling.step_table import StepTable
from ddpm_fast.training.trainer import Trainer
from ddpm_fast.utils.files import prepare_folder
from ddpm_fast.utils.images import save_png, sheet

SEED = 0x5A3D  # the same x_T in every sheet


def draw_samples(trainer: Trainer, num: int = 16, steps: int | None = 50) -> Tensor:
    """Sample images from the averaged network by ancestral sampling.

    Every call starts from the same x_T. Labels of a conditional network cycle through its classes,
    without the null label.

    Args:
        trainer: The training.
        num: Number of images.
        steps: Steps of the sampler; None for all timesteps.

    Returns:
        Images in [-1, 1], float32 [num, C, H, W].
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
        real = classes - 1 if options.label_dropout else classes
        labels = torch.arange(num) % real
    sampler = Sampler(network, table, network.config.sample_shape, num)
    return sampler.sample(num, SEED, labels=labels, progress=False)


def save_samples(trainer: Trainer, path: Path, num: int = 16, steps: int | None = 50) -> None:
    """Save `draw_samples` as one sheet, in the main process.

    Raises:
        OSError: The file cannot be written.
    """
    if trainer.is_main:
        prepare_folder(path.parent)
        save_png(sheet(draw_samples(trainer, num, steps)), path)
