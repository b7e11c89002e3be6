"""The variational bound: its terms compared with integrals, its mean with exact values."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from cases import F32, F64, SCHEDULE
from ddpm_fast import NoiseSchedule, philox_normal
from ddpm_fast.diffusion.likelihood import prior_kl, variational_bound
from ddpm_fast.diffusion.noise_levels import respace
from ddpm_fast.ops.philox import STREAM_TRAINING
from gaussian_data import (
    ENTROPY,
    best_epsilon,
    data,
    expected_prior,
    expected_terms,
    model_marginal,
)
from sampler_cases import Net, smooth

SHORT = NoiseSchedule.linear(8, 1e-2, 0.85)
LONGER = NoiseSchedule.linear(60, 1e-3, 0.3)
SEED = 11
VALUES = torch.arange(256, dtype=F64) / 127.5 - 1


def bound(model, schedule, x0, **options):
    supplied = {"seed": SEED, "progress": False} | options
    return variational_bound(model, schedule, x0, **supplied)


def pixels(num, *shape, seed=0, dtype=F64):
    """Return data of 256 values."""
    generator = torch.Generator().manual_seed(seed)
    return VALUES[torch.randint(0, 256, (num, *shape), generator=generator)].to(dtype)


def noise_at(x0, t, seed=SEED, first=0):
    return philox_normal(len(x0), x0.shape[1:], seed, STREAM_TRAINING + t, first).to(x0.dtype)


def in_bits(nats):
    return nats / math.log(2)


def divergence(x0, x_t, t, mean, sigma2):
    """Return D_KL(q(x_{t-1} | x_t, x_0) || N(mean, sigma2)) by quadrature, q by Bayes' rule."""
    beta, alpha = float(SHORT.betas[t]), float(SHORT.alphas[t])
    abar, prev = float(SHORT.alphas_cumprod[t]), float(SHORT.alphas_cumprod[t - 1])

    def integrand(x):
        log_q = (
            stats.norm.logpdf(x_t, alpha**0.5 * x, beta**0.5)
            + stats.norm.logpdf(x, prev**0.5 * x0, (1 - prev) ** 0.5)
            - stats.norm.logpdf(x_t, abar**0.5 * x0, (1 - abar) ** 0.5)
        )
        return math.exp(log_q) * (log_q - stats.norm.logpdf(x, mean, sigma2**0.5))

    return integrate.quad(integrand, mean - 6, mean + 6, points=[mean], limit=500)[0]


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_each_divergence_equals_its_integral(variance: str) -> None:
    """With the mean of p by Eq. 11, Ho et al. 2020."""
    x0 = torch.tensor([[0.3], [-0.9]], dtype=F64)
    model = best_epsilon(SHORT)
    found = bound(model, SHORT, x0, variance=variance, clip=None, decoder="gaussian")
    assert found.timesteps.tolist() == list(range(7, -1, -1))
    for t in range(1, 8):
        beta, alpha = float(SHORT.betas[t]), float(SHORT.alphas[t])
        abar, prev = float(SHORT.alphas_cumprod[t]), float(SHORT.alphas_cumprod[t - 1])
        x_t = abar**0.5 * x0 + (1 - abar) ** 0.5 * noise_at(x0, t)
        epsilon = model(x_t, torch.full((2,), t))
        sigma2 = beta if variance == "beta" else beta * (1 - prev) / (1 - abar)
        mean = (x_t - beta / (1 - abar) ** 0.5 * epsilon) / alpha**0.5
        for item in range(2):
            exact = divergence(float(x0[item]), float(x_t[item]), t, float(mean[item]), sigma2)
            assert float(found.vb[item, 7 - t]) == pytest.approx(in_bits(exact), rel=1e-6)


def test_the_prior_equals_its_integral() -> None:
    x0 = torch.tensor([[0.3], [-0.9]], dtype=F64)
    found = bound(best_epsilon(SHORT), SHORT, x0, clip=None, decoder="gaussian").prior_bpd
    abar = float(SHORT.alphas_cumprod[-1])
    for item in range(2):
        q = stats.norm(abar**0.5 * float(x0[item]), (1 - abar) ** 0.5)
        exact, _ = integrate.quad(lambda x, q=q: q.pdf(x) * (q.logpdf(x) - stats.norm.logpdf(x)),
                                  -10, 10)  # fmt: skip
        assert float(found[item]) == pytest.approx(in_bits(exact), rel=1e-8)
    # float32 data and an alphas_cumprod of 4e-5: nothing cancels.
    abar = float(SCHEDULE.alphas_cumprod[-1])
    exact = (abar * 0.25 - abar - math.log1p(-abar)) / 2
    assert float(prior_kl(torch.tensor([0.5]), SCHEDULE)) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("decoder", ["discretised", "gaussian"])
def test_l0_is_the_integral_over_the_bin_or_the_density(decoder: str) -> None:
    x0 = pixels(6, 1)
    found = bound(best_epsilon(SHORT), SHORT, x0, clip=None, decoder=decoder).decoder_bpd
    one_minus_abar = float(SHORT.betas[0])
    x_1 = (1 - one_minus_abar) ** 0.5 * x0 + one_minus_abar**0.5 * noise_at(x0, 0)
    epsilon = best_epsilon(SHORT)(x_1, torch.zeros(6, dtype=torch.int64))
    mean = (x_1 - one_minus_abar**0.5 * epsilon) / (1 - one_minus_abar) ** 0.5
    second = float(SHORT.posterior_variance[1])
    for item in range(6):
        x = float(x0[item])
        if decoder == "gaussian":
            exact = stats.norm.logpdf(x, float(mean[item]), one_minus_abar**0.5)
        else:
            p = stats.norm(float(mean[item]), second**0.5)
            ends = (x - 1 / 255 if x > -1 else -np.inf, x + 1 / 255 if x < 1 else np.inf)
            exact = math.log(integrate.quad(p.pdf, *ends, epsabs=0)[0])
        assert float(found[item]) == pytest.approx(-in_bits(exact), rel=1e-7)


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_the_mean_of_every_term_is_its_expectation(variance: str) -> None:
    """Monte-Carlo on Gaussian data, within four standard errors."""
    x0 = data(400, 64)
    found = bound(best_epsilon(SHORT), SHORT, x0, variance=variance, clip=None, decoder="gaussian")
    error = found.vb.std(0) / 20
    off = found.vb.mean(0) - in_bits(expected_terms(SHORT, variance).flip(0))
    assert (off.abs() < 4 * error).all()
    off = found.prior_bpd.mean() - in_bits(expected_prior(SHORT))
    assert abs(off) < 4 * found.prior_bpd.std() / 20


def test_the_expectation_of_a_term_is_its_integral_over_x_t() -> None:
    """The expectations of the test above, by quadrature over x_0 and the noise."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    nodes, weights = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    x0 = 0.2 + 0.5 * nodes.repeat_interleave(20)
    noise, weight = nodes.repeat(20), torch.outer(weights, weights).flatten()
    expected = expected_terms(SHORT, "beta")
    for t in range(1, 8):
        abar, beta = float(SHORT.alphas_cumprod[t]), float(SHORT.betas[t])
        x_t = (abar**0.5 * x0 + (1 - abar) ** 0.5 * noise)[:, None]
        epsilon = best_epsilon(SHORT)(x_t, torch.full((400,), t)).flatten()
        true = float(SHORT.posterior_variance[t])
        x0_coef = float(SHORT.posterior_mean_coef1[t])
        pred = (x_t.flatten() - (1 - abar) ** 0.5 * epsilon) / abar**0.5
        kl = (math.log(beta / true) + (true + (x0_coef * (x0 - pred)).square()) / beta - 1) / 2
        assert float((weight * kl).sum()) == pytest.approx(float(expected[t]), rel=1e-9)


def test_the_bound_holds_and_tightens_with_more_steps() -> None:
    """With the exact score the gap to the entropy of the data decreases like 1/T."""
    gaps = []
    for T in (10, 30, 100, 300):
        schedule = NoiseSchedule.cosine(T)
        total = expected_prior(schedule) + float(expected_terms(schedule, "beta").sum())
        gaps.append(total - ENTROPY)
        if T in (10, 100):
            x0 = data(60, 256)
            found = bound(
                best_epsilon(schedule), schedule, x0, variance="beta", clip=None, decoder="gaussian"
            )
            # Item by item, so that the data's own spread drops out.
            exact = -torch.distributions.Normal(0.2, 0.5).log_prob(x0).mean(1)
            excess = found.total_bpd - in_bits(exact)
            assert abs(excess.mean() - in_bits(gaps[-1])) < 4 * excess.std() / 60**0.5
    assert all(gap > 0 for gap in gaps)
    assert all(later < earlier / 2.2 for earlier, later in pairwise(gaps))
    assert gaps[-1] < 0.005


@pytest.mark.parametrize("x", [-1.0, 0.2, 0.9])
def test_the_bound_holds_at_every_single_point(x: float) -> None:
    """-log p(x_0) of the model itself, which is a Gaussian, is below the bound's mean."""
    schedule = NoiseSchedule.cosine(6)
    mean, variance = model_marginal(schedule)
    exact = -stats.norm.logpdf(x, mean, variance**0.5)
    x0 = torch.full((8000, 1), x, dtype=F64)
    found = bound(
        best_epsilon(schedule),
        schedule,
        x0,
        variance="beta",
        clip=None,
        decoder="gaussian",
        micro_batch=8000,
    )
    nats = found.in_nats(found.total_bpd)
    error = float(nats.std()) / 8000**0.5
    assert exact + 4 * error < float(nats.mean()) < exact + 0.3


def openai_bound(model, betas, timestep_map, x0, noises, kind, clip):
    """Return the result of calc_bpd_loop of improved-diffusion, from its description."""
    abar = np.cumprod(1 - betas)
    prev = np.append(1.0, abar[:-1])
    posterior = betas * (1 - prev) / (1 - abar)
    clipped = np.log(np.append(posterior[1], posterior[1:]))
    columns = {"vb": [], "xstart_mse": [], "mse": []}
    flat = lambda values: values.reshape(len(x0), -1).mean(1)  # noqa: E731
    for i in reversed(range(len(betas))):
        noise = noises(timestep_map[i])
        x_t = math.sqrt(abar[i]) * x0 + math.sqrt(1 - abar[i]) * noise
        out = model(x_t, torch.full((len(x0),), timestep_map[i]))
        # fixed_large is log(append(posterior_variance[1], betas[1:])) there.
        large = np.log(betas[i]) if i else clipped[0]
        log_p = torch.tensor(clipped[i] if kind == "posterior" else large)
        if "learned" in kind:
            out, learned_output = torch.split(out, x0.shape[1], dim=1)
            frac = (learned_output + 1) / 2
            learned = frac * np.log(betas[i]) + (1 - frac) * clipped[i]
            log_p = learned_output if kind == "learned" else learned
        pred = math.sqrt(1 / abar[i]) * x_t - math.sqrt(1 / abar[i] - 1) * out
        pred = pred.clamp(-clip, clip) if clip else pred
        c1 = betas[i] * math.sqrt(prev[i]) / (1 - abar[i])
        c2 = (1 - prev[i]) * math.sqrt(1 - betas[i]) / (1 - abar[i])
        mean, true = c1 * pred + c2 * x_t, c1 * x0 + c2 * x_t
        if i:
            delta = clipped[i] - log_p
            term = 0.5 * (-1 - delta + delta.exp() + (true - mean) ** 2 * (-log_p).exp())
        else:
            inverse = (-log_p / 2).exp()
            up, down = ((x0 - mean + side / 255) * inverse for side in (1, -1))
            cdf_up, cdf_down = torch.special.ndtr(up), torch.special.ndtr(down)
            probability = torch.where(
                x0 < -0.999, cdf_up, torch.where(x0 > 0.999, 1 - cdf_down, cdf_up - cdf_down)
            )
            term = -probability.log()
        epsilon = (math.sqrt(1 / abar[i]) * x_t - pred) / math.sqrt(1 / abar[i] - 1)
        columns["vb"].append(flat(term) / math.log(2))
        columns["xstart_mse"].append(flat((pred - x0) ** 2))
        columns["mse"].append(flat((epsilon - noise) ** 2))
    found = {name: torch.stack(values, 1) for name, values in columns.items()}
    last = abar[-1]
    prior = 0.5 * (-1 - math.log(1 - last) + (1 - last) + last * x0**2)
    found["prior_bpd"] = flat(prior) / math.log(2)
    found["total_bpd"] = found["prior_bpd"] + found["vb"].sum(1)
    return found


def rough(x, t):
    return 0.9 * best_epsilon(LONGER)(x, t)


def learned(x, t):
    """Model of 2C channels: an epsilon, and a learned variance in [-1, 1]."""
    return torch.cat([rough(x, t), torch.sin(x + t.view(-1, 1, 1, 1) / 3)], 1)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("stored", [None, 5, [0, 3, 20, 44, 59]], ids=["all", "five", "listed"])
@pytest.mark.parametrize("variance", ["posterior", "beta", "learned", "learned_range"])
def test_every_number_equals_that_of_openai(variance: str, stored, clip: float | None) -> None:
    x0 = pixels(3, 2, 4, 3)
    model = learned if "learned" in variance else rough
    spacing = {"spacing": stored} if isinstance(stored, list) else {"steps": stored}
    found = bound(model, LONGER, x0, variance=variance, clip=clip, **spacing)
    timesteps = found.timesteps.flip(0).tolist()
    abar = LONGER.alphas_cumprod.numpy()[timesteps]
    betas = 1 - abar / np.append(1.0, abar[:-1])
    exact = openai_bound(model, betas, timesteps, x0, lambda t: noise_at(x0, t), variance, clip)
    assert found.vb.shape == (3, len(timesteps))
    assert found.decoder_bpd.tolist() == found.vb[:, -1].tolist()
    for name, values in exact.items():
        torch.testing.assert_close(getattr(found, name), values, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("prediction", ["x0", "v", "score"])
def test_every_prediction_of_one_model_has_one_bound(prediction: str) -> None:
    def with_options(x, t):
        signal, noise = (
            table[t].view(-1, 1, 1, 1)
            for table in (SCHEDULE.sqrt_alphas_cumprod, SCHEDULE.sqrt_one_minus_alphas_cumprod)
        )
        epsilon = smooth(x, t)
        x0 = (x - noise * epsilon) / signal
        v = signal * epsilon - noise * x0
        return {"x0": x0, "v": v, "score": -epsilon / noise}[prediction]

    x0 = pixels(3, 2, 4, 3)
    expected = bound(smooth, SCHEDULE, x0, steps=6)
    found = bound(with_options, SCHEDULE, x0, steps=6, prediction=prediction)
    torch.testing.assert_close(found.vb, expected.vb, rtol=1e-7, atol=1e-10)


def test_float32_is_close_to_float64() -> None:
    x0 = pixels(4, 3, 8, 8)
    exact = bound(smooth, SCHEDULE, x0, steps=100)
    found = bound(smooth, SCHEDULE, x0.float(), steps=100)
    assert found.vb.dtype == F64
    torch.testing.assert_close(found.vb, exact.vb, rtol=2e-4, atol=1e-9)
    torch.testing.assert_close(found.total_bpd, exact.total_bpd, rtol=2e-5, atol=0)


def test_small_errors_keep_their_digits_in_float32() -> None:
    """The means of q and p share the term of x_t, which is large beside their difference."""
    x0 = torch.zeros(2, 3, 8, 8)
    found = bound(lambda x, t: torch.full_like(x, 1e-3), SCHEDULE, x0, prediction="x0", steps=100)
    chain, _ = respace(SCHEDULE, 100)
    exact = (chain.posterior_mean_coef1 * 1e-3).square() / (2 * chain.posterior_variance)
    exact = in_bits(exact.flip(0)[:-1]).expand(2, -1)
    torch.testing.assert_close(found.vb[:, :-1], exact, rtol=1e-5, atol=0)


def in_slots(x, t):
    """Model whose output depends on slot and batch size, like the last bits of a convolution."""
    slot = torch.arange(len(x), dtype=x.dtype).view(-1, 1, 1, 1)
    return smooth(x, t) * (1 + 0.01 * slot + 0.1 * len(x))


@pytest.mark.parametrize("model", [Net(), in_slots], ids=["network", "slots"])
def test_the_terms_of_an_item_do_not_depend_on_the_batch(model) -> None:
    x0 = pixels(10, 3, 8, 8, dtype=F32)
    options = {"steps": 4, "micro_batch": 4, "variance": "beta"}
    whole = bound(model, SCHEDULE, x0, first_sample=2, **options)
    for begin, end in ((0, 3), (3, 4), (4, 10)):
        part = bound(model, SCHEDULE, x0[begin:end], first_sample=2 + begin, **options)
        for name in ("prior_bpd", "vb", "xstart_mse", "mse", "total_bpd"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[begin:end]), name
    moved = bound(model, SCHEDULE, x0, first_sample=3, **options)
    assert not torch.equal(moved.vb, whole.vb)


@pytest.mark.parametrize(
    "other",
    [{"micro_batch": 64}, {"pad": False}, {"micro_batch": 3}, {"backend": "reference"}],
    ids=str,
)
def test_the_micro_batch_changes_last_bits_only(other) -> None:
    net, x0 = Net(), pixels(10, 3, 8, 8, dtype=F32)
    options = {"steps": 4, "micro_batch": 4, "variance": "beta", "first_sample": 2}
    whole, found = (bound(net, SCHEDULE, x0, **supplied) for supplied in (options, options | other))
    torch.testing.assert_close(found.vb, whole.vb, rtol=1e-5, atol=1e-8)


def test_padding_is_optional() -> None:
    seen = []

    def model(x, t):
        seen.append((len(x), int(t[0])))
        return smooth(x, t)

    x0 = pixels(5, 1, 4, 4)
    bound(model, SCHEDULE, x0, steps=2, micro_batch=4, first_sample=1)
    assert seen == [(4, 999), (4, 0)] * 2
    seen.clear()
    bound(model, SCHEDULE, x0, steps=2, micro_batch=4, pad=False)
    assert seen == [(4, 999), (4, 0), (1, 999), (1, 0)]


def test_labels_are_divided_like_the_data() -> None:
    labels = torch.arange(10)

    def model(x, t, labels, scale):
        return scale * smooth(x, t) * (1 + labels.view(-1, 1, 1, 1))

    x0 = pixels(10, 1, 4, 4)
    options = {"steps": 2, "micro_batch": 4}
    found = bound(model, SCHEDULE, x0, model_kwargs={"labels": labels, "scale": 0.5}, **options)
    for i in range(10):
        alone = bound(
            lambda x, t, i=i: 0.5 * smooth(x, t) * (1 + i),
            SCHEDULE,
            x0[i : i + 1],
            first_sample=i,
            **options,
        )
        torch.testing.assert_close(found.vb[i], alone.vb[0])


def test_layouts_and_output_objects() -> None:
    class Output:
        def __init__(self, sample):
            self.sample = sample

    x0 = pixels(4, 3, 6, 5)
    expected = bound(smooth, SCHEDULE, x0, steps=3)
    channels_last = x0.to(memory_format=torch.channels_last)
    found = bound(lambda x, t: Output(smooth(x, t)), SCHEDULE, channels_last, steps=3)
    torch.testing.assert_close(found.vb, expected.vb)


def test_zero_terminal_snr_is_bounded_through_v() -> None:
    schedule = SCHEDULE.rescale_zero_terminal_snr()
    found = bound(lambda x, t: torch.zeros_like(x), schedule, pixels(2, 1, 4), prediction="v",
                  steps=5)  # fmt: skip
    assert (found.prior_bpd == 0).all()
    assert found.vb.isfinite().all()
    assert (found.mse[:, 0] == 0).all()
