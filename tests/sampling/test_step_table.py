from __future__ import annotations

import copy
import math
import pickle
import pickletools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import rows_with
from ddpm_fast.diffusion.schedule import NoiseSchedule, ScheduleWarning
from ddpm_fast.diffusion.thresholding import DynamicThreshold
from ddpm_fast.diffusion.timesteps import timesteps
from ddpm_fast.ops.row import ROW_FIELDS, RowFlag, column, flags_for
from ddpm_fast.sampling.step_table import StepTable

LINEAR = NoiseSchedule.linear()
ZERO_SNR = LINEAR.rescale_zero_terminal_snr()
PREDICTIONS = ["epsilon", "x0", "v", "score"]
DIFFUSERS_PREDICTION = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}


def step(row, x, out, z):
    """Evaluate the row equation for the columns of DDPM and DDIM."""
    r = dict(zip(ROW_FIELDS, row.tolist(), strict=False))
    x0 = (r["P"] * x + r["Q"] * r["G0"] * out).clamp(-r["clip"], r["clip"])
    return r["Xx"] * x + r["Xx0"] * x0 + r["Xo"] * out + r["S"] * z, x0


def x0_and_epsilon(prediction, abar, x, out):
    """Return x0 and epsilon from x = sqrt(abar) x0 + sqrt(1 - abar) eps and the model output."""
    a, b = math.sqrt(abar), math.sqrt(1 - abar)
    if prediction == "v":  # v = sqrt(abar) eps - sqrt(1 - abar) x0
        return a * x - b * out, b * x + a * out
    if prediction == "x0":
        return out, (x - a * out) / b
    epsilon = out if prediction == "epsilon" else -b * out
    return (x - b * epsilon) / a, epsilon


def bayes(abar, abar_prev, x, x0):
    """Return mean and variance of q(x_prev | x_t, x0) by adding precisions."""
    if abar_prev == 1:
        return x0, 0.0
    alpha = abar / abar_prev
    likelihood, prior = 1 / (1 - alpha), 1 / (1 - abar_prev)
    variance = 1 / (alpha * likelihood + prior)
    mean = math.sqrt(alpha) * likelihood * x + math.sqrt(abar_prev) * prior * x0
    return variance * mean, variance


def chain(schedule, table):
    """Yield (row, abar, abar_prev) of each step, from the timesteps alone."""
    abar = schedule.alphas_cumprod[table.timesteps].tolist()
    return list(zip(table.rows, abar, [*abar[1:], 1.0], strict=True))


def draws(n=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 1, n, dtype=torch.float64, generator=generator)


def close(got, expected, rtol=1e-9):
    torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize("clip", [None, 1.0, 0.3])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("schedule", "steps", "spacing"),
    [
        pytest.param(LINEAR, None, "linspace", id="full"),
        pytest.param(LINEAR, 37, "trailing", id="trailing"),
        pytest.param(NoiseSchedule.cosine(), 50, "leading", id="cosine-leading"),
        pytest.param(NoiseSchedule.cosine(), None, [7, 400, 996], id="list-without-0"),
    ],
)
def test_ddpm_is_bayes_rule(schedule, steps, spacing, prediction, clip, variance):
    table = StepTable.ddpm(schedule, steps, variance, prediction, clip, spacing)
    x, out, z = draws()
    for row, abar, abar_prev in chain(schedule, table)[:: max(1, table.steps // 25)]:
        got, got_x0 = step(row, x, out, z)
        x0, _ = x0_and_epsilon(prediction, abar, x, out)
        x0 = x0 if clip is None else x0.clamp(-clip, clip)
        mean, posterior = bayes(abar, abar_prev, x, x0)
        chosen = posterior if variance == "posterior" else 1 - abar / abar_prev
        noise = 0 if abar_prev == 1 else math.sqrt(chosen)
        close(got_x0 * math.sqrt(abar), x0 * math.sqrt(abar))
        close(got, mean + noise * z, rtol=1e-8)
    assert bool(table.flags & RowFlag.CLIP) == (clip is not None)
    assert not table.flags & RowFlag.RAW_OUT


def test_ddpm_epsilon_is_algorithm_2():
    table = StepTable.ddpm(LINEAR, variance="beta", clip=None)
    x, out, z = draws()
    betas, abar = LINEAR.betas, LINEAR.alphas_cumprod
    for row, t in zip(table.rows, range(999, -1, -1), strict=True):
        mean = (x - betas[t] / (1 - abar[t]).sqrt() * out) / (1 - betas[t]).sqrt()
        close(step(row, x, out, z)[0], mean + (betas[t].sqrt() * z if t else 0), rtol=1e-8)


@pytest.mark.parametrize("schedule", [LINEAR, NoiseSchedule.linear(beta_start=1e-12)])
def test_the_full_ddpm_table_has_the_posterior_of_the_schedule(schedule):
    rows = StepTable.ddpm(schedule).rows.flip(0)
    coefs = schedule.q_posterior_coefs("cpu", torch.float64)
    got = torch.stack([rows[:, column("Xx0")], rows[:, column("Xx")], rows[:, column("S")] ** 2], 1)
    torch.testing.assert_close(got, coefs[:, :3], rtol=1e-12, atol=0)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("rederive", [True, False])
def test_ddim_is_equation_12(prediction, clip, eta, rederive):
    schedule = NoiseSchedule.cosine()
    table = StepTable.ddim(schedule, 40, eta, prediction, clip, rederive_epsilon=rederive)
    x, out, z = draws()
    for row, abar, prev in chain(schedule, table):
        x0, epsilon = x0_and_epsilon(prediction, abar, x, out)
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
        if rederive:
            epsilon = (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
        sigma = eta * math.sqrt((1 - prev) / (1 - abar)) * math.sqrt(1 - abar / prev)
        direction = math.sqrt(1 - prev - sigma**2) * epsilon
        close(step(row, x, out, z)[0], math.sqrt(prev) * x0 + direction + sigma * z, rtol=1e-8)
    assert table.uses_noise == (eta > 0)
    assert [table.draws(i) for i in (0, 38, 39)] == [eta > 0] * 3
    assert bool(table.flags & RowFlag.RAW_OUT) != rederive


@pytest.mark.parametrize("steps", [None, 20])
def test_ddim_with_eta_1_is_ddpm(steps):
    ddim = StepTable.ddim(LINEAR, steps, eta=1.0, spacing="trailing").rows
    ddpm = StepTable.ddpm(LINEAR, steps, spacing="trailing").rows
    torch.testing.assert_close(ddim, ddpm, rtol=1e-8, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), betas=st.lists(st.floats(1e-7, 0.9), min_size=1, max_size=30))
def test_any_respaced_chain_is_bayes_rule(data, betas):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScheduleWarning)
        schedule = NoiseSchedule.from_betas(betas)
    stored = data.draw(st.sets(st.integers(0, len(betas) - 1), min_size=1))
    table = StepTable.ddpm(schedule, prediction="x0", clip=None, spacing=sorted(stored))
    assert table.timesteps.tolist() == sorted(stored, reverse=True)
    x, out, z = draws(4)
    for row, abar, abar_prev in chain(schedule, table):
        mean, variance = bayes(abar, abar_prev, x, out)
        close(step(row, x, out, z)[0], mean + math.sqrt(variance) * z, rtol=1e-6)


@pytest.mark.parametrize("make", [StepTable.ddpm, StepTable.ddim])
@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_zero_terminal_snr_samples(make, prediction):
    row = make(ZERO_SNR, prediction=prediction).rows[0]
    x, out, z = draws()
    got, x0 = step(row, x, out, 0 * z)
    assert torch.equal(x0, (out if prediction == "x0" else -out).clamp(-1, 1))
    a, b = (float(ZERO_SNR.alphas_cumprod[-2]) ** 0.5, 1 - float(ZERO_SNR.alphas_cumprod[-2]))
    close(got, a * x0 + (0 if make == StepTable.ddpm else math.sqrt(b)) * x)


@pytest.mark.parametrize("make", [StepTable.ddpm, StepTable.ddim])
@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing", [500, 60]])
def test_last_row_adds_no_noise_and_returns_x0(make, variance, spacing):
    options = {"variance": variance} if make == StepTable.ddpm else {"eta": 1.0}
    table = make(LINEAR, 2 if isinstance(spacing, list) else 50, spacing=spacing, **options)
    last = dict(zip(ROW_FIELDS, table.rows[-1].tolist(), strict=False))
    assert (last["S"], last["Xx"], last["Xo"], last["Xx0"]) == (0, 0, 0, 1)
    assert (table.rows[:-1, column("S")] > 0).all()


@pytest.mark.parametrize("prediction", list(DIFFUSERS_PREDICTION))
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_ddpm_steps_like_diffusers(prediction, clip, spacing, variance):
    scheduling = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
    reference = scheduling.DDPMScheduler(
        timestep_spacing=spacing,
        clip_sample=clip is not None,
        prediction_type=DIFFUSERS_PREDICTION[prediction],
        variance_type="fixed_small" if variance == "posterior" else "fixed_large",
    )
    reference.set_timesteps(50)
    table = StepTable.ddpm(LINEAR, 50, variance, prediction, clip, spacing)
    assert torch.equal(table.timesteps, reference.timesteps)
    x, out, _ = draws()
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    for row, t in zip(table.rows, reference.timesteps, strict=True):
        theirs = reference.step(out, t, x, generator=torch.Generator().manual_seed(1))
        ours, x0 = step(row, x, out, z)
        # Where trailing ends above t = 0, diffusers adds noise to the finished image.
        expected = (
            theirs.pred_original_sample if t == reference.timesteps[-1] else theirs.prev_sample
        )
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-4)
        torch.testing.assert_close(x0, theirs.pred_original_sample, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("prediction", list(DIFFUSERS_PREDICTION))
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("rederive", [True, False])
def test_ddim_steps_like_diffusers(prediction, clip, spacing, eta, rederive):
    scheduling = pytest.importorskip("diffusers.schedulers.scheduling_ddim")
    reference = scheduling.DDIMScheduler(
        timestep_spacing=spacing,
        clip_sample=clip is not None,
        prediction_type=DIFFUSERS_PREDICTION[prediction],
    )
    reference.set_timesteps(50)
    table = StepTable.ddim(LINEAR, 50, eta, prediction, clip, spacing, rederive)
    assert torch.equal(table.timesteps, reference.timesteps)
    x, out, z = draws()
    for row, t in zip(table.rows, reference.timesteps.tolist(), strict=True):
        noise = z if eta else None
        theirs = reference.step(out, t, x, eta, rederive, variance_noise=noise).prev_sample
        torch.testing.assert_close(step(row, x, out, z)[0], theirs, rtol=1e-4, atol=2e-4)


def test_start_begins_lower_in_the_chain():
    full = StepTable.ddpm(LINEAR)
    late = StepTable.ddpm(LINEAR, start=300)
    assert late.start == 300
    assert late.timesteps.tolist() == list(range(299, -1, -1))
    assert torch.equal(late.rows, full.rows[-300:])
    spaced = StepTable.ddim(LINEAR, 4, spacing="linspace", start=301)
    assert spaced.timesteps.tolist() == [300, 200, 100, 0]
    assert StepTable.ddpm(ZERO_SNR, prediction="v", start=1000).steps == 1000


def test_random_start_is_the_whole_table():
    table = StepTable.ddpm(LINEAR, 50, start="random")
    assert table.start == "random"
    assert torch.equal(table.rows, StepTable.ddpm(LINEAR, 50).rows)
    assert table != StepTable.ddpm(LINEAR, 50)


def test_to_rounds_once_and_shares():
    table = StepTable.ddpm(LINEAR, 10)
    rows, steps = table.to("cpu")
    assert (rows.dtype, steps.dtype) == (torch.float32, torch.int64)
    assert torch.equal(rows, table.rows.float())
    assert torch.equal(steps, table.timesteps)
    assert all(a is b for a, b in zip(table.to("cpu"), (rows, steps), strict=True))
    assert torch.equal(table.to("cpu", torch.float64)[0], table.rows)


def test_a_pickle_refers_to_public_names():
    schedule = NoiseSchedule.linear()
    pickled = pickle.dumps((schedule, StepTable.ddim(schedule, steps=3, clip=DynamicThreshold())))
    words = [word for _, word, _ in pickletools.genops(pickled) if isinstance(word, str)]
    modules = {word for word in words if word.startswith("ddpm_fast")}
    assert modules == {"ddpm_fast"}


@pytest.mark.parametrize("clone", [lambda t: pickle.loads(pickle.dumps(t)), copy.deepcopy])
def test_is_immutable_and_compares_by_content(clone):
    table = StepTable.ddim(LINEAR, 10, clip=None, start="random")
    table.to("cpu", torch.float64)[0].zero_()
    table.rows.zero_()
    with pytest.raises(AttributeError, match="immutable"):
        table.steps = 3
    other = clone(table)
    assert other == table == StepTable.ddim(LINEAR, 10, clip=None, start="random")
    assert hash(other) == hash(table)
    assert table != StepTable.ddim(LINEAR, 10, eta=0.1, clip=None, start="random")
    assert (other.flags, other.steps, other.uses_noise) == (RowFlag(0), 10, False)
    assert repr(other) == "StepTable(ddim(eta=0), 10 steps, epsilon, start=random)"


def refused(case, error, message, make, *args, **kwargs):
    return pytest.param(error, message, lambda: make(*args, **kwargs), id=case)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        refused("T-bool", TypeError, "T must", timesteps, True, 1),
        refused("steps-0", ValueError, "steps must", timesteps, 10, 0),
        refused("steps-above-T", ValueError, "steps must", timesteps, 10, 11),
        refused("steps-bool", TypeError, "steps must", timesteps, 10, True),
        refused("steps-float", TypeError, "steps must", timesteps, 10, 5.0),
        refused("spacing-name", ValueError, "spacing must", timesteps, 10, 5, "even"),
        refused("spacing-none", TypeError, "spacing must", timesteps, 10, 5, None),
        refused("list-empty", ValueError, "at least one", timesteps, 10, None, []),
        refused("list-repeated", ValueError, "strictly", timesteps, 10, None, [5, 5]),
        refused("list-disordered", ValueError, "strictly", timesteps, 10, None, [1, 9, 5]),
        refused("list-above-T", ValueError, r"spacing\[0\]", timesteps, 10, None, [10, 1]),
        refused("list-negative", ValueError, r"spacing\[1\]", timesteps, 10, None, [5, -1]),
        refused("list-float", TypeError, r"spacing\[0\]", timesteps, 10, None, [5.0]),
        refused("list-length", ValueError, "steps must", timesteps, 10, 3, [5, 1]),
        refused("nan", ValueError, "column P", flags_for, rows_with(P=math.nan)),
        refused("inf", ValueError, "column S", flags_for, rows_with(S=math.inf)),
        refused("clip-0-beside-1", ValueError, "clip", flags_for, rows_with(clip=(1.0, 0.0))),
        refused("clip-negative", ValueError, "clip", flags_for, rows_with(clip=(-1.0, -1.0))),
        refused("clip-nan", ValueError, "clip", flags_for, rows_with(clip=(1.0, math.nan))),
        refused("padding", ValueError, "padding", flags_for, torch.eye(2, 32).flip(1)),
        refused("width", ValueError, r"\[2, 28\]", flags_for, rows_with()[:, :28]),
        refused("one-row", ValueError, r"\[32\]", flags_for, rows_with()[0]),
        refused("integers", TypeError, "int32", flags_for, rows_with().int()),
        refused("rows-list", TypeError, "rows.*list", flags_for, [1.0]),
        refused("schedule", TypeError, "schedule must", StepTable.ddpm, LINEAR.betas),
        refused("steps-above-start", ValueError, "steps must", StepTable.ddpm, LINEAR, 9, start=8),
        refused("variance", ValueError, "variance must", StepTable.ddpm, LINEAR, 9, "small"),
        refused("prediction", ValueError, "prediction", StepTable.ddpm, LINEAR, prediction="noise"),
        refused("clip-0", ValueError, "clip must", StepTable.ddpm, LINEAR, clip=0),
        refused("clip-bool", TypeError, "clip must", StepTable.ddpm, LINEAR, clip=True),
        refused("start-0", ValueError, "start must", StepTable.ddpm, LINEAR, start=0),
        refused("start-above-T", ValueError, "start must", StepTable.ddpm, LINEAR, start=1001),
        refused("start-bool", TypeError, "start must", StepTable.ddpm, LINEAR, start=True),
        refused("start-name", ValueError, "start must", StepTable.ddpm, LINEAR, start="any"),
        refused("zero-snr", ValueError, "zero terminal SNR", StepTable.ddpm, ZERO_SNR, 50),
        refused("zero-snr-s", ValueError, "'score'", StepTable.ddim, ZERO_SNR, 50, 0, "score"),
        refused("eta-negative", ValueError, "eta must", StepTable.ddim, LINEAR, eta=-0.1),
        refused("eta-too-large", ValueError, "eta must", StepTable.ddim, LINEAR, eta=9),
        refused("rederive", TypeError, "rederive", StepTable.ddim, LINEAR, rederive_epsilon=1),
        refused("too-short", ValueError, "one per row", StepTable, rows_with(), [1]),
        refused("negative", ValueError, r"timesteps\[1\]", StepTable, rows_with(), [1, -1]),
        refused("beyond-float32", ValueError, "P = 1e\\+39", StepTable, rows_with(P=1e39), [1, 0]),
        refused("past-of-nothing", ValueError, "push is 0", flags_for, rows_with(Xh1=1)),
        refused("push", ValueError, "push must be 0 or 1", flags_for, rows_with(push=2)),
        refused(
            "random-past",
            ValueError,
            "'random'",
            StepTable,
            rows_with(push=1, Xh1=1),
            [1, 0],
            start="random",
        ),
        refused(
            "threshold", TypeError, "threshold must", StepTable, rows_with(), [1, 0], threshold=1
        ),
        refused("scale-0", ValueError, "init_scale", StepTable, rows_with(), [1, 0], init_scale=0),
        refused("no-specialisation", ValueError, "column M", StepTable, rows_with(M=1), [1, 0]),
        refused("dtype", ValueError, "dtype must", StepTable.ddpm(LINEAR, 2).to, "cpu", torch.half),
    ],
)
def test_bad_input_names_the_argument(error, message, call):
    with pytest.raises(error, match=message):
        call()
