"""Samples of each solver with the exact score: mean, covariance, sliced Wasserstein distance."""

from __future__ import annotations

from functools import cache, partial

import numpy as np
import pytest
import torch

from ddpm_fast import NoiseSchedule, Sampler, StepTable
from gaussian_mixture import F64, MIXTURE, NORMAL, Mixture, distances

BACKEND = "cpu"
NUM = 32_768
SCHEDULE = NoiseSchedule.linear()

# For each solver the number of timesteps, before duplicates are removed, and the allowance for its
# discretisation error in each distance: at most twice the distance of a million samples.
FIRST, SECOND = 0.012, 0.006
SOLVERS = {
    "ddpm-posterior": (StepTable.ddpm, 200, FIRST),
    "ddpm-beta": (partial(StepTable.ddpm, variance="beta"), 200, FIRST),
    "ddim": (StepTable.ddim, 130, FIRST),
    "ddim-eta0.5": (partial(StepTable.ddim, eta=0.5), 130, FIRST),
    "ddim-eta1-raw": (partial(StepTable.ddim, eta=1.0, rederive_epsilon=False), 200, FIRST),
    "ve_ode": (StepTable.ve_ode, 130, FIRST),
    "dpmpp_2m-midpoint": (StepTable.dpmpp_2m, 40, SECOND),
    "dpmpp_2m-heun": (partial(StepTable.dpmpp_2m, solver_type="heun"), 40, SECOND),
    "dpmpp_2m_sde-midpoint": (StepTable.dpmpp_2m_sde, 60, SECOND),
    "dpmpp_2m_sde-heun": (partial(StepTable.dpmpp_2m_sde, solver_type="heun"), 60, SECOND),
    "unipc-bh2": (StepTable.unipc, 30, SECOND),
    "unipc-bh1": (partial(StepTable.unipc, solver_type="bh1"), 30, SECOND),
    "plms": (StepTable.plms, 30, SECOND),
}


def spaced(steps: int) -> list[int]:
    """Return timesteps T - 1 .. 0, spaced as evenly in log(alpha / sigma) as integers allow."""
    level = (SCHEDULE.snr.log() / 2).flip(0)
    wanted = torch.linspace(float(level[0]), float(level[-1]), steps, dtype=F64)
    timesteps = (
        SCHEDULE.T - 1 - np.unique(torch.searchsorted(level, wanted).clamp(max=SCHEDULE.T - 1))
    )
    return timesteps.tolist()


def sample(table: StepTable, x_T=None):
    sampler = Sampler(MIXTURE.model(SCHEDULE), table, (2,), NUM, "cpu", F64, BACKEND)
    return sampler.sample(NUM, seed=1, x_T=x_T, progress=False)


@cache
def between_exact_samples(law: Mixture) -> dict[str, float]:
    """Return the largest distances of 16 sets of NUM exact samples from their distribution."""
    found = [distances(law.sample(NUM, seed=100 + i), law) for i in range(16)]
    return {name: max(each[name] for each in found) for name in found[0]}


def assert_samples_of(law: Mixture, samples, allowance: float) -> None:
    """Allow 1.25 times the distance of exact samples, plus the discretisation error."""
    for name, distance in distances(samples, law).items():
        bound = 1.25 * between_exact_samples(law)[name] + allowance
        assert distance < bound, f"{name}: {distance:.4f}, allowed {bound:.4f}"


DEFAULT = ("dpmpp_2m_sde-midpoint", "unipc-bh2", "plms")  # a few steps; the others are slow


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in DEFAULT else pytest.mark.slow) for n in SOLVERS],
)
def test_samples_follow_the_data(name: str):
    make, steps, allowance = SOLVERS[name]
    samples = sample(make(SCHEDULE, spacing=spaced(steps), clip=None))
    assert_samples_of(MIXTURE, samples, allowance)


@pytest.mark.slow
@pytest.mark.parametrize("evaluate_at", ["current", "next"])
def test_the_inverse_encodes_the_data_as_noise_and_ddim_decodes_it(evaluate_at: str):
    """Both are of first order: at 176 steps the variance of the code is up to 3 % too small."""
    data = MIXTURE.sample(NUM, seed=7)
    inverse = StepTable.ddim_inverse(SCHEDULE, spacing=spaced(200), evaluate_at=evaluate_at)
    code = sample(inverse, data)
    assert_samples_of(NORMAL, code, allowance=0.035)
    decoded = sample(StepTable.ddim(SCHEDULE, spacing=spaced(200), clip=None), code)
    assert float((decoded - data).square().mean().sqrt()) < 0.03
