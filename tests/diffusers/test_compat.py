"""Known bugs of diffusers that compat="diffusers" reproduces and compat="corrected" does not.

docs/diffusers.md lists them. Seen with diffusers 0.42.1.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers")

import diffusers

from ddpm_fast import NoiseSchedule, StepTable, reverse_step_
from ddpm_fast.diffusers import FastDDIMScheduler, FastDDPMScheduler, step_table
from scheduler_cases import FAST, THEIRS, assert_near, generator, model_of, normals

F64 = torch.float64
LINEAR = NoiseSchedule.linear()
X, OUT = normals(0), normals(1)


def trio(kind="ddpm", steps=10, **options):
    """Return the scheduler of diffusers, and the drop-in for each compat."""
    schedulers = [
        THEIRS[kind](**options),
        FAST[kind](**options),
        FAST[kind](**options, compat="corrected"),
    ]
    for scheduler in schedulers:
        scheduler.set_timesteps(steps)
    return schedulers


def stepped(scheduler, t, out=OUT, x=X, **options):
    return scheduler.step(out, t, x, generator=generator(3), **options).prev_sample


def exact(table, row, out=OUT, x=X):
    """Compute the step of the papers in float64, with the noise that `stepped` draws."""
    noise = torch.randn(x.shape, generator=generator(3)).to(F64)
    memory = table.memory(x.to(F64))
    return reverse_step_(x.to(F64), out.to(F64), table, row, noise=noise, memory=memory)


def assert_exact(got, want):
    assert_near(got.to(F64), want, 2e-6)


@pytest.mark.parametrize(
    ("variance", "prediction"),
    [("fixed_small", "epsilon"), ("fixed_large", "v"), ("fixed_small_log", "x0")],
)
def test_corrected_is_the_step_table_of_the_paper(variance, prediction):
    name = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}[prediction]
    *_, ours = trio(steps=50, variance_type=variance, prediction_type=name)
    variances = {
        "fixed_small": "posterior",
        "fixed_large": "beta",
        "fixed_small_log": "posterior_log",
    }
    table = StepTable.ddpm(LINEAR, 50, variances[variance], prediction, spacing="leading")
    assert ours.timesteps.tolist() == table.timesteps.tolist()
    for row in (0, 20, 48, 49):
        assert_exact(stepped(ours, ours.timesteps[row]), exact(table, row))
    rows = step_table(ours, "corrected").rows
    torch.testing.assert_close(rows, table.rows, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(("eta", "clipped"), [(0.0, True), (0.6, False), (0.6, True)])
def test_corrected_ddim_is_the_step_table_of_the_paper(eta, clipped):
    *_, ours = trio("ddim", steps=50)
    table = StepTable.ddim(LINEAR, 50, eta, rederive_epsilon=clipped)
    got = step_table(ours, "corrected", eta, clipped)
    torch.testing.assert_close(got.rows, table.rows, rtol=1e-9, atol=1e-14)
    for row in (0, 30, 49):
        t = ours.timesteps[row]
        step = stepped(ours, t, eta=eta, use_clipped_model_output=clipped)
        assert_exact(step, exact(table, row))


def test_float32_coefficients():
    """1 - abar_t / abar_prev has three correct digits at the end of a thousand steps."""
    theirs, follows, right = trio(steps=1000, clip_sample=False)
    want = exact(StepTable.ddpm(LINEAR, 1000, clip=None), 998)
    assert_near(stepped(follows, 1), stepped(theirs, 1), 1e-6)
    assert_exact(stepped(right, 1), want)
    assert float((stepped(theirs, 1).to(F64) - want).abs().max()) > 1e-5 * float(want.abs().max())


def test_fixed_large_log():
    """Issue 14569: the square root of a negative logarithm."""
    theirs, follows, right = trio(variance_type="fixed_large_log")
    t = theirs.timesteps[3]
    assert stepped(theirs, t).isnan().all()
    assert stepped(follows, t).isnan().all()
    assert_exact(stepped(right, t), exact(StepTable.ddpm(LINEAR, 10, "beta", spacing="leading"), 3))


def test_an_unknown_variance_type():
    """Any other name is fixed_small to DDPMScheduler."""
    theirs, follows = (cls(variance_type="tiny") for cls in (THEIRS["ddpm"], FAST["ddpm"]))
    assert_near(stepped(follows, 500), stepped(theirs, 500))
    with pytest.raises(ValueError, match=r"variance_type must be one of .*; got 'tiny'"):
        trio(variance_type="tiny")


def test_fixed_large_adds_noise_in_the_last_trailing_step():
    """Noise is added for t > 0, and the last of 50 trailing timesteps is 19."""
    theirs, follows, right = trio(
        steps=50, variance_type="fixed_large", timestep_spacing="trailing"
    )
    last = theirs.timesteps[-1]
    none = torch.zeros(1, 1, 64, 64)
    for scheduler in (theirs, follows):
        image = stepped(scheduler, last, none, none)
        assert float(image.std()) == pytest.approx(0.076, abs=3e-3)
    assert_near(stepped(follows, last, none, none), stepped(theirs, last, none, none))
    assert not stepped(right, last, none, none).any()


def test_learned_variance():
    """The deviation is the square root of a logarithm; corrected: exp(v / 2)."""
    theirs, follows, right = trio(variance_type="learned")
    t = theirs.timesteps[3]
    for v in (-3.0, 2.0):
        both = torch.cat([OUT, torch.full_like(OUT, v)], dim=1)
        assert_near(stepped(follows, t, both), stepped(theirs, t, both))
        table = StepTable.ddpm(LINEAR, 10, "learned", spacing="leading")
        assert_exact(stepped(right, t, both), exact(table, 3, both))
    assert stepped(follows, t, torch.cat([OUT, -OUT.abs()], dim=1)).isnan().all()


@pytest.mark.parametrize(("spacing", "steps"), [("linspace", 10), ("trailing", 13)])
def test_ddim_steps_to_a_timestep_that_is_not_the_next(spacing, steps):
    """Issues 12633, 11347 (linspace) and 9261 (trailing)."""
    theirs, follows, right = trio("ddim", steps, timestep_spacing=spacing)
    t = theirs.timesteps[steps - 2]
    assert_near(stepped(follows, t), stepped(theirs, t))
    table = StepTable.ddim(LINEAR, steps, spacing=spacing, rederive_epsilon=False)
    want = exact(table, steps - 2)
    assert_exact(stepped(right, t), want)
    assert float((stepped(follows, t).to(F64) - want).abs().max()) > 2e-3
    with pytest.raises(ValueError, match=r"timestep must be one of scheduler.timesteps; got 5"):
        stepped(right, 5)


def test_final_alpha_of_ddim():
    """set_alpha_to_one=False is an option and no bug: both follow it."""
    theirs, follows, right = trio("ddim", 20, set_alpha_to_one=False)
    for scheduler in (follows, right):
        assert_near(stepped(scheduler, 0), stepped(theirs, 0), 1e-5)


@pytest.mark.parametrize("kind", FAST)
def test_a_timestep_below_zero(kind):
    """At 62 of the 1000 numbers of steps rounding adds a timestep -1 to trailing spacing."""
    theirs = THEIRS[kind](timestep_spacing="trailing")
    theirs.set_timesteps(61)
    assert theirs.timesteps[-1] == -1
    right = FAST[kind](timestep_spacing="trailing", compat="corrected")
    right.set_timesteps(61)
    assert right.timesteps.tolist() == theirs.timesteps[:-1].tolist()
    with pytest.raises(ValueError, match=r"got -1 from set_timesteps .* or compat='corrected'"):
        FAST[kind](timestep_spacing="trailing").set_timesteps(61)


@pytest.mark.parametrize("kind", FAST)
def test_float16_images_get_no_noise_at_the_first_timesteps(kind):
    """alphas_cumprod is cast to the dtype of the images before it is subtracted from 1."""
    theirs, follows, right = trio(kind)
    x, noise, t = torch.zeros(1, 1, 4, 4).half(), torch.ones(1, 1, 4, 4).half(), torch.tensor([0])
    for scheduler in (theirs, follows):
        assert not scheduler.add_noise(x, noise, t).any()
    assert float(right.add_noise(x, noise, t)[0, 0, 0, 0]) == pytest.approx(0.01, rel=1e-3)


def test_epsilon_at_zero_terminal_snr():
    """Issue 3851: x0 is infinite; a clip preserves its sign."""
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    for clip in (True, False):
        theirs, follows = (
            cls(**options, clip_sample=clip) for cls in (THEIRS["ddim"], FAST["ddim"])
        )
        for scheduler in (theirs, follows):
            scheduler.set_timesteps(10)
        got, want = (s.step(OUT, 999, X).pred_original_sample for s in (follows, theirs))
        assert torch.equal(got, want)
        with pytest.raises(ValueError, match="those of diffusers are not at timestep 999"):
            step_table(theirs)
    with pytest.raises(ValueError, match="prediction"):
        trio("ddim", 10, **options)


# Multistep schedulers, by their step table


def multistep(kind, steps, **options):
    cls = {
        "dpm": diffusers.DPMSolverMultistepScheduler,
        "unipc": diffusers.UniPCMultistepScheduler,
    }[kind]
    scheduler = cls(**options)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("kind", ["dpm", "unipc"])
def test_corrected_multistep_is_the_step_table_of_the_paper(kind, prediction):
    name = {"epsilon": "epsilon", "v": "v_prediction"}[prediction]
    table = step_table(multistep(kind, 20, prediction_type=name), "corrected")
    make = {"dpm": StepTable.dpmpp_2m, "unipc": StepTable.unipc}[kind]
    assert table == make(LINEAR, 20, prediction, clip=None) or torch.equal(
        table.rows, make(LINEAR, 20, prediction, clip=None).rows
    )


def end_of(scheduler):
    """Return the last image of a chain of diffusers with the closed-form model."""
    x, model = X, model_of(scheduler)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x).prev_sample
    return x


def test_unipc_bh1_ends_in_nan():
    scheduler = multistep("unipc", 10, solver_type="bh1")
    assert not end_of(scheduler).isfinite().any()
    with pytest.raises(ValueError, match="solver_type must be 'bh2' with final_sigmas_type='zero'"):
        step_table(scheduler)
    table = step_table(scheduler, "corrected")
    assert table.rows.isfinite().sum() == table.rows.numel() - len(table.rows)  # clip is infinite


@pytest.mark.parametrize("kind", ["dpm", "unipc"])
def test_all_timesteps_repeat_one(kind):
    """One of as many linspace steps as timesteps is rounded to its neighbour: a step of 0."""
    scheduler = multistep(kind, 100, num_train_timesteps=100, beta_end=0.2, beta_start=1e-3)
    assert len(set(scheduler.timesteps.tolist())) == 99
    assert not end_of(copy.deepcopy(scheduler)).isfinite().all()
    with pytest.raises(ValueError, match="those of diffusers are not at timestep"):
        step_table(scheduler)
    assert step_table(scheduler, "corrected").timesteps.tolist() == sorted(
        set(scheduler.timesteps.tolist()), reverse=True
    )


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        ("dpm", {"solver_order": 3}, "solver_order .* must be 1 or 2; got 3"),
        ("dpm", {"use_flow_sigmas": True}, "use_flow_sigmas .*must be .*; got True"),
        (
            "dpm",
            {"prediction_type": "flow_prediction"},
            "prediction_type .*must be .*; got 'flow_prediction'",
        ),
        (
            "dpm",
            {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
            "algorithm_type .*must be .*; got 'dpmsolver'",
        ),
        ("unipc", {"predict_x0": False}, "predict_x0 .*must be .*; got False"),
        ("unipc", {"solver_p": diffusers.DDIMScheduler()}, "solver_p .*must be .*; got "),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_options_that_are_not_supported(kind, options, match):
    with pytest.raises(ValueError, match=match):
        step_table(multistep(kind, 10, **options))


def test_schedulers_and_arguments_that_are_not_supported():
    euler = diffusers.EulerDiscreteScheduler()
    with pytest.raises(
        TypeError, match=r"scheduler must be one of DDPMScheduler.*got EulerDiscrete"
    ):
        step_table(euler)

    class Own(diffusers.DDPMScheduler):
        pass

    class Mine(FastDDPMScheduler):
        pass

    for subclass in (Own(), Mine()):
        with pytest.raises(TypeError, match=r"got (Own|Mine), whose steps may differ"):
            step_table(subclass)
    with pytest.raises(ValueError, match="compat must be"):
        step_table(diffusers.DDPMScheduler(), "right")
    with pytest.raises(ValueError, match="eta and use_clipped_model_output must be 0 and False"):
        step_table(diffusers.DDPMScheduler(), eta=0.5)
    with pytest.raises(ValueError, match="variance_type must not be 'learned'"):
        step_table(FastDDPMScheduler(variance_type="learned"))
    assert math.isfinite(FastDDIMScheduler().init_noise_sigma)
