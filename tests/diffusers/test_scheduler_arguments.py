"""Arguments and options that the drop-in schedulers reject by name."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")

from cases import assert_named
from ddpm_fast.diffusers import FastDDIMScheduler, FastDDPMScheduler
from scheduler_cases import FAST, generator, normals

EACH = pytest.mark.parametrize("kind", FAST)
X, OUT = normals(0), normals(1)


def scheduled(kind="ddpm", steps=10, **options):
    scheduler = FAST[kind](**options)
    scheduler.set_timesteps(steps)
    return scheduler


def step(kind="ddpm", **change):
    arguments = {"model_output": OUT, "timestep": 500, "sample": X} | change
    return scheduled(kind).step(**arguments)


BAD = [
    ("sample", None, TypeError, "torch.Tensor", "NoneType"),
    ("sample", X.long(), TypeError, "float32", "int64"),
    ("model_output", OUT[:, :1], ValueError, "[2, 3, 6, 5]", "[2, 1, 6, 5]"),
    (
        "model_output",
        OUT.repeat(1, 2, 1, 1),
        ValueError,
        "without a learned variance",
        "[2, 6, 6, 5]",
    ),
    ("model_output", OUT.to("meta"), ValueError, "cpu", "meta"),
    ("timestep", 500.0, TypeError, "int", "float"),
    ("timestep", torch.tensor(500.0), TypeError, "int32 tensor", "float32"),
    ("timestep", 1000, ValueError, "[0, 999]", "1000"),
    ("timestep", -1, ValueError, "[0, 999]", "-1"),
    ("timestep", torch.tensor([500, 1000]), ValueError, "[0, 999]", "1000"),
    ("timestep", torch.tensor([1, 2, 3]), ValueError, "2 samples", "[3]"),
    ("timestep", 501, ValueError, "scheduler.timesteps", "501"),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda b: f"{b[0]}-{b[-1]}")
def test_bad_arguments_of_step_are_named(bad):
    assert_named(step, bad)


def test_a_learned_variance_must_be_in_the_output():
    with pytest.raises(
        ValueError, match=r"model_output must have 2C channels .* got \[2, 3, 6, 5\]"
    ):
        scheduled(variance_type="learned_range").step(OUT, 500, X)


def test_ddim_without_timesteps_and_with_two_sources_of_noise():
    with pytest.raises(ValueError, match="num_inference_steps must be set by set_timesteps"):
        FastDDIMScheduler().step(OUT, 500, X)
    with pytest.raises(ValueError, match="generator must be None with variance_noise"):
        scheduled("ddim").step(OUT, 500, X, eta=0.5, generator=generator(1), variance_noise=OUT)
    with pytest.raises(ValueError, match=r"variance_noise must have the shape of sample"):
        scheduled("ddim").step(OUT, 500, X, eta=0.5, variance_noise=OUT[:1])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"prediction_type": "flow_prediction"},
            "prediction_type .*must be .*; got 'flow_prediction'",
        ),
        ({"compat": "right"}, "compat must be one of diffusers, corrected; got 'right'"),
    ],
)
@EACH
def test_options_that_are_not_supported(kind, options, match):
    with pytest.raises(ValueError, match=match):
        FAST[kind](**options)


def test_bad_images_and_timesteps_of_add_noise():
    ours = FastDDPMScheduler()
    for arguments, error, match in (
        ((X, OUT, 5), TypeError, "timesteps must be an integer tensor"),
        ((X, OUT, torch.tensor([0.5])), TypeError, "timesteps must be .* float32"),
        (
            (X, OUT, torch.tensor([5, 1000])),
            ValueError,
            r"timesteps must be an integer in \[0, 999\]",
        ),
        (
            (X, OUT, torch.tensor([-1])),
            ValueError,
            r"timesteps must be an integer in \[0, 999\]; got -1",
        ),
        ((X, OUT, torch.tensor([1, 2, 3])), ValueError, "must broadcast"),
        ((X, OUT[:, :2], torch.tensor([1])), ValueError, "must broadcast"),
        ((None, OUT, torch.tensor([1])), TypeError, "original_samples must be"),
        ((X, OUT.to("meta"), torch.tensor([1])), ValueError, "noise must be on the device"),
    ):
        with pytest.raises(error, match=match):
            ours.add_noise(*arguments)


@EACH
@pytest.mark.parametrize(
    ("steps", "error", "match"),
    [
        (0, ValueError, r"num_inference_steps must be an integer in \[1, 1000\]; got 0"),
        (-3, ValueError, "num_inference_steps must be an integer"),
        (None, TypeError, "num_inference_steps must be an integer .*; got NoneType"),
        ("a", TypeError, "num_inference_steps must be an integer .*; got 'a'"),
        (2.5, TypeError, "num_inference_steps must be an integer .*; got 2.5"),
    ],
)
def test_bad_numbers_of_steps(kind, steps, error, match):
    ours = scheduled(kind)
    before = dict(ours.__dict__)
    with pytest.raises(error, match=match):
        ours.set_timesteps(steps)
    assert ours.__dict__ == before


def test_bad_custom_timesteps():
    for timesteps, error, match in (
        ([], ValueError, "timesteps must have at least one element"),
        ([3, 2.5], TypeError, "timesteps must be an integer .*; got 2.5"),
        ([5, 900], ValueError, "descending"),
        ([1000, 5], ValueError, "must start before"),
    ):
        with pytest.raises(error, match=match):
            FastDDPMScheduler().set_timesteps(timesteps=timesteps)


def test_epsilon_at_zero_terminal_snr_leaves_the_scheduler_as_it_was():
    ours = FastDDIMScheduler(rescale_betas_zero_snr=True, compat="corrected")
    with pytest.raises(ValueError, match="prediction_type must be 'sample' or 'v_prediction'"):
        ours.set_timesteps(20)
    assert ours.num_inference_steps is None
