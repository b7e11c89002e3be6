"""A trainer that is interrupted and used again, and what it leaves for another one."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("accelerate", reason="needs accelerate")

from accelerate import Accelerator

from ddpm_fast.training.metrics import EpochMetrics
from ddpm_fast.training.run_state import CHECKPOINT, STATE
from trainer_cases import Squares, losses, network, run, same_weights, trainer


class Drawing(Squares):
    """Squares that draw from torch's generator whenever they are taken."""

    def __getitem__(self, i: int):
        return self.images[i] * torch.rand(())

    def split(self, test: float, seed: int):
        return tuple(Drawing(images=part.images) for part in super().split(test, seed))


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def test_an_interrupt_in_the_held_out_pass_loses_nothing(tmp_path):
    """Neither for the same trainer nor for one that goes on from what it saved."""
    whole = run(trainer(tmp_path / "a"))
    made = trainer(tmp_path / "b")
    held_out, made._held_out = made._held_out, interrupted
    with pytest.raises(KeyboardInterrupt):
        run(made)
    made.save()
    made._held_out = held_out
    other = run(trainer(tmp_path / "b", resume=True))
    for found in (run(made), other):
        assert losses(found) == losses(whole)
        assert all(row["images_per_s"] > 0 for row in found.history)
        assert same_weights(found.averaged, whole.averaged)


def test_an_interrupt_within_a_step_is_not_gone_over(tmp_path):
    """The weights may be those of before or after it."""
    made = trainer(tmp_path / "b")
    average, made._ema.update = made._ema.update, interrupted
    with pytest.raises(KeyboardInterrupt):
        run(made)
    made._ema.update = average
    state = (tmp_path / "b" / STATE).read_bytes()
    for again in (made.save, lambda: run(made)):
        with pytest.raises(RuntimeError, match=r"step 0 was interrupted: resume .*resume=True"):
            again()
    assert (tmp_path / "b" / STATE).read_bytes() == state
    assert losses(run(trainer(tmp_path / "b", resume=True))) == losses(run(trainer(tmp_path / "c")))


def test_a_loss_that_is_not_finite_is_reported_at_every_saving(tmp_path):
    """Also where the step was left out and the weights are fine."""
    made = trainer(tmp_path)
    next(made.run(progress=False))
    state = (tmp_path / STATE).read_bytes()
    step = made._train_step
    made._train_step = lambda *args: step(*args) * (math.inf if made.step == 4 else 1)
    for again in (lambda: run(made), made.save):
        with pytest.raises(RuntimeError, match="the loss is not finite at step 4, epoch 1"):
            again()
    assert (tmp_path / STATE).read_bytes() == state


def test_no_process_writes_before_all_have_looked(tmp_path, monkeypatch):
    """One that is late would find the state of a run that is its own."""
    met = []
    monkeypatch.setattr(
        Accelerator, "wait_for_everyone", lambda self: met.append((tmp_path / "run").exists())
    )
    trainer(tmp_path / "run")
    assert met == [False]


@pytest.mark.parametrize("last", [1, 3, 5])
def test_images_that_draw_are_the_same_again(tmp_path, last):
    """Whatever the caller has drawn, and in a run that goes on at any step."""
    found = []
    for seed in range(2):
        made = trainer(tmp_path / str(seed), network(), Drawing())
        torch.manual_seed(seed)
        found.append(run(made))
    assert losses(found[0]) == losses(found[1])
    made = trainer(tmp_path / "c", network(), Drawing(), save_steps=1)
    step = made._train_step
    made._train_step = lambda *args: interrupted() if made.step == last else step(*args)
    with pytest.raises(KeyboardInterrupt):
        run(made)
    again = trainer(tmp_path / "c", network(), Drawing(), resume=True)
    assert again.step == last
    assert losses(run(again)) == losses(found[0])


def test_a_checkpoint_that_was_set_aside_is_put_back(tmp_path):
    run(trainer(tmp_path))
    (tmp_path / CHECKPOINT).rename(tmp_path / f".{CHECKPOINT}.0badcafe.old")
    trainer(tmp_path, resume=True)
    assert (tmp_path / CHECKPOINT / "unet").is_dir()
    assert not list(tmp_path.glob(".*"))


def test_the_seconds_of_an_epoch_are_those_of_its_steps(monkeypatch):
    class Alone:
        @staticmethod
        def reduce(value, how):
            return value

    clock = [0.0]
    monkeypatch.setattr("ddpm_fast.training.metrics.time.perf_counter", lambda: clock[0])
    metrics = EpochMetrics(Alone(), 1, 10, [3.0], 2.0)  # one step of two seconds behind it
    clock[0] = 50.0
    metrics.start()
    for loss, now in ((1.0, 51.0), (2.0, 52.0)):
        metrics.add(torch.tensor(loss))
        clock[0] = now
    metrics.read()
    clock[0] = 90.0  # a saving
    metrics.start()
    metrics.add(torch.tensor(6.0))
    clock[0] = 94.0
    metrics.read()
    assert metrics.losses == [3, 1, 2, 6]
    assert metrics.seconds == 8
    assert metrics.summary(80) == {"loss": 3, "loss_min": 1, "loss_max": 6, "images_per_s": 10}
