"""Predictions told as one another, as functions and as wrapped models."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ddpm_fast import ConvertedModel, NoiseSchedule, Sampler, StepTable, convert_prediction
from ddpm_fast.diffusion.parameterization import PREDICTIONS
from ddpm_fast.utils.cuda_graphs import capture_key
from diffusers_pairs import closed_form

LINEAR = NoiseSchedule.linear()
ZERO_SNR = LINEAR.rescale_zero_terminal_snr()


def all_of(schedule, t, x0, epsilon):
    """x_t and every prediction of one x0 and epsilon."""
    a, s = (float(schedule.alphas_cumprod[t]) ** 0.5, 0.0)
    s = math.sqrt(1 - a * a)
    x_t = a * x0 + s * epsilon
    return x_t, {"x0": x0, "epsilon": epsilon, "v": a * epsilon - s * x0, "score": -epsilon / s}


@pytest.mark.parametrize("t", [0, 500, 999])
@pytest.mark.parametrize(("source", "target"), [*itertools.product(PREDICTIONS, repeat=2)])
def test_every_kind_as_every_other(source, target, t):
    x0, epsilon = torch.randn(2, 3, 4, 5, dtype=torch.float64).unbind()
    x_t, kinds = all_of(LINEAR, t, x0, epsilon)
    got = convert_prediction(kinds[source], x_t, t, LINEAR, source, target)
    torch.testing.assert_close(got, kinds[target], rtol=1e-9, atol=1e-9)
    half = convert_prediction(kinds[source].half(), x_t.half(), t, LINEAR, source, target)
    assert half.dtype == torch.float32


def test_an_x0_of_a_half_precision_network_does_not_overflow():
    """1/sqrt(abar) is 20,000 at the end of the cosine schedule."""
    cosine = NoiseSchedule.cosine()
    model = closed_form(cosine, "epsilon")
    wrapped = ConvertedModel(lambda x, t: -model(x, t), cosine, "epsilon", "x0")
    x, t = torch.randn(2, 3, 4).half(), torch.full((2,), 999)
    out = wrapped(x, t)
    assert out.dtype == torch.float32
    assert out.isfinite().all()
    assert float(out.abs().max()) > 1e4


def test_a_graph_of_a_wrapped_model_is_dropped_with_its_weights():
    module = torch.nn.Linear(3, 3)
    wrapped = ConvertedModel(module, LINEAR, "epsilon", "v")
    states = [capture_key(wrapped)]
    module.eval()
    states.append(capture_key(wrapped))
    module.weight = torch.nn.Parameter(torch.zeros(3, 3))
    states.append(capture_key(wrapped))
    assert len({str(state) for state in states}) == 3
    assert capture_key(wrapped) == states[-1]


def test_each_sample_has_its_timestep():
    x0, epsilon = torch.randn(2, 2, 3, dtype=torch.float64).unbind()
    t = torch.tensor([3, 800])
    pairs = [all_of(LINEAR, int(k), x0[i], epsilon[i]) for i, k in enumerate(t)]
    x_t = torch.stack([pair[0] for pair in pairs])
    v = torch.stack([pair[1]["v"] for pair in pairs])
    got = convert_prediction(v, x_t, t, LINEAR, "v", "epsilon")
    torch.testing.assert_close(got, epsilon, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", ["x0", "v", "score"])
def test_a_wrapped_model_samples_what_its_own_table_does(prediction):
    model = closed_form(LINEAR, "epsilon")
    wrapped = ConvertedModel(model, LINEAR, "epsilon", prediction)
    images = [
        Sampler(run, table, (2, 3), 4, "cpu", torch.float64).sample(4, seed=1, progress=False)
        for run, table in (
            (model, StepTable.ddpm(LINEAR, 20)),
            (wrapped, StepTable.ddpm(LINEAR, 20, prediction=prediction)),
        )
    ]
    torch.testing.assert_close(*images, rtol=1e-8, atol=1e-8)


def test_a_learned_variance_and_labels_pass_through():
    def model(x, t, labels):
        return torch.cat([x * labels.view(-1, 1, 1), x + 7], dim=1)

    x, t = torch.randn(2, 3, 4), torch.tensor([5, 900])
    out = ConvertedModel(model, LINEAR, "x0", "epsilon")(x, t, torch.tensor([1.0, 2.0]))
    expected = convert_prediction(
        model(x, t, torch.tensor([1.0, 2.0]))[:, :3], x, t, LINEAR, "x0", "epsilon"
    )
    assert torch.equal(out[:, :3], expected)
    assert torch.equal(out[:, 3:], x + 7)


def test_zero_terminal_snr_converts_between_x0_and_v():
    x0, epsilon = torch.randn(2, 1, 4, dtype=torch.float64).unbind()
    x_t, kinds = all_of(ZERO_SNR, 999, x0, epsilon)
    got = convert_prediction(kinds["v"], x_t, 999, ZERO_SNR, "v", "x0")
    torch.testing.assert_close(got, x0)
    torch.testing.assert_close(
        convert_prediction(x0, x_t, 999, ZERO_SNR, "x0", "v"), kinds["v"], rtol=1e-9, atol=1e-9
    )


def test_gradients_in_float64():
    out, x_t = torch.randn(2, 2, 3, dtype=torch.float64).unbind()
    inputs = (out.requires_grad_(), x_t.clone().requires_grad_())
    assert torch.autograd.gradcheck(
        lambda o, x: convert_prediction(o, x, 400, LINEAR, "epsilon", "v"), inputs
    )


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        pytest.param(
            ValueError, "source must be one of", (X, X, 1, LINEAR, "noise", "v"), id="source"
        ),
        pytest.param(
            ValueError, "target must be one of", (X, X, 1, LINEAR, "v", "eps"), id="target"
        ),
        pytest.param(
            ValueError, "source.*zero terminal", (X, X, 1, ZERO_SNR, "epsilon", "v"), id="abar-0"
        ),
        pytest.param(
            ValueError, "target.*'score'", (X, X, 1, ZERO_SNR, "v", "score"), id="to-score"
        ),
        pytest.param(ValueError, "t must be an integer", (X, X, 1000, LINEAR, "v", "x0"), id="t"),
        pytest.param(
            ValueError, r"out must have.*\[2, 3\]", (X[:, :1], X, 1, LINEAR, "v", "x0"), id="shape"
        ),
        pytest.param(TypeError, "schedule must", (X, X, 1, LINEAR.betas, "v", "x0"), id="schedule"),
    ],
)
def test_bad_input_names_the_argument(error, words, call):
    with pytest.raises(error, match=words):
        convert_prediction(*call)
    if words.startswith(("source", "target")):
        with pytest.raises(error, match=words):
            ConvertedModel(lambda x, t: x, *call[3:])
