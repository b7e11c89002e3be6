"""Variances of the reverse process, x_0 of model outputs, and respaced schedules."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cases import F16, F32, F64, SCHEDULE, assert_named
from ddpm_fast import NoiseSchedule, StepTable
from ddpm_fast.diffusion.noise_levels import respace
from ddpm_fast.diffusion.parameterization import x0_coefficients
from ddpm_fast.diffusion.variance import VARIANCES, model_variance
from ddpm_fast.ops.row import column

ZERO_SNR = SCHEDULE.rescale_zero_terminal_snr()


def posterior(schedule, first):
    """Return the log-variance of Eq. 7, with a given value at index 0."""
    betas = schedule.betas.numpy()
    abar = np.cumprod(1 - betas)
    prev = np.append(1.0, abar[:-1])
    variance = betas * (1 - prev) / (1 - abar)
    return np.log(np.append(variance[1] if first == "repeat" else 1e-20, variance[1:]))


@pytest.mark.parametrize("first", ["repeat", "clamp"])
@pytest.mark.parametrize("dtype", [F16, F32, F64])
@pytest.mark.parametrize("kind", VARIANCES)
def test_every_kind_is_its_formula(kind: str, dtype: torch.dtype, first: str) -> None:
    t = torch.tensor([0, 1, 500, 999])
    x_t = torch.zeros(4, 2, 3, dtype=dtype)
    learned_output = (
        torch.linspace(-1.5, 1.5, 24).view(4, 2, 3).to(dtype) if "learned" in kind else None
    )
    variance, log = model_variance(x_t, t, SCHEDULE, kind, learned_output, first)
    low = torch.from_numpy(posterior(SCHEDULE, first))[t].view(4, 1, 1)
    high = SCHEDULE.betas.log()[t].view(4, 1, 1)
    large = high.clone()  # OpenAI's fixed_large takes the posterior's at index 0
    if first == "repeat":
        large[0] = low[0]
    share = None if learned_output is None else (learned_output.double() + 1) / 2
    exact = {
        "posterior": lambda: low,
        "beta": lambda: large,
        "learned": lambda: learned_output.double(),
        "learned_range": lambda: share * high + (1 - share) * low,
    }[kind]()
    assert log.dtype == variance.dtype == (F64 if dtype == F64 else F32)
    assert log.shape == (x_t.shape if learned_output is not None else (4, 1, 1))
    # The schedule's own 1 - abar has the digits that numpy's lacks.
    torch.testing.assert_close(log.double(), exact, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(variance, log.exp())


def test_the_ends_of_the_learned_range_are_the_fixed_kinds() -> None:
    x_t = torch.zeros(1, 2)
    for learned_output, kind in ((-1.0, "posterior"), (1.0, "beta")):
        _, found = model_variance(
            x_t, 7, SCHEDULE, "learned_range", torch.full((1, 2), learned_output)
        )
        _, fixed = model_variance(x_t, 7, SCHEDULE, kind)
        assert (found == fixed).all()


def test_a_learned_variance_is_differentiable() -> None:
    learned_output = torch.randn(2, 3, dtype=F64, requires_grad=True)
    for kind in ("learned", "learned_range"):
        assert torch.autograd.gradcheck(
            lambda r, kind=kind: model_variance(torch.zeros(2, 3, dtype=F64), 5, SCHEDULE, kind, r),
            (learned_output,),
        )


@pytest.mark.parametrize(
    "bad",
    [
        ("kind", "small", ValueError, "posterior, beta, learned", "small"),
        ("learned_output", torch.zeros(2, 3), ValueError, "must be None", "posterior"),
        ("t", 1000, ValueError, "[0, 999]"),
        ("schedule", None, TypeError, "NoiseSchedule", "NoneType"),
        ("log_variance", "drop", ValueError, "repeat", "drop"),
        ("x_t", torch.zeros(2, dtype=torch.int64), TypeError, "int64"),
    ],
    ids=lambda bad: bad[0],
)
def test_a_bad_argument_is_named(bad) -> None:
    def call(**wrong):
        good = {"x_t": torch.zeros(2, 3), "t": 5, "schedule": SCHEDULE, "kind": "posterior"}
        return model_variance(**(good | wrong))

    assert_named(call, bad)


def test_a_learned_kind_needs_a_learned_output() -> None:
    x_t = torch.zeros(2, 3)
    with pytest.raises(
        ValueError, match="learned_output must be a tensor for the variance 'learned_range'"
    ):
        model_variance(x_t, 5, SCHEDULE, "learned_range")
    with pytest.raises(
        ValueError, match=r"learned_output must have the shape of x_t, \[2, 3\]; got \[2, 6\]"
    ):
        model_variance(x_t, 5, SCHEDULE, "learned", torch.zeros(2, 6))
    single = NoiseSchedule.from_betas([0.999])
    with pytest.raises(ValueError, match="'clamp' for T = 1; got 'repeat'"):
        model_variance(x_t, 0, single, "posterior")
    assert model_variance(x_t, 0, single, "beta")[0].flatten().tolist() == pytest.approx(
        [0.999] * 2
    )


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "score"])
def test_an_output_gives_back_x0(prediction: str) -> None:
    t = torch.arange(0, 1000, 111)
    signal, noise = SCHEDULE.sqrt_alphas_cumprod[t], SCHEDULE.sqrt_one_minus_alphas_cumprod[t]
    x0, epsilon = torch.randn(2, len(t), dtype=F64)
    x_t = signal * x0 + noise * epsilon
    out = {
        "epsilon": epsilon,
        "x0": x0,
        "v": signal * epsilon - noise * x0,
        "score": -epsilon / noise,
    }[prediction]
    x_coef, out_coef = x0_coefficients(SCHEDULE, prediction)[t].unbind(1)
    torch.testing.assert_close(x_coef * x_t + out_coef * out, x0)


def test_an_epsilon_without_signal_is_rejected() -> None:
    for prediction in ("epsilon", "score"):
        with pytest.raises(ValueError, match="prediction must be 'x0' or 'v' for a schedule of"):
            x0_coefficients(ZERO_SNR, prediction)
    with pytest.raises(ValueError, match="prediction must be one of epsilon, x0, v, score"):
        x0_coefficients(SCHEDULE, "noise")
    assert x0_coefficients(ZERO_SNR, "v").isfinite().all()


@pytest.mark.parametrize("schedule", [SCHEDULE, NoiseSchedule.cosine(), ZERO_SNR])
@pytest.mark.parametrize(
    ("steps", "spacing"),
    [(50, "linspace"), (1, "linspace"), (250, "trailing"), (7, "quad"), (None, [3, 40, 999])],
)
def test_a_respaced_schedule_is_the_chain_of_the_step_table(schedule, steps, spacing) -> None:
    """The rows equal those of the posterior (Eq. 7) and betas of the new schedule."""
    chain, stored = respace(schedule, steps, spacing)
    assert chain.alphas_cumprod.tolist() == schedule.alphas_cumprod[stored].tolist()
    for variance in ("posterior", "beta"):
        table = StepTable.ddpm(schedule, steps, variance, "v", spacing=spacing)
        assert stored[::-1] == table.timesteps.tolist()
        sigma2 = chain.posterior_variance if variance == "posterior" else chain.betas
        sigma2[0] = 0
        mine = {
            "Xx0": chain.posterior_mean_coef1,
            "Xx": chain.posterior_mean_coef2,
            "S": sigma2.sqrt(),
        }
        for name, values in mine.items():
            theirs = table.rows[:, column(name)].flip(0)
            torch.testing.assert_close(values, theirs, rtol=1e-12, atol=0, msg=name)


def test_respacing_to_all_steps_returns_the_schedule() -> None:
    chain, stored = respace(SCHEDULE)
    assert chain is SCHEDULE
    assert stored == list(range(1000))
    assert respace(SCHEDULE, 1000)[0] is SCHEDULE
    assert respace(SCHEDULE, 10)[0].name == "linear, 10 of 1000 steps"


def test_bad_arguments_of_respace_are_named() -> None:
    with pytest.raises(TypeError, match="schedule must be a NoiseSchedule; got list"):
        respace([0.1, 0.2], 1)
    with pytest.raises(ValueError, match=r"steps must be an integer in \[1, 1000\]; got 1001"):
        respace(SCHEDULE, 1001)


def test_the_clamped_variance_makes_the_decoder_degenerate() -> None:
    """A deviation of 1e-10 is tiny beside bins of 2/255; hence the default "repeat"."""
    _, clamped = model_variance(torch.zeros(1, 1), 0, SCHEDULE, "posterior", None, "clamp")
    _, repeated = model_variance(torch.zeros(1, 1), 0, SCHEDULE, "posterior")
    assert float(clamped) == pytest.approx(math.log(1e-20))
    assert 1e-3 < float((repeated / 2).exp()) < 1e-2
