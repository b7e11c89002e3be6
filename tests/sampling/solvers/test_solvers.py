"""Solvers compared with each other and with closed forms, in float64."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from cases import F64
from ddpm_fast import DynamicThreshold, NoiseSchedule, Sampler, StepTable
from ddpm_fast.diffusion.parameterization import PREDICTIONS
from ddpm_fast.ops.row import RowFlag, column
from diffusers_pairs import SCHEDULES, closed_form

LINEAR, COSINE = SCHEDULES["linear"], SCHEDULES["cosine"]
ZERO_SNR = LINEAR.rescale_zero_terminal_snr()
SOLVERS = {
    name: getattr(StepTable, name)
    for name in (
        *("ddpm", "ddim", "ddim_inverse", "ve_ode"),
        *("dpmpp_2m", "dpmpp_2m_sde", "unipc", "plms"),
    )
}
EACH = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
MULTISTEP = ("dpmpp_2m", "dpmpp_2m_sde", "unipc", "plms")


def run(table: StepTable, model, num: int = 3, steps: int | None = None, **options):
    """Return the last state of a chain, or the states after each step."""
    if table.start == "data":
        generator = torch.Generator().manual_seed(2)
        options["x_T"] = torch.rand(num, 2, 3, generator=generator, dtype=F64) * 2 - 1
    sampler = Sampler(model, table, (2, 3), num, "cpu", F64)
    return sampler.sample(num, seed=4, progress=False, **options)


@pytest.mark.parametrize("prediction", PREDICTIONS[:3])
@pytest.mark.parametrize(
    "clip", [None, 0.5, DynamicThreshold(0.8)], ids=["none", "half", "dynamic"]
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_variance_exploding_form_is_ddim_to_rounding(schedule, clip, prediction):
    """The states too: x_t / sqrt(abar_t), with the same noise."""
    model = closed_form(SCHEDULES[schedule], prediction)
    options = {"steps": 20, "prediction": prediction, "clip": clip}
    ddim = StepTable.ddim(SCHEDULES[schedule], **options)
    ve = StepTable.ve_ode(SCHEDULES[schedule], **options)
    steps = range(21)
    _, states = run(ddim, model, return_steps=steps)
    _, exploding = run(ve, model, return_steps=steps)
    abar = torch.cat([SCHEDULES[schedule].alphas_cumprod[ddim.timesteps], torch.ones(1)])
    scaled = exploding * abar.sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(scaled, states, rtol=1e-10, atol=1e-10)


def test_a_generator_draws_for_the_variance_exploding_form_what_it_draws_for_ddim():
    model = closed_form(LINEAR, "epsilon")
    images = [
        Sampler(model, table, (2, 3), 3, "cpu", F64, noise=torch.Generator().manual_seed(1))
        for table in (StepTable.ddim(LINEAR, 9), StepTable.ve_ode(LINEAR, 9))
    ]
    ddim, ve = (sampler.sample(3, progress=False) for sampler in images)
    torch.testing.assert_close(ve, ddim, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc", "plms"])
def test_a_chain_does_not_depend_on_the_one_before(name):
    """Not even NaN, which a coefficient of 0 would pass on."""
    model, broken = closed_form(LINEAR, "epsilon"), True
    sampler = Sampler(
        lambda x, t: x * math.nan if broken else model(x, t),
        SOLVERS[name](LINEAR, 6),
        (2, 3),
        3,
        "cpu",
        F64,
    )
    assert sampler.sample(3, progress=False).isnan().all()
    broken = False
    expected = Sampler(model, sampler.table, (2, 3), 3, "cpu", F64).sample(3, progress=False)
    assert torch.equal(sampler.sample(3, progress=False), expected)


def test_the_variance_exploding_form_is_eulers_step_in_sigma():
    """Eq. 11 of the notes: d x = epsilon d sigma, sigma(t) = sqrt(1/abar(t) - 1)."""
    table = StepTable.ve_ode(LINEAR, 10, clip=None)
    sigma = LINEAR.sigmas
    torch.testing.assert_close(sigma, (1 / LINEAR.alphas_cumprod - 1).sqrt(), rtol=1e-9, atol=0)
    _, states = run(table, closed_form(LINEAR, "epsilon"), return_steps=range(11))
    levels = [*sigma[table.timesteps].tolist(), 0.0]
    torch.testing.assert_close(
        states[0].std() / math.sqrt(1 + levels[0] ** 2),
        torch.tensor(1.0, dtype=F64),
        rtol=0.3,
        atol=0,
    )
    for i, t in enumerate(table.timesteps.tolist()):
        x = states[i] / math.sqrt(1 + levels[i] ** 2)
        epsilon = closed_form(LINEAR, "epsilon")(x, torch.full((3,), t))
        expected = states[i] + (levels[i + 1] - levels[i]) * epsilon
        torch.testing.assert_close(states[i + 1], expected, rtol=1e-9, atol=1e-9)


@EACH
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_makes_the_same_chain(solver, prediction):
    from ddpm_fast import ConvertedModel

    model = closed_form(LINEAR, "epsilon")
    expected = run(solver(LINEAR, 8, clip=0.9), model)
    converted = ConvertedModel(model, LINEAR, "epsilon", prediction)
    got = run(solver(LINEAR, 8, prediction=prediction, clip=0.9), converted)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@EACH
def test_a_clip_that_never_acts_changes_nothing(solver, spacing):
    model = closed_form(LINEAR, "epsilon")
    free, wide = (run(solver(LINEAR, 10, clip=c, spacing=spacing), model) for c in (None, 1e9))
    torch.testing.assert_close(wide, free, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("prediction", ["x0", "v"])
@EACH
def test_alphas_cumprod_near_0(solver, prediction):
    """At 1e-127 the contribution of x_t to x0 is below rounding."""
    tiny = NoiseSchedule.linear(1000, 1e-4, 0.5)
    table = solver(tiny, 20, prediction=prediction, spacing="trailing")
    got = run(table, closed_form(tiny, prediction))
    assert got.isfinite().all()
    rows, _ = table.to("cpu")
    assert rows[:, [column("P"), column("Q"), column("ratio")]].isfinite().all()


@EACH
def test_one_step_ends_at_x0(solver):
    """From any level a chain of one row ends at the (clipped) x0, where encoding begins."""
    table = solver(LINEAR, None, spacing=[600], clip=0.4)
    x0 = closed_form(LINEAR, "x0")
    if table.start == "data":
        x = torch.randn(3, 2, 3, dtype=F64)
        epsilon = closed_form(LINEAR, "epsilon")(x, torch.full((3,), 600))
        abar = float(LINEAR.alphas_cumprod[600])
        expected = math.sqrt(abar) * x.clamp(-0.4, 0.4) + math.sqrt(1 - abar) * epsilon
        sampler = Sampler(closed_form(LINEAR, "epsilon"), table, (2, 3), 3, "cpu", F64)
        torch.testing.assert_close(sampler.sample(3, x_T=x, progress=False), expected)
        return
    x_T = torch.randn(3, 2, 3, dtype=F64)
    got = run(table, closed_form(LINEAR, "epsilon"), x_T=x_T * table.init_scale)
    expected = x0(x_T, torch.full((3,), 600)).clamp(-0.4, 0.4)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_dpm_solver_is_algorithm_2(solver_type):
    """Algorithm 2 of Lu et al. 2022, written in lambda."""
    table = StepTable.dpmpp_2m(COSINE, 6, clip=None, solver_type=solver_type)
    model = closed_form(COSINE, "epsilon")
    _, states = run(table, model, return_steps=range(7))
    abar = [*COSINE.alphas_cumprod[table.timesteps].tolist(), 1.0]
    previous = step = None
    for i, t in enumerate(table.timesteps.tolist()):
        alpha, sigma = math.sqrt(abar[i]), math.sqrt(1 - abar[i])
        x0 = (states[i] - sigma * model(states[i], torch.full((3,), t))) / alpha
        if i == 5:
            torch.testing.assert_close(states[6], x0)
            break
        alpha_n, sigma_n = math.sqrt(abar[i + 1]), math.sqrt(1 - abar[i + 1])
        h = math.log(alpha_n / sigma_n) - math.log(alpha / sigma)
        D1 = 0 if previous is None else (x0 - previous) * h / step
        rise = -0.5 * math.expm1(-h) if solver_type == "midpoint" else math.expm1(-h) / h + 1
        expected = sigma_n / sigma * states[i] - alpha_n * (math.expm1(-h) * x0 - rise * D1)
        torch.testing.assert_close(states[i + 1], expected, rtol=1e-8, atol=1e-8)
        previous, step = x0, h


@pytest.mark.parametrize("steps", [2, 40])
def test_first_order_sde_steps_are_ancestral(steps):
    """The first row of SDE-DPM-Solver++, and all of its noise, is DDPM's posterior."""
    listed = StepTable.dpmpp_2m_sde(LINEAR, steps).timesteps.tolist()
    sde = StepTable.dpmpp_2m_sde(LINEAR, spacing=listed).rows
    ddpm = StepTable.ddpm(LINEAR, spacing=listed).rows
    for name in ("Xx", "Xx0", "S"):
        torch.testing.assert_close(sde[0, column(name)], ddpm[0, column(name)])
    torch.testing.assert_close(sde[:, column("S")], ddpm[:, column("S")], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("evaluate_at", ["next", "current"])
@pytest.mark.parametrize("start", [None, 400])
def test_decoding_inverts_encoding(evaluate_at, start):
    """First order: the error decreases with the number of steps."""
    model = closed_form(LINEAR, "epsilon")
    images = torch.randn(64, 2, 3, dtype=F64, generator=torch.Generator().manual_seed(0)) / 2 + 0.2
    errors = []
    for steps in (25, 100, 400):
        options = {"steps": steps, "clip": None, "start": start}
        inverse = StepTable.ddim_inverse(LINEAR, **options, evaluate_at=evaluate_at)
        sampler = Sampler(model, inverse, (2, 3), 64, "cpu", F64)
        codes = sampler.sample(64, x_T=images, progress=False)
        back = sampler.with_table(StepTable.ddim(LINEAR, **options))
        errors.append(
            float((back.sample(64, x_T=codes, progress=False) - images).pow(2).mean().sqrt())
        )
    assert errors[0] < 0.2
    assert errors[1] < errors[0] / 3
    assert errors[2] < errors[1] / 3


@pytest.mark.parametrize("kind", ["posterior", "beta"])
def test_a_variance_through_its_logarithm_is_the_same(kind):
    """Equal down to 1e-20, where it is clamped."""
    for schedule in SCHEDULES.values():
        plain = StepTable.ddpm(schedule, 50, variance=kind).rows
        logged = StepTable.ddpm(schedule, 50, variance=f"{kind}_log").rows
        torch.testing.assert_close(logged, plain, rtol=1e-12, atol=0)
    tiny = NoiseSchedule.from_betas([1e-22, 1e-22, 0.999, 0.999])
    S = StepTable.ddpm(tiny, variance="posterior_log").rows[:, column("S")]
    assert float(S[2]) == pytest.approx(1e-10, rel=1e-9)


def test_learned_variances_scale_the_noise():
    """Eq. 15 of Nichol & Dhariwal 2021, and exp(v): in the row, e * S is the standard deviation."""
    v = 0.3
    plain = StepTable.ddpm(LINEAR, 20).rows
    beta = StepTable.ddpm(LINEAR, 20, variance="beta").rows
    for kind in ("learned", "learned_range"):
        table = StepTable.ddpm(LINEAR, 20, variance=kind)
        assert table.learned
        assert table.uses_noise
        low, high = (table.rows[:-1, column(name)] for name in ("Lmin", "Lmax"))
        std = table.rows[:-1, column("S")] * ((low + v * (high - low)) / 2).exp()
        small, large = (2 * rows[:-1, column("S")].log() for rows in (plain, beta))
        u = (v + 1) / 2
        expected = torch.full_like(std, v) if kind == "learned" else u * large + (1 - u) * small
        torch.testing.assert_close(2 * std.log(), expected, rtol=1e-9, atol=1e-9)
        assert float(table.rows[-1, column("S")]) == 0


@pytest.mark.parametrize("kind", ["learned", "learned_range"])
def test_samples_have_the_learned_variance(kind):
    """The deviation of x' from its mean is that of the second half of the channels."""
    v = -0.4

    def model(x, t):
        return torch.cat([0 * x, torch.full_like(x, v)], dim=1)

    table = StepTable.ddpm(LINEAR, spacing=[700, 300], variance=kind, prediction="x0", clip=None)
    sampler = Sampler(model, table, (8, 64), 500, "cpu", F64)
    x_T = torch.zeros(500, 8, 64, dtype=F64)
    _, states = sampler.sample(500, x_T=x_T, progress=False, return_steps=[1])
    small, large = (
        2 * math.log(StepTable.ddpm(LINEAR, spacing=[700, 300], variance=k).rows[0, column("S")])
        for k in ("posterior", "beta")
    )
    u = (v + 1) / 2
    expected = v if kind == "learned" else u * large + (1 - u) * small
    assert float(states[0].var().log()) == pytest.approx(expected, abs=0.02)


def test_learned_channels_are_ignored_by_other_tables():
    single = closed_form(LINEAR, "epsilon")

    def model(x, t):
        return torch.cat([single(x, t), torch.full_like(x, math.nan)], dim=1)

    for make in SOLVERS.values():
        table = make(LINEAR, 5)
        assert torch.equal(run(table, model), run(table, single))


def test_a_learned_variance_needs_2c_channels():
    table = StepTable.ddpm(LINEAR, 5, variance="learned_range")
    with pytest.raises(ValueError, match=r"2C channels.*\[3, 4, 3\]; got \[3, 2, 3\]"):
        run(table, closed_form(LINEAR, "epsilon"))


@EACH
def test_zero_terminal_snr_samples_or_raises(solver):
    """v and x0 start from pure noise; solvers that divide by sqrt(abar) cannot."""
    for prediction in ("epsilon", "score"):
        with pytest.raises(ValueError, match="prediction must be 'x0' or 'v'"):
            solver(ZERO_SNR, 10, prediction=prediction)
    if solver in (StepTable.ve_ode, StepTable.plms):
        with pytest.raises(ValueError, match="alphas_cumprod above 0"):
            solver(ZERO_SNR, 10, prediction="v", spacing="trailing")
        return
    for prediction in ("x0", "v"):
        table = solver(ZERO_SNR, 100, prediction=prediction, spacing="trailing", clip=None)
        if table.start == "data":
            assert float(table.rows[-1, column("Xx0")]) == 0  # ends at pure noise
            assert run(table, closed_form(ZERO_SNR, prediction)).isfinite().all()
            continue
        got = run(table, closed_form(ZERO_SNR, prediction), num=5000)
        assert float(got.mean()) == pytest.approx(0.2, abs=0.02)
        assert float(got.std()) == pytest.approx(0.5, abs=0.05 if table.uses_noise else 0.02)


def test_unipc_bh1_has_no_first_step_out_of_pure_noise():
    with pytest.raises(ValueError, match="solver_type must be 'bh2'"):
        StepTable.unipc(ZERO_SNR, 5, "v", spacing="trailing", solver_type="bh1")


@pytest.mark.parametrize("name", MULTISTEP)
def test_a_multistep_chain_has_no_random_start(name):
    with pytest.raises(ValueError, match="'random'"):
        SOLVERS[name](LINEAR, 10, start="random")
    later = SOLVERS[name](LINEAR, 10, start=300, spacing="linspace")
    assert int(later.timesteps[0]) == 299


@EACH
def test_a_chain_that_begins_lower_is_that_of_its_timesteps(solver):
    lower = solver(LINEAR, 5, start=300, spacing="trailing")
    listed = sorted(set(lower.timesteps.tolist()))
    assert max(listed) == (299 if lower.start != "data" else listed[-1])
    if lower.start != "data":
        assert torch.equal(lower.rows, solver(LINEAR, spacing=listed).rows)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 499, 999, 1000])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("name", MULTISTEP)
def test_any_number_of_steps_has_distinct_timesteps(name, spacing, steps):
    table = SOLVERS[name](LINEAR, steps, spacing=spacing)
    stored = table.timesteps.tolist()
    assert len(set(stored)) == steps
    assert stored == sorted(stored, reverse=True)
    assert table.steps == steps + (name == "plms" and steps > 1)


BAD = {
    "steps-0": (ValueError, "steps must", {"steps": 0}),
    "steps-above-T": (ValueError, "steps must", {"steps": 1001}),
    "steps-float": (TypeError, "steps must", {"steps": 10.0}),
    "unsorted": (ValueError, "strictly ascending or descending", {"spacing": [5, 900, 40]}),
    "repeated": (ValueError, "strictly ascending or descending", {"spacing": [900, 40, 40]}),
    "outside": (ValueError, r"spacing\[0\] must", {"spacing": [1000, 40]}),
    "prediction": (ValueError, "prediction must be one of", {"prediction": "noise"}),
    "clip": (ValueError, "clip must", {"clip": -1.0}),
    "start": (ValueError, "start must", {"start": 0}),
    "schedule": (TypeError, "schedule must", {"schedule": LINEAR.betas}),
    "eta": (ValueError, "eta must", {"eta": -0.1}),
    "solver_type": (ValueError, "solver_type must be one of", {"solver_type": "euler"}),
    "evaluate_at": (ValueError, "evaluate_at must be one of", {"evaluate_at": "now"}),
    "variance": (ValueError, "variance must be one of", {"variance": "small"}),
}


@pytest.mark.parametrize(
    ("solver", "case"),
    [
        pytest.param(solver, case, id=f"{name}-{case}")
        for name, solver in SOLVERS.items()
        for case, (_, _, options) in BAD.items()
        if set(options) <= set(inspect.signature(solver).parameters)
    ],
)
def test_bad_input_names_the_argument(solver, case):
    error, words, options = BAD[case]
    with pytest.raises(error, match=words):
        solver(**{"schedule": LINEAR} | options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantile": 0.0}, "quantile must"),
        ({"quantile": 1.5}, "quantile must"),
        ({"cap": 0.0}, "cap must"),
        ({"cap": math.nan}, "cap must"),
    ],
    ids=["0", "above-1", "cap-0", "nan"],
)
def test_a_threshold_is_checked(options, words):
    with pytest.raises(ValueError, match=words):
        DynamicThreshold(**options)


def test_flags_are_those_of_the_terms_in_use():
    flags = {name: make(LINEAR, 10, clip=None).flags for name, make in SOLVERS.items()}
    past = RowFlag.H1 | RowFlag.PUSH
    assert flags == {
        "ddpm": RowFlag(0),
        "ddim": RowFlag(0),
        "ddim_inverse": RowFlag.RAW_OUT,
        "ve_ode": RowFlag.SCALE_IN,
        "dpmpp_2m": past,
        "dpmpp_2m_sde": past,
        "unipc": past | RowFlag.H2 | RowFlag.SECOND,
        "plms": past | RowFlag.H2 | RowFlag.H3 | RowFlag.PUSH_OUT | RowFlag.RAW_OUT,
    }
