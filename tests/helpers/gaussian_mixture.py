"""A mixture of Gaussians in the plane: exact models, its ODE, and distances of samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from ddpm_fast import NoiseSchedule

F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True, eq=False)
class Mixture:
    """Components with weights [K], means [K, 2] and covariances [K, 2, 2].

    Noised to x_t = sqrt(abar) x_0 + sqrt(1 - abar) z it is a mixture again, of means sqrt(abar) m
    and covariances abar C + (1 - abar) I, so that its score and E[x_0 | x_t] are closed forms.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor

    @property
    def mean(self) -> Tensor:
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        off = self.means - self.mean
        within = self.covariances + off[:, :, None] * off[:, None, :]
        return torch.einsum("k,kij->ij", self.weights, within)

    def sample(self, num: int, seed: int) -> Tensor:
        source = generator(seed)
        which = torch.multinomial(self.weights, num, replacement=True, generator=source)
        z = torch.randn(num, 2, generator=source, dtype=F64)
        roots = torch.linalg.cholesky(self.covariances)
        return self.means[which] + (roots[which] @ z[:, :, None])[:, :, 0]

    def noised(self, num: int, abar: float, seed: int) -> Tensor:
        z = torch.randn(num, 2, generator=generator(seed + 1), dtype=F64)
        return abar**0.5 * self.sample(num, seed) + (1 - abar) ** 0.5 * z

    def outputs(self, x: Tensor, abar: Tensor, one_minus_abar: Tensor) -> tuple[Tensor, Tensor]:
        """Return E[epsilon | x_t] and E[x_0 | x_t] for x [N, 2] at one noise level."""
        signal, noise = abar.sqrt(), one_minus_abar.sqrt()
        spread = abar * self.covariances + one_minus_abar * torch.eye(2, dtype=F64)
        off = x - signal * self.means[:, None]
        pull = off @ torch.linalg.inv(spread)
        scale = self.weights.log() - spread.logdet() / 2
        share = (scale[:, None] - (off * pull).sum(-1) / 2).softmax(0)[:, :, None]
        x0 = self.means[:, None] + signal * (pull @ self.covariances)
        return noise * (share * pull).sum(0), (share * x0).sum(0)

    def model(self, schedule: NoiseSchedule, prediction: str = "epsilon") -> Callable[..., Tensor]:
        """Return the exact model of a schedule; a batch is at one timestep."""
        abar, one_minus_abar = schedule.alphas_cumprod, schedule.one_minus_alphas_cumprod

        def network(x: Tensor, t: Tensor) -> Tensor:
            a, r = abar[t[0]], one_minus_abar[t[0]]
            epsilon, x0 = self.outputs(x, a, r)
            if prediction == "v":
                return a.sqrt() * epsilon - r.sqrt() * x0
            return {"epsilon": epsilon, "x0": x0, "score": -epsilon / r.sqrt()}[prediction]

        return network

    def flow(self, x: Tensor, sigma: float, sigma_end: float) -> Tensor:
        """Integrate the probability-flow ODE from one sigma to another, to about 1e-10.

        sigma^2 = 1 / abar - 1. For u = x_t / sqrt(abar) it is du / d log(sigma) = sigma epsilon.
        """

        def slope(log_sigma: float, u: Any) -> Any:
            variance = torch.tensor(2 * log_sigma, dtype=F64).exp()
            abar, one_minus_abar = 1 / (1 + variance), variance / (1 + variance)
            state = torch.from_numpy(u).view(-1, 2) * abar.sqrt()
            return (
                (variance.sqrt() * self.outputs(state, abar, one_minus_abar)[0]).flatten().numpy()
            )

        ends = [float(torch.tensor(s, dtype=F64).log()) for s in (sigma, sigma_end)]
        start = (x * (1 + sigma**2) ** 0.5).flatten().numpy()
        solved = solve_ivp(slope, ends, start, method="DOP853", rtol=1e-10, atol=1e-12)
        return torch.from_numpy(solved.y[:, -1]).view(-1, 2) / (1 + sigma_end**2) ** 0.5


def _turned(degrees: float, *deviations: float) -> Tensor:
    """Return the covariance of standard deviations along rotated axes."""
    angle = torch.deg2rad(torch.tensor(degrees, dtype=F64))
    c, s = float(angle.cos()), float(angle.sin())
    axes = torch.tensor([[c, -s], [s, c]], dtype=F64)
    return axes @ torch.diag(torch.tensor(deviations, dtype=F64).square()) @ axes.T


MIXTURE = Mixture(
    torch.tensor([0.5, 0.3, 0.2], dtype=F64),
    torch.tensor([[-0.9, -0.4], [0.6, -0.7], [0.3, 0.8]], dtype=F64),
    torch.stack([_turned(0, 0.2, 0.2), _turned(30, 0.4, 0.15), _turned(-60, 0.3, 0.2)]),
)

NORMAL = Mixture(
    torch.ones(1, dtype=F64), torch.zeros(1, 2, dtype=F64), torch.eye(2, dtype=F64)[None]
)

_ANGLES = torch.arange(16, dtype=F64) * (torch.pi / 16)
PROJECTIONS = torch.stack([_ANGLES.cos(), _ANGLES.sin()])


@cache
def _quantiles(law: Mixture, num: int) -> Tensor:
    """Return quantiles of projections [num, directions], at the middle of num equal shares."""
    centers = law.means @ PROJECTIONS
    deviations = torch.einsum("id,kij,jd->kd", PROJECTIONS, law.covariances, PROJECTIONS).sqrt()
    values = torch.linspace(-6, 6, 20_001, dtype=F64)
    shares = (torch.arange(num, dtype=F64) + 0.5) / num
    found = []
    for center, deviation in zip(centers.T, deviations.T, strict=True):
        below = torch.special.ndtr((values[:, None] - center) / deviation) @ law.weights
        found.append(torch.from_numpy(np.interp(shares, below, values)))
    return torch.stack(found, dim=1)


def distances(samples: Tensor, law: Mixture) -> dict[str, float]:
    """Return distances between samples [N, 2] and a distribution.

    The largest errors of the mean and of the covariance, and the sliced Wasserstein distance: the
    root mean square over fixed directions of the 2-Wasserstein distance of the projections.
    """
    projected = (samples @ PROJECTIONS).sort(0).values
    return {
        "mean": float((samples.mean(0) - law.mean).abs().max()),
        "covariance": float((samples.T.cov() - law.covariance).abs().max()),
        "wasserstein": float((projected - _quantiles(law, len(samples))).square().mean().sqrt()),
    }
