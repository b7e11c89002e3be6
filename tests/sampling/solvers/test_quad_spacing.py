"""Quad spacing of ermongroup/ddim, which repeats timesteps of long chains."""

import numpy as np
import pytest
import torch

from ddpm_fast import NoiseSchedule, Sampler, StepTable
from diffusers_pairs import closed_form, rough

LINEAR = NoiseSchedule.linear()
MODEL = rough(closed_form(LINEAR, "epsilon"))
X_T = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def ddim_of_ermongroup(steps):
    """Run generalized_steps at eta 0, which has a step for each repetition."""
    seq = [int(s) for s in np.linspace(0, np.sqrt(1000 * 0.8), steps) ** 2]
    assert len(set(seq)) < len(seq)
    levels, x = [*LINEAR.alphas_cumprod, torch.ones((), dtype=torch.float64)], X_T
    for t, after in zip(reversed(seq), [*reversed(seq[:-1]), -1], strict=True):
        abar, abar_prev = levels[t], levels[after]
        epsilon = MODEL(x, torch.full((len(x),), t))
        x0 = (x - epsilon * (1 - abar).sqrt()) / abar.sqrt()
        x = abar_prev.sqrt() * x0 + (1 - abar_prev).sqrt() * epsilon
    return x


@pytest.mark.parametrize("steps", [50, 100, 200])
def test_ddim_equals_the_chain_with_repetitions(steps):
    table = StepTable.ddim(LINEAR, steps, clip=None, spacing="quad")
    assert table.steps < steps
    ours = Sampler(MODEL, table, X_T.shape[1:], device="cpu", dtype=torch.float64)
    got = ours.sample(3, seed=0, x_T=X_T)
    torch.testing.assert_close(got.double(), ddim_of_ermongroup(steps), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "method", ["ddpm", "ddim", "ve_ode", "plms", "dpmpp_2m", "dpmpp_2m_sde", "unipc"]
)
def test_every_solver_takes_any_number_of_steps(method):
    for steps in (2, 50, 51, 200, 1000):
        table = getattr(StepTable, method)(LINEAR, steps, spacing="quad")
        assert not table.rows.isnan().any()
        assert int(table.timesteps[0]) in (799, 800)
