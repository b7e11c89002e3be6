"""Trainer on a GPU: steps do not synchronise, and trainings are resumed."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("accelerate", reason="needs accelerate")

from ddpm_fast import NoiseSchedule
from ddpm_fast.training.trainer import Trainer
from trainer_cases import Labelled, losses, network, options, run

pytestmark = pytest.mark.cuda
LABELLED = {"label_dropout": 0.5, "offset_noise": 0.1}


def trainer(out, chosen, **others) -> Trainer:
    """Create a trainer of a network whose last class is the null label."""
    model = network(num_class_embeds=6)
    return Trainer(model, Labelled(), NoiseSchedule.linear(), chosen, out, device="cuda", **others)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_step_does_not_synchronise(tmp_path, precision):
    trained = run(trainer(tmp_path, options(precision=precision, **LABELLED)))  # warm
    images = torch.randn(28, 1, 8, 8, device="cuda").to(memory_format=torch.channels_last)
    labels = torch.zeros(28, dtype=torch.int64, device="cuda")
    t = torch.full((28,), 500, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = trained._train_step(images, labels, t, 10_000)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(loss.item())


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_training_is_resumed(tmp_path, precision):
    chosen = options(epochs=4, precision=precision, **LABELLED)
    whole = run(trainer(tmp_path / "a", chosen))
    steps = trainer(tmp_path / "b", chosen).run(progress=False)
    next(steps), next(steps)
    steps.close()
    second = run(trainer(tmp_path / "b", chosen, resume=True))
    for ours, theirs in zip(losses(second), losses(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
