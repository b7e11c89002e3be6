"""The weights of the objectives, against the divergences that they stand for."""

from __future__ import annotations

import pytest
import torch

from cases import F64, SCHEDULE, assert_named
from ddpm_fast import NoiseSchedule
from ddpm_fast.diffusion.gaussian import gaussian_kl, gaussian_log_density
from ddpm_fast.diffusion.noise_levels import respace
from ddpm_fast.training.loss_weights import objective_weights

CHAINS = [SCHEDULE, NoiseSchedule.cosine(50), respace(SCHEDULE, 20)[0]]
IDS = ["linear", "cosine", "respaced"]


@pytest.mark.parametrize("schedule", CHAINS, ids=IDS)
def test_the_weights_are_those_of_the_papers(schedule) -> None:
    """Eq. 12 of Ho et al. 2020, and both of its forms, worked out by hand."""
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
    """By autograd: the second derivative of the term in the prediction is twice the weight.

    The mean of p is Eq. 11 of Ho et al. 2020 for every target, by the epsilon that it stands for.
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
def test_the_simple_objective_weights_epsilons_error_by_1(target: str) -> None:
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
def test_a_bad_argument_is_named(bad) -> None:
    assert_named(lambda **wrong: objective_weights(**({"schedule": SCHEDULE} | wrong)), bad)


def test_without_signal_only_x0_and_v_have_weights() -> None:
    schedule = SCHEDULE.rescale_zero_terminal_snr()
    for target in ("epsilon", "score"):
        with pytest.raises(ValueError, match="target must be 'x0' or 'v' for a schedule of zero"):
            objective_weights(schedule, target=target)
    for target in ("x0", "v"):
        assert objective_weights(schedule, target=target).isfinite().all()
