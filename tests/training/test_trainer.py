"""Trainer: steps, losses, averaged weights and files."""

from __future__ import annotations

import copy
import csv
import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("accelerate", reason="needs accelerate")

from accelerate.state import AcceleratorState

import ddpm_fast
from ddpm_fast import ThesisUNet, training_losses
from ddpm_fast.training import data_order
from ddpm_fast.training.data import ImageData
from ddpm_fast.training.run_state import CHECKPOINT, HISTORY, LOSS_CURVE, STATE
from ddpm_fast.training.samples import draw_samples, save_samples
from trainer_cases import (
    LINEAR,
    Labelled,
    Squares,
    losses,
    network,
    options,
    run,
    same_weights,
    trainer,
)


def test_a_training_equals_an_explicit_loop(tmp_path):
    """Adam with warm-up and clipping, and averaged weights, by the positions of the images."""
    trained = run(trainer(tmp_path, chosen=options(clip_norm=0.5)))
    model, step = network(), 0
    average = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), 1.0)
    data = trained.train_data
    means = []
    for epoch in range(2):
        model.train()
        for indices, first in data_order.EpochOrder(len(data), 28, 0, epoch).batches(0, 1):
            t = data_order.random_timesteps(0, first, len(indices), 1000)
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
    for row, of_epoch in zip(trained.history, (means[:3], means[3:]), strict=True):
        assert row["loss"] == pytest.approx(sum(of_epoch) / 3, rel=1e-5)
        assert row["loss_min"] == pytest.approx(min(of_epoch), rel=1e-5)
        assert row["loss_max"] == pytest.approx(max(of_epoch), rel=1e-5)
    for ours, theirs in ((trained.network, model), (trained.averaged, average)):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_loss_falls_as_in_a_plain_loop(tmp_path):
    """Over three seeds, against torch.randn, torch.randint and the equation."""
    ours, plain = [], []
    for seed in range(3):
        chosen = options(epochs=30, batch=32, lr=2e-3, seed=seed, test_share=0.0, ema=0.0)
        trained = run(trainer(tmp_path / str(seed), network(seed), chosen=chosen, save_every=30))
        ours.append(sum(row["loss"] for row in trained.history[-5:]) / 5)
        model, images = network(seed), Squares().images
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        abar, last_losses = LINEAR.alphas_cumprod.float(), []
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
                last_losses += [loss.item()] * (epoch >= 25)
        plain.append(sum(last_losses) / len(last_losses))
    spread = max(abs(a - b) for a in plain for b in plain) + 0.02
    assert abs(sum(ours) / 3 - sum(plain) / 3) < 2 * spread
    assert max(ours) < 0.7  # 1 at the start


def test_images_are_loaded_in_batches_or_one_by_one(tmp_path):
    """A data set with `batch` and one without, labels and flips included."""
    squares = Labelled()
    pairs = [squares[i] for i in range(len(squares))]
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

    trained = [
        run(trainer(tmp_path / name, network(num_class_embeds=5), which))
        for name, which in (("a", data), ("b", OneByOne(data)))
    ]
    assert losses(trained[0]) == losses(trained[1])
    assert same_weights(trained[0].network, trained[1].network)


def test_without_ema_the_network_itself_is_saved(tmp_path):
    trained = run(trainer(tmp_path, chosen=options(ema=0.0)))
    assert trained.averaged is trained.network
    assert same_weights(ddpm_fast.load(tmp_path / CHECKPOINT).unet, trained.network)


def test_files_of_a_training(tmp_path):
    trained = run(trainer(tmp_path))
    trained.draw("squares")
    save_samples(trained, tmp_path / "s.png", 4, 5)
    found = ddpm_fast.load(tmp_path / CHECKPOINT)
    assert same_weights(found.unet, trained.averaged)
    assert not same_weights(found.unet, trained.network)
    assert (found.prediction, found.variance, found.schedule) == ("epsilon", "posterior", LINEAR)
    with (tmp_path / HISTORY).open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in trained.history]
    assert [int(row["steps"]) for row in rows] == [3, 6]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [CHECKPOINT, LOSS_CURVE, HISTORY, STATE, "s.png"]
    )


def test_diffusers_reads_the_checkpoint(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
    trained = run(trainer(tmp_path, chosen=options(prediction="v")))
    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path / CHECKPOINT)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 500])
    torch.testing.assert_close(pipe.unet(x, t).sample, trained.averaged.eval()(x, t))


@pytest.mark.parametrize(
    "chosen",
    [
        {"objective": "full", "variance": "beta"},
        {"objective": "hybrid", "variance": "learned_range"},
        {"objective": "score"},
        {"prediction": "v", "weighting": "min_snr"},
        {"prediction": "x0", "offset_noise": 0.1},
        {"prediction": "score", "precision": "bfloat16"},
        {"precision": "float16", "optimizer": "adamw", "weight_decay": 0.1, "decay": "cosine"},
    ],
    ids=lambda c: "-".join(map(str, c.values())),
)
def test_every_objective_trains(tmp_path, chosen):
    model = network(out_channels=2) if "hybrid" in chosen.values() else network()
    trained = run(trainer(tmp_path, model, chosen=options(**chosen)))
    assert all(map(math.isfinite, losses(trained)[-1]))
    assert not same_weights(trained.network, network(out_channels=model.config.out_channels))
    assert draw_samples(trained, 2, 4).shape == (2, 1, 8, 8)


def test_labels_and_their_dropout(tmp_path):
    """A share of the labels, by the positions of the images, becomes the last class."""
    trained = trainer(
        tmp_path, network(num_class_embeds=6), Labelled(), chosen=options(label_dropout=0.5)
    )
    seen, held_out = [], []
    trained.network.register_forward_pre_hook(lambda module, args: seen.append(args[2].clone()))
    trained.averaged.register_forward_pre_hook(
        lambda module, args: held_out.append(args[2].clone())
    )
    run(trained)
    dropped = torch.cat(
        [data_order.dropped_labels(0, first, 28, 0.5) for first in (0, 28, 56, 86, 114, 142)]
    )
    assert torch.equal(torch.cat(seen) == 5, dropped)
    assert 0.3 < float(dropped.float().mean()) < 0.7
    assert held_out
    assert all((labels < 5).all() for labels in held_out)
    assert draw_samples(trained, 4, 3).shape == (4, 1, 8, 8)


def test_the_network_of_the_thesis(tmp_path):
    torch.manual_seed(0)
    model = ThesisUNet(img_channels=1, sequence_channels=(8, 16), sample_size=8)
    trained = run(trainer(tmp_path, model))
    assert same_weights(ddpm_fast.load(tmp_path / CHECKPOINT).unet, trained.averaged)
    assert draw_samples(trained, 2, 3).isfinite().all()


@pytest.mark.slow
def test_a_compiled_network_has_the_losses_of_an_eager_one(tmp_path):
    eager = run(trainer(tmp_path / "a"))
    trained = run(trainer(tmp_path / "b", chosen=options(compile=True)))
    for ours, theirs in zip(losses(trained), losses(eager), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_training_does_not_change_the_callers_generator(tmp_path):
    torch.manual_seed(5)
    trained = trainer(tmp_path)
    before = torch.get_rng_state()
    run(trained)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_differs_in_every_step(tmp_path):
    trained, seeds = trainer(tmp_path, network(dropout=0.3), chosen=options(epochs=3)), []
    trained.network.register_forward_pre_hook(
        lambda module, args: seeds.append(torch.initial_seed())
    )
    run(trained)
    assert len(set(seeds)) == len(seeds) == 9
    assert data_order.step_seed(0, 5, 0) not in (
        data_order.step_seed(0, 5, 1),
        data_order.step_seed(1, 5, 0),
    )


def test_settings_of_accelerate_are_ignored(tmp_path, monkeypatch):
    whole = run(trainer(tmp_path / "a"))
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert losses(run(trainer(tmp_path / "b"))) == losses(whole)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("ranks", [2, 8])
def test_test_images_are_split_over_processes(tmp_path, monkeypatch, ranks):
    """Five images over two processes, and over eight, some of which have none."""
    trained = trainer(tmp_path, data=Squares(50), chosen=options(batch=16))
    assert len(trained.test_data) == 5
    alone, shared = trained._held_out(), []
    for rank in range(ranks):
        processes = SimpleNamespace(
            num_processes=ranks, process_index=rank, reduce=lambda value, how: value
        )
        monkeypatch.setattr(trained, "_accelerator", processes)
        shared.append(trained._held_out())
    assert sum(shared) == pytest.approx(alone, rel=1e-6)
