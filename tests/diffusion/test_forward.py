"""q_sample, q_sample_philox and q_posterior: values, layouts, bits, NaN, sizes, bad arguments."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import (
    BF16,
    F16,
    F32,
    F64,
    FIRST,
    SCHEDULE,
    SEED,
    STREAM,
    WRITABLE,
    Case,
    assert_named,
    assert_rounded_once,
    backends,
    cases,
    each,
    normals,
    per_sample,
    relative_error,
    same_bits,
    sample_inputs,
)
from ddpm_fast import philox_normal, q_posterior, q_sample, q_sample_philox

ON = pytest.mark.parametrize("on", backends(), ids=str)


def exact_q_sample(x0, t, noise):
    """Return Eq. 4, Ho et al. 2020, in float64, and the sum of the absolute values of its terms."""
    signal = per_sample(SCHEDULE.alphas_cumprod[t.cpu()].sqrt(), x0) * x0.cpu().double()
    one_minus_abar = SCHEDULE.one_minus_alphas_cumprod[t.cpu()]
    added = per_sample(one_minus_abar.sqrt(), x0) * noise.cpu().double()
    return signal + added, signal.abs() + added.abs()


def exact_q_posterior(x0, x_t, t):
    """Return mean, magnitude and variance of Eq. 6 and 7, Ho et al. 2020, in float64."""
    t = t.cpu()
    beta, abar = SCHEDULE.betas[t], SCHEDULE.alphas_cumprod[t]
    prev, one_minus_abar = SCHEDULE.alphas_cumprod_prev[t], SCHEDULE.one_minus_alphas_cumprod[t]
    one_minus_abar_prev = (one_minus_abar - beta) / (1 - beta)
    one_minus_abar_prev[t == 0] = 0
    x0_coef = per_sample(prev.sqrt() * beta / one_minus_abar, x0) * x0.cpu().double()
    x_t_coef = (
        per_sample((abar / prev).sqrt() * one_minus_abar_prev / one_minus_abar, x0)
        * x_t.cpu().double()
    )
    return (
        x0_coef + x_t_coef,
        x0_coef.abs() + x_t_coef.abs(),
        per_sample(one_minus_abar_prev / one_minus_abar * beta, x0),
    )


def dense_strides(x):
    return torch.empty_like(x).stride()


@pytest.mark.parametrize(("on", "case"), each(cases()))
def test_q_sample_is_eq_4_and_keeps_the_layout(on, case):
    x0, t, noise = case.tensor(on.device, 1), case.timesteps(on.device), case.others(on.device, 2)
    x_t = q_sample(x0, t, noise, SCHEDULE, backend=on.name)
    assert_rounded_once(x_t, *exact_q_sample(x0, t, noise))
    assert x_t.dtype == x0.dtype
    assert x_t.device == x0.device
    assert x_t.stride() == dense_strides(x0)


@pytest.mark.parametrize(("on", "case"), each(cases()))
def test_q_posterior_is_eq_6_and_7_and_keeps_the_layout(on, case):
    x0, x_t, t = case.others(on.device, 1), case.tensor(on.device, 2), case.timesteps(on.device)
    mean, variance, log_variance = q_posterior(x0, x_t, t, SCHEDULE, backend=on.name)
    exact, magnitude, exact_variance = exact_q_posterior(x0, x_t, t)
    assert_rounded_once(mean, exact, magnitude)
    assert mean.stride() == dense_strides(x_t)
    assert mean.dtype == x_t.dtype
    wide = F64 if case.dtype == F64 else F32
    assert variance.dtype == log_variance.dtype == wide
    assert variance.shape == log_variance.shape == (len(t), *[1] * (x_t.ndim - 1))
    torch.testing.assert_close(variance.cpu(), exact_variance.to(wide), rtol=2e-7, atol=0)
    log_exact = exact_variance.clamp(min=1e-20).log()
    torch.testing.assert_close(log_variance.cpu(), log_exact.to(wide), rtol=2e-7, atol=0)


@pytest.mark.parametrize(("on", "case"), each(cases()))
def test_q_sample_philox_returns_the_noise_that_it_added(on, case):
    x0, t = case.tensor(on.device, 1), case.timesteps(on.device)
    x_t, noise = q_sample_philox(x0, t, SCHEDULE, SEED, STREAM, FIRST, backend=on.name)
    built = philox_normal(
        len(t), x0.shape[1:], SEED, STREAM, FIRST, device=on.device, backend=on.name
    )
    assert same_bits(noise, built.to(x0.dtype))
    assert same_bits(x_t, q_sample(x0, t, noise, SCHEDULE, backend=on.name))
    assert x_t.stride() == noise.stride() == dense_strides(x0)


@ON
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_error_is_at_most_twice_that_of_torch_in_the_same_dtype(on, dtype):
    x0, noise = (normals((4, 3, 8, 8), "contiguous", dtype, s, on.device) for s in (1, 2))
    t = torch.tensor([0, 10, 500, 999], device=on.device)
    a, b = (per_sample(c[t.cpu()], x0).to(on.device, dtype) for c in SCHEDULE_COEFS)
    exact, _ = exact_q_sample(x0, t, noise)
    ours = relative_error(q_sample(x0, t, noise, SCHEDULE, backend=on.name), exact)
    assert ours <= max(2 * relative_error(a * x0 + b * noise, exact), torch.finfo(dtype).eps)
    mean, *_ = q_posterior(x0, noise, t, SCHEDULE, backend=on.name)
    a, b = (per_sample(c[t.cpu()], x0).to(on.device, dtype) for c in POSTERIOR_COEFS)
    exact, *_ = exact_q_posterior(x0, noise, t)
    assert relative_error(mean, exact) <= max(
        2 * relative_error(a * x0 + b * noise, exact), torch.finfo(dtype).eps
    )


SCHEDULE_COEFS = SCHEDULE.sqrt_alphas_cumprod, SCHEDULE.sqrt_one_minus_alphas_cumprod
POSTERIOR_COEFS = SCHEDULE.posterior_mean_coef1, SCHEDULE.posterior_mean_coef2


@ON
@pytest.mark.parametrize("name", ["odd-hw", "partial-block", "five-dim"])
def test_generated_noise_does_not_depend_on_the_layout(on, name):
    inputs = [
        sample_inputs("q_sample_philox", Case(name, layout), on.device) for layout in WRITABLE
    ]
    got = [on.ops.q_sample_philox(*args) for args in inputs]
    for x_t, noise in got[1:]:
        assert same_bits(x_t, got[0][0])
        assert same_bits(noise, got[0][1])


@ON
@pytest.mark.parametrize(
    "t",
    [
        pytest.param(lambda d: 7, id="int"),
        pytest.param(lambda d: torch.tensor(7, device=d), id="0-d"),
        pytest.param(lambda d: torch.tensor([7], device=d), id="one-for-all"),
        pytest.param(lambda d: torch.tensor([7], device=d).expand(3), id="expanded"),
        pytest.param(lambda d: torch.tensor([7, 0, 7, 0, 7, 0], device=d)[::2], id="strided"),
        pytest.param(lambda d: torch.full((3,), 7, dtype=torch.int32, device=d), id="int32"),
    ],
)
def test_forms_of_t(on, t):
    x0, noise = (normals((3, 2, 5), "contiguous", F32, s, on.device) for s in (1, 2))
    plain = torch.full((3,), 7, device=on.device)
    for function in (
        lambda t: q_sample(x0, t, noise, SCHEDULE, backend=on.name),
        lambda t: q_sample_philox(x0, t, SCHEDULE, 1, backend=on.name)[0],
        lambda t: q_posterior(x0, noise, t, SCHEDULE, backend=on.name)[0],
        lambda t: q_posterior(x0, noise, t, SCHEDULE, backend=on.name)[1],
    ):
        assert same_bits(function(t(on.device)), function(plain))


@ON
def test_nan_and_infinity_stay_in_their_element(on):
    x0, noise = (normals((2, 3, 4, 4), "contiguous", F32, s, on.device) for s in (1, 2))
    x0[0, 1, 2, 3], noise[1, 2, 0, 1], x0[1, 0, 0, 0] = math.nan, math.nan, math.inf
    strange = x0.isnan() | noise.isnan()
    for result in (
        q_sample(x0, 500, noise, SCHEDULE, backend=on.name),
        q_posterior(x0, noise, 500, SCHEDULE, backend=on.name)[0],
    ):
        assert torch.equal(result.isnan(), strange)
        assert result[1, 0, 0, 0] == math.inf
        assert result.isinf().sum() == 1


@ON
def test_timesteps_out_of_range_are_rejected_or_clamped(on):
    """The CPU kernels raise; the others clamp, because a check would synchronise."""
    x0, noise = (normals((3, 4), "contiguous", F32, s, on.device) for s in (1, 2))
    coefs = SCHEDULE.q_sample_coefs(on.device)
    t = torch.tensor([-(2**62), 1000, 2**62], device=on.device)
    if on.name == "cpu":
        with pytest.raises(RuntimeError, match=r"t must lie in \[0, 1000\)"):
            on.ops.q_sample(x0, t, noise, coefs)
        return
    clamped = on.ops.q_sample(x0, t.clamp(0, 999), noise, coefs)
    assert same_bits(on.ops.q_sample(x0, t, noise, coefs), clamped)


@st.composite
def strided(draw, shape, seed):
    """Return normals with random strides: memory order, steps, gaps, broadcast dimensions."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.integers(1, 2)) for _ in shape]
    stored = [1 if draw(st.integers(0, 5)) == 0 else size for size in shape]
    big = torch.full([stored[d] * steps[d] + 1 for d in order], math.nan)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    window = big.permute(inverse)
    window = window[tuple(slice(1, None, step) for step in steps)]
    window = window[tuple(slice(0, size) for size in stored)]
    generator = torch.Generator().manual_seed(seed)
    return window.copy_(torch.randn(stored, generator=generator)).expand(shape)


@ON
@settings(max_examples=12)
@given(data=st.data())
def test_any_shape_and_strides(on, data):
    shape = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))
    shape = [1 if math.prod(shape) > 2000 else size for size in shape]
    x0, noise = (data.draw(strided(shape, seed)).to(on.device) for seed in (1, 2))
    t = torch.randint(1000, shape[:1], generator=torch.Generator().manual_seed(3)).to(on.device)
    x_t = q_sample(x0, t, noise, SCHEDULE, backend=on.name)
    assert_rounded_once(x_t, *exact_q_sample(x0, t, noise))
    mean, *_ = q_posterior(x0, noise, t, SCHEDULE, backend=on.name)
    assert_rounded_once(mean, *exact_q_posterior(x0, noise, t)[:2])
    built, added = q_sample_philox(x0, t, SCHEDULE, 1, backend=on.name)
    assert same_bits(built, q_sample(x0, t, added, SCHEDULE, backend=on.name))


X = torch.zeros(2, 3, 4, 4)


def sampled(x0=X, t=1, noise=X, schedule=SCHEDULE, backend="auto"):
    return q_sample(x0, t, noise, schedule, backend)


def philoxed(x0=X, t=1, schedule=SCHEDULE, seed=1, stream=1, first_sample=0, backend="auto"):
    return q_sample_philox(x0, t, schedule, seed, stream, first_sample, backend)


def posterior(x0=X, x_t=X, t=1, schedule=SCHEDULE, backend="auto"):
    return q_posterior(x0, x_t, t, schedule, backend)


FOREIGN_DEVICE = torch.zeros(2, 3, 4, 4, device="meta")
LEADING = [
    ([1.0], TypeError, "torch.Tensor", "list"),
    (X.long(), TypeError, "float32, float16, bfloat16, float64", "int64"),
    (X.to_sparse(), TypeError, "strided", "sparse"),
    (torch.tensor(1.0), ValueError, "batch dimension", "0-d"),
]
BAD = [
    ("t", 1.5, TypeError, "int64", "float"),
    ("t", True, TypeError, "int64", "bool"),
    ("t", torch.tensor([1.0, 2.0]), TypeError, "int64", "float32"),
    ("t", 1000, ValueError, "[0, 999]", "1000"),
    ("t", torch.tensor([0, -1]), ValueError, "[0, 999]", "-1"),
    ("t", torch.tensor([1, 2, 3]), ValueError, "2 samples", "[3]"),
    ("t", torch.tensor([[1], [2]]), ValueError, "2 samples", "[2, 1]"),
    ("t", torch.tensor([1, 2], device="meta"), ValueError, "cpu", "meta"),
    ("schedule", SCHEDULE.betas, TypeError, "NoiseSchedule", "Tensor"),
    ("backend", "gpu", ValueError, "auto, reference, cpu, triton, cuda", "'gpu'"),
    ("backend", "cuda", RuntimeError, "cannot run", "CUDA tensors", "cpu"),
]
LIKE = [
    (None, TypeError, "torch.Tensor", "NoneType"),
    (X[:1], ValueError, "[2, 3, 4, 4]", "[1, 3, 4, 4]"),
    (X.half(), TypeError, "float32", "float16"),
    (FOREIGN_DEVICE, ValueError, "cpu", "meta"),
]
BAD_CALLS = [
    *[(f, *case) for f in (sampled, philoxed, posterior) for case in BAD],
    *[(sampled, "x0", *case) for case in LEADING],
    *[(philoxed, "x0", *case) for case in LEADING],
    *[(posterior, "x_t", *case) for case in LEADING],
    *[(sampled, "noise", *case) for case in LIKE],
    *[(posterior, "x0", *case) for case in LIKE],
    (philoxed, "seed", -1, ValueError, "[0, 18446744073709551615]", "-1"),
    (philoxed, "seed", 1.0, TypeError, "int", "float"),
    (philoxed, "stream", 1 << 32, ValueError, "[0, 4294967295]", "4294967296"),
    (philoxed, "first_sample", -1, ValueError, "[0, 9223372036854775807]", "-1"),
]


@pytest.mark.parametrize("bad", BAD_CALLS, ids=lambda c: f"{c[0].__name__}-{c[1]}-{c[-1]}")
def test_bad_arguments_are_named_with_what_is_accepted(bad):
    assert_named(bad[0], bad[1:])


def test_a_backend_without_float64_raises():
    with pytest.raises(
        TypeError,
        match="tensors must be float32, float16, bfloat16 for backend triton; got float64",
    ):
        sampled(X.double(), noise=X.double(), backend="triton")
