"""Training objectives: values and gradients of the equations, and known optima."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cases import F32, F64, SCHEDULE, normals
from ddpm_fast import ConvertedModel, NoiseSchedule, training_losses, variational_bound
from ddpm_fast.diffusion.likelihood import prior_kl
from ddpm_fast.ops.philox import STREAM_TRAINING
from gaussian_data import M, S, best_epsilon, expected_terms
from loss_cases import (
    PREDICTIONS,
    SHORT,
    T4,
    VARIANCES,
    Network,
    batch,
    exact_bound,
    exact_epsilon,
    exact_target,
    levels,
    mean,
)

DECODERS = ("discretised", "gaussian")


def grads(loss, network):
    return torch.autograd.grad(loss.sum(), list(network.parameters()), retain_graph=True)


def noised(x0, noise, t, schedule=SHORT):
    abar, _ = levels(schedule, t, x0.ndim)
    return abar.sqrt() * x0 + (1 - abar).sqrt() * noise


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        pytest.param("contiguous", F64, id="contiguous-float64"),
        pytest.param("channels-last", F32, id="channels-last-float32"),
    ],
)
def test_simple_equals_the_equation_and_its_gradient(prediction, layout, dtype) -> None:
    network, (x0, noise) = Network(dtype=dtype), batch(dtype=dtype, layout=layout)
    found = training_losses(network, x0, T4, SHORT, prediction=prediction, noise=noise)
    x_t = noised(x0, noise, T4).to(dtype)
    plain = mean((network(x_t, T4) - exact_target(prediction, x0, noise, T4).to(dtype)).square())
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == F32 else {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(found.loss, plain, **close)
    torch.testing.assert_close(grads(found.loss, network), grads(plain, network), **close)
    torch.testing.assert_close(found.x_t, x_t, **close)
    assert found.loss.shape == (4,)
    assert found.mse is found.loss
    assert found.vb is None
    assert torch.equal(found.noise, noise)
    assert torch.equal(found.pred, network(found.x_t, T4))


@pytest.mark.parametrize(
    ("prediction", "variance", "decoder"),
    [("epsilon", variance, decoder) for variance in VARIANCES for decoder in DECODERS]
    + [(prediction, "learned_range", "discretised") for prediction in PREDICTIONS[1:]],
)
def test_full_equals_the_term_of_the_bound_and_its_gradient(prediction, variance, decoder) -> None:
    """Index 0 and others in one batch, through the mean and the variance."""
    network, (x0, noise) = Network("learned" in variance), batch()
    x0 = (0.9 * x0).requires_grad_()  # the outer bins have no upper or lower end
    options = {"prediction": prediction, "variance": variance, "decoder": decoder}
    found = training_losses(network, x0, T4, SHORT, objective="full", noise=noise, **options)
    x_t = noised(x0, noise, T4)
    exact = exact_bound(prediction, variance, decoder, network(x_t, T4), x0, x_t, T4)
    torch.testing.assert_close(found.loss, exact, rtol=1e-8, atol=1e-10)
    assert found.vb is found.loss
    for i in range(4):
        ours, theirs = (
            torch.autograd.grad(loss[i], [x0, *network.parameters()], retain_graph=True)
            for loss in (found.loss, exact)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("prediction", "variance"), zip(PREDICTIONS, VARIANCES, strict=True))
def test_full_summed_over_t_is_the_variational_bound(prediction: str, variance: str) -> None:
    network = Network("learned" in variance)
    x0 = torch.randint(0, 256, (3, 2, 4, 4), generator=torch.Generator().manual_seed(1)).double()
    x0 = x0 / 127.5 - 1
    options = {"prediction": prediction, "variance": variance, "seed": 5, "first_sample": 9}
    bound = variational_bound(network, SHORT, x0, clip=None, pad=False, progress=False, **options)
    columns = [
        training_losses(
            network, x0, t, SHORT, objective="full", stream=STREAM_TRAINING + t, **options
        ).loss
        for t in bound.timesteps.tolist()
    ]
    terms = torch.stack(columns, 1)
    torch.testing.assert_close(terms, bound.vb, rtol=1e-12, atol=0)
    total = terms.sum(1) + mean(prior_kl(x0, SHORT)) / math.log(2)
    torch.testing.assert_close(total, bound.total_bpd, rtol=1e-12, atol=0)


@pytest.mark.parametrize("objective", ["full", "hybrid"])
def test_a_term_does_not_depend_on_the_other_timesteps_of_the_batch(objective: str) -> None:
    """On a CPU the decoder is skipped if no sample is at index 0."""
    network, (x0, noise) = Network(learned=True), batch()
    options = {"objective": objective, "variance": "learned_range"}
    whole = training_losses(network, x0, T4, SHORT, noise=noise, **options).vb
    for i in range(4):
        one = slice(i, i + 1)
        alone = training_losses(network, x0[one], T4[one], SHORT, noise=noise[one], **options).vb
        torch.testing.assert_close(alone, whole[one], rtol=1e-12, atol=0)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
@pytest.mark.parametrize("weight", [None, 0.25])
def test_hybrid_trains_the_variance_by_the_bound_and_the_mean_by_simple(variance, weight) -> None:
    """L_simple + 0.001 L_vlb (Eq. 16, Nichol & Dhariwal 2021), estimated from one t of T."""
    network, (x0, noise) = Network(learned=True), batch()
    options = {"variance": variance, "noise": noise}
    more = {} if weight is None else {"vb_weight": weight}
    hybrid = training_losses(network, x0, T4, SHORT, objective="hybrid", **options, **more)
    simple = training_losses(network, x0, T4, SHORT, **options)
    full = training_losses(network, x0, T4, SHORT, objective="full", **options)
    scale = 8 * (0.001 if weight is None else weight)
    torch.testing.assert_close(hybrid.mse, simple.loss)
    torch.testing.assert_close(hybrid.vb, full.loss)
    torch.testing.assert_close(hybrid.loss, simple.loss + scale * full.loss)
    of_mean, of_variance = network.outer.parameters(), network.variance.parameters()
    for parameters, exact in (
        (list(of_mean), simple.loss),
        (list(of_variance), scale * full.loss),
    ):
        ours, theirs = (
            torch.autograd.grad(loss.sum(), parameters, retain_graph=True)
            for loss in (hybrid.loss, exact)
        )
        torch.testing.assert_close(ours, theirs)
        assert all((grad != 0).any() for grad in ours)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_score_matching_has_the_value_and_gradient_of_simple(prediction: str) -> None:
    """Against Eq. 8 of Khungurn 2022, and L_simple of the epsilon of the same network."""
    network, (x0, noise) = Network(), batch()
    found = training_losses(
        network, x0, T4, SHORT, prediction=prediction, objective="score", noise=noise
    )

    def epsilon(x, t):
        return exact_epsilon(prediction, network(x, t), x, t)

    simple = training_losses(epsilon, x0, T4, SHORT, noise=noise).loss
    abar, _ = levels(SHORT, T4)
    x_t = noised(x0, noise, T4)
    score = -epsilon(x_t, T4) / (1 - abar).sqrt()
    equation = mean((noise + (1 - abar).sqrt() * score).square())
    for exact in (simple, equation):
        torch.testing.assert_close(found.loss, exact, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(grads(found.loss, network), grads(exact, network))


def test_a_learned_variance_is_ignored_for_a_fixed_variance() -> None:
    x0, noise = batch()
    found = training_losses(Network(learned=True), x0, T4, SHORT, noise=noise)
    torch.testing.assert_close(
        found.loss, training_losses(Network(), x0, T4, SHORT, noise=noise).loss
    )


# Optima: data N(M, S^2), integrated over x_0 and the noise by quadrature.


def integrated(schedule):
    """A batch of all pairs of nodes, with their weights: means become expectations."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    nodes, weights = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    x0 = M + S * nodes.repeat_interleave(20)
    return x0[:, None], nodes.repeat(20)[:, None], torch.outer(weights, weights).flatten()


class Perturbed(torch.nn.Module):
    """A model with an offset and a slope added to its output; both are 0 at the optimum."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model, self.by = model, torch.nn.Parameter(torch.zeros(2, dtype=F64))

    def forward(self, x, t):
        return self.model(x, t) + self.by[0] + self.by[1] * x


@pytest.mark.parametrize(
    ("objective", "weighting"),
    [
        ("simple", None),
        ("simple", "min_snr"),
        ("score", None),
        ("score", "min_snr"),
        ("full", None),
    ],
)
@pytest.mark.parametrize(
    ("prediction", "t"), [("v", 0), ("v", 7), *((prediction, 2) for prediction in PREDICTIONS)]
)
def test_every_target_has_one_optimum(prediction, objective, weighting, t) -> None:
    """At the exact model the gradient is 0 and the loss the variance of its target."""
    best = best_epsilon(SHORT)
    exact = best if prediction == "epsilon" else ConvertedModel(best, SHORT, "epsilon", prediction)
    x0, noise, share = integrated(SHORT)
    network = Perturbed(exact)
    found = training_losses(
        network, x0, t, SHORT, prediction=prediction, objective=objective, weighting=weighting,
        variance="beta", decoder="gaussian", noise=noise,
    )  # fmt: skip
    loss, mse = ((share * values).sum() for values in (found.loss, found.mse))
    abar = float(SHORT.alphas_cumprod[t])
    x0_coef = S**2 * (1 - abar) / (S**2 * abar + 1 - abar)
    snr = abar / (1 - abar)
    of_target = {
        "x0": x0_coef,
        "epsilon": x0_coef * snr,
        "v": x0_coef / (1 - abar),
        "score": x0_coef * snr / (1 - abar),
    }[prediction]
    if objective == "full":
        irreducible = float(expected_terms(SHORT, "beta")[t]) / math.log(2)
    elif weighting == "min_snr":
        irreducible = x0_coef * min(snr, 5.0)
    else:
        irreducible = of_target if objective == "simple" else x0_coef * snr
    assert mse.item() == pytest.approx(of_target, rel=1e-9)
    assert loss.item() == pytest.approx(irreducible, rel=1e-9)
    (slope,) = torch.autograd.grad(loss, network.by, create_graph=True)
    assert slope.abs().max() < 1e-9 * max(1.0, irreducible)
    # The optimum is a minimum.
    curvature = torch.stack([torch.autograd.grad(s, network.by, retain_graph=True)[0]
                             for s in slope])  # fmt: skip
    assert torch.linalg.eigvalsh(curvature).min() > 0


@pytest.mark.parametrize("t", [1, 4])
def test_the_best_learned_variance_is_that_of_the_mixed_posterior(t: int) -> None:
    """The bound has no gradient at the variance of q plus that of its mean given x_t."""
    x0, noise, share = integrated(SHORT)
    abar = float(SHORT.alphas_cumprod[t])
    x0_coef = S**2 * (1 - abar) / (S**2 * abar + 1 - abar)
    best = float(SHORT.posterior_variance[t] + SHORT.posterior_mean_coef1[t].square() * x0_coef)
    learned_output = torch.tensor(math.log(best), dtype=F64, requires_grad=True)

    def network(x, t):
        return torch.cat([best_epsilon(SHORT)(x, t), learned_output.expand_as(x)], 1)

    for objective in ("full", "hybrid"):
        found = training_losses(
            network, x0, t, SHORT, objective=objective, variance="learned", noise=noise
        )
        (slope,) = torch.autograd.grad((share * found.loss).sum(), learned_output)
        assert abs(float(slope)) < 1e-9


# Gradients through the fused q_sample, and NaN.


@pytest.mark.parametrize(
    ("prediction", "objective", "generated", "backend"),
    [(p, o, False, "reference") for p in PREDICTIONS for o in ("simple", "score", "full")]
    + [("epsilon", o, g, "cpu") for o in ("simple", "full") for g in (False, True)],
)
def test_gradcheck_in_x0_the_noise_and_the_parameters(
    prediction, objective, generated, backend
) -> None:
    network = Network(learned=True)
    x0, noise = (values[:3, :, :2, :2].contiguous() for values in batch())
    t = torch.tensor([0, 3, 7])
    names = [name for name, _ in network.named_parameters()]
    options = {"prediction": prediction, "objective": objective, "variance": "learned_range",
               "backend": backend, "offset_noise": 0.1, "seed": 1}  # fmt: skip

    def run(x0, noise, *parameters):
        def model(x, t):
            return torch.func.functional_call(network, dict(zip(names, parameters, strict=True)),
                                              (x, t))  # fmt: skip

        more = None if generated else noise
        return training_losses(model, 0.9 * x0, t, SHORT, noise=more, **options).loss

    inputs = [x0, noise, *network.parameters()]
    inputs = [value.detach().clone().requires_grad_() for value in inputs]
    if generated:
        inputs[1] = noise
    if objective != "full":
        inputs[-2:] = [value.detach() for value in inputs[-2:]]  # of the variance
    assert torch.autograd.gradcheck(run, inputs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("objective", "sample"),
    [("simple", 0), ("score", 0), ("full", 0), ("full", 2), ("hybrid", 2)],
)
def test_nan_stays_nan_and_reaches_no_other_sample(objective: str, sample: int) -> None:
    x0, noise = batch(dtype=F32)
    network = Network(learned=True, dtype=F32)
    nans = torch.zeros(4, 4, 3, 5)
    nans[sample, 1, 2, 3] = math.nan  # one element of the prediction

    found = training_losses(
        lambda x, t: network(x, t) + nans, x0, T4, SHORT, objective=objective,
        variance="learned_range", noise=noise,
    )  # fmt: skip
    wrong = found.loss.isnan().tolist()
    assert wrong == [i == sample for i in range(4)]


def test_the_decoder_of_other_samples_gives_no_nan_gradient() -> None:
    """The probability of a bin underflows if x_0 is far off, as early in training."""
    x0, noise = (values.float() for values in batch())
    t = torch.tensor([0, 500, 999, 999])
    out = (x0 + torch.tensor([0.1, 1e15, 1e15, 1.0]).view(4, 1, 1, 1)).requires_grad_()
    found = training_losses(
        lambda x, t: out, x0, t, SCHEDULE, prediction="x0", objective="full", variance="beta",
        noise=noise,
    )  # fmt: skip
    assert found.loss.isfinite().all()
    (grad,) = torch.autograd.grad(found.loss.sum(), out)
    assert grad.isfinite().all()
    assert (grad != 0).all()


def test_zero_terminal_snr_is_trained_through_v_and_x0() -> None:
    schedule = NoiseSchedule.linear(8, 1e-2, 0.85).rescale_zero_terminal_snr()
    x0, noise = batch()
    for prediction in ("v", "x0"):
        for objective, weighting in (("simple", None), ("simple", "min_snr"), ("score", None),
                                     ("full", None)):  # fmt: skip
            network = Network()
            found = training_losses(
                network, x0, T4, schedule, prediction=prediction, objective=objective,
                weighting=weighting, noise=noise,
            )  # fmt: skip
            assert found.loss.isfinite().all()
            assert all(grad.isfinite().all() for grad in grads(found.loss, network))
    for prediction in ("epsilon", "score"):
        with pytest.raises(ValueError, match="prediction must be 'x0' or 'v' for a schedule of z"):
            training_losses(Network(), x0, T4, schedule, prediction=prediction, noise=noise)


def test_small_errors_keep_their_digits_in_float32() -> None:
    """For a bound near its minimum, over all 1000 timesteps."""
    x0 = 0.5 * normals((6, 3, 8, 8), "contiguous", F64, 3, "cpu")
    t = torch.tensor([0, 1, 10, 100, 500, 999])
    model = best_epsilon(SCHEDULE)
    exact, found = (
        training_losses(
            model, x0.to(dtype), t, SCHEDULE, objective="full", decoder="gaussian", seed=2
        )
        for dtype in (F64, F32)
    )
    assert found.loss.dtype == F32
    torch.testing.assert_close(found.loss.double(), exact.loss, rtol=2e-3, atol=1e-9)
