"""Divergences, densities and the decoder of 256 bins, compared with integrals."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from scipy import integrate, stats

from cases import BF16, F16, F32, F64, assert_named
from ddpm_fast.diffusion.gaussian import (
    discretised_gaussian_log_likelihood,
    gaussian_kl,
    gaussian_kl_full,
    gaussian_log_density,
)

VALUES = torch.arange(256, dtype=F64) / 127.5 - 1  # the middles of the bins
PAIRS = [(0.0, 0.0, 0.0, 0.0), (0.3, -1.0, -0.4, 0.7), (-2.0, 1.5, 0.5, -0.5), (0, -6.0, 0.02, -7)]


def random_gaussian(generator: torch.Generator, *batch: int, d: int = 4):
    factor = torch.randn(*batch, d, d, generator=generator, dtype=F64)
    mean = torch.randn(*batch, d, generator=generator, dtype=F64)
    return mean, factor @ factor.mT + 0.1 * torch.eye(d, dtype=F64)


@pytest.mark.parametrize("pair", PAIRS)
def test_the_divergence_equals_the_integral(pair) -> None:
    m1, log1, m2, log2 = pair
    p, q = (stats.norm(m, math.exp(log / 2)) for m, log in ((m1, log1), (m2, log2)))
    width = 12 * math.exp(log1 / 2)
    exact, _ = integrate.quad(
        lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), m1 - width, m1 + width, limit=200
    )
    assert float(gaussian_kl(*pair)) == pytest.approx(exact, rel=1e-8, abs=1e-12)


def test_the_divergence_sums_to_corollary_9_and_proposition_8() -> None:
    """With the + before the logarithms that the printed corollary lacks."""
    m1, m2 = torch.tensor([0.1, -0.5, 2.0]), torch.tensor([0.4, 0.0, 1.0])
    s1, s2, d = 0.7, 1.3, 3
    corollary = 0.5 * (
        float((m2 - m1).square().sum()) / s2**2
        + 2 * d * (math.log(s2) - math.log(s1))
        + d * s1**2 / s2**2
        - d
    )
    total = gaussian_kl(m1, 2 * math.log(s1), m2, 2 * math.log(s2)).sum()
    assert float(total) == pytest.approx(corollary, rel=1e-6)
    eye = torch.eye(3)
    full = gaussian_kl_full(m1, s1**2 * eye, m2, s2**2 * eye)
    assert float(full) == pytest.approx(corollary, rel=1e-6)


def test_the_full_divergence_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    first = random_gaussian(generator, 5, 1)
    second = random_gaussian(generator, 3)
    p, q = (torch.distributions.MultivariateNormal(*g) for g in (first, second))
    exact = torch.distributions.kl_divergence(p.expand((5, 3)), q.expand((5, 3)))
    torch.testing.assert_close(gaussian_kl_full(*first, *second), exact)
    assert float(gaussian_kl_full(*second, *second).abs().max()) < 1e-12


def test_gradients_are_those_of_differences() -> None:
    generator = torch.Generator().manual_seed(1)
    args = [torch.randn(3, generator=generator, dtype=F64, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradcheck(gaussian_kl, args)
    assert torch.autograd.gradcheck(gaussian_log_density, args[:3])
    x = torch.tensor([-1.0, -0.2, 1.0], dtype=F64)
    assert torch.autograd.gradcheck(
        lambda mean, log: discretised_gaussian_log_likelihood(x, mean, log), args[:2]
    )


def test_shapes_broadcast_and_half_precision_is_computed_in_float32() -> None:
    mean = torch.zeros(2, 1, 3, dtype=F16)
    out = gaussian_kl(mean, torch.zeros(4, 1, dtype=BF16), 1.0, 0.0)
    assert (out.shape, out.dtype) == ((2, 4, 3), F32)
    assert (out == 0.5).all()
    assert gaussian_kl(0.0, 0.0, 1.0, 0.0).dtype == F64
    assert gaussian_log_density(mean, 0.0, 0.0).dtype == F32
    assert discretised_gaussian_log_likelihood(mean, mean, 0.0).dtype == F32
    assert discretised_gaussian_log_likelihood(mean.double(), 0.0, 0.0).dtype == F64


def test_float32_keeps_small_divergences_and_survives_extreme_variances() -> None:
    """For nearly equal log-variances the divergence is of second order."""
    for log2 in (-80.0, -46.0, 0.0, 40.0):
        log1 = torch.tensor([log2 - 1e-2, log2, log2 + 1.0], dtype=F32)
        exact = gaussian_kl(0.0, log1.double(), 0.0, log2)
        error = (gaussian_kl(0.0, log1, 0.0, log2) - exact).abs()
        assert (error <= 1e-9 + 1e-6 * exact).all()


@pytest.mark.parametrize("log_variance", [-46.0, -12.0, -9.0, -4.0, 0.0, 5.0])
@pytest.mark.parametrize("mean", [-1.3, -1.0, 0.313, 1.0])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_decoder_sums_to_1(mean: float, log_variance: float, dtype: torch.dtype) -> None:
    found = discretised_gaussian_log_likelihood(VALUES.to(dtype), mean, log_variance)
    assert found.dtype == dtype
    assert found.isfinite().all()
    # Narrow and between two bins, the rounded middles of float32 no longer fill the line.
    tolerance = 1e-12 if dtype == F64 else 1e-4
    if dtype == F64 or log_variance > -20:
        assert abs(float(found.double().exp().sum()) - 1) < tolerance


@pytest.mark.parametrize("index", [0, 1, 100, 127, 128, 254, 255])
@pytest.mark.parametrize(("mean", "scale"), [(0.02, 0.05), (-0.9, 0.3), (1.2, 0.4), (0.0, 3.0)])
def test_the_decoder_is_the_integral_over_the_bin(index: int, mean: float, scale: float) -> None:
    x = float(VALUES[index])
    low = -math.inf if index == 0 else x - 1 / 255
    high = math.inf if index == 255 else x + 1 / 255
    exact, _ = integrate.quad(stats.norm(mean, scale).pdf, low, high, epsabs=0, epsrel=1e-11)
    found = discretised_gaussian_log_likelihood(x, mean, 2 * math.log(scale))
    if exact > 1e-280:
        assert float(found) == pytest.approx(math.log(exact), rel=1e-8)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("scale", [1e-10, 1e-4, 0.01, 1.0, 30.0])
def test_the_decoder_keeps_its_digits_in_the_tails(scale: float, dtype: torch.dtype) -> None:
    """Compared with 60 digits: a narrow Gaussian far away, and a wide one."""
    x = torch.tensor([-1.0, -0.6, -0.2, 0.2, 0.6, 1.0], dtype=F64)
    x = ((x + 1) * 127.5).round() / 127.5 - 1
    mean, log_variance = 0.113, 2 * math.log(scale)
    x, log = x.to(dtype), torch.tensor(log_variance, dtype=dtype)
    found = discretised_gaussian_log_likelihood(x, torch.tensor(mean, dtype=dtype), log)
    with mpmath.workdps(60):
        centre = mpmath.mpf(float(torch.tensor(mean, dtype=dtype)))
        narrow = mpmath.exp(-mpmath.mpf(float(log)) / 2)
        for value, got in zip(x.tolist(), found.tolist(), strict=True):
            # Mirrored to below the mean, where the cumulative distribution has its digits.
            away = -abs(value - centre)
            half = mpmath.mpf(1) / 255
            above = mpmath.ncdf((away + half) * narrow)
            below = 0 if abs(value) == 1 else mpmath.ncdf((away - half) * narrow)
            exact = float(mpmath.log(above - below))
            assert got == pytest.approx(exact, rel=1e-11 if dtype == F64 else 2e-7)


def test_the_density_is_scipys() -> None:
    x = torch.linspace(-3, 3, 7, dtype=F64)
    exact = torch.from_numpy(stats.norm(0.4, math.exp(-0.3)).logpdf(x.numpy()))
    torch.testing.assert_close(gaussian_log_density(x, 0.4, -0.6), exact)


@pytest.mark.parametrize(
    "bad",
    [
        ("mean1", torch.zeros(2, dtype=torch.int64), TypeError, "floating-point", "int64"),
        ("log_variance2", "0", TypeError, "a number", "str"),
        ("mean2", True, TypeError, "a number", "bool"),
    ],
    ids=lambda bad: bad[0],
)
def test_a_bad_argument_of_the_divergence_is_named(bad) -> None:
    def call(**wrong):
        names = ("mean1", "log_variance1", "mean2", "log_variance2")
        return gaussian_kl(**(dict.fromkeys(names, torch.zeros(2)) | wrong))

    assert_named(call, bad)


@pytest.mark.parametrize(
    "bad",
    [
        ("covariance1", -torch.eye(3), ValueError, "positive definite"),
        ("covariance2", torch.full((3, 3), math.nan), ValueError, "positive definite"),
        ("covariance2", torch.eye(2), ValueError, "d = 3", "[2, 2]"),
        ("mean2", torch.zeros(4), ValueError, "d = 3", "[4]"),
        ("mean1", torch.zeros(3, dtype=F16), TypeError, "float64", "float16"),
        ("covariance1", torch.eye(3, dtype=F64), TypeError, "float32", "float64"),
        ("mean1", 0.0, TypeError, "Tensor", "float"),
    ],
    ids=lambda bad: f"{bad[0]}-{bad[-1]}",
)
def test_a_bad_argument_of_the_full_divergence_is_named(bad) -> None:
    def call(**wrong):
        good = {"mean1": torch.zeros(3), "covariance1": torch.eye(3)}
        good |= {"mean2": torch.ones(3), "covariance2": torch.eye(3)}
        return gaussian_kl_full(**(good | wrong))

    assert_named(call, bad)
