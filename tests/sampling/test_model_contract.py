"""Models that break a run: written inputs, active dropout, a sampler within its own run."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from cases import SCHEDULE, same_bits
from ddpm_fast import Codec, Sampler, StepTable, training_losses, variational_bound
from ddpm_fast.diffusion.parameterization import ConvertedModel
from sampler_cases import DDPM, SHAPE, Net, draw, sampler, smooth


def scales_x(x, t):
    return smooth(x.mul_(2), t)


def moves_t(x, t):
    t.zero_()
    return smooth(x, t)


def moves_labels(x, t, labels):
    labels.add_(1)
    return smooth(x, t)


class WritesThroughView(nn.Module):
    def forward(self, x, t):
        x[:, 0].zero_()
        return smooth(x, t)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (scales_x, "scales_x wrote to x"),
        (moves_t, "moves_t wrote to t"),
        (WritesThroughView(), "WritesThroughView wrote to x"),
        (torch.compile(WritesThroughView(), backend="eager"), "wrote to x"),
    ],
    ids=["function", "timesteps", "view", "compiled"],
)
def test_a_model_that_writes_to_its_inputs_is_refused(model, message):
    match = f"model must not write to its inputs; .*{message} in place"
    with pytest.raises(RuntimeError, match=match):
        draw(sampler(model))
    x0 = torch.zeros(2, *SHAPE)
    with pytest.raises(RuntimeError, match=match):
        variational_bound(model, SCHEDULE, x0, steps=2, progress=False)
    with pytest.raises(RuntimeError, match=match):
        training_losses(model, x0, torch.tensor([1, 2]), SCHEDULE, seed=0)


def test_a_model_that_writes_to_its_labels_is_refused():
    with pytest.raises(RuntimeError, match="moves_labels wrote to argument 2 in place"):
        draw(sampler(moves_labels), labels=3)


def test_a_model_that_returns_its_input_is_none_of_these():
    assert draw(sampler(lambda x, t: x)).shape[0] == 10


class Random(nn.Module):
    """With dropout, or another layer that differs in training mode."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, t):
        return self.layer(x)


class Functional(nn.Module):
    dropout = None

    def __init__(self, p):
        super().__init__()
        self.dropout = p

    def forward(self, x, t):
        return nn.functional.dropout(x, self.dropout, self.training)


class Holder:
    def __init__(self, network):
        self.network = network

    def __call__(self, x, t):
        return self.network(x, t)

    def predict(self, x, t):
        return self.network(x, t)


ACTIVE = Random(nn.Dropout(0.3)).train()
REACHES = {
    "itself": lambda net: net,
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "closure": lambda net: lambda x, t: net(x, t),
    "global": lambda net: _calls_global,
    "partial": lambda net: functools.partial(_calls, net),
    "attribute": Holder,
    "method": lambda net: Holder(net).predict,
    "converted": lambda net: ConvertedModel(net, SCHEDULE, "epsilon", "v"),
}


def _calls(net, x, t):
    return net(x, t)


def _calls_global(x, t):
    return ACTIVE(x, t)


@pytest.mark.parametrize("reach", REACHES.values(), ids=REACHES)
def test_active_dropout_is_refused(reach):
    run = sampler(reach(ACTIVE))
    with pytest.raises(ValueError, match=r"model\.eval\(\) first; got .* active Dropout\(p=0.3\)"):
        draw(run)
    ACTIVE.eval()
    try:
        draw(run)
    finally:
        ACTIVE.train()


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (Random(nn.Dropout2d(0.1)), r"Dropout2d\(p=0.1\)"),
        (Random(nn.AlphaDropout(0.1)), r"AlphaDropout\(p=0.1\)"),
        (Random(nn.BatchNorm2d(SHAPE[0])), "BatchNorm2d"),
        (Functional(0.2), r"Functional\(dropout=0.2\)"),
    ],
    ids=["dropout2d", "alpha", "batch-norm", "functional"],
)
def test_other_layers_in_training_mode(model, what):
    codec = Codec(model.train(), SCHEDULE, SHAPE, 2)
    with pytest.raises(ValueError, match=what):
        codec.encode(torch.zeros(1, *SHAPE), progress=False)
    with pytest.raises(ValueError, match=what):
        variational_bound(model, SCHEDULE, torch.zeros(1, *SHAPE), steps=2, progress=False)
    model.eval()
    codec.encode(torch.zeros(1, *SHAPE), progress=False)


@pytest.mark.parametrize("model", [Net(), Random(nn.Dropout(0.0)), Random(nn.GroupNorm(1, 3))])
def test_training_mode_without_them_is_accepted(model):
    assert same_bits(draw(sampler(model.train())), draw(sampler(model.eval())))


def test_a_sampler_within_its_own_run_is_refused():
    run = sampler()

    class Preview:
        def update(self, n):
            run.with_table(StepTable.ddim(SCHEDULE, 2)).sample(1, progress=False)

    expected = draw(run)
    for progress in (Preview(),):
        with pytest.raises(RuntimeError, match="must not be used within its own run"):
            run.sample(2, progress=progress)
    assert same_bits(draw(run), expected)

    def samples(x, t):
        return inner.sample(len(x), progress=False)

    inner = Sampler(samples, DDPM, SHAPE, device="cpu")
    with pytest.raises(RuntimeError, match="must not be used within its own run"):
        inner.sample(1, progress=False)
    other = sampler()
    outer = Sampler(lambda x, t: other.sample(len(x), progress=False), DDPM, SHAPE, device="cpu")
    assert outer.sample(1, progress=False).shape == (1, *SHAPE)
