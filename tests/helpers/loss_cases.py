"""Networks and batches for the tests of losses, and objectives from the equations."""

from __future__ import annotations

import math

import torch

from cases import F64, normals
from ddpm_fast import NoiseSchedule

SHORT = NoiseSchedule.linear(8, 1e-2, 0.85)
PREDICTIONS = ("epsilon", "x0", "v", "score")
VARIANCES = ("posterior", "beta", "learned", "learned_range")
SHAPE = (4, 2, 3, 5)
T4 = torch.tensor([0, 1, 5, 7])


class Network(torch.nn.Module):
    """A small network that depends on the timestep, with 2C channels for a learned variance."""

    def __init__(self, learned: bool = False, channels: int = 2, dtype=F64) -> None:
        super().__init__()
        self.outer = torch.nn.Conv2d(channels, channels, 3, padding=1)
        self.variance = torch.nn.Conv2d(channels, channels, 1) if learned else None
        generator = torch.Generator().manual_seed(3)
        for parameter in self.parameters():
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        self.to(dtype)

    def forward(self, x, t, labels=None):
        shift = t.to(x.dtype) / 10 if labels is None else (t + labels).to(x.dtype) / 10
        out = self.outer(torch.sin(x + shift.view(-1, 1, 1, 1)))
        return out if self.variance is None else torch.cat([out, self.variance(x)], 1)


def batch(shape=SHAPE, dtype=F64, layout="contiguous"):
    """x0 in [-1, 1] and noise."""
    x0, noise = (normals(shape, layout, dtype, seed, "cpu") for seed in (1, 2))
    return torch.tanh(x0), noise


def levels(schedule, t, ndim=4):
    """abar and beta of each sample, float64, from the betas."""
    abar = (1 - schedule.betas).cumprod(0)[t]
    return [values.view(-1, *[1] * (ndim - 1)) for values in (abar, schedule.betas[t])]


def exact_target(prediction, x0, noise, t, schedule=SHORT):
    abar, _ = levels(schedule, t, x0.ndim)
    return {
        "epsilon": noise,
        "x0": x0,
        "v": abar.sqrt() * noise - (1 - abar).sqrt() * x0,
        "score": -noise / (1 - abar).sqrt(),
    }[prediction]


def exact_epsilon(prediction, out, x_t, t, schedule=SHORT):
    """Epsilon of a prediction, by the equations."""
    abar, _ = levels(schedule, t, x_t.ndim)
    return {
        "epsilon": lambda: out,
        "x0": lambda: (x_t - abar.sqrt() * out) / (1 - abar).sqrt(),
        "v": lambda: abar.sqrt() * out + (1 - abar).sqrt() * x_t,
        "score": lambda: -(1 - abar).sqrt() * out,
    }[prediction]()


def mean(values):
    return values.flatten(1).mean(1)


def exact_bound(prediction, variance, decoder, output, x0, x_t, t, schedule=SHORT):
    """L_{t-1}, or L_0 at index 0, of each sample in bits per dimension.

    Eq. 5, 7, 11 and 13 of Ho et al. 2020, Eq. 15 of Nichol & Dhariwal 2021.
    """
    betas = schedule.betas.tolist()
    abars = (1 - schedule.betas).cumprod(0).tolist()
    true = [0.0] + [betas[i] * (1 - abars[i - 1]) / (1 - abars[i]) for i in range(1, schedule.T)]
    true[0] = true[1]
    out, learned_output = output.chunk(2, 1) if "learned" in variance else (output, None)
    epsilons = exact_epsilon(prediction, out, x_t, t, schedule)
    terms = []
    for n, i in enumerate(t.tolist()):
        beta, abar = betas[i], abars[i]
        mean_p = (x_t[n] - beta / (1 - abar) ** 0.5 * epsilons[n]) / (1 - beta) ** 0.5
        if variance == "learned":
            sigma2 = learned_output[n].exp()
        elif variance == "learned_range":
            v = (learned_output[n] + 1) / 2
            sigma2 = torch.exp(v * math.log(beta) + (1 - v) * math.log(true[i]))
        else:
            first = betas[0] if decoder == "gaussian" else true[0]
            fixed = first if i == 0 else beta if variance == "beta" else true[i]
            sigma2 = torch.tensor(fixed, dtype=F64)
        p = torch.distributions.Normal(mean_p, sigma2.sqrt())
        if i > 0:
            prev = abars[i - 1]
            x0_coef, x_coef = (
                prev**0.5 * beta / (1 - abar),
                (1 - beta) ** 0.5 * (1 - prev) / (1 - abar),
            )
            mean_q = x0_coef * x0[n] + x_coef * x_t[n]
            q = torch.distributions.Normal(mean_q, torch.full_like(mean_q, true[i] ** 0.5))
            nats = torch.distributions.kl_divergence(q, p)
        elif decoder == "gaussian":
            nats = -p.log_prob(x0[n])
        else:
            # From the tail, because the distribution function loses its digits near 1.
            far = (x0[n] - mean_p).abs()
            near, end = (torch.erfc((far - side / 255) / p.scale / 2**0.5) for side in (1, -1))
            nats = -((near - end) / 2).log()
        terms.append(nats.mean() / math.log(2))
    return torch.stack(terms)
