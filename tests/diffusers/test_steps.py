"""Each step of the fast schedulers on diffusers' own trajectory, for every option."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")

import diffusers

from ddpm_fast import reverse_step_
from ddpm_fast.diffusers import FastDDPMScheduler, step_table
from scheduler_cases import (
    FAST,
    OPTIONS,
    SHAPE,
    THEIRS,
    assert_near,
    generator,
    model_of,
    normals,
    trajectory,
)

KINDS = [(kind, name) for kind in OPTIONS for name in OPTIONS[kind]]


def pair(kind, name, steps):
    options = OPTIONS[kind][name]
    made = THEIRS[kind](**options), FAST[kind](**options)
    for scheduler in made:
        if steps is not None:
            scheduler.set_timesteps(steps)
    assert made[0].timesteps.tolist() == made[1].timesteps.tolist()
    return made


@pytest.mark.parametrize(("kind", "name"), KINDS, ids=[f"{k}-{n}" for k, n in KINDS])
@pytest.mark.parametrize("steps", [7, 50])
def test_every_option(kind, name, steps):
    theirs, ours = pair(kind, name, steps)
    for row, (x, out, made) in enumerate(trajectory(theirs, normals(0))):
        t = ours.timesteps[row]
        got = ours.step(out, t, x, generator=generator(row))
        assert_near(got.prev_sample, made.prev_sample)
        # x0 is a difference of two numbers that may be large where alphas_cumprod is small.
        terms = float(x.abs().max() + out.abs().max()) * float(theirs.alphas_cumprod[t] ** -0.5)
        rounding = 4 * torch.finfo(torch.float32).eps * min(terms, 1e30)
        assert_near(got.pred_original_sample, made.pred_original_sample, plus=rounding)
        assert got.prev_sample.is_contiguous()


@pytest.mark.parametrize("name", ["epsilon", "cosine", "v_prediction", "learned_range"])
@pytest.mark.parametrize("set_", [True, False], ids=["set", "as-made"])
def test_all_thousand_steps(name, set_):
    """Where 1 - abar_t / abar_prev has three digits in float32, and theirs are met."""
    theirs, ours = pair("ddpm", name, 1000 if set_ else None)
    for row, (x, out, made) in enumerate(trajectory(theirs, normals(0))):
        got = ours.step(out, int(theirs.timesteps[row]), x, generator=generator(row))
        assert_near(got.prev_sample, made.prev_sample)


@pytest.mark.parametrize("clipped", [True, False, None])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["epsilon", "v_prediction", "sample", "trailing", "unclipped"])
def test_ddim_with_eta_and_the_clipped_output(name, eta, clipped):
    theirs, ours = pair("ddim", name, 20)
    of_step = {"eta": eta, "use_clipped_model_output": clipped}
    for row, (x, out, made) in enumerate(trajectory(theirs, normals(0), **of_step)):
        t = int(theirs.timesteps[row])
        got = ours.step(out, t, x, generator=generator(row), **of_step)
        assert_near(got.prev_sample, made.prev_sample)
        if eta:
            noise = torch.randn(SHAPE, generator=generator(row))
            given = ours.step(out, t, x, variance_noise=noise, **of_step)
            assert torch.equal(given.prev_sample, got.prev_sample)


def test_ddim_from_any_timestep_of_the_schedule():
    """diffusers steps by the stride from wherever it is, also between the timesteps of a chain."""
    theirs, ours = pair("ddim", "epsilon", 50)
    x, out = normals(0), normals(1)
    for t in (1, 10, 49, 333, 998):
        assert_near(ours.step(out, t, x).prev_sample, theirs.step(out, t, x).prev_sample)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 1, 7, 5), (2, 4, 16, 3), (2, 5), (2, 3, 2, 4, 3)]
)
@pytest.mark.parametrize("kind", FAST)
def test_samples_of_any_shape(kind, shape):
    theirs, ours = pair(kind, "epsilon", 10)
    x, out, t = normals(0, shape), normals(1, shape), theirs.timesteps[4]
    want = theirs.step(out, t, x, generator=generator(2)).prev_sample
    assert_near(ours.step(out, t, x, generator=generator(2)).prev_sample, want)


@pytest.mark.parametrize("layout", ["channels-last", "sliced", "expanded"])
def test_samples_of_any_layout_keep_theirs_and_are_not_written(layout):
    theirs, ours = pair("ddpm", "learned_range", 10)
    view = {
        "channels-last": lambda x: x.to(memory_format=torch.channels_last),
        "sliced": lambda x: x.repeat_interleave(2, -1)[..., ::2],
        "expanded": lambda x: x[:1].expand_as(x),
    }[layout]
    x, out = view(normals(0)), view(normals(1, (2, 6, 6, 5)))
    before, t = x.clone(), theirs.timesteps[4]
    want = theirs.step(out, t, x, generator=generator(2))
    got = ours.step(out, t, x, generator=generator(2))
    assert_near(got.prev_sample, want.prev_sample)
    assert_near(got.pred_original_sample, want.pred_original_sample)
    assert torch.equal(x, before)
    if layout == "channels-last":
        assert got.prev_sample.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_of_no_samples():
    ours = FastDDPMScheduler()
    none = torch.empty(0, 3, 4, 4)
    assert ours.step(none, 5, none).prev_sample.shape == (0, 3, 4, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "name"), [("ddpm", "epsilon"), ("ddpm", "learned_range"), ("ddim", "cosine")]
)
def test_half_precision_is_nearer_to_float64_than_the_library(kind, name, dtype):
    theirs, ours = pair(kind, name, 20)
    exact = FAST[kind](**OPTIONS[kind][name])
    exact.set_timesteps(20)
    for row, (x, out, _) in enumerate(trajectory(theirs, normals(0))):
        x, out, t = x.to(dtype), out.to(dtype), theirs.timesteps[row]
        made = [s.step(out, t, x, generator=generator(row)).prev_sample for s in (ours, theirs)]
        noise = torch.randn(SHAPE, generator=generator(row), dtype=dtype).double()
        want = _with_noise(exact, out.double(), t, x.double(), noise)
        errors = [float((m.double() - want).abs().max()) for m in made]
        assert made[0].dtype == dtype
        assert errors[0] <= 1.2 * errors[1] + torch.finfo(dtype).eps * float(want.abs().max())


def _with_noise(scheduler, out, t, x, noise):
    """A step in float64 with the noise of another dtype's draw."""
    import ddpm_fast.diffusers.scheduler_base as module

    drawn = module.randn_tensor
    module.randn_tensor = lambda *args, **options: noise
    try:
        return scheduler.step(out, t, x).prev_sample
    finally:
        module.randn_tensor = drawn


@pytest.mark.parametrize(
    ("sample", "output", "result"),
    [
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float64, torch.float64, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", FAST)
def test_the_result_has_the_dtype_that_the_library_gives_it(kind, sample, output, result):
    theirs, ours = pair(kind, "epsilon", 10)
    x, out, t = normals(0).to(sample), normals(1).to(output), theirs.timesteps[3]
    want = theirs.step(out, t, x, generator=generator(2)).prev_sample
    got = ours.step(out, t, x, generator=generator(2)).prev_sample
    assert got.dtype == want.dtype == result
    # The library multiplies in the narrower of the two, and in float64 by float32 coefficients.
    assert_near(got, want, max(1e-5, *(4 * torch.finfo(d).eps for d in (sample, output))))


# Schedulers that only the pipelines take: by their table


def multistep(kind, **options):
    scheduler = {
        "dpm": diffusers.DPMSolverMultistepScheduler,
        "unipc": diffusers.UniPCMultistepScheduler,
    }[kind]
    return scheduler(**options)


SIGMAS = {
    name: {f"use_{name}": True} for name in ("karras_sigmas", "exponential_sigmas", "beta_sigmas")
}
EITHER = {
    "plain": {},
    "v": {"prediction_type": "v_prediction"},
    "x0": {"prediction_type": "sample"},
    "thresholded": {
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.8,
        "sample_max_value": 2.0,
    },
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "sigma-min": {"final_sigmas_type": "sigma_min"},
    "sigma-min-to-the-end": {"final_sigmas_type": "sigma_min", "lower_order_final": False},
    "first-order": {"solver_order": 1},
    "zero-snr": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "cosine-v": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    **SIGMAS,
}
MULTISTEP = {
    **{("dpm", name): options for name, options in EITHER.items()},
    **{("unipc", name): options for name, options in EITHER.items()},
    ("dpm", "heun"): {"solver_type": "heun"},
    ("dpm", "heun-karras-to-sigma-min"): {
        "solver_type": "heun",
        "use_karras_sigmas": True,
        "final_sigmas_type": "sigma_min",
        "euler_at_final": True,
    },
    ("dpm", "sde"): {"algorithm_type": "sde-dpmsolver++"},
    ("dpm", "sde-heun-karras"): {
        "algorithm_type": "sde-dpmsolver++",
        "solver_type": "heun",
        "use_karras_sigmas": True,
    },
    ("dpm", "euler-at-final"): {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
    ("dpm", "lu"): {"use_lu_lambdas": True},
    ("dpm", "lambda-min"): {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
    ("unipc", "bh1"): {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
    ("unipc", "some-uncorrected"): {"disable_corrector": [0, 1, 5]},
}


@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize(("kind", "name"), MULTISTEP, ids=lambda x: x)
def test_multistep_schedulers(kind, name, steps):
    scheduler = multistep(kind, **MULTISTEP[kind, name])
    scheduler.set_timesteps(steps)
    table = step_table(scheduler)
    model, x = model_of(scheduler), normals(0)
    memory = table.memory(x)
    for row, t in enumerate(scheduler.timesteps):
        out, noise = model(x, t), torch.randn(SHAPE, generator=generator(row))
        got = reverse_step_(x.clone(), out, table, row, noise=noise, memory=memory)
        extra = {"generator": generator(row)} if kind == "dpm" else {}
        x = scheduler.step(out, t, x, **extra).prev_sample
        assert_near(got, x, 2e-5 if name == "lambda-min" else 1e-5)
