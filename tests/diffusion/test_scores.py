"""Tweedie's estimate, and the score and the noise, against integrals and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate, stats

from cases import F16, F32, F64, SCHEDULE, assert_named
from ddpm_fast import NoiseSchedule
from ddpm_fast.diffusion.parameterization import noise_from_score, score_from_noise, tweedie
from sampler_cases import smooth

TIMES = [0, 40, 500, 999]
PARTS = ((0.3, -0.7, 0.1), (0.7, 0.5, 0.3))  # weight, mean and deviation: data of two humps


def mixture_score(x_t, t):
    """The gradient of log q(x_t), by autograd from the density of the noised mixture."""
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
            prior = sum(w * stats.norm.pdf(x0, mean, scale) for w, mean, scale in PARTS)
            return prior * stats.norm.pdf(value, signal * x0, noise)

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
