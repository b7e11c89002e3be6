"""Weights of the squared error: of the bound, min-SNR, and tables of the caller."""

from __future__ import annotations

import pytest
import torch

from cases import F32, F64, SCHEDULE, assert_named
from ddpm_fast import NoiseSchedule, objective_weights, training_losses
from ddpm_fast.diffusion.gaussian import gaussian_kl, gaussian_log_density
from ddpm_fast.diffusion.noise_levels import respace
from loss_cases import PREDICTIONS, SHORT, T4, Network, batch

T = torch.tensor([0, 150, 500, 999])  # SNR above and below gamma
CHAINS = [SCHEDULE, NoiseSchedule.cosine(50), respace(SCHEDULE, 20)[0]]
IDS = ["linear", "cosine", "respaced"]


@pytest.mark.parametrize(("objective", "gamma"), [("simple", 5.0), ("score", 1.0)])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_equals_the_paper(prediction: str, objective: str, gamma: float) -> None:
    """Section 3.4, Hang et al. 2023: min(SNR, gamma) for x_0, divided by SNR or SNR + 1 for others.

    The error of a score is that of epsilon over 1 - abar.
    """
    x0, noise = batch()
    found = training_losses(
        Network(), x0, T, SCHEDULE, prediction=prediction, objective=objective,
        weighting="min_snr", gamma=gamma, noise=noise,
    )  # fmt: skip
    abar = (1 - SCHEDULE.betas).cumprod(0)[T]
    snr = abar / (1 - abar)
    clamped = snr.clamp(max=gamma)
    assert (clamped < snr).any()
    assert (clamped == snr).any()
    weight = {
        "x0": clamped,
        "epsilon": clamped / snr,
        "v": clamped / (snr + 1),
        "score": clamped / snr * (1 - abar),
    }[prediction]
    torch.testing.assert_close(found.loss, weight * found.mse, rtol=1e-9, atol=0)
    assert not torch.equal(found.loss, found.mse)


@pytest.mark.parametrize("weighting", [None, "min_snr"])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_losses_equal_those_of_diffusers_scripts(prediction, weighting) -> None:
    """As train_text_to_image.py of diffusers has it, by its scheduler and its compute_snr."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.training_utils import compute_snr

    scheduler = diffusers.DDPMScheduler()
    network, (x0, noise) = Network(dtype=F32), batch(dtype=F32)
    found = training_losses(
        network, x0, T, SCHEDULE, prediction=prediction, weighting=weighting, noise=noise
    )
    x_t = scheduler.add_noise(x0, noise, T)
    target = {
        "epsilon": lambda: noise,
        "x0": lambda: x0,
        "v": lambda: scheduler.get_velocity(x0, noise, T),
    }[prediction]()
    theirs = torch.nn.functional.mse_loss(network(x_t, T), target, reduction="none")
    theirs = theirs.mean(dim=[1, 2, 3])
    if weighting is not None:
        snr = compute_snr(scheduler, T)
        clamped = torch.stack([snr, 5.0 * torch.ones_like(T)], dim=1).min(dim=1)[0]
        theirs = theirs * clamped / {"epsilon": snr, "v": snr + 1, "x0": 1}[prediction]
    torch.testing.assert_close(found.x_t, x_t, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.loss, theirs, rtol=2e-4, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_table_multiplies_the_weights_of_the_objective(prediction: str) -> None:
    network, (x0, noise) = Network(learned=True), batch()
    table = torch.linspace(0.5, 2, 8, dtype=F64)
    options = {"prediction": prediction, "noise": noise, "variance": "learned_range"}

    def loss(**more):
        return training_losses(network, x0, T4, SHORT, **options, **more).loss

    weight = table[T4]
    torch.testing.assert_close(loss(weighting=table), weight * loss())
    score = loss(objective="score")
    torch.testing.assert_close(loss(objective="score", weighting=table), weight * score)
    # The term of the learned variance is not weighted.
    bound = loss(objective="hybrid") - loss()
    torch.testing.assert_close(loss(objective="hybrid", weighting=table), weight * loss() + bound)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_weights_of_the_bound_give_its_gradient(prediction: str) -> None:
    """In nats, with the Gaussian L_0."""
    network, (x0, noise) = Network(), batch()
    options = {"prediction": prediction, "noise": noise}
    table = objective_weights(SHORT, "beta", prediction)
    weighted = training_losses(network, x0, T4, SHORT, weighting=table, **options)
    full = training_losses(
        network, x0, T4, SHORT, objective="full", variance="beta", decoder="gaussian", **options
    )
    nats = full.loss * torch.tensor(2.0).log()
    for n in range(4):
        ours, theirs = (
            torch.autograd.grad(loss[n], list(network.parameters()), retain_graph=True)
            for loss in (weighted.loss, nats)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("schedule", CHAINS, ids=IDS)
def test_the_weights_equal_the_papers(schedule) -> None:
    """Eq. 12 of Ho et al. 2020, for both variances."""
    beta, alpha = schedule.betas[1:], schedule.alphas[1:]
    abar, prev = schedule.alphas_cumprod[1:], schedule.alphas_cumprod[:-1]
    of_beta = objective_weights(schedule, "beta")
    of_posterior = objective_weights(schedule, "posterior")
    exact = beta / (2 * alpha * (1 - abar))
    torch.testing.assert_close(of_beta[1:], exact, rtol=1e-8, atol=0)
    exact = (1 - alpha) / (2 * alpha * (1 - prev))
    torch.testing.assert_close(of_posterior[1:], exact, rtol=1e-8, atol=0)
    first = float(1 / (2 * schedule.alphas[0]))
    assert float(of_beta[0]) == pytest.approx(first)
    assert float(of_posterior[0]) == pytest.approx(first)
    assert of_beta.dtype == F64


@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize("target", ["epsilon", "x0", "v", "score"])
@pytest.mark.parametrize("schedule", CHAINS, ids=IDS)
def test_a_term_is_its_weight_times_the_squared_error(schedule, target: str, variance: str) -> None:
    """By autograd: the second derivative of the term is twice the weight.

    The mean of p is Eq. 11 of Ho et al. 2020, with the epsilon of the prediction.
    """
    weights = objective_weights(schedule, variance, target)
    for index in {0, 1, 5, schedule.T - 1}:
        abar, beta = float(schedule.alphas_cumprod[index]), float(schedule.betas[index])
        one_minus_abar = float(schedule.one_minus_alphas_cumprod[index])
        x0, noise = torch.tensor([0.3, -0.8], dtype=F64)
        x_t = abar**0.5 * x0 + one_minus_abar**0.5 * noise
        sigma2 = float(schedule.posterior_variance[index])
        log_p = torch.tensor(beta if variance == "beta" or index == 0 else sigma2, dtype=F64).log()

        def term(
            out,
            index=index,
            abar=abar,
            one_minus_abar=one_minus_abar,
            beta=beta,
            x0=x0,
            x_t=x_t,
            log_p=log_p,
        ):
            epsilon = {
                "epsilon": lambda: out,
                "score": lambda: -(one_minus_abar**0.5) * out,
                "x0": lambda: (x_t - abar**0.5 * out) / one_minus_abar**0.5,
                "v": lambda: abar**0.5 * out + one_minus_abar**0.5 * x_t,
            }[target]()
            mean = (x_t - beta / one_minus_abar**0.5 * epsilon) / float(
                schedule.alphas[index]
            ) ** 0.5
            if index == 0:
                return -gaussian_log_density(x0, mean, log_p)
            posterior = schedule.posterior_mean_coef1[index] * x0
            posterior = posterior + schedule.posterior_mean_coef2[index] * x_t
            return gaussian_kl(posterior, schedule.posterior_log_variance[index], mean, log_p)

        truth = {
            "epsilon": noise,
            "score": -noise / one_minus_abar**0.5,
            "x0": x0,
            "v": abar**0.5 * noise - one_minus_abar**0.5 * x0,
        }[target]
        slope, curvature = (
            torch.autograd.functional.jacobian(term, truth),
            torch.autograd.functional.hessian(term, truth),
        )
        assert float(curvature) / 2 == pytest.approx(float(weights[index]), rel=1e-6)
        assert abs(float(slope)) < 1e-6 * max(1.0, float(weights[index]))


@pytest.mark.parametrize("target", ["epsilon", "x0", "v", "score"])
def test_the_simple_objective_weights_the_error_of_epsilon_by_1(target: str) -> None:
    weights = objective_weights(SCHEDULE, "beta", target, "simple")
    # The ratio of a target's weight to epsilon's is the same in both objectives.
    full = objective_weights(SCHEDULE, "beta", target) / objective_weights(SCHEDULE, "beta")
    torch.testing.assert_close(weights, full)
    assert target != "epsilon" or (weights == 1).all()


@pytest.mark.parametrize(
    "bad",
    [
        ("schedule", 5, TypeError, "NoiseSchedule", "int"),
        ("variance", "learned", ValueError, "posterior, beta", "learned"),
        ("target", "noise", ValueError, "epsilon, x0", "noise"),
        ("objective", "whole", ValueError, "full, simple", "whole"),
    ],
    ids=lambda bad: bad[0],
)
def test_an_invalid_argument_is_named(bad) -> None:
    assert_named(lambda **wrong: objective_weights(**({"schedule": SCHEDULE} | wrong)), bad)


def test_zero_terminal_snr_has_weights_of_x0_and_v_only() -> None:
    schedule = SCHEDULE.rescale_zero_terminal_snr()
    for target in ("epsilon", "score"):
        with pytest.raises(ValueError, match="target must be 'x0' or 'v' for a schedule of zero"):
            objective_weights(schedule, target=target)
    for target in ("x0", "v"):
        assert objective_weights(schedule, target=target).isfinite().all()
