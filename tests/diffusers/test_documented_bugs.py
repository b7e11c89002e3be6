"""Known bugs of the schedulers of diffusers, which step tables do not have.

Issue numbers are those of github.com/huggingface/diffusers. Seen with diffusers 0.42.1.
"""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")

import diffusers

from ddpm_fast import NoiseSchedule, StepTable, reverse_step_
from diffusers_pairs import SCHEDULES, THEIR_PREDICTION, closed_form

BACKEND = "cpu"
F64 = torch.float64
LINEAR, COSINE = SCHEDULES["linear"], SCHEDULES["cosine"]
SHAPE = (2, 3, 4, 4)


def normals(seed: int, shape=SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ours(table: StepTable, x, out, row: int = 0, noise=None, memory=None):
    """Compute one step of a table in float64."""
    noise = None if noise is None else noise.to(F64)
    x = x.to(F64, copy=True)
    return reverse_step_(x, out.to(F64), table, row, noise=noise, memory=memory, backend=BACKEND)


def sample_by_table(table: StepTable, model, x):
    x, memory = x.to(F64), table.memory(x.to(F64))
    for row, t in enumerate(table.timesteps):
        x = ours(table, x, model(x, t.expand(len(x))), row, torch.zeros_like(x), memory)
    return x


def sample_by_scheduler(scheduler, model, x, **options):
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(len(x))), t, x, **options).prev_sample
    return x


def scheduled(kind: str, steps: int, **options):
    scheduler = getattr(diffusers, kind)(**options)
    scheduler.set_timesteps(steps)
    return scheduler


def largest(values: torch.Tensor) -> float:
    return float(values.abs().max())


def test_fixed_large_log_is_nan():
    """Issue 14569: DDPMScheduler takes the square root of log(beta); ours is "beta"."""
    x, out = normals(0), normals(1)
    theirs = scheduled("DDPMScheduler", 50, variance_type="fixed_large_log")
    assert theirs.step(out, theirs.timesteps[0], x).prev_sample.isnan().all()
    log, plain = (StepTable.ddpm(LINEAR, 50, variance) for variance in ("beta_log", "beta"))
    torch.testing.assert_close(log.rows, plain.rows, rtol=1e-14, atol=0)


def test_fixed_large_adds_noise_in_the_last_trailing_step():
    """DDPMScheduler adds noise for t > 0, and the last of 50 trailing timesteps is 19."""
    x = torch.zeros(1, 3, 64, 64)
    theirs = scheduled(
        "DDPMScheduler", 50, variance_type="fixed_large", timestep_spacing="trailing"
    )
    last = theirs.step(x, theirs.timesteps[-1], x, generator=torch.Generator().manual_seed(0))
    assert largest(last.pred_original_sample) == 0
    expected = float(LINEAR.one_minus_alphas_cumprod[19].sqrt())
    assert float(last.prev_sample.std()) == pytest.approx(expected, rel=0.02)
    assert expected == pytest.approx(0.076, abs=5e-4)
    table = StepTable.ddpm(LINEAR, 50, "beta", spacing="trailing")
    assert not ours(table, x, x, row=49, noise=normals(2, x.shape)).any()


@pytest.mark.parametrize(
    ("spacing", "steps", "t", "following", "wrong"),
    [("linspace", 10, 111, 0, 11), ("trailing", 13, 153, 76, 77)],
)
def test_ddim_steps_to_a_timestep_that_is_not_the_next(spacing, steps, t, following, wrong):
    """Issues 12633, 11347 (linspace) and 9261 (trailing): the previous timestep is t - T // steps.

    9261 was closed by a change to DDPMScheduler only.
    """
    x0, epsilon = normals(0).clamp(-1, 1).to(F64), normals(1).to(F64)

    def at(t):
        signal, noise = LINEAR.sqrt_alphas_cumprod[t], LINEAR.sqrt_one_minus_alphas_cumprod[t]
        return signal * x0 + noise * epsilon

    theirs = scheduled("DDIMScheduler", steps, timestep_spacing=spacing)
    assert theirs.timesteps[-2:].tolist() == [t, following]
    got = theirs.step(epsilon, t, at(t)).prev_sample
    torch.testing.assert_close(got, at(wrong), rtol=0, atol=1e-4)
    assert largest(got - at(following)) > 2e-3
    table = StepTable.ddim(LINEAR, steps, spacing=spacing)
    mine = ours(table, at(t), epsilon, row=steps - 2)
    torch.testing.assert_close(mine, at(following), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("spacing", "steps", "first_two", "wrong"),
    [("linspace", 10, (999, 888), 899), ("trailing", 13, (999, 922), 923)],
)
def test_pndm_steps_to_a_timestep_that_is_not_the_next(spacing, steps, first_two, wrong):
    """As DDIMScheduler does: PNDMScheduler's previous timestep is t - T // steps too."""
    x, out = normals(0).to(F64), normals(1).to(F64)
    theirs = scheduled("PNDMScheduler", steps, timestep_spacing=spacing, skip_prk_steps=True)
    assert tuple(theirs.timesteps[:2].tolist()) == first_two
    got = theirs.step(out, theirs.timesteps[0], x).prev_sample
    right, mistaken = (StepTable.plms(LINEAR, spacing=[999, t]) for t in (first_two[1], wrong))
    torch.testing.assert_close(got, ours_of_first_row(mistaken, x, out), rtol=0, atol=1e-3)
    table = StepTable.plms(LINEAR, steps, spacing=spacing)
    stepped = ours_of_first_row(table, x, out)
    torch.testing.assert_close(stepped, ours_of_first_row(right, x, out), rtol=0, atol=1e-12)
    assert largest(got - stepped) > 0.01


def ours_of_first_row(table: StepTable, x, out):
    return ours(table, x, out, memory=table.memory(x))


@pytest.mark.parametrize("steps", [61, 103])
def test_trailing_timesteps_may_end_below_zero(steps: int):
    """At 62 of the 1000 numbers of steps, rounding adds a timestep -1."""
    theirs = scheduled("DDIMScheduler", steps, timestep_spacing="trailing")
    assert len(theirs.timesteps) == steps + 1
    assert int(theirs.timesteps[-1]) == -1
    for table in (StepTable.ddim, StepTable.ddpm, StepTable.dpmpp_2m):
        timesteps = table(LINEAR, steps, spacing="trailing").timesteps
        assert timesteps.tolist() == theirs.timesteps[:-1].tolist()


def test_learned_variance_is_the_square_root_of_the_output():
    """DDPMScheduler treats log sigma^2 as sigma^2; ours is exp(v / 2)."""
    x, out, noise = torch.zeros(SHAPE), torch.zeros(SHAPE), normals(2)
    table = StepTable.ddpm(LINEAR, 50, "learned")
    for v in (-3.0, 2.0):
        both = torch.cat([out, torch.full(SHAPE, v)], dim=1)
        theirs = scheduled("DDPMScheduler", 50, variance_type="learned")
        source = torch.Generator().manual_seed(2)
        got = theirs.step(both, theirs.timesteps[0], x, generator=source).prev_sample
        torch.testing.assert_close(got, torch.tensor(v).sqrt() * noise, equal_nan=True)
        torch.testing.assert_close(
            ours(table, x, both, noise=noise), math.exp(v / 2) * noise.double()
        )


def test_unipc_bh1_ends_in_nan():
    """At sigma 0 the step h is infinite, and B = h of bh1 times the difference 0 is NaN."""
    options = {"prediction_type": "sample", "final_sigmas_type": "zero", "solver_type": "bh1"}
    model, x = closed_form(LINEAR, "x0"), normals(0)
    theirs = scheduled("UniPCMultistepScheduler", 12, **options)
    table = StepTable.unipc(LINEAR, 12, "x0", clip=None, solver_type="bh1")
    memory, mine = table.memory(x.to(F64)), x.to(F64)
    for row, t in enumerate(theirs.timesteps):
        out = model(x, t.expand(2))
        x0 = model(mine, t.expand(2))
        mine = ours(table, mine, x0, row, memory=memory)
        x = theirs.step(out, t, x).prev_sample
        if row < 11:
            torch.testing.assert_close(x.to(F64), mine, rtol=0, atol=1e-5)
    assert x.isnan().all()
    torch.testing.assert_close(mine, x0, rtol=0, atol=1e-12)


def test_pndm_combines_velocities_of_different_timesteps():
    """Issue 14816: v and epsilon chains of one denoiser differ in PNDMScheduler, not in ours."""
    theirs, mine = {}, {}
    for ours_name, name in (("epsilon", "epsilon"), ("v", "v_prediction")):
        model = closed_form(LINEAR, ours_name)
        options = {"prediction_type": name, "skip_prk_steps": True, "set_alpha_to_one": True}
        theirs[ours_name] = sample_by_scheduler(
            scheduled("PNDMScheduler", 20, **options), model, normals(0)
        ).to(F64)
        table = StepTable.plms(LINEAR, 20, ours_name)
        mine[ours_name] = sample_by_table(table, model, normals(0))
    torch.testing.assert_close(mine["v"], mine["epsilon"], rtol=0, atol=1e-10)
    torch.testing.assert_close(theirs["epsilon"], mine["epsilon"], rtol=0, atol=1e-3)
    assert largest(theirs["v"] - theirs["epsilon"]) > 0.01


def test_ddim_inverse_of_x0_divides_by_zero():
    """Issue 10920: at x_0 the epsilon of DDIMInverseScheduler is 0 / 0."""
    x, model = normals(0) / 2, closed_form(LINEAR, "x0")
    theirs = scheduled("DDIMInverseScheduler", 20, prediction_type="sample", clip_sample=False)
    t = theirs.timesteps[0]
    assert not theirs.step(model(x, t.expand(2)), t, x).prev_sample.isfinite().any()
    x0, epsilon = (
        sample_by_table(StepTable.ddim_inverse(LINEAR, 20, kind), closed_form(LINEAR, kind), x)
        for kind in ("x0", "epsilon")
    )
    torch.testing.assert_close(x0, epsilon, rtol=0, atol=1e-4)


def test_ddim_inverse_converts_v_at_another_timestep():
    """The network of DDIMInverseScheduler gets the next t, and its v is converted at t."""
    x, codes = normals(0) / 2, {}
    for kind in ("epsilon", "v"):
        option = {"prediction_type": THEIR_PREDICTION[kind], "clip_sample": False}
        model = closed_form(LINEAR, kind)
        theirs = sample_by_scheduler(scheduled("DDIMInverseScheduler", 20, **option), model, x)
        codes[kind] = theirs, sample_by_table(StepTable.ddim_inverse(LINEAR, 20, kind), model, x)
    torch.testing.assert_close(codes["v"][1], codes["epsilon"][1], rtol=0, atol=1e-4)
    assert largest(codes["v"][0] - codes["epsilon"][0]) > 0.1


def test_ddim_inverse_passes_the_next_timestep():
    """The network of DDIMInverseScheduler gets x_t and the next t; ours offers both."""
    x, model = normals(0).to(F64) / 2, closed_form(LINEAR, "epsilon")
    theirs = sample_by_scheduler(scheduled("DDIMInverseScheduler", 20, clip_sample=False), model, x)
    current, following = (
        sample_by_table(StepTable.ddim_inverse(LINEAR, 20, evaluate_at=at), model, x)
        for at in ("current", "next")
    )
    torch.testing.assert_close(theirs, following, rtol=0, atol=1e-3)
    assert largest(current - following) > 0.01


MULTISTEP = {
    "DPMSolverMultistepScheduler": StepTable.dpmpp_2m,
    "UniPCMultistepScheduler": StepTable.unipc,
}


@pytest.mark.parametrize("kind", MULTISTEP)
def test_float32_tables_are_coarse_on_the_cosine_schedule(kind: str):
    """At 1 / alpha = 20,000 the error of diffusers is 2e-4, and ours below 1e-5."""
    x, table = normals(0), MULTISTEP[kind](COSINE, 10, clip=None)
    out = closed_form(COSINE, "epsilon")(x, torch.full((2,), 999))
    theirs = scheduled(kind, 10, beta_schedule="squaredcos_cap_v2")
    got = theirs.step(out, theirs.timesteps[0], x).prev_sample
    exact = ours(table, x, out, memory=table.memory(x.to(F64)))
    mine = reverse_step_(x.clone(), out, table, 0, memory=table.memory(x), backend=BACKEND)
    assert largest(mine - exact) < 1e-5 * largest(exact)
    assert 1e-4 < largest(got - exact) / largest(exact) < 5e-4


@pytest.mark.parametrize("channels", [1, 4])
def test_dpm_solver_cuts_a_learned_variance_off_after_three_channels(channels: int):
    """model_output[:, :3] keeps a variance of grey images and breaks four channels."""
    x, out = normals(0, (2, channels, 4, 4)), normals(1, (2, 2 * channels, 4, 4))
    theirs = scheduled("DPMSolverMultistepScheduler", 10, variance_type="learned_range")
    if channels == 1:
        assert theirs.step(out, theirs.timesteps[0], x).prev_sample.shape == (2, 2, 4, 4)
    else:
        with pytest.raises(RuntimeError, match="must match the size"):
            theirs.step(out, theirs.timesteps[0], x)
    table = StepTable.dpmpp_2m(LINEAR, 10, clip=None)
    both, half = (
        ours(table, x, o, memory=table.memory(x.to(F64))) for o in (out, out[:, :channels])
    )
    torch.testing.assert_close(both, half, rtol=0, atol=0)


@pytest.mark.parametrize("kind", MULTISTEP)
def test_multistep_solvers_of_all_timesteps_repeat_one(kind: str):
    """One of as many linspace steps as timesteps is rounded to its neighbour: a step of 0, NaN."""
    ramp = {"beta_start": 1e-3, "beta_end": 0.2}
    schedule = NoiseSchedule.linear(100, **ramp)
    x, model = normals(0), closed_form(schedule, "epsilon")
    theirs = scheduled(kind, 100, timestep_spacing="linspace", num_train_timesteps=100, **ramp)
    assert len(set(theirs.timesteps.tolist())) == 99
    assert sample_by_scheduler(theirs, model, x).isnan().any()
    table = MULTISTEP[kind](schedule, 100, spacing="linspace")
    assert table.timesteps.tolist() == list(range(99, -1, -1))
    assert sample_by_table(table, model, x).isfinite().all()


def test_steps_offset_leads_out_of_the_schedule():
    """Issue 10003: leading timesteps with steps_offset 1, of Stable Diffusion, reach 1000."""
    theirs = scheduled("DDIMScheduler", 1000, steps_offset=1)
    with pytest.raises(IndexError):
        theirs.step(normals(1), theirs.timesteps[0], normals(0))
    assert StepTable.ddim(LINEAR, 1000).timesteps[0] == 999


def test_epsilon_at_zero_terminal_snr_is_nan():
    """Issue 3851: an epsilon does not determine x_0 at abar = 0; ours rejects it."""
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    theirs = scheduled("DDIMScheduler", 10, **options)
    got = theirs.step(normals(1), theirs.timesteps[0], normals(0)).prev_sample
    assert not got.isfinite().any()
    with pytest.raises(ValueError, match="prediction must be 'x0' or 'v'"):
        StepTable.ddim(LINEAR.rescale_zero_terminal_snr(), 10, spacing="trailing")
