"""The trainer: its losses, its average, what goes on where, and what is refused."""

from __future__ import annotations

import copy
import csv
import errno
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="needs accelerate")

from accelerate.state import AcceleratorState

import ddpm_fast
from cases import same_bits
from ddpm_fast import NoiseSchedule, ThesisUNet, training_losses
from ddpm_fast.data import ImageData
from ddpm_fast.training import order
from ddpm_fast.training.options import TrainOptions
from ddpm_fast.training.samples import draw_samples, save_samples
from ddpm_fast.training.trainer import CHECKPOINT, CURVE, HISTORY, STATE, Trainer
from trainer_cases import TINY, Labelled, Squares, losses, network, options

LINEAR = NoiseSchedule.linear()
ZERO_SNR = LINEAR.rescale_zero_terminal_snr()


def trainer(out, model=None, data=None, schedule=LINEAR, chosen=None, **others) -> Trainer:
    model = model if model is not None else network()
    data = data if data is not None else Squares()
    return Trainer(model, data, schedule, chosen or options(), out, device="cpu", **others)


def run(made: Trainer) -> Trainer:
    for _ in made.run(progress=False):
        pass
    return made


def weights(module) -> list[torch.Tensor]:
    return [value.clone() for value in module.state_dict().values()]


def same_weights(a, b) -> bool:
    return all(map(same_bits, weights(a), weights(b)))


# What a step does


def test_a_run_is_the_loop_written_out(tmp_path):
    """Adam with warm-up and clipping, and the average, by the places of the images."""
    made = run(trainer(tmp_path, chosen=options(clip_norm=0.5)))
    model, step = network(), 0
    average = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), 1.0)
    data = made.train_data
    means = []
    for epoch in range(2):
        model.train()
        for indices, first in order.Epoch(len(data), 28, 0, epoch).batches(0, 1):
            t = order.timesteps(0, first, len(indices), 1000)
            x0 = data.images[indices]
            loss = training_losses(model, x0, t, LINEAR, seed=0, first_sample=first).loss.mean()
            optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 2)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            with torch.no_grad():
                for a, b in zip(average.parameters(), model.parameters(), strict=True):
                    a.lerp_(b, 1 - (1 + step) / (10 + step))
            means.append(loss.item())
            step += 1
    for row, of_epoch in zip(made.history, (means[:3], means[3:]), strict=True):
        assert row["loss"] == pytest.approx(sum(of_epoch) / 3, rel=1e-5)
        assert row["loss_min"] == pytest.approx(min(of_epoch), rel=1e-5)
        assert row["loss_max"] == pytest.approx(max(of_epoch), rel=1e-5)
    for ours, theirs in ((made.network, model), (made.averaged, average)):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_loss_falls_as_that_of_a_plain_loop(tmp_path):
    """Over three seeds, against torch.randn, torch.randint and the equation."""
    ours, plain = [], []
    for seed in range(3):
        chosen = options(epochs=30, batch=32, lr=2e-3, seed=seed, test_share=0.0, ema=0.0)
        made = run(trainer(tmp_path / str(seed), network(seed), chosen=chosen, save_every=30))
        ours.append(sum(row["loss"] for row in made.history[-5:]) / 5)
        model, images = network(seed), Squares().images
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        abar, kept = LINEAR.alphas_cumprod.float(), []
        torch.manual_seed(seed)
        for epoch in range(30):
            for x0 in images[torch.randperm(96)].split(32):
                t, noise = torch.randint(0, 1000, (32,)), torch.randn_like(x0)
                a = abar[t].view(-1, 1, 1, 1)
                out = model(a.sqrt() * x0 + (1 - a).sqrt() * noise, t)
                loss = torch.nn.functional.mse_loss(out, noise)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                kept += [loss.item()] * (epoch >= 25)
        plain.append(sum(kept) / len(kept))
    spread = max(abs(a - b) for a in plain for b in plain) + 0.02
    assert abs(sum(ours) / 3 - sum(plain) / 3) < 2 * spread
    assert max(ours) < 0.7  # it begins at 1


def test_images_come_at_once_or_one_by_one(tmp_path):
    """A data set with `batch` and one without, labels and flips included."""
    given = Labelled()
    pairs = [given[i] for i in range(len(given))]
    data = ImageData(
        torch.stack([image for image, _ in pairs]),
        name="squares",
        labels=[label for _, label in pairs],
        class_names=list("abcde"),
        flip=True,
    )

    class OneByOne(Labelled):
        def __init__(self, of):
            self.of, self.name, self.fingerprint = of, of.name, of.fingerprint

        def __len__(self):
            return len(self.of)

        def __getitem__(self, i):
            return self.of[i]

        def set_epoch(self, epoch):
            self.of.set_epoch(epoch)

        def split(self, test, seed):
            return tuple(OneByOne(part) for part in self.of.split(test, seed))

    made = [
        run(trainer(tmp_path / name, network(num_class_embeds=5), which))
        for name, which in (("a", data), ("b", OneByOne(data)))
    ]
    assert losses(made[0]) == losses(made[1])
    assert same_weights(made[0].network, made[1].network)


def test_without_an_average_the_network_itself_is_saved(tmp_path):
    made = run(trainer(tmp_path, chosen=options(ema=0.0)))
    assert made.averaged is made.network
    assert same_weights(ddpm_fast.load(tmp_path / CHECKPOINT).unet, made.network)


def test_what_is_written(tmp_path):
    made = run(trainer(tmp_path))
    made.draw("squares")
    save_samples(made, tmp_path / "s.png", 4, 5)
    found = ddpm_fast.load(tmp_path / CHECKPOINT)
    assert same_weights(found.unet, made.averaged)
    assert not same_weights(found.unet, made.network)
    assert (found.prediction, found.variance, found.schedule) == ("epsilon", "posterior", LINEAR)
    with (tmp_path / HISTORY).open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in made.history]
    assert [int(row["steps"]) for row in rows] == [3, 6]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [CHECKPOINT, CURVE, HISTORY, STATE, "s.png"]
    )


def test_diffusers_reads_the_checkpoint(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
    made = run(trainer(tmp_path, chosen=options(prediction="v")))
    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path / CHECKPOINT)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 500])
    torch.testing.assert_close(pipe.unet(x, t).sample, made.averaged.eval()(x, t))


@pytest.mark.parametrize(
    "chosen",
    [
        {"objective": "full", "variance": "beta"},
        {"objective": "hybrid", "variance": "learned_range"},
        {"objective": "score"},
        {"prediction": "v", "weighting": "min_snr"},
        {"prediction": "x0"},
        {"offset_noise": 0.1},
        {"prediction": "score"},
        {"precision": "bfloat16"},
        {"precision": "float16"},
        {"optimizer": "adamw", "weight_decay": 0.1, "decay": "cosine"},
    ],
    ids=lambda c: "-".join(map(str, c.values())),
)
def test_every_objective_trains(tmp_path, chosen):
    model = network(out_channels=2) if "hybrid" in chosen.values() else network()
    made = run(trainer(tmp_path, model, chosen=options(**chosen)))
    assert all(map(math.isfinite, losses(made)[-1]))
    assert not same_weights(made.network, network(out_channels=model.config.out_channels))
    assert draw_samples(made, 2, 4).shape == (2, 1, 8, 8)


def test_labels_and_their_dropout(tmp_path):
    """A share of the labels, by the places of the images, becomes the last class."""
    made = trainer(
        tmp_path, network(num_class_embeds=6), Labelled(), chosen=options(label_dropout=0.5)
    )
    seen, held_out = [], []
    made.network.register_forward_pre_hook(lambda module, args: seen.append(args[2].clone()))
    made.averaged.register_forward_pre_hook(lambda module, args: held_out.append(args[2].clone()))
    run(made)
    lost = torch.cat([order.dropped(0, first, 28, 0.5) for first in (0, 28, 56, 86, 114, 142)])
    assert torch.equal(torch.cat(seen) == 5, lost)
    assert 0.3 < float(lost.float().mean()) < 0.7
    assert held_out
    assert all((labels < 5).all() for labels in held_out)
    assert draw_samples(made, 4, 3).shape == (4, 1, 8, 8)


def test_the_network_of_the_thesis(tmp_path):
    torch.manual_seed(0)
    model = ThesisUNet(img_channels=1, sequence_channels=(8, 16), sample_size=8)
    made = run(trainer(tmp_path, model))
    assert same_weights(ddpm_fast.load(tmp_path / CHECKPOINT).unet, made.averaged)
    assert draw_samples(made, 2, 3).isfinite().all()


@pytest.mark.slow
def test_a_compiled_network_has_the_losses_of_eager(tmp_path):
    eager = run(trainer(tmp_path / "a"))
    made = run(trainer(tmp_path / "b", chosen=options(compile=True)))
    for ours, theirs in zip(losses(made), losses(eager), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_training_leaves_the_callers_random_numbers_alone(tmp_path):
    torch.manual_seed(5)
    made = trainer(tmp_path)
    before = torch.get_rng_state()
    run(made)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_dropout_is_another_in_every_step(tmp_path):
    made, seeds = trainer(tmp_path, network(dropout=0.3), chosen=options(epochs=3)), []
    made.network.register_forward_pre_hook(lambda module, args: seeds.append(torch.initial_seed()))
    run(made)
    assert len(set(seeds)) == len(seeds) == 9
    assert order.torch_seed(0, 5, 0) not in (order.torch_seed(0, 5, 1), order.torch_seed(1, 5, 0))


# Order


def test_every_image_once_an_epoch_in_an_order_of_its_own():
    epochs = [order.Epoch(100, 20, 3, e) for e in range(3)]
    orders = [torch.cat([i for i, _ in epoch.batches(0, 1)]) for epoch in epochs]
    for found in orders:
        assert sorted(found.tolist()) == list(range(100))
    assert not torch.equal(orders[0], orders[1])
    assert torch.equal(
        orders[1], torch.cat([i for i, _ in order.Epoch(100, 20, 3, 1).batches(0, 1)])
    )
    assert not torch.equal(
        orders[0], torch.cat([i for i, _ in order.Epoch(100, 20, 4, 0).batches(0, 1)])
    )
    firsts = [first for epoch in epochs for _, first in epoch.batches(0, 1)]
    assert firsts == list(range(0, 300, 20))


def test_processes_share_the_steps_of_one():
    whole = list(order.Epoch(90, 20, 0, 2).batches(0, 1))
    shares = [list(order.Epoch(90, 20, 0, 2).batches(rank, 4)) for rank in range(4)]
    for step, (indices, first) in enumerate(whole):
        assert torch.equal(torch.cat([share[step][0] for share in shares]), indices)
        assert [share[step][1] for share in shares] == [first + 5 * rank for rank in range(4)]
    assert len(whole) == 4  # ten images are left out
    assert whole[0][1] == 180
    assert order.cut(90, 20, 4) == (20, 4)
    assert order.cut(7, 20, 1) == (7, 1)
    assert order.cut(7, 20, 2) == (6, 1)
    with pytest.raises(ValueError, match="data must have an image for each of 8 processes"):
        order.cut(7, 20, 8)


def test_timesteps_are_uniform_and_each_places_own():
    found = order.timesteps(1, 0, 40_000, 10)
    counts = torch.bincount(found, minlength=10)
    assert float(((counts - 4000) ** 2 / 4000).sum()) < 27.9  # chi-squared, 9 degrees, p = 0.001
    assert torch.equal(found[300:310], order.timesteps(1, 300, 10, 10))
    assert not torch.equal(found, order.timesteps(2, 0, 40_000, 10))
    assert order.timesteps(1 << 63, (1 << 40) - 1, 3, 1000).shape == (3,)


# Going on


@pytest.mark.parametrize(
    "chosen", [{}, {"ema": 0.0}, {"precision": "bfloat16"}, {"precision": "float16"}], ids=str
)
def test_a_run_that_goes_on_has_the_losses_of_one_that_was_not_stopped(tmp_path, chosen):
    """Bit for bit, dropout included."""
    model = lambda: network(dropout=0.3)  # noqa: E731
    whole = run(trainer(tmp_path / "a", model(), chosen=options(epochs=4, **chosen)))
    first = trainer(tmp_path / "b", model(), chosen=options(epochs=4, **chosen))
    steps = first.run(progress=False)
    next(steps), next(steps)
    steps.close()
    second = run(trainer(tmp_path / "b", model(), chosen=options(epochs=4, **chosen), resume=True))
    assert losses(second) == losses(whole)
    assert second.step == whole.step
    assert same_weights(second.network, whole.network)
    assert same_weights(second.averaged, whole.averaged)


@pytest.mark.parametrize("last", [1, 4, 5, 7])
def test_a_run_that_goes_on_within_an_epoch(tmp_path, last):
    """Saved after every second of an epoch's three steps and stopped in step `last`; 6 ends one."""
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


def test_what_a_run_cannot_go_on_with_is_named(tmp_path):
    run(trainer(tmp_path))
    state = (tmp_path / STATE).read_bytes()
    for change, words in (
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
            ValueError, match=rf"resume: .* was begun with something else: .*{words}"
        ):
            trainer(tmp_path, resume=True, **change)
    assert (tmp_path / STATE).read_bytes() == state
    longer = run(trainer(tmp_path, chosen=options(epochs=3), resume=True))
    assert len(longer.history) == 3


def test_a_folder_that_holds_a_run_is_not_begun_anew(tmp_path):
    run(trainer(tmp_path))
    with pytest.raises(FileExistsError, match=r"holds a run \(state.pt\); resume it"):
        trainer(tmp_path)
    (tmp_path / STATE).unlink()
    with pytest.raises(FileExistsError, match=r"holds a run \(history.csv\)"):
        trainer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no training state to go on from"):
        trainer(tmp_path / "none", resume=True)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"x" * 99])
def test_a_damaged_state_is_named(tmp_path, damage):
    run(trainer(tmp_path))
    path = tmp_path / STATE
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"state.pt: is no whole training state"):
        trainer(tmp_path, resume=True)


def test_nothing_in_a_state_is_executed(tmp_path):
    run(trainer(tmp_path))

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"format": 1, "options": Trap()}, tmp_path / STATE)
    with pytest.raises(ValueError, match="no whole training state"):
        trainer(tmp_path, resume=True)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("file", [STATE, HISTORY])
def test_a_full_disk_leaves_the_last_good_state(tmp_path, monkeypatch, file):
    made = trainer(tmp_path, chosen=options(epochs=3))
    steps = made.run(progress=False)
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


def test_what_was_killed_before_its_checkpoint_gets_it(tmp_path, monkeypatch):
    """The state of the last epoch is on disk, its checkpoint is not."""
    made = trainer(tmp_path)
    steps = made.run(progress=False)
    next(steps)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("ddpm_fast.training.trainer.save", killed)
    with pytest.raises(KeyboardInterrupt):
        next(steps)
    monkeypatch.undo()
    assert not same_weights(ddpm_fast.load(tmp_path / CHECKPOINT).unet, made.averaged)
    again = run(trainer(tmp_path, resume=True))
    assert again.step == made.step
    assert same_weights(ddpm_fast.load(tmp_path / CHECKPOINT).unet, made.averaged)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    made = trainer(tmp_path, chosen=options(epochs=3))
    steps = made.run(progress=False)
    next(steps)
    with torch.no_grad():
        made.network.conv_out.bias.fill_(math.nan)
    with pytest.raises(RuntimeError, match="the loss is not finite at step 3, epoch 1"):
        next(steps)
    assert ddpm_fast.load(tmp_path / CHECKPOINT).unet.conv_out.bias.isfinite().all()
    assert run(trainer(tmp_path, chosen=options(epochs=3), resume=True)).epoch == 3


def test_a_last_step_that_spoils_the_weights_is_not_saved(tmp_path):
    """All losses of its epoch are finite."""
    made = trainer(tmp_path, chosen=options(epochs=3, test_share=0.0))
    steps = made.run(progress=False)
    next(steps)
    good = (tmp_path / STATE).read_bytes()
    step = made._train_step

    def spoiled(*args):
        loss = step(*args)
        if made.step == 5:
            with torch.no_grad():
                made.network.conv_out.bias.fill_(math.inf)
        return loss

    made._train_step = spoiled
    with pytest.raises(RuntimeError, match="the weights are not finite after step 5"):
        next(steps)
    assert (tmp_path / STATE).read_bytes() == good


def test_the_optimizer_is_fused_by_the_device_and_not_by_the_state(tmp_path):
    made = trainer(tmp_path, chosen=options(epochs=2, precision="float16"))
    steps = made.run(progress=False)
    next(steps)
    state = torch.load(tmp_path / STATE, weights_only=True)
    state["optimizer"]["param_groups"][0]["fused"] = True
    torch.save(state, tmp_path / STATE)
    again = run(trainer(tmp_path, chosen=options(epochs=2, precision="float16"), resume=True))
    assert not again._optimizer.param_groups[0]["fused"]


def test_accelerates_own_settings_change_nothing(tmp_path, monkeypatch):
    whole = run(trainer(tmp_path / "a"))
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert losses(run(trainer(tmp_path / "b"))) == losses(whole)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_held_out_images_are_shared_out(tmp_path, monkeypatch, ranks):
    """Every rank's share of few images, also where some have none."""
    made = trainer(tmp_path, data=Squares(50), chosen=options(batch=16))
    assert len(made.test_data) == 5
    alone, shared = made._held_out(), []
    for rank in range(ranks):
        processes = SimpleNamespace(
            num_processes=ranks, process_index=rank, reduce=lambda value, how: value
        )
        monkeypatch.setattr(made, "_processes", processes)
        shared.append(made._held_out())
    assert sum(shared) == pytest.approx(alone, rel=1e-6)


def test_what_a_killed_process_left_is_removed(tmp_path):
    run(trainer(tmp_path))
    (tmp_path / ".ddpm_fast.0badcafe.tmp").write_bytes(b"half")
    (tmp_path / f".{CHECKPOINT}.0badcafe.old").mkdir()
    trainer(tmp_path, resume=True)
    assert not list(tmp_path.glob(".*"))


# What is refused


@pytest.mark.parametrize(
    ("name", "value", "words"),
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
def test_bad_options_are_named(name, value, words):
    with pytest.raises((ValueError, TypeError), match=words):
        TrainOptions(**{name: value})


def test_options_go_through_json():
    chosen = options(betas=(0.8, 0.95), weighting="min_snr")
    assert TrainOptions.from_dict(chosen.to_dict()) == chosen
    kinds = TrainOptions(lr=np.float64(1e-3), seed=np.int64(3), betas=[np.float32(0.5), 0.9])
    assert [type(v) for v in (kinds.lr, kinds.seed, *kinds.betas)] == [float, int, float, float]
    with pytest.raises(ValueError, match="weighting must be None for the objective 'full'"):
        TrainOptions(objective="full", weighting="min_snr")
    with pytest.raises(ValueError, match="there is no momentum"):
        TrainOptions.from_dict({"momentum": 0.9})


@pytest.mark.parametrize(
    ("change", "error", "words"),
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
def test_what_does_not_fit_is_refused(tmp_path, change, error, words):
    with pytest.raises(error, match=words):
        trainer(tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_the_learning_rate():
    chosen = TrainOptions(lr=1.0, warmup=10, decay="linear", decay_share=0.5)
    rates = [chosen.rate(step, 100) for step in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert rates[9:50] == [1.0] * 41
    assert rates[75] == pytest.approx(0.5)
    assert 0 < rates[99] < 0.03
    assert TrainOptions(lr=1.0, warmup=0, decay="none").rate(99, 100) == 1.0
    cosine = TrainOptions(lr=1.0, warmup=0, decay="cosine", decay_share=1.0)
    assert cosine.rate(50, 100) == pytest.approx(0.5)
    assert TINY["sample_size"] == 8
