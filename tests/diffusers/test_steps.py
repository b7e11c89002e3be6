"""Steps of the drop-in schedulers on trajectories of diffusers, for every option."""

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
    result = THEIRS[kind](**options), FAST[kind](**options)
    for scheduler in result:
        if steps is not None:
            scheduler.set_timesteps(steps)
    assert result[0].timesteps.tolist() == result[1].timesteps.tolist()
    return result


@pytest.mark.parametrize(("kind", "name"), KINDS, ids=[f"{k}-{n}" for k, n in KINDS])
def test_every_option(kind, name):
    theirs, ours = pair(kind, name, 12)
    for row, (x, out, result) in enumerate(trajectory(theirs, normals(0))):
        t = ours.timesteps[row]
        got = ours.step(out, t, x, generator=generator(row))
        assert_near(got.prev_sample, result.prev_sample)
        # x0 is a difference of two numbers, which are large if alphas_cumprod is small.
        terms = float(x.abs().max() + out.abs().max()) * float(theirs.alphas_cumprod[t] ** -0.5)
        rounding = 4 * torch.finfo(torch.float32).eps * min(terms, 1e30)
        assert_near(got.pred_original_sample, result.pred_original_sample, plus=rounding)
        assert got.prev_sample.is_contiguous()


@pytest.mark.parametrize(
    ("name", "steps"), [("epsilon", None), ("cosine", 1000), ("learned_range", 1000)]
)
def test_all_thousand_steps(name, steps):
    """The results are equal although 1 - abar_t / abar_prev has three digits in float32."""
    theirs, ours = pair("ddpm", name, steps)
    for row, (x, out, result) in enumerate(trajectory(theirs, normals(0))):
        got = ours.step(out, int(theirs.timesteps[row]), x, generator=generator(row))
        assert_near(got.prev_sample, result.prev_sample)


@pytest.mark.parametrize(
    ("name", "eta", "clipped"),
    [
        ("epsilon", 0.0, True),
        ("epsilon", 0.3, None),
        ("epsilon", 1.0, False),
        ("epsilon", 1.0, True),
        ("v_prediction", 0.3, False),
        ("v_prediction", 1.0, True),
        ("sample", 0.3, False),
        ("sample", 1.0, True),
        ("trailing", 0.3, True),
        ("unclipped", 1.0, False),
        ("unclipped", 0.3, True),
    ],
)
def test_ddim_with_eta_and_the_clipped_output(name, eta, clipped):
    theirs, ours = pair("ddim", name, 12)
    step_options = {"eta": eta, "use_clipped_model_output": clipped}
    for row, (x, out, result) in enumerate(trajectory(theirs, normals(0), **step_options)):
        t = int(theirs.timesteps[row])
        got = ours.step(out, t, x, generator=generator(row), **step_options)
        assert_near(got.prev_sample, result.prev_sample)
        if eta:
            noise = torch.randn(SHAPE, generator=generator(row))
            repeated = ours.step(out, t, x, variance_noise=noise, **step_options)
            assert torch.equal(repeated.prev_sample, got.prev_sample)


def test_ddim_from_any_timestep_of_the_schedule():
    """diffusers subtracts a stride from any timestep, also from one outside of the chain."""
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
def test_samples_of_any_layout(layout):
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


@pytest.mark.parametrize(
    ("kind", "name", "dtype"),
    [
        ("ddpm", "epsilon", torch.float16),
        ("ddpm", "learned_range", torch.bfloat16),
        ("ddim", "cosine", torch.float16),
    ],
)
def test_half_precision_error_within_that_of_diffusers(kind, name, dtype):
    theirs, ours = pair(kind, name, 20)
    exact = FAST[kind](**OPTIONS[kind][name])
    exact.set_timesteps(20)
    for row, (x, out, _) in enumerate(trajectory(theirs, normals(0))):
        x, out, t = x.to(dtype), out.to(dtype), theirs.timesteps[row]
        result = [s.step(out, t, x, generator=generator(row)).prev_sample for s in (ours, theirs)]
        noise = torch.randn(SHAPE, generator=generator(row), dtype=dtype).double()
        want = _with_noise(exact, out.double(), t, x.double(), noise)
        errors = [float((m.double() - want).abs().max()) for m in result]
        assert result[0].dtype == dtype
        assert errors[0] <= 1.2 * errors[1] + torch.finfo(dtype).eps * float(want.abs().max())


def _with_noise(scheduler, out, t, x, noise):
    """Compute a step in float64 with the given noise."""
    import ddpm_fast.diffusers.scheduler_base as module

    original = module.randn_tensor
    module.randn_tensor = lambda *args, **options: noise
    try:
        return scheduler.step(out, t, x).prev_sample
    finally:
        module.randn_tensor = original


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
def test_the_result_has_the_dtype_of_diffusers(kind, sample, output, result):
    theirs, ours = pair(kind, "epsilon", 10)
    x, out, t = normals(0).to(sample), normals(1).to(output), theirs.timesteps[3]
    want = theirs.step(out, t, x, generator=generator(2)).prev_sample
    got = ours.step(out, t, x, generator=generator(2)).prev_sample
    assert got.dtype == want.dtype == result
    # diffusers multiplies in the narrower dtype, and in float64 by float32 coefficients.
    assert_near(got, want, max(1e-5, *(4 * torch.finfo(d).eps for d in (sample, output))))


# Multistep schedulers, by their step table


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


# From 15 steps on DPM-Solver ends with a step of second order.
LONG = ["plain", "sigma-min", "sigma-min-to-the-end", "heun", "sde", "euler-at-final", "bh1"]


@pytest.mark.parametrize(
    ("kind", "name", "steps"),
    [(*key, 8) for key in MULTISTEP] + [(*key, 20) for key in MULTISTEP if key[1] in LONG],
)
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
