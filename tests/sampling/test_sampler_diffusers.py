"""Chains of diffusers' schedulers and pipeline from the same torch.Generator."""

from __future__ import annotations

import pytest
import torch

from cases import SCHEDULE
from ddpm_fast import NoiseSchedule, Sampler, StepTable, reverse_step_
from sampler_cases import SHAPE, smooth

diffusers = pytest.importorskip("diffusers", reason="needs diffusers")

COMMON = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}


def velocity(x, t):
    """Return the model that predicts v or x0 where `smooth` predicts epsilon."""
    abar = SCHEDULE.alphas_cumprod[t].view(-1, 1, 1, 1)
    epsilon = smooth(x, t).double()
    x0 = (x.double() - (1 - abar).sqrt() * epsilon) / abar.sqrt()
    return (abar.sqrt() * epsilon - (1 - abar).sqrt() * x0).to(x.dtype), x0.to(x.dtype)


MODELS = {
    "epsilon": smooth,
    "v": lambda x, t: velocity(x, t)[0],
    "x0": lambda x, t: velocity(x, t)[1],
}
PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}


def ddpm(steps=50, spacing="leading", variance="posterior", prediction="epsilon", clip=1.0):
    scheduler = diffusers.DDPMScheduler(
        **COMMON,
        variance_type={"posterior": "fixed_small", "beta": "fixed_large"}[variance],
        timestep_spacing=spacing,
        prediction_type=PREDICTION_TYPES[prediction],
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
    )
    table = StepTable.ddpm(SCHEDULE, steps, variance, prediction, clip, spacing)
    return scheduler, table, {}, MODELS[prediction]


def ddim(steps=50, eta=0.0, unclipped_epsilon=True, prediction="epsilon", clip=1.0):
    scheduler = diffusers.DDIMScheduler(
        **COMMON,
        timestep_spacing="leading",
        prediction_type=PREDICTION_TYPES[prediction],
        clip_sample=clip is not None,
    )
    table = StepTable.ddim(
        SCHEDULE, steps, eta, prediction, clip, rederive_epsilon=not unclipped_epsilon
    )
    options = {"eta": eta, "use_clipped_model_output": not unclipped_epsilon}
    return scheduler, table, options, MODELS[prediction]


def sde(steps=20):
    scheduler = diffusers.DPMSolverMultistepScheduler(**COMMON, algorithm_type="sde-dpmsolver++")
    return scheduler, StepTable.dpmpp_2m_sde(SCHEDULE, steps, clip=None), {}, smooth


CHAINS = [
    pytest.param(lambda: ddpm(1000), id="ddpm-all-steps"),
    pytest.param(lambda: ddpm(1000, variance="beta"), id="ddpm-beta-all-steps"),
    pytest.param(lambda: ddpm(), id="ddpm-leading"),
    pytest.param(lambda: ddpm(spacing="trailing"), id="ddpm-trailing"),
    pytest.param(lambda: ddpm(spacing="linspace"), id="ddpm-linspace"),
    pytest.param(lambda: ddpm(variance="beta"), id="ddpm-beta"),
    pytest.param(lambda: ddpm(clip=None), id="ddpm-unclipped"),
    pytest.param(lambda: ddpm(clip=0.5), id="ddpm-clip-half"),
    pytest.param(lambda: ddpm(prediction="v"), id="ddpm-v"),
    pytest.param(lambda: ddpm(prediction="x0"), id="ddpm-x0"),
    pytest.param(lambda: ddim(), id="ddim"),
    pytest.param(lambda: ddim(unclipped_epsilon=False), id="ddim-rederived"),
    pytest.param(lambda: ddim(eta=0.5), id="ddim-eta"),
    pytest.param(lambda: ddim(eta=1.0, unclipped_epsilon=False), id="ddim-eta-1-rederived"),
    pytest.param(lambda: ddim(prediction="v", clip=None), id="ddim-v-unclipped"),
    pytest.param(lambda: sde(), id="dpmpp-sde"),
]


def diffusers_chain(scheduler, table, options, model, num, generator):
    """Return the states of diffusers; x_T and the noise of every step come from one generator."""
    scheduler.set_timesteps(table.steps)
    assert scheduler.timesteps.tolist() == table.timesteps.tolist()
    states = [torch.randn(num, *SHAPE, generator=generator)]
    for t in scheduler.timesteps:
        out = model(states[-1], t.expand(num))
        step = scheduler.step(out, t, states[-1], generator=generator, **options)
        states.append(step.prev_sample)
    return torch.stack(states)


@pytest.mark.parametrize("make", CHAINS)
def test_a_chain_draws_and_computes_what_diffusers_does(make):
    scheduler, table, options, model = make()
    theirs = diffusers_chain(scheduler, table, options, model, 6, torch.Generator().manual_seed(5))
    ours = Sampler(model, table, SHAPE, 6, "cpu", noise=torch.Generator().manual_seed(5))
    _, states = ours.sample(6, progress=False, return_steps=range(table.steps + 1))
    torch.testing.assert_close(states, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("make", CHAINS[2:10])
def test_each_step_on_the_trajectory_of_diffusers(make):
    """Each step is within 1e-5 of the largest value; errors do not accumulate."""
    scheduler, table, options, model = make()
    generator = torch.Generator().manual_seed(5)
    theirs = diffusers_chain(scheduler, table, options, model, 2, generator)
    generator = torch.Generator().manual_seed(5)
    torch.randn(2, *SHAPE, generator=generator)
    for row, t in enumerate(table.timesteps.tolist()):
        x = theirs[row].clone()
        noise = torch.zeros_like(x)
        if t > 0:
            noise = torch.randn(x.shape, generator=generator)
        out = model(x, torch.full((2,), t))
        reverse_step_(x, out, table, row, noise=noise)
        scale = float(theirs[row + 1].abs().max())
        torch.testing.assert_close(x, theirs[row + 1], rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("name", "make"),
    [("linear", NoiseSchedule.linear), ("squaredcos_cap_v2", NoiseSchedule.cosine)],
    ids=["linear", "cosine"],
)
def test_the_pipeline_of_diffusers(name, make):
    """DDPMPipeline with a small UNet2DModel: x_T, every step and the last clamp."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    scheduler = diffusers.DDPMScheduler(1000, beta_schedule=name)
    pipeline = diffusers.DDPMPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(2)
    theirs = pipeline(3, generator, num_inference_steps=6, output_type="pt").images
    table = StepTable.ddpm(make(), 6, spacing="leading")
    ours = Sampler(unet, table, (3, 8, 8), 3, noise=torch.Generator().manual_seed(2))
    got = (ours.sample(3, progress=False) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(got, theirs, rtol=0, atol=1e-4)
