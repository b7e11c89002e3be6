"""Data N(M, S^2), with exact model, likelihood and bound."""

from __future__ import annotations

import math

import torch

from cases import F64

M, S = 0.2, 0.5
ENTROPY = math.log(2 * math.pi * math.e * S**2) / 2  # nats per dimension


def data(num, *shape, seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return (M + S * torch.randn(num, *shape, generator=generator, dtype=F64)).to(dtype)


def best_epsilon(schedule):
    """Return the model E[epsilon | x_t] of this data in closed form."""
    table = torch.stack([schedule.alphas_cumprod, schedule.one_minus_alphas_cumprod], 1)

    def model(x, t):
        abar, one_minus_abar = table[t].to(x.dtype).view(-1, 2, *[1] * (x.ndim - 1)).unbind(1)
        return one_minus_abar.sqrt() * (x - M * abar.sqrt()) / (S**2 * abar + one_minus_abar)

    return model


def expected_terms(schedule, variance):
    """E[L_{t-1}] and at index 0 E[L_0] as a density, nats per dimension, float64 [T].

    The squared error of the best epsilon is the variance of epsilon given x_t, S^2 abar /
    (S^2 abar + 1 - abar); it is weighted by Eq. 12 of Ho et al. 2020, and the divergence of the
    variances is added (Corollary 9 of Khungurn 2022).
    """
    terms = []
    for i in range(schedule.T):
        beta, alpha = float(schedule.betas[i]), float(schedule.alphas[i])
        abar, prev = float(schedule.alphas_cumprod[i]), float(schedule.alphas_cumprod_prev[i])
        error = S**2 * abar / (S**2 * abar + 1 - abar)
        true = beta * (1 - prev) / (1 - abar)
        sigma2 = beta if variance == "beta" or i == 0 else true
        constant = math.log(2 * math.pi * sigma2) / 2
        if i > 0:
            constant = (math.log(sigma2 / true) + true / sigma2 - 1) / 2
        terms.append(constant + beta**2 / (2 * sigma2 * alpha * (1 - abar)) * error)
    return torch.tensor(terms, dtype=F64)


def expected_prior(schedule):
    """Return E[L_T] in nats per dimension."""
    abar = float(schedule.alphas_cumprod[-1])
    return (abar * (S**2 + M**2) - abar - math.log(1 - abar)) / 2


def model_marginal(schedule):
    """Return mean and variance of x_0 under the model with variance beta (linear steps)."""
    mean, variance = 0.0, 1.0
    model = best_epsilon(schedule)
    for i in reversed(range(schedule.T)):
        beta, alpha = float(schedule.betas[i]), float(schedule.alphas[i])
        one_minus_abar = float(schedule.one_minus_alphas_cumprod[i])
        ends = torch.tensor([[0.0], [1.0]], dtype=F64)
        # Eq. 11, Ho et al. 2020.
        moved = (ends - beta / one_minus_abar**0.5 * model(ends, torch.tensor([i, i]))) / alpha**0.5
        offset, slope = float(moved[0]), float(moved[1] - moved[0])
        mean, variance = slope * mean + offset, slope**2 * variance + beta
    return mean, variance
