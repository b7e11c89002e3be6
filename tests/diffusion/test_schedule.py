from __future__ import annotations

import copy
import math
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch

from ddpm_fast.diffusion.schedule import NoiseSchedule, ScheduleWarning

SCHEDULES = [
    pytest.param(NoiseSchedule.linear, id="linear"),
    pytest.param(NoiseSchedule.scaled_linear, id="scaled-linear"),
    pytest.param(NoiseSchedule.cosine, id="cosine"),
    pytest.param(NoiseSchedule.sigmoid, id="sigmoid"),
    pytest.param(NoiseSchedule.sigmoid_cumprod, id="sigmoid-cumprod"),
    pytest.param(lambda: NoiseSchedule.power(2), id="power-2"),
    pytest.param(NoiseSchedule.sine_wave, id="sine-wave"),
    pytest.param(lambda: NoiseSchedule.linear().rescale_zero_terminal_snr(), id="zero-snr"),
    pytest.param(lambda: NoiseSchedule.linear(1000, 1e-12, 0.02), id="beta-1e-12"),
    pytest.param(lambda: quiet(NoiseSchedule.linear, 200, 1e-9, 2e-9), id="all-betas-tiny"),
    pytest.param(lambda: NoiseSchedule.from_betas([0.9, 0.99]), id="two-large-betas"),
]


def quiet(make, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScheduleWarning)
        return make(*args)


def exact(schedule: NoiseSchedule) -> dict[str, list[float]]:
    """Return Eq. 4 and 7 of Ho et al. 2020 in 60-digit arithmetic, from the alphas."""
    names = ("alphas_cumprod", "one_minus_alphas_cumprod", "snr", "posterior_variance")
    out = {n: [] for n in (*names, "posterior_mean_coef1", "posterior_mean_coef2")}
    with localcontext() as ctx:
        ctx.prec = 60
        prev = Decimal(1)
        for b, a in zip(schedule.betas.tolist(), schedule.alphas.tolist(), strict=True):
            beta, alpha = Decimal(b), Decimal(a) if b > 0.5 else 1 - Decimal(b)
            abar = prev * alpha
            out["alphas_cumprod"].append(float(abar))
            out["one_minus_alphas_cumprod"].append(float(1 - abar))
            out["snr"].append(float(abar / (1 - abar)))
            out["posterior_variance"].append(float((1 - prev) / (1 - abar) * beta))
            out["posterior_mean_coef1"].append(float(prev.sqrt() * beta / (1 - abar)))
            out["posterior_mean_coef2"].append(float(alpha.sqrt() * (1 - prev) / (1 - abar)))
            prev = abar
    return out


@pytest.mark.parametrize("make", SCHEDULES)
def test_tables_equal_60_digit_arithmetic(make):
    schedule = make()
    for name, truth in exact(schedule).items():
        got = getattr(schedule, name)
        assert got.dtype == torch.float64
        assert got.device.type == "cpu"
        np.testing.assert_allclose(got.numpy(), truth, rtol=5e-12, atol=0, err_msg=name)


@pytest.mark.parametrize("make", SCHEDULES)
def test_tables_agree_with_each_other(make):
    s = make()
    one = torch.ones(1, dtype=torch.float64)
    assert s.T == s.num_timesteps == len(s.betas)
    assert torch.equal(s.alphas_cumprod_prev, torch.cat([one, s.alphas_cumprod[:-1]]))
    assert torch.equal(s.sqrt_alphas_cumprod, s.alphas_cumprod.sqrt())
    assert torch.equal(s.sqrt_one_minus_alphas_cumprod, s.one_minus_alphas_cumprod.sqrt())
    assert s.posterior_variance[0] == 0
    assert s.posterior_mean_coef1[0] == 1
    assert s.posterior_mean_coef2[0] == 0
    assert s.posterior_log_variance[0] == math.log(1e-20)
    log_variance = s.posterior_variance.clamp(min=1e-20).log()
    torch.testing.assert_close(s.posterior_log_variance, log_variance, rtol=0, atol=0)


def test_linear_ends_at_the_papers_alphas_cumprod():
    assert round(math.log10(NoiseSchedule.linear(1000).alphas_cumprod[-1]), 2) == -4.39


@pytest.mark.parametrize(
    ("make", "beta"),
    [
        pytest.param(NoiseSchedule.linear, lambda u: u, id="linear"),
        pytest.param(NoiseSchedule.sigmoid, lambda u: 1 / (1 + math.exp(6 - 12 * u)), id="sigmoid"),
        pytest.param(lambda **kw: NoiseSchedule.power(1.5, **kw), lambda u: u**1.5, id="power"),
        pytest.param(
            NoiseSchedule.sine_wave, lambda u: math.sin(2.5 * math.pi * u) ** 2, id="sine-wave"
        ),
        pytest.param(
            lambda **kw: NoiseSchedule.sine_wave(cycles=1, **kw),
            lambda u: math.sin(math.pi * u) ** 2,
            id="sine-wave-1",
        ),
    ],
)
def test_betas_follow_their_formula(make, beta):
    got = quiet(lambda: make(T=11, beta_start=0.001, beta_end=0.3)).betas
    expected = [0.001 + 0.299 * beta(t / 10) for t in range(11)]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("T", [50, 1000])
@pytest.mark.parametrize(
    ("name", "make", "betas"),
    [
        pytest.param("linear", NoiseSchedule.linear, (1e-4, 0.02), id="linear"),
        pytest.param("scaled_linear", NoiseSchedule.scaled_linear, (8.5e-4, 0.012), id="scaled"),
        pytest.param("squaredcos_cap_v2", NoiseSchedule.cosine, (), id="cosine"),
        pytest.param("sigmoid", NoiseSchedule.sigmoid, (1e-4, 0.02), id="sigmoid"),
    ],
)
def test_equals_diffusers(name, make, betas, T):
    scheduling = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
    ends = dict(zip(("beta_start", "beta_end"), betas, strict=False))
    reference = scheduling.DDPMScheduler(num_train_timesteps=T, beta_schedule=name, **ends)
    ours = quiet(make, T, *betas)
    torch.testing.assert_close(ours.betas.float(), reference.betas, rtol=2e-4, atol=1e-7)
    torch.testing.assert_close(
        ours.alphas_cumprod.float(), reference.alphas_cumprod, rtol=2e-4, atol=0
    )


@pytest.mark.parametrize("T", [50, 1000])
def test_sigmoid_cumprod_and_cosine_equal_lucidrains(T):
    reference = pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
    for ours, betas in (
        (NoiseSchedule.sigmoid_cumprod(T), reference.sigmoid_beta_schedule(T)),
        (NoiseSchedule.cosine(T), reference.cosine_beta_schedule(T)),
    ):
        # Its sigmoid of start and end is float32: 1.3e-5 of the second-last beta.
        torch.testing.assert_close(ours.betas, betas.double(), rtol=2e-5, atol=1e-9)


def test_sigmoid_cumprod_follows_its_curve():
    s = NoiseSchedule.sigmoid_cumprod(T=8, start=-2, end=1, tau=0.5)
    low, high = (1 / (1 + math.exp(-v / 0.5)) for v in (-2, 1))
    curve = [1 / (1 + math.exp(-(-2 + 3 * t / 8) / 0.5)) for t in range(1, 8)]
    expected = [(high - v) / (high - low) for v in curve]
    np.testing.assert_allclose(s.alphas_cumprod[:-1].numpy(), expected, rtol=1e-12)
    assert s.betas[-1] == 0.999


@pytest.mark.parametrize("T", [2, 1000])
def test_zero_terminal_snr_equals_diffusers(T):
    scheduling = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
    base = quiet(NoiseSchedule.linear, T)
    got = base.rescale_zero_terminal_snr()
    reference = scheduling.rescale_zero_terminal_snr(base.betas)
    torch.testing.assert_close(got.betas, reference, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.alphas_cumprod[0], base.alphas_cumprod[0], rtol=1e-14, atol=0)
    assert got.alphas_cumprod[-1] == 0
    assert (got.zero_terminal_snr, base.zero_terminal_snr) == (True, False)
    assert got.betas[-1] == 1
    assert got.snr[-1] == 0
    assert got.rescale_zero_terminal_snr() == got


def test_zero_terminal_snr_needs_two_steps():
    with pytest.raises(ValueError, match="at least 2"):
        NoiseSchedule.from_betas([1.0]).rescale_zero_terminal_snr()


@pytest.mark.parametrize(
    "convert",
    [
        pytest.param(lambda x: x.tolist(), id="list"),
        pytest.param(lambda x: tuple(x.tolist()), id="tuple"),
        pytest.param(lambda x: x.numpy(), id="numpy"),
        pytest.param(lambda x: x.numpy()[::-1].copy()[::-1], id="numpy-negative-stride"),
        pytest.param(lambda x: x, id="torch"),
        pytest.param(lambda x: x.clone().requires_grad_(), id="torch-requires-grad"),
    ],
)
@pytest.mark.parametrize("attribute", ["betas", "alphas", "alphas_cumprod"])
def test_from_sequences(attribute, convert):
    base = NoiseSchedule.cosine(20)
    got = getattr(NoiseSchedule, f"from_{attribute}")(convert(getattr(base, attribute)))
    assert torch.equal(getattr(got, attribute), getattr(base, attribute))
    for name in ("betas", "alphas", "alphas_cumprod", "posterior_variance"):
        torch.testing.assert_close(getattr(got, name), getattr(base, name), rtol=1e-12, atol=0)


def test_from_betas_copies_its_input():
    betas = torch.full((500,), 0.02, dtype=torch.float64)
    s = NoiseSchedule.from_betas(betas)
    betas[0] = 0.5
    assert s.betas[0] == 0.02


def test_from_alphas_keeps_tiny_alphas():
    s = NoiseSchedule.from_alphas([0.5, 1e-20])
    assert s.alphas_cumprod.tolist() == [0.5, 0.5e-20]


@pytest.mark.parametrize("make", SCHEDULES[:6])
def test_common_schedules_do_not_warn(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make()
        NoiseSchedule.scaled_linear(1000, 0.00085, 0.012)


@pytest.mark.parametrize(
    ("make", "signal"),
    [
        pytest.param(lambda: NoiseSchedule.power(10), "0.382", id="power-10"),
        pytest.param(lambda: NoiseSchedule.linear(100), "0.603", id="linear-100"),
        pytest.param(lambda: NoiseSchedule.from_betas([0.75]), "0.5", id="from-betas"),
        pytest.param(lambda: NoiseSchedule.from_alphas([0.25]), "0.5", id="from-alphas"),
        pytest.param(lambda: NoiseSchedule.from_alphas_cumprod([0.25]), "0.5", id="from-cumprod"),
    ],
)
def test_far_from_normal_warns_with_the_number(make, signal):
    with pytest.warns(ScheduleWarning, match=f"keeps {signal} of x_0's amplitude") as caught:
        schedule = make()
    assert [w.filename for w in caught] == [__file__]
    kl = -0.5 * math.log(1 - schedule.alphas_cumprod[-1])
    assert f"{kl:.3g} nats" in str(caught[0].message)


def refused(case, error, message, make, *args, **kwargs):
    return pytest.param(error, message, lambda: make(*args, **kwargs), id=case)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        refused("T-bool", TypeError, "T must", NoiseSchedule.linear, True),
        refused("T-float", TypeError, "T must", NoiseSchedule.linear, 10.0),
        refused("T-str", TypeError, "T must", NoiseSchedule.cosine, "10"),
        refused("T-0", ValueError, "T must", NoiseSchedule.cosine, 0),
        refused("T-negative", ValueError, "T must", NoiseSchedule.sigmoid_cumprod, -1),
        refused("start-0", ValueError, "beta_start", NoiseSchedule.linear, 9, 0),
        refused("start-nan", ValueError, "beta_start", NoiseSchedule.linear, 9, math.nan),
        refused("start-str", TypeError, "beta_start", NoiseSchedule.linear, 9, "a"),
        refused("end-above-1", ValueError, "beta_end", NoiseSchedule.sigmoid, 9, 0.1, 1.5),
        refused("swapped", ValueError, "beta_start", NoiseSchedule.power, 2, 9, 0.1, 0.05),
        refused("exponent-0", ValueError, "exponent", NoiseSchedule.power, 0),
        refused("exponent-inf", ValueError, "exponent", NoiseSchedule.power, math.inf),
        refused("exponent-bool", TypeError, "exponent", NoiseSchedule.power, True),
        refused("cycles-negative", ValueError, "cycles", NoiseSchedule.sine_wave, -1),
        refused("wave-at-1", ValueError, "index 5", NoiseSchedule.sine_wave, 1, 11, 0.1, 1),
        refused("s-negative", ValueError, "s must", NoiseSchedule.cosine, 9, -1),
        refused("max-beta", ValueError, "max_beta", NoiseSchedule.cosine, 9, 0, 2),
        refused("end-is-start", ValueError, "end must", NoiseSchedule.sigmoid_cumprod, 9, 1, 1),
        refused("tau-0", ValueError, "tau must", NoiseSchedule.sigmoid_cumprod, 9, tau=0),
        refused("underflow", ValueError, "range of float64", NoiseSchedule.linear, 100_000),
        refused("betas-empty", ValueError, r"betas.*\[0\]", NoiseSchedule.from_betas, []),
        refused("betas-2d", ValueError, "betas.*shape", NoiseSchedule.from_betas, [[0.1]]),
        refused("betas-0d", ValueError, "betas.*shape", NoiseSchedule.from_betas, 0.1),
        refused("betas-ragged", TypeError, "betas", NoiseSchedule.from_betas, [[0.1], [1, 2]]),
        refused("betas-none", TypeError, "betas", NoiseSchedule.from_betas, None),
        refused("betas-str", TypeError, "betas", NoiseSchedule.from_betas, ["a"]),
        refused("betas-bool", TypeError, "betas", NoiseSchedule.from_betas, [True]),
        refused("betas-complex", TypeError, "betas", NoiseSchedule.from_betas, np.array([1j])),
        refused("nan", ValueError, "finite.*index 1", NoiseSchedule.from_betas, [0.1, math.nan]),
        refused("inf", ValueError, "betas.*finite", NoiseSchedule.from_betas, [math.inf]),
        refused("beta-0", ValueError, "betas.*index 1", NoiseSchedule.from_betas, [0.1, 0.0]),
        refused("beta-above-1", ValueError, "betas.*1.1", NoiseSchedule.from_betas, [1.1]),
        refused("early-1", ValueError, "below 1 except", NoiseSchedule.from_betas, [1.0, 0.5]),
        refused("early-0", ValueError, "above 0 except", NoiseSchedule.from_alphas, [0.0, 0.5]),
        refused("alpha-1", ValueError, "alphas", NoiseSchedule.from_alphas, [1.0]),
        refused("flat", ValueError, "falling", NoiseSchedule.from_alphas_cumprod, [0.5, 0.5]),
        refused("abar-below-0", ValueError, "in", NoiseSchedule.from_alphas_cumprod, [0.5, -0.1]),
        refused("abar-1", ValueError, "in", NoiseSchedule.from_alphas_cumprod, [1.0, 0.1]),
    ],
)
def test_bad_input_names_the_argument(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_equal_and_hash_by_content():
    s = NoiseSchedule.linear()
    same = NoiseSchedule.from_betas(s.betas.numpy(), name="another label")
    assert s == same
    assert hash(s) == hash(same)
    assert s != NoiseSchedule.linear(999)
    assert s != NoiseSchedule.scaled_linear()
    assert s != "linear"


@pytest.mark.parametrize(
    "clone",
    [
        pytest.param(lambda s: pickle.loads(pickle.dumps(s)), id="pickle"),
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(copy.copy, id="copy"),
    ],
)
def test_copies_are_equal_and_do_not_warn(clone):
    s = quiet(NoiseSchedule.power, 10)
    coefs = s.q_sample_coefs("cpu", torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = clone(s)
    assert other == s
    assert (other.name, repr(other)) == (s.name, repr(s))
    assert torch.equal(other.posterior_variance, s.posterior_variance)
    assert torch.equal(other.q_sample_coefs("cpu", torch.float32), coefs)


def test_is_immutable():
    s = NoiseSchedule.linear()
    s.betas[0] = 0.5
    s.q_sample_coefs("cpu", torch.float64)[0] = 7
    assert s == NoiseSchedule.linear()
    assert s.betas[0] == 1e-4
    assert s.sqrt_alphas_cumprod[0] < 1
    for action in (lambda: setattr(s, "T", 5), lambda: delattr(s, "name")):
        with pytest.raises(AttributeError, match="immutable"):
            action()


def test_repr_says_what_it_is():
    text = "NoiseSchedule(linear, T=1000, alphas_cumprod[-1]=4.04e-05)"
    assert repr(NoiseSchedule.linear()) == text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coefficient_tables(dtype):
    s = NoiseSchedule.linear()
    columns = [s.sqrt_alphas_cumprod, s.sqrt_one_minus_alphas_cumprod]
    assert torch.equal(s.q_sample_coefs("cpu", dtype), torch.stack(columns, 1).to(dtype))
    columns = [s.betas, s.alphas_cumprod, s.one_minus_alphas_cumprod]
    assert torch.equal(s.levels("cpu", dtype), torch.stack(columns, 1).to(dtype))
    mean = [s.posterior_mean_coef1, s.posterior_mean_coef2]
    columns = [*mean, s.posterior_variance, s.posterior_log_variance]
    clamped = s.q_posterior_coefs("cpu", dtype)
    assert torch.equal(clamped, torch.stack(columns, 1).to(dtype))
    repeated = s.q_posterior_coefs("cpu", dtype, log_variance="repeat")
    assert repeated[0, 3] == repeated[1, 3] == clamped[1, 3]
    assert torch.equal(repeated[1:], clamped[1:])
    assert torch.equal(repeated[:, :3], clamped[:, :3])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda s: s.q_sample_coefs("cpu", torch.float16), "dtype", id="half"),
        pytest.param(lambda s: s.q_sample_coefs("cpu", "float32"), "dtype", id="dtype-str"),
        pytest.param(lambda s: s.q_sample_coefs("nowhere"), "device", id="device"),
        pytest.param(
            lambda s: s.q_posterior_coefs(log_variance="x"), "log_variance", id="convention"
        ),
        pytest.param(
            lambda s: s.q_posterior_coefs(log_variance="repeat"), "for T = 1", id="repeat-one-step"
        ),
    ],
)
def test_coefficient_tables_reject_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(NoiseSchedule.from_betas([1.0]))


def test_coefficient_tables_are_cached_once_for_all_threads():
    s = NoiseSchedule.linear()
    with ThreadPoolExecutor(8) as pool:
        tables = list(pool.map(lambda _: s.q_posterior_coefs("cpu"), range(64)))
    assert all(t is tables[0] for t in tables)
    assert s.q_posterior_coefs("cpu", torch.float64) is not tables[0]


def test_tables_cached_in_inference_mode_work_with_autograd():
    with torch.inference_mode():
        s = NoiseSchedule.from_betas(torch.full((600,), 0.02))
        coefs = s.q_sample_coefs("cpu", torch.float32)
    x = torch.ones(2, requires_grad=True)
    (x * coefs[3]).sum().backward()
    assert torch.equal(x.grad, coefs[3])
    assert not s.betas.is_inference()


def test_default_device_and_dtype_do_not_matter():
    expected = NoiseSchedule.cosine(50)
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            got = NoiseSchedule.cosine(50)
            assert NoiseSchedule.from_betas(expected.betas.tolist()) == expected
            assert torch.device("cpu") == got.q_sample_coefs().device
    finally:
        torch.set_default_dtype(torch.float32)
    assert got == expected


@pytest.mark.slow
def test_coefficient_tables_compile_without_a_graph_break():
    s = NoiseSchedule.linear()
    scale = lambda x, t: x * s.q_sample_coefs(x.device, x.dtype)[t, 0]  # noqa: E731
    x, t = torch.randn(3), torch.tensor([0, 5, 999])
    compiled = torch.compile(scale, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, t), scale(x, t))
