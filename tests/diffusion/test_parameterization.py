"""Conversion between predictions, as functions and as models; scores."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import integrate

from cases import F16, F32, F64, SCHEDULE, assert_named
from ddpm_fast import ConvertedModel, NoiseSchedule, Sampler, StepTable, convert_prediction
from ddpm_fast.diffusion.parameterization import (
    PREDICTIONS,
    noise_from_score,
    score_from_noise,
    tweedie,
)
from ddpm_fast.utils.cuda_graphs import capture_key
from diffusers_pairs import closed_form
from sampler_cases import smooth

LINEAR = NoiseSchedule.linear()
ZERO_SNR = LINEAR.rescale_zero_terminal_snr()


def all_of(schedule, t, x0, epsilon):
    """Return x_t and every prediction of one x0 and epsilon."""
    a, s = (float(schedule.alphas_cumprod[t]) ** 0.5, 0.0)
    s = math.sqrt(1 - a * a)
    x_t = a * x0 + s * epsilon
    return x_t, {"x0": x0, "epsilon": epsilon, "v": a * epsilon - s * x0, "score": -epsilon / s}


@pytest.mark.parametrize("t", [0, 500, 999])
@pytest.mark.parametrize(("source", "target"), [*itertools.product(PREDICTIONS, repeat=2)])
def test_every_prediction_converts_to_every_other(source, target, t):
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
def test_a_converted_model_samples_like_its_own_table(prediction):
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


TIMES = [0, 40, 500, 999]
PARTS = ((0.3, -0.7, 0.1), (0.7, 0.5, 0.3))  # weight, mean and deviation: data of two humps


def density(x, mean, scale):
    return math.exp(-(((x - mean) / scale) ** 2) / 2) / (scale * math.sqrt(2 * math.pi))


def mixture_score(x_t, t):
    """Return the gradient of log q(x_t), by autograd through the density of the mixture."""
    abar = float(SCHEDULE.alphas_cumprod[t])
    x = x_t.double().detach().requires_grad_()
    logs = []
    for weight, mean, scale in PARTS:
        variance = abar * scale**2 + 1 - abar
        off = x - math.sqrt(abar) * mean
        logs.append(math.log(weight) - off.square() / (2 * variance) - math.log(variance) / 2)
    (score,) = torch.autograd.grad(torch.logsumexp(torch.stack(logs), 0).sum(), x)
    return score.to(x_t.dtype)


@pytest.mark.parametrize("t", TIMES)
def test_tweedie_is_the_mean_of_x0_given_x_t(t: int) -> None:
    x_t = torch.tensor([[-1.1], [-0.2], [0.4], [1.3]], dtype=F64)
    found = tweedie(x_t, mixture_score(x_t, t), t, SCHEDULE)
    abar = float(SCHEDULE.alphas_cumprod[t])
    signal, noise = math.sqrt(abar), math.sqrt(1 - abar)
    for value, got in zip(x_t.flatten().tolist(), found.flatten().tolist(), strict=True):

        def weight(x0, value=value):
            prior = sum(w * density(x0, mean, scale) for w, mean, scale in PARTS)
            return prior * density(value, signal * x0, noise)

        peak = value / signal
        ends = {"points": [peak, -0.7, 0.5], "limit": 400} if abs(peak) < 4 else {"limit": 400}
        total, _ = integrate.quad(weight, -4, 4, epsabs=0, **ends)
        first, _ = integrate.quad(lambda x0, w=weight: x0 * w(x0), -4, 4, epsabs=0, **ends)
        assert got == pytest.approx(first / total, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("dtype", [F32, F64, F16])
def test_score_and_noise_are_each_others_inverse_and_eq_9(dtype: torch.dtype) -> None:
    t = torch.tensor(TIMES)
    x_t = torch.linspace(-2, 2, 4 * 6, dtype=F64).view(4, 3, 2)
    epsilon = smooth(x_t, t)
    abar = SCHEDULE.alphas_cumprod[t].view(-1, 1, 1)
    # The data of `smooth` is N(0.2, 0.25), so that x_t is a Gaussian too.
    exact = -(x_t - 0.2 * abar.sqrt()) / (0.25 * abar + 1 - abar)
    found = score_from_noise(epsilon.to(dtype), t, SCHEDULE)
    assert found.dtype == dtype
    tolerance = {F64: 1e-12, F32: 1e-5, F16: 1e-2}[dtype]
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)
    back = noise_from_score(found, t, SCHEDULE)
    torch.testing.assert_close(back.double(), epsilon, rtol=tolerance, atol=tolerance)


def test_an_int_is_every_samples_timestep_and_gradients_pass() -> None:
    x, s = (torch.randn(2, 3, dtype=F64, requires_grad=True) for _ in range(2))
    t = torch.tensor([7, 7])
    assert torch.equal(tweedie(x, s, 7, SCHEDULE), tweedie(x, s, t, SCHEDULE))
    assert torch.autograd.gradcheck(lambda a, b: tweedie(a, b, t, SCHEDULE), (x, s))
    assert torch.autograd.gradcheck(lambda a: score_from_noise(a, t, SCHEDULE), (x,))
    assert torch.autograd.gradcheck(lambda a: noise_from_score(a, t, SCHEDULE), (x,))


@pytest.mark.parametrize(
    "bad",
    [
        ("score", torch.zeros(2, 4), ValueError, "[2, 3]", "[2, 4]"),
        ("score", torch.zeros(2, 3, dtype=F64), TypeError, "float32", "float64"),
        ("x_t", torch.zeros(2, 3, dtype=torch.int64), TypeError, "int64"),
        ("t", 1000, ValueError, "[0, 999]", "1000"),
        ("t", 1.0, TypeError, "int64", "float"),
        ("schedule", 1000, TypeError, "NoiseSchedule", "int"),
    ],
    ids=lambda bad: f"{bad[0]}-{bad[-1]}",
)
def test_a_bad_argument_is_named(bad) -> None:
    def call(**wrong):
        good = {"x_t": torch.zeros(2, 3), "score": torch.zeros(2, 3), "schedule": SCHEDULE, "t": 5}
        return tweedie(**(good | wrong))

    assert_named(call, bad)


@pytest.mark.parametrize("t", [999, torch.tensor([3, 999])], ids=["int", "tensor"])
def test_an_x_t_without_signal_has_no_estimate(t) -> None:
    schedule = NoiseSchedule.linear().rescale_zero_terminal_snr()
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"t must be below 999.*alphas_cumprod is 0.*got 999"):
        tweedie(x, x, t, schedule)
    assert tweedie(x, x, 998, schedule).isfinite().all()
    assert score_from_noise(x, t, schedule).isfinite().all()
