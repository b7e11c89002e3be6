"""Simulations of the process: marginals, posterior, and chains with exact scores.

Tolerances are SIGMAS standard errors of the sample unless noted; seeds are fixed.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch

from cases import F64, backends
from ddpm_fast import NoiseSchedule, Sampler, StepTable, q_posterior, q_sample, q_sample_philox

stats = pytest.importorskip("scipy.stats")

SIGMAS = 4.5
SCHEDULES = {
    "linear": NoiseSchedule.linear(1000),
    "cosine": NoiseSchedule.cosine(300),
    "short": NoiseSchedule.from_betas(np.linspace(0.05, 0.6, 12)),
}
ON_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def assert_moments(x, mean, variance, kurtosis=3.0):
    """Check mean and variance of independent draws; `kurtosis` is that of the distribution."""
    x = np.asarray(x, dtype=np.float64).ravel()
    assert abs(x.mean() - mean) < SIGMAS * math.sqrt(variance / x.size)
    spread = variance * math.sqrt((kurtosis - 1) / x.size)
    assert abs(x.var() - variance) < SIGMAS * spread


# The forward process


@ON_SCHEDULE
def test_marginals_are_those_of_the_simulated_markov_chain(schedule):
    """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z, step by step, against q(x_t | x_0)."""
    num, x0 = 20_000, 0.7
    generator = np.random.default_rng(1)
    betas = schedule.betas.numpy()
    x = np.full(num, x0)
    observed = {0, 1, schedule.T // 2, schedule.T - 1}
    for t in range(schedule.T):
        x = math.sqrt(1 - betas[t]) * x + math.sqrt(betas[t]) * generator.standard_normal(num)
        if t not in observed:
            continue
        start = torch.full((num, 1), x0)
        direct, _ = q_sample_philox(start, t, schedule, seed=2, stream=t)
        abar = float(schedule.alphas_cumprod[t])
        for drawn in (x, direct.numpy()):
            assert_moments(drawn, math.sqrt(abar) * x0, 1 - abar)
        assert stats.ks_2samp(x, direct.numpy().ravel()).pvalue > 1e-3


@pytest.mark.parametrize("on", backends(), ids=str)
def test_the_forward_process_preserves_unit_variance(on):
    """a_t^2 + b_t^2 = 1: standard normal data stays standard normal at every t."""
    schedule = SCHEDULES["linear"]
    generator = torch.Generator().manual_seed(3)
    x0, noise = (torch.randn(50, 400, generator=generator).to(on.device) for _ in range(2))
    t = torch.linspace(0, 999, 50).long().to(on.device)
    assert_moments(q_sample(x0, t, noise, schedule, backend=on.name).cpu(), 0, 1)


# The posterior


@ON_SCHEDULE
@pytest.mark.parametrize("x0", [-0.9, 0.0, 0.4])
def test_posterior_is_bayes_rule_by_quadrature(schedule, x0):
    """q(x_{t-1} | x_t, x_0) is q(x_t | x_{t-1}) q(x_{t-1} | x_0), normalised; one dimension."""
    for t in sorted({1, 2, schedule.T // 3, schedule.T - 2, schedule.T - 1}):
        beta, prev = float(schedule.betas[t]), float(schedule.alphas_cumprod[t - 1])
        abar = float(schedule.alphas_cumprod[t])
        for draw in (-1.5, 0.3):
            x_t = math.sqrt(abar) * x0 + math.sqrt(1 - abar) * draw
            scale = math.sqrt(1 - prev)
            z = np.linspace(-14, 14, 40_001)
            before = math.sqrt(prev) * x0 + scale * z
            log_density = -(z**2) / 2 - (x_t - math.sqrt(1 - beta) * before) ** 2 / (2 * beta)
            weight = np.exp(log_density - log_density.max())
            weight /= weight.sum()
            mean = float((weight * before).sum())
            variance = float((weight * (before - mean) ** 2).sum())
            args = (torch.tensor([[v]], dtype=F64) for v in (x0, x_t))
            got_mean, got_variance, got_log = q_posterior(*args, t, schedule)
            assert float(got_mean) == pytest.approx(mean, abs=1e-7 * scale)
            assert float(got_variance) == pytest.approx(variance, rel=1e-6)
            assert float(got_log) == pytest.approx(math.log(variance), abs=1e-6)


@ON_SCHEDULE
def test_posterior_at_index_0_is_x0_itself(schedule):
    x0, x_t = torch.tensor([[0.3]], dtype=F64), torch.tensor([[-2.0]], dtype=F64)
    mean, variance, log_variance = q_posterior(x0, x_t, 0, schedule)
    assert float(mean) == pytest.approx(0.3, rel=1e-12)
    assert float(variance) == 0
    assert float(log_variance) == pytest.approx(math.log(1e-20))


def test_posterior_draws_bring_a_marginal_to_the_one_before():
    """x_t ~ q(x_t | x_0), then x_{t-1} ~ q(. | x_t, x_0), is q(x_{t-1} | x_0)."""
    schedule, num, t = SCHEDULES["short"], 200_000, 7
    x0 = torch.full((num, 1), 0.7)
    x_t, _ = q_sample_philox(x0, t, schedule, seed=5)
    mean, variance, _ = q_posterior(x0, x_t, t, schedule)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(6))
    abar = float(schedule.alphas_cumprod[t - 1])
    assert_moments(mean + variance.sqrt() * noise, math.sqrt(abar) * 0.7, 1 - abar)


# The reverse process with exact scores


class Mixture:
    """Exact predictions for points of a mixture of Gaussians; q(x_t) is a mixture too.

    A tensor [B, dims, points] holds B * points of them; the timestep is one for the whole batch.
    """

    def __init__(self, schedule, weights, means, covariances):
        weights, means, covariances = (
            torch.tensor(v, dtype=F64) for v in (weights, means, covariances)
        )
        self.parts = weights, means, covariances
        self.mean = weights @ means
        off = means - self.mean
        spread = covariances + off[:, :, None] * off[:, None, :]
        self.covariance = (weights[:, None, None] * spread).sum(0)
        self.abar = schedule.alphas_cumprod
        abar = self.abar[:, None, None, None]
        at_t = abar * covariances + (1 - abar) * torch.eye(means.shape[1], dtype=F64)
        self.inverses = torch.linalg.inv(at_t)  # [T, k, dims, dims]
        self.log_weights = weights.log() - torch.linalg.slogdet(at_t).logabsdet / 2

    def draw(self, batch, points, seed):
        weights, means, covariances = self.parts
        generator = torch.Generator().manual_seed(seed)
        which = torch.multinomial(weights, batch * points, True, generator=generator)
        root = torch.linalg.cholesky(covariances)[which]
        z = torch.randn(len(which), means.shape[1], 1, dtype=F64, generator=generator)
        x0 = means[which] + (root @ z)[:, :, 0]
        return x0.view(batch, points, -1).movedim(-1, 1)

    def score(self, x, t):
        """Return the gradient of log q(x_t)."""
        t = int(t[0])
        off = x.double().movedim(1, -1)[..., None, :] - self.abar[t].sqrt() * self.parts[1]
        solved = torch.einsum("kij,bnkj->bnki", self.inverses[t], off)
        chosen = torch.softmax(self.log_weights[t] - (off * solved).sum(-1) / 2, dim=-1)
        return -(chosen[..., None] * solved).sum(-2).movedim(-1, 1)

    def epsilon(self, x, t):
        return (-(1 - self.abar[t[0]]).sqrt() * self.score(x, t)).to(x.dtype)


BATCH, POINTS = 4, 1024
slow = partial(pytest.param, marks=pytest.mark.slow)


def gaussian(schedule, mean=0.4, variance=0.09):
    return Mixture(schedule, [1.0], [[mean]], [[[variance]]])


def two_clusters(schedule):
    return Mixture(
        schedule,
        [0.3, 0.7],
        [[-0.8, 0.5], [0.6, -0.2]],
        [[[0.04, 0.02], [0.02, 0.05]], [[0.02, -0.01], [-0.01, 0.03]]],
    )


def sampled(model, table, dims, points=POINTS, x_T=None):
    """Return points [BATCH * points, dims] of BATCH samples, each an image of points."""
    sampler = Sampler(model, table, (dims, points), BATCH, "cpu")
    x = sampler.sample(BATCH, 11, x_T=x_T, progress=False)
    return x.double().movedim(1, -1).reshape(-1, dims)


def exact_chain(schedule, table, mean, variance, start=(0.0, 1.0)):
    """Mean and variance of a linear-Gaussian chain: one-dimensional data N(mean, variance).

    x0 is linear in x_t, E[x0 | x_t] = mean + gain (x_t - sqrt(abar) mean), and so is every step.
    """
    m, v = start
    betas, abars = schedule.betas, schedule.alphas_cumprod
    for t in range(table.steps - 1, -1, -1):
        beta, abar = float(betas[t]), float(abars[t])
        prev = float(abars[t - 1]) if t else 1.0
        gain = math.sqrt(abar) * variance / (abar * variance + 1 - abar)
        x0_coef = math.sqrt(prev) * beta / (1 - abar)
        x_coef = math.sqrt(1 - beta) * (1 - prev) / (1 - abar)
        slope = x_coef + x0_coef * gain
        m = slope * m + x0_coef * mean * (1 - gain * math.sqrt(abar))
        added = beta * (1 - prev) / (1 - abar) if table.name == "ddpm(posterior)" else beta
        v = slope**2 * v + (added if t else 0.0)
    return m, v


@pytest.mark.parametrize("variance", ["posterior", "beta"])
@ON_SCHEDULE
def test_chains_of_a_gaussian_have_its_mean_and_variance(schedule, variance):
    """To the sampling error those of the discrete chain, and near those of the data.

    The chain of T steps is not the data's law: the posterior variance falls short of the reverse
    variance by O(beta), beta exceeds it. Over 1000 steps both are within 3%.
    """
    data = gaussian(schedule)
    table = StepTable.ddpm(schedule, variance=variance, clip=None)
    got = sampled(data.epsilon, table, 1)
    mean, spread = exact_chain(schedule, table, 0.4, 0.09)
    assert_moments(got, mean, spread)
    if schedule.T == 1000:
        assert mean == pytest.approx(0.4, abs=5e-3)
        assert spread == pytest.approx(0.09, rel=0.03)


@pytest.mark.parametrize("prediction", ["epsilon", "score", "x0", "v"])
def test_predictions_of_one_model_give_one_distribution(prediction):
    schedule = SCHEDULES["short"]
    data = gaussian(schedule)

    def model(x, t):
        abar = schedule.alphas_cumprod[t[0]]
        score = data.score(x, t)
        epsilon = -(1 - abar).sqrt() * score
        x0 = (x.double() + (1 - abar) * score) / abar.sqrt()
        v = abar.sqrt() * epsilon - (1 - abar).sqrt() * x0
        return {"epsilon": epsilon, "score": score, "x0": x0, "v": v}[prediction].to(x.dtype)

    table = StepTable.ddpm(schedule, prediction=prediction, clip=None)
    got = sampled(model, table, 1, 10 * POINTS)
    assert_moments(got, *exact_chain(schedule, table, 0.4, 0.09))


@pytest.mark.parametrize("start", [1, 2, 7, 12])
def test_every_start_brings_its_marginal_to_the_data(start):
    """A chain of any length T' <= T that begins at q(x_T')."""
    schedule, points = SCHEDULES["short"], 10 * POINTS
    data = gaussian(schedule)
    table = StepTable.ddpm(schedule, clip=None, start=start)
    x_T, _ = q_sample_philox(data.draw(BATCH, points, 1), start - 1, schedule, seed=start)
    got = sampled(data.epsilon, table, 1, points, x_T)
    abar = float(schedule.alphas_cumprod[start - 1])
    begun = (math.sqrt(abar) * 0.4, abar * 0.09 + 1 - abar)
    assert_moments(got, *exact_chain(schedule, table, 0.4, 0.09, begun))


@pytest.mark.parametrize(
    "make",
    [
        slow(lambda s: StepTable.ddpm(s, clip=None), id="ddpm"),
        slow(lambda s: StepTable.ddpm(s, variance="beta", clip=None), id="ddpm-beta"),
        slow(lambda s: StepTable.ddim(s, clip=None), id="ddim"),
        pytest.param(lambda s: StepTable.ddim(s, 250, eta=1.0, clip=None), id="ddim-eta-1"),
        slow(lambda s: StepTable.ddpm(s, clip=None, start=500), id="ddpm-from-500"),
    ],
)
def test_chains_of_a_mixture_have_its_clusters(make):
    """Mean, covariance, weights and a projection; 0.01 allows for the discretisation."""
    schedule, num = SCHEDULES["linear"], BATCH * POINTS
    data = two_clusters(schedule)
    table = make(schedule)
    x_T = None
    if table.start is not None:
        x0 = data.draw(BATCH, POINTS, 2)
        x_T, _ = q_sample_philox(x0, table.start - 1, schedule, seed=4)
    got = sampled(data.epsilon, table, 2, POINTS, x_T)
    errors = SIGMAS * (data.covariance.diagonal() / num).sqrt()
    assert bool(((got.mean(0) - data.mean).abs() < errors + 0.01).all())
    covariance = torch.cov(got.T)
    spread = SIGMAS * data.covariance.abs().max() * math.sqrt(2 / num)
    assert bool(((covariance - data.covariance).abs() < spread + 0.01).all())
    share = float((got[:, 0] < -0.1).double().mean())
    assert share == pytest.approx(0.3, abs=SIGMAS * math.sqrt(0.21 / num) + 0.01)
    line = torch.tensor([0.8, -0.6], dtype=F64)
    drawn = data.draw(num, 1, 3)[:, :, 0]
    distance = stats.ks_2samp((got @ line).numpy(), (drawn @ line).numpy()).statistic
    assert distance < 1.95 * math.sqrt(2 / num) + 0.01


def test_ddim_maps_quantiles_of_a_gaussian():
    """Without noise every quantile of x_T maps to that of the data (the ODE, T = 1000)."""
    schedule = SCHEDULES["linear"]
    z = torch.linspace(-2, 2, 4 * BATCH).view(BATCH, 1, 4)
    got = sampled(gaussian(schedule).epsilon, StepTable.ddim(schedule, clip=None), 1, 4, z)
    torch.testing.assert_close(got.flatten(), 0.4 + 0.3 * z.flatten().double(), rtol=0, atol=0.01)
