"""Order of convergence to the probability-flow ODE, of a mixture whose score is a closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import pytest
import torch

from ddpm_fast import NoiseSchedule, Sampler, StepTable
from ddpm_fast.diffusion.parameterization import PREDICTIONS
from ddpm_fast.ops.row import ROW_FIELDS
from gaussian_mixture import F64, MIXTURE

BACKEND = "cpu"
T = 100_000  # so many that rounding to integers hardly moves a timestep
SCHEDULE = NoiseSchedule.linear(T, 1e-4 * 1000 / T, 0.02 * 1000 / T)
ABAR = SCHEDULE.alphas_cumprod
SIGMA = (SCHEDULE.one_minus_alphas_cumprod / ABAR).sqrt()
STEPS = (20, 40, 80, 160)
NUM = 32


@dataclass(frozen=True)
class Interval:
    """Two noise levels sigma between which chains of any number of steps run."""

    noisy: float
    clean: float
    spaced: Callable[..., np.ndarray]

    def timesteps(self, steps: int) -> list[int]:
        levels = self.spaced(self.noisy, self.clean, steps + 1)
        return torch.searchsorted(SIGMA, torch.from_numpy(levels)).tolist()

    def flow(self, x, back: bool = False):
        """Return the exact solution at the clean end for x at the noisy end, or the reverse."""
        ends = SIGMA[self.timesteps(1)].tolist()
        return MIXTURE.flow(x, *(ends[::-1] if back else ends))

    @cache  # noqa: B019
    def start(self):
        return MIXTURE.noised(NUM, float(ABAR[self.timesteps(1)[0]]), seed=3)

    @cache  # noqa: B019
    def exact(self):
        return self.flow(self.start())

    def denoised(self, make, steps: int, prediction: str = "epsilon"):
        """Return the state at the clean end, before the last row, which ends at x_0."""
        spacing = self.timesteps(steps)
        table = make(SCHEDULE, spacing=spacing, prediction=prediction, clip=None)
        state = run(table, prediction, self.start() * table.init_scale, [table.steps - 1])[0]
        return state * ABAR[spacing[-1]].sqrt() if table.name == "ve_ode" else state


IN_LAMBDA = Interval(5.0, 0.25, np.geomspace)  # equal steps of lambda = -log(sigma)
IN_SIGMA = Interval(0.7, 0.3, np.linspace)


def run(table: StepTable, prediction: str, x, after: list[int]):
    """Return the states of a chain from x after a number of rows."""
    model = MIXTURE.model(SCHEDULE, prediction)
    sampler = Sampler(model, table, (2,), len(x), "cpu", F64, BACKEND)
    return sampler.sample(len(x), x_T=x, progress=False, return_steps=after)[1]


def slope(errors, steps=STEPS) -> float:
    """Return the exponent p of errors proportional to steps^-p, by least squares."""
    sizes = [float(error.square().mean().sqrt()) for error in errors]
    return -float(np.polyfit(np.log(steps), np.log(sizes), 1)[0])


SOLVERS = {
    "ddim": (StepTable.ddim, 1),
    "ddim-raw": (partial(StepTable.ddim, rederive_epsilon=False), 1),
    "ve_ode": (StepTable.ve_ode, 1),
    "dpmpp_2m-midpoint": (StepTable.dpmpp_2m, 2),
    "dpmpp_2m-heun": (partial(StepTable.dpmpp_2m, solver_type="heun"), 2),
    # UniC adds one to the order of UniP (Theorem 3.1, Zhao et al. 2023).
    "unipc-bh2": (StepTable.unipc, 3),
    "unipc-bh1": (partial(StepTable.unipc, solver_type="bh1"), 3),
    # Adams and Bashforth's weights are those of equal steps of sigma; of others it is of order 2.
    "plms": (StepTable.plms, 2),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_the_error_falls_with_the_order_of_the_solver(name: str):
    make, order = SOLVERS[name]
    errors = [IN_LAMBDA.denoised(make, steps) - IN_LAMBDA.exact() for steps in STEPS]
    assert abs(slope(errors) - order) < 0.1


def test_plms_in_equal_steps_of_sigma_is_of_third_order():
    """The start limits the order: Heun's step, and two steps with fewer than four epsilons."""
    fewer = [steps // 2 for steps in STEPS]
    errors = [IN_SIGMA.denoised(StepTable.plms, steps) - IN_SIGMA.exact() for steps in fewer]
    assert slope(errors, fewer) > 2.9


@pytest.mark.parametrize("evaluate_at", ["current", "next"])
def test_the_inverse_is_of_first_order(evaluate_at: str):
    """From its first state, at the clean end, which all chains share."""
    data, errors = MIXTURE.sample(NUM, seed=5), []
    for steps in STEPS:
        spacing = IN_LAMBDA.timesteps(steps)
        table = StepTable.ddim_inverse(SCHEDULE, spacing=spacing, evaluate_at=evaluate_at)
        first, last = run(table, "epsilon", data, [1, table.steps])
        errors.append(last - IN_LAMBDA.flow(first, back=True))
    assert abs(slope(errors) - 1) < 0.1


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SOLVERS)
def test_a_chain_is_the_same_for_every_prediction(name: str, prediction: str):
    make, _ = SOLVERS[name]
    ours, epsilon = (IN_LAMBDA.denoised(make, 20, kind) for kind in (prediction, "epsilon"))
    torch.testing.assert_close(ours, epsilon, rtol=0, atol=1e-9)


MEAN, VARIANCE = 0.3, 0.4  # of Gaussian data, whose chains stay Gaussian


def law_at_the_clean_end(table: StepTable) -> tuple[float, float]:
    """Mean and variance of the state before the last row, without sampling.

    With the exact epsilon of Gaussian data, a line in x, a row is an affine map of (x, h1, 1).
    """
    abar = ABAR[table.timesteps].tolist()
    scale = abar[0] * VARIANCE + 1 - abar[0]
    law = np.array([[scale, 0, 0], [0, 0, 0], [0, 0, 0]])
    mean = np.array([math.sqrt(abar[0]) * MEAN, 0.0, 1.0])
    for level, row in zip(abar[:-1], table.rows.tolist(), strict=False):
        of = dict(zip(ROW_FIELDS, row, strict=False))
        slope = math.sqrt(1 - level) / (level * VARIANCE + 1 - level)
        epsilon = np.array([slope, 0, -slope * math.sqrt(level) * MEAN])
        x0 = np.array([of["P"], 0, 0]) + of["Q"] * epsilon
        step = np.array(
            [
                np.array([of["Xx"], of["Xh1"], 0]) + of["Xx0"] * x0 + of["Xo"] * epsilon,
                of["Hv"] * x0,
                [0, 0, 1],
            ]
        )
        mean, law = step @ mean, step @ law @ step.T
        law[0, 0] += of["S"] ** 2
    return float(mean[0]), float(law[0, 0])


STOCHASTIC = {
    "ddpm": (StepTable.ddpm, 1),
    "ddpm-beta": (partial(StepTable.ddpm, variance="beta"), 1),
    "ddim-eta-half": (partial(StepTable.ddim, eta=0.5), 1),
    "ddim-eta-1": (partial(StepTable.ddim, eta=1.0), 1),
    "dpmpp_2m_sde-midpoint": (StepTable.dpmpp_2m_sde, 2),
    "dpmpp_2m_sde-heun": (partial(StepTable.dpmpp_2m_sde, solver_type="heun"), 2),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_distribution_of_a_noisy_chain_converges_with_its_weak_order(name: str):
    make, order = STOCHASTIC[name]
    errors = []
    for steps in STEPS:
        table = make(SCHEDULE, spacing=IN_LAMBDA.timesteps(steps), clip=None)
        mean, variance = law_at_the_clean_end(table)
        abar = float(ABAR[table.timesteps[-1]])
        exact = math.sqrt(abar) * MEAN, abar * VARIANCE + 1 - abar
        errors.append(torch.tensor([mean - exact[0], variance - exact[1]], dtype=F64))
    assert order - 0.1 < slope(errors) < order + 0.25
