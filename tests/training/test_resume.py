"""Resumed trainings."""

from __future__ import annotations

import errno
import math
import os

import pytest
import torch

pytest.importorskip("accelerate", reason="needs accelerate")

import ddpm_fast
from ddpm_fast import NoiseSchedule, ThesisUNet
from ddpm_fast.training.run_state import CHECKPOINT, HISTORY, STATE
from trainer_cases import Squares, losses, network, options, run, same_weights, trainer


@pytest.mark.parametrize(
    "chosen",
    [
        {"precision": "float16"},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"ema": 0.0}, marks=pytest.mark.slow),
        pytest.param({"precision": "bfloat16"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_resumed_training_has_the_losses_of_an_uninterrupted_one(tmp_path, chosen):
    """Bit for bit, dropout included."""
    model = lambda: network(dropout=0.3)  # noqa: E731
    whole = run(trainer(tmp_path / "a", model(), chosen=options(epochs=3, **chosen)))
    first = trainer(tmp_path / "b", model(), chosen=options(epochs=3, **chosen))
    steps = first.run(progress=False)
    next(steps), next(steps)
    steps.close()
    second = run(trainer(tmp_path / "b", model(), chosen=options(epochs=3, **chosen), resume=True))
    assert losses(second) == losses(whole)
    assert second.step == whole.step
    assert same_weights(second.network, whole.network)
    assert same_weights(second.averaged, whole.averaged)


@pytest.mark.parametrize("last", [pytest.param(1, marks=pytest.mark.slow), 5, 7])
def test_a_training_is_resumed_within_an_epoch(tmp_path, last):
    """Saved every two steps of epochs of three, and stopped in step `last`; 6 ends an epoch."""
    chosen = options(epochs=3)
    model = lambda: network(dropout=0.3)  # noqa: E731
    whole = run(trainer(tmp_path / "a", model(), chosen=chosen))
    first = trainer(tmp_path / "b", model(), chosen=chosen, save_every=3, save_steps=2)
    step = first._train_step

    def stopped(*args):
        if first.step == last:
            raise KeyboardInterrupt
        return step(*args)

    first._train_step = stopped
    with pytest.raises(KeyboardInterrupt):
        run(first)
    second = trainer(tmp_path / "b", model(), chosen=chosen, resume=True)
    assert second.step == last // 2 * 2
    assert second.epoch == second.step // 3
    assert same_weights(ddpm_fast.load(tmp_path / "b" / CHECKPOINT).unet, second.averaged) or (
        second.step == 0
    )
    run(second)
    assert losses(second) == losses(whole)
    assert [row["steps"] for row in second.history] == [3, 6, 9]
    assert same_weights(second.network, whole.network)
    assert same_weights(second.averaged, whole.averaged)


def test_changed_options_of_a_resumed_training_are_named(tmp_path):
    run(trainer(tmp_path))
    state = (tmp_path / STATE).read_bytes()
    for change, message in (
        (
            {"model": network(block_out_channels=(8, 8))},
            r"network.block_out_channels: \[8, 16\], now",
        ),
        (
            {"model": ThesisUNet(img_channels=1, sequence_channels=(8, 16), sample_size=8)},
            "network.class: 'UNet', now 'ThesisUNet'",
        ),
        ({"schedule": NoiseSchedule.cosine()}, "schedule.name: 'linear', now 'cosine'"),
        ({"schedule": NoiseSchedule.linear(500)}, "schedule.T: 1000, now 500"),
        ({"data": Squares(seed=1)}, "data.fingerprint"),
        ({"chosen": options(lr=3e-3)}, "lr: 0.001, now 0.003"),
        ({"chosen": options(prediction="v")}, "prediction: 'epsilon', now 'v'"),
    ):
        with pytest.raises(
            ValueError, match=rf"resume: .* was started with other options: .*{message}"
        ):
            trainer(tmp_path, resume=True, **change)
    assert (tmp_path / STATE).read_bytes() == state
    longer = run(trainer(tmp_path, chosen=options(epochs=3), resume=True))
    assert len(longer.history) == 3


def test_a_training_is_not_overwritten(tmp_path):
    run(trainer(tmp_path))
    with pytest.raises(FileExistsError, match=r"holds a training \(state.pt\); resume it"):
        trainer(tmp_path)
    (tmp_path / STATE).unlink()
    with pytest.raises(FileExistsError, match=r"holds a training \(history.csv\)"):
        trainer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no training state to resume from"):
        trainer(tmp_path / "none", resume=True)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"x" * 99])
def test_a_damaged_state_is_named(tmp_path, damage):
    run(trainer(tmp_path))
    path = tmp_path / STATE
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"state.pt: is no whole training state"):
        trainer(tmp_path, resume=True)


def test_no_code_in_a_state_is_executed(tmp_path):
    run(trainer(tmp_path))

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"format": 1, "options": Trap()}, tmp_path / STATE)
    with pytest.raises(ValueError, match="no whole training state"):
        trainer(tmp_path, resume=True)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("file", [STATE, HISTORY])
def test_a_full_disk_keeps_the_last_state(tmp_path, monkeypatch, file):
    first_run = trainer(tmp_path, chosen=options(epochs=3))
    steps = first_run.run(progress=False)
    next(steps)
    good = (tmp_path / STATE).read_bytes()
    replace = os.replace

    def full(source, target):
        if str(target).endswith(file):
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=rf"file cannot be written: No space left .*{file}"):
        next(steps)
    monkeypatch.undo()
    if file == STATE:
        assert (tmp_path / STATE).read_bytes() == good
    assert not list(tmp_path.glob(".ddpm_fast*"))
    again = run(trainer(tmp_path, chosen=options(epochs=3), resume=True))
    whole = run(trainer(tmp_path / "whole", chosen=options(epochs=3)))
    assert losses(again) == losses(whole)


def test_a_missing_checkpoint_is_written_when_resumed(tmp_path, monkeypatch):
    """The state of the last epoch was saved, its checkpoint was not."""
    first_run = trainer(tmp_path)
    steps = first_run.run(progress=False)
    next(steps)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("ddpm_fast.training.trainer.save", killed)
    with pytest.raises(KeyboardInterrupt):
        next(steps)
    monkeypatch.undo()
    assert not same_weights(ddpm_fast.load(tmp_path / CHECKPOINT).unet, first_run.averaged)
    again = run(trainer(tmp_path, resume=True))
    assert again.step == first_run.step
    assert same_weights(ddpm_fast.load(tmp_path / CHECKPOINT).unet, first_run.averaged)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    first_run = trainer(tmp_path, chosen=options(epochs=3))
    steps = first_run.run(progress=False)
    next(steps)
    with torch.no_grad():
        first_run.network.conv_out.bias.fill_(math.nan)
    with pytest.raises(RuntimeError, match="the loss is not finite at step 3, epoch 1"):
        next(steps)
    assert ddpm_fast.load(tmp_path / CHECKPOINT).unet.conv_out.bias.isfinite().all()
    assert run(trainer(tmp_path, chosen=options(epochs=3), resume=True)).epoch == 3


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """All losses of its epoch are finite."""
    first_run = trainer(tmp_path, chosen=options(epochs=3, test_share=0.0))
    steps = first_run.run(progress=False)
    next(steps)
    good = (tmp_path / STATE).read_bytes()
    step = first_run._train_step

    def damaged(*args):
        loss = step(*args)
        if first_run.step == 5:
            with torch.no_grad():
                first_run.network.conv_out.bias.fill_(math.inf)
        return loss

    first_run._train_step = damaged
    with pytest.raises(RuntimeError, match="the weights are not finite after step 5"):
        next(steps)
    assert (tmp_path / STATE).read_bytes() == good


def test_the_device_decides_if_the_optimizer_is_fused(tmp_path):
    first_run = trainer(tmp_path, chosen=options(epochs=2, precision="float16"))
    steps = first_run.run(progress=False)
    next(steps)
    state = torch.load(tmp_path / STATE, weights_only=True)
    state["optimizer"]["param_groups"][0]["fused"] = True
    torch.save(state, tmp_path / STATE)
    again = run(trainer(tmp_path, chosen=options(epochs=2, precision="float16"), resume=True))
    assert not again._optimizer.param_groups[0]["fused"]


def test_temporary_files_of_a_killed_process_are_removed(tmp_path):
    run(trainer(tmp_path))
    (tmp_path / ".ddpm_fast.0badcafe.tmp").write_bytes(b"half")
    (tmp_path / f".{CHECKPOINT}.0badcafe.old").mkdir()
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / ".ddpm_fast.0badcafe.tmp").write_bytes(b"half")
    trainer(tmp_path, resume=True)
    assert not list(tmp_path.rglob(".*"))
