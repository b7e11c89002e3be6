"""Options of a training, and combinations that are rejected."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="needs accelerate")

from ddpm_fast.training.config import TrainOptions
from ddpm_fast.training.lr_schedule import learning_rate
from trainer_cases import LINEAR, TINY, Labelled, network, options, trainer

ZERO_SNR = LINEAR.rescale_zero_terminal_snr()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", 0, "epochs"),
        ("batch", 1.5, "batch"),
        ("lr", 0.0, "lr"),
        ("lr", math.nan, "lr"),
        ("ema", 1.0, "ema"),
        ("decay", "step", "decay must be one of none, linear, cosine; got 'step'"),
        ("optimizer", "sgd", "optimizer must be one of adam, adamw; got 'sgd'"),
        ("objective", "l1", "objective"),
        ("precision", "int8", "precision"),
        ("weighting", "snr", "weighting"),
        ("objective", "hybrid", "needs variance 'learned'"),
        ("betas", (0.9, 1.0), r"betas\[1\]"),
        ("clip_norm", 0.0, "clip_norm"),
        ("seed", 1 << 64, "seed"),
        ("test_share", 1.0, "test_share"),
        ("compile", "no", "compile must be a bool"),
    ],
)
def test_invalid_options_are_named(name, value, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TrainOptions(**{name: value})


def test_options_can_be_stored_as_json():
    chosen = options(betas=(0.8, 0.95), weighting="min_snr")
    assert TrainOptions.from_dict(chosen.to_dict()) == chosen
    kinds = TrainOptions(lr=np.float64(1e-3), seed=np.int64(3), betas=[np.float32(0.5), 0.9])
    assert [type(v) for v in (kinds.lr, kinds.seed, *kinds.betas)] == [float, int, float, float]
    with pytest.raises(ValueError, match="weighting must be None for the objective 'full'"):
        TrainOptions(objective="full", weighting="min_snr")
    with pytest.raises(ValueError, match="there is no momentum"):
        TrainOptions.from_dict({"momentum": 0.9})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": network(in_channels=3, out_channels=3)}, ValueError, r"images are \[1, 8, 8\]"),
        ({"model": network(out_channels=2)}, ValueError, "output channels"),
        ({"model": network(num_class_embeds=5)}, ValueError, "labels"),
        ({"data": Labelled()}, ValueError, "labels"),
        ({"model": network(num_class_embeds=4), "data": Labelled()}, ValueError, "5 classes"),
        ({"model": torch.nn.Linear, "data": None}, TypeError, "network must be a Module"),
        ({"chosen": 3}, TypeError, "options must be a TrainOptions"),
        ({"schedule": "linear"}, TypeError, "schedule must be a NoiseSchedule"),
        ({"save_every": 0}, ValueError, "save_every"),
        ({"save_steps": 0}, ValueError, "save_steps"),
        ({"chosen": options(test_share=0.999)}, ValueError, "test_share"),
        ({"chosen": options(label_dropout=0.1)}, ValueError, "label_dropout needs labels"),
        ({"model": network().half()}, ValueError, "float32"),
        ({"model": torch.nn.Linear(1, 1)}, TypeError, "network must be a UNet or ThesisUNet"),
        ({"schedule": ZERO_SNR}, ValueError, "zero terminal SNR"),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_arguments_that_do_not_fit_are_rejected(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        trainer(tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_the_learning_rate():
    chosen = TrainOptions(lr=1.0, warmup=10, decay="linear", decay_share=0.5)
    rates = [learning_rate(chosen, step, 100) for step in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert rates[9:50] == [1.0] * 41
    assert rates[75] == pytest.approx(0.5)
    assert 0 < rates[99] < 0.03
    assert learning_rate(TrainOptions(lr=1.0, warmup=0, decay="none"), 99, 100) == 1.0
    cosine = TrainOptions(lr=1.0, warmup=0, decay="cosine", decay_share=1.0)
    assert learning_rate(cosine, 50, 100) == pytest.approx(0.5)
    assert TINY["sample_size"] == 8
