"""Interrupted trainers: used again, or resumed by another one."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("accelerate", reason="needs accelerate")

from accelerate import Accelerator

from ddpm_fast.training.metrics import EpochMetrics
from ddpm_fast.training.run_state import CHECKPOINT, STATE
from trainer_cases import Squares, losses, network, run, same_weights, trainer


class RandomSquares(Squares):
    """Squares that use torch's generator whenever they are loaded."""

    def __getitem__(self, i: int):
        return self.images[i] * torch.rand(())

    def split(self, test: float, seed: int):
        return tuple(RandomSquares(images=part.images) for part in super().split(test, seed))


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def test_an_interrupt_in_the_test_pass_loses_nothing(tmp_path):
    """For the same trainer, and for one that resumes what it saved."""
    whole = run(trainer(tmp_path / "a"))
    first = trainer(tmp_path / "b")
    held_out, first._held_out = first._held_out, interrupted
    with pytest.raises(KeyboardInterrupt):
        run(first)
    first.save()
    first._held_out = held_out
    other = run(trainer(tmp_path / "b", resume=True))
    for found in (run(first), other):
        assert losses(found) == losses(whole)
        assert all(row["images_per_s"] > 0 for row in found.history)
        assert same_weights(found.averaged, whole.averaged)


def test_a_trainer_interrupted_within_a_step_is_not_used_again(tmp_path):
    """Its weights may be those before or after the step."""
    first = trainer(tmp_path / "b")
    average, first._ema.update = first._ema.update, interrupted
    with pytest.raises(KeyboardInterrupt):
        run(first)
    first._ema.update = average
    state = (tmp_path / "b" / STATE).read_bytes()
    for again in (first.save, lambda: run(first)):
        with pytest.raises(RuntimeError, match=r"step 0 was interrupted: resume .*resume=True"):
            again()
    assert (tmp_path / "b" / STATE).read_bytes() == state
    assert losses(run(trainer(tmp_path / "b", resume=True))) == losses(run(trainer(tmp_path / "c")))


def test_a_loss_that_is_not_finite_is_reported_whenever_it_is_saved(tmp_path):
    """Even if the step was skipped and the weights are finite."""
    first = trainer(tmp_path)
    next(first.run(progress=False))
    state = (tmp_path / STATE).read_bytes()
    step = first._train_step
    first._train_step = lambda *args: step(*args) * (math.inf if first.step == 4 else 1)
    for again in (lambda: run(first), first.save):
        with pytest.raises(RuntimeError, match="the loss is not finite at step 4, epoch 1"):
            again()
    assert (tmp_path / STATE).read_bytes() == state


def test_no_process_writes_before_all_have_checked_the_folder(tmp_path, monkeypatch):
    """A late process would find the state of its own training."""
    met = []
    monkeypatch.setattr(
        Accelerator, "wait_for_everyone", lambda self: met.append((tmp_path / "run").exists())
    )
    trainer(tmp_path / "run")
    assert met == [False]


@pytest.mark.parametrize("last", [3, 5])
def test_random_images_are_reproducible(tmp_path, last):
    """For any state of the caller's generator, and in a resumed training."""
    found = []
    for seed in range(2):
        first = trainer(tmp_path / str(seed), network(), RandomSquares())
        torch.manual_seed(seed)
        found.append(run(first))
    assert losses(found[0]) == losses(found[1])
    first = trainer(tmp_path / "c", network(), RandomSquares(), save_steps=1)
    step = first._train_step
    first._train_step = lambda *args: interrupted() if first.step == last else step(*args)
    with pytest.raises(KeyboardInterrupt):
        run(first)
    again = trainer(tmp_path / "c", network(), RandomSquares(), resume=True)
    assert again.step == last
    assert losses(run(again)) == losses(found[0])


def test_a_checkpoint_under_its_temporary_name_is_restored(tmp_path):
    run(trainer(tmp_path))
    (tmp_path / CHECKPOINT).rename(tmp_path / f".{CHECKPOINT}.0badcafe.old")
    trainer(tmp_path, resume=True)
    assert (tmp_path / CHECKPOINT / "unet").is_dir()
    assert not list(tmp_path.glob(".*"))


def test_seconds_of_an_epoch_are_those_of_its_steps(monkeypatch):
    class Alone:
        @staticmethod
        def reduce(value, how):
            return value

    clock = [0.0]
    monkeypatch.setattr("ddpm_fast.training.metrics.time.perf_counter", lambda: clock[0])
    metrics = EpochMetrics(Alone(), 1, 10, [3.0], 2.0)  # after one step of two seconds
    clock[0] = 50.0
    metrics.start()
    for loss, now in ((1.0, 51.0), (2.0, 52.0)):
        metrics.add(torch.tensor(loss))
        clock[0] = now
    metrics.read()
    clock[0] = 90.0  # a checkpoint was saved
    metrics.start()
    metrics.add(torch.tensor(6.0))
    clock[0] = 94.0
    metrics.read()
    assert metrics.losses == [3, 1, 2, 6]
    assert metrics.seconds == 8
    assert metrics.summary(80) == {"loss": 3, "loss_min": 1, "loss_max": 6, "images_per_s": 10}
